"""What ``edge-infer package`` says when it cannot package a model: one sentence, and nothing is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_models
import pytest
import tensorflow_models
import torch
from test_parity import npz, wide_range_model

from edge_infer import cli
from edge_infer.errors import EXIT_CONVERSION, EXIT_NOTHING_FITS, EXIT_USAGE
from edge_infer.target import FOLDERS

IMAGE = ("--input", "image=float32:?,1,8,8")


@dataclass(frozen=True)
class Bench:
    """Where a case of the table builds what it packages."""

    models: Path
    folder: Path

    def cut(self, name: str, share: float = 0.6) -> Path:
        """A model file that ends too early."""
        whole = (self.models / name).read_bytes()
        path = self.folder / f"cut{Path(name).suffix}"
        path.write_bytes(whole[: int(len(whole) * share)])
        return path

    def never_converted(self, name: str) -> Path:
        """An ONNX model under a hash of its own, so that no earlier test's conversion is found for it."""
        model = onnx.load(self.models / name)
        model.doc_string = str(self.folder)
        onnx.save(model, self.folder / name)
        return self.folder / name

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def state(self, factory: str) -> list[object]:
        """The state dict with a factory; the file ``f.py`` of this folder is its module."""
        return [self.models / "torch_state.pth", *IMAGE, "--factory", factory]

    def factory(self, code: str) -> list[object]:
        return self.state(f"{self.file('f.py', code)}:make")

    def network(self, forward: str) -> list[object]:
        """A network without weights that computes ``forward`` of ``image``."""
        code = "import torch\nclass Net(torch.nn.Module):\n    def forward(self, image): return " + forward
        torch.save({}, self.folder / "empty.pth")
        factory = f"{self.file('f.py', code)}:Net"
        return [self.folder / "empty.pth", *IMAGE, "--factory", factory, "--format", "onnx"]

    def samples(self, **arrays: np.ndarray) -> list[object]:
        return [self.models / "torch.onnx", "--precision", "int8", "--calibration", npz(self.folder, **arrays)]

    def target(self, sound: str, broken: str) -> list[object]:
        text = next(path for folder in FOLDERS if (path := folder / "cpu-x86_64.toml").is_file()).read_text()
        assert sound in text
        return [self.models / "torch.onnx", "--target", self.file("t.toml", text.replace(sound, broken))]


Build = Callable[[Bench], Sequence[object]]
Table = dict[str, tuple[Build, int, tuple[str, ...]]]


def images(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def damaged_saved_model(bench: Bench) -> Path:
    path = bench.folder / "damaged"
    shutil.copytree(bench.models / "keras_saved_model", path)
    data = (path / "saved_model.pb").read_bytes()
    (path / "saved_model.pb").write_bytes(data[: len(data) // 3])
    return path


def legacy_pickle(bench: Bench) -> Path:
    path = bench.folder / "old.pth"
    torch.save({"weight": torch.zeros(300)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-900])
    return path


def pickle_of_no_module(bench: Bench) -> Path:
    torch.save([1, 2], bench.folder / "list.pth")
    return bench.folder / "list.pth"


def with_weights_at(bench: Bench, location: str) -> Path:
    """An ONNX model whose external data lies wherever ``location`` says."""
    path = onnx_models.two_inputs_with_weights_beside(bench.folder)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    return path


def with_linked_weights(bench: Bench) -> Path:
    path = with_weights_at(bench, "linked.weights")
    (bench.folder / "linked.weights").symlink_to(bench.folder / "two inputs.weights")
    return path


def with_weights_below_a_link(bench: Bench) -> Path:
    path = with_weights_at(bench, "below/two inputs.weights")
    elsewhere = bench.folder / "elsewhere"
    elsewhere.mkdir()
    (bench.folder / "two inputs.weights").rename(elsewhere / "two inputs.weights")
    (bench.folder / "below").symlink_to(elsewhere)
    return path


def exported(bench: Bench, function: Callable[[torch.Tensor], object]) -> Path:
    """A program whose submodule ``inner.head`` computes ``function``."""

    class Head(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return function(x)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.ModuleDict({"head": Head()})

        def forward(self, x: torch.Tensor) -> object:
            return self.inner["head"](x)

    path = bench.folder / "program.pt2"
    torch.export.save(torch.export.export(Net(), (torch.rand(3, 4),)), path)
    return path


def of_any_batch(bench: Bench) -> Path:
    """A program that makes a tensor as large as its input, which a trace makes as large as the example."""

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones([x.shape[0], 4])

    path = bench.folder / "any_batch.pt2"
    batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(Net(), (torch.rand(3, 4),), dynamic_shapes=batch), path)
    return path


class Bessel(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def scripted(bench: Bench, module: torch.nn.Module) -> Path:
    path = bench.folder / "script.pt"
    torch.jit.script(module).save(str(path))
    return path


def occupied(bench: Bench) -> Sequence[object]:
    bench.file("taken.edge", "my only copy")
    return [bench.models / "torch.onnx", "-o", bench.folder / "taken.edge"]


MODELS: Table = {
    "nothing there": (lambda b: [b.folder / "absent.onnx"], EXIT_USAGE, ("no model at", "absent.onnx")),
    "no SavedModel": (lambda b: [b.models], EXIT_CONVERSION, ("without saved_model.pb", "expected a SavedModel")),
    "text": (
        lambda b: [b.file("notes.txt", "dear diary")],
        EXIT_CONVERSION,
        ("edge-infer: ", "notes.txt begins with", "expected a SavedModel directory"),
    ),
    "empty": (lambda b: [b.file("empty.bin", "")], EXIT_CONVERSION, ("empty.bin begins with b''",)),
    "text as .onnx": (
        lambda b: [b.file("a.onnx", "dear diary")],
        EXIT_CONVERSION,
        ("a.onnx", "damaged or no ONNX model"),
    ),
    "empty .onnx": (lambda b: [b.file("a.onnx", "")], EXIT_CONVERSION, ("a.onnx is not a sound ONNX model",)),
    "cut .onnx": (lambda b: [b.cut("torch.onnx")], EXIT_CONVERSION, ("cut.onnx", "cut off")),
    "cut .pt": (lambda b: [b.cut("torch_script.pt"), *IMAGE], EXIT_CONVERSION, ("cut.pt is an archive that is cut",)),
    "cut .pth": (lambda b: [b.cut("torch_state.pth"), *IMAGE], EXIT_CONVERSION, ("cut.pth is an archive that is cut",)),
    "cut .pt2": (lambda b: [b.cut("torch_export.pt2")], EXIT_CONVERSION, ("cut.pt2 is an archive that is cut off",)),
    "cut .keras": (lambda b: [b.cut("keras.keras")], EXIT_CONVERSION, ("cut.keras is an archive that is cut off",)),
    "cut .h5": (lambda b: [b.cut("keras.h5")], EXIT_CONVERSION, ("Keras cannot load", "cut.h5")),
    "cut legacy pickle": (
        lambda b: [legacy_pickle(b), *IMAGE, "--trust-pickle"],
        EXIT_CONVERSION,
        ("PyTorch cannot load", "old.pth"),
    ),
    "damaged SavedModel": (lambda b: [damaged_saved_model(b)], EXIT_CONVERSION, ("TensorFlow cannot load", "damaged")),
    "another archive": (
        lambda b: [b.samples(x=images(1))[-1]],
        EXIT_CONVERSION,
        ("archive with ['x.npy']", "no model"),
    ),
    "unknown ONNX operator": (
        lambda b: [onnx_models.of_unknown_domain(b.folder)],
        EXIT_CONVERSION,
        ("no operator Sharpen in the domain com.example.vision",),
    ),
    "ONNX weights elsewhere": (
        lambda b: [with_weights_at(b, "../outside.bin")],
        EXIT_CONVERSION,
        ("'../outside.bin' outside its own folder; refused",),
    ),
    "ONNX weights at an absolute path": (
        lambda b: [with_weights_at(b, "/etc/hostname")],
        EXIT_CONVERSION,
        ("'/etc/hostname' outside its own folder; refused",),
    ),
    "ONNX weights missing": (
        lambda b: [with_weights_at(b, "lost.bin")],
        EXIT_USAGE,
        ("keeps weights in 'lost.bin', which is not beside it; copy that file too",),
    ),
    "ONNX weights linked": (lambda b: [with_linked_weights(b)], EXIT_CONVERSION, ("'linked.weights' outside",)),
    "ONNX weights below a link": (
        lambda b: [with_weights_below_a_link(b)],
        EXIT_CONVERSION,
        ("'below/two inputs.weights' outside its own folder; refused",),
    ),
    "quantization destroys it": (
        lambda b: [
            wide_range_model(b.folder),
            *("--precision", "int8", "--format", "onnx", "--calibration"),
            npz(b.folder, x=np.random.default_rng(2).standard_normal((40, 4)).astype(np.float32)),
        ],
        EXIT_CONVERSION,
        ("int8 against float32: output 'y' differs by", "allowed is 0.25", "choose another precision"),
    ),
}

OPERATORS: Table = {
    "TFLite": (
        lambda b: [tensorflow_models.made() / "beyond_tflite", "--format", "tflite"],
        EXIT_CONVERSION,
        ("no built-in operator for Betainc in layer 'likelihood/Betainc'",),
    ),
    "ONNX": (
        lambda b: [exported(b, lambda x: torch.kthvalue(x, 2)[0]), "--format", "onnx"],
        EXIT_CONVERSION,
        ("operator aten.kthvalue in layer inner.head has no ONNX form", "--format torchscript"),
    ),
    "ONNX from TorchScript": (
        lambda b: [scripted(b, Bessel()), "--input", "x=float32:?", "--format", "onnx"],
        EXIT_CONVERSION,
        ("operator aten::special_bessel_j0 has no ONNX form",),
    ),
    "exported program whose trace is wrong": (
        lambda b: [of_any_batch(b), "--format", "torchscript"],
        EXIT_CONVERSION,
        ("torch.jit.trace loses (", "an exported program has no code to script"),
    ),
    "complex output": (
        lambda b: [exported(b, torch.fft.fft), "--format", "torchscript"],
        EXIT_CONVERSION,
        ("output 'output' has dtype complex64",),
    ),
    "outputs of one name": (
        lambda b: [exported(b, lambda x: {"a": (x, -x), "a_0": x + 1}), "--format", "torchscript"],
        EXIT_CONVERSION,
        ("two outputs that would be named 'a_0'",),
    ),
    "no outputs": (
        lambda b: b.network("{}"),
        EXIT_CONVERSION,
        ("returns no tensors",),
    ),
    "an output that is no tensor": (
        lambda b: b.network("'seven'"),
        EXIT_CONVERSION,
        ("edge-infer: the model returns a str, expected tensors",),
    ),
}

FACTORIES: Table = {
    "module missing": (lambda b: b.state("nowhere.nets:make"), EXIT_USAGE, ("cannot import nowhere.nets",)),
    "file missing": (lambda b: b.state(f"{b.folder}/no.py:make"), EXIT_USAGE, ("cannot import", "no.py")),
    "no callable named": (lambda b: b.state("nets"), EXIT_USAGE, ("'nets', expected module:callable",)),
    "attribute missing": (lambda b: b.factory("x = 1"), EXIT_USAGE, ("no callable 'make'",)),
    "no module made": (lambda b: b.factory("def make(): return 5"), EXIT_USAGE, ("gives a int", "torch.nn.Module")),
    "raises": (lambda b: b.factory("def make(): raise OSError('disk')"), EXIT_USAGE, ("failed: OSError: disk",)),
    "does not fit": (
        lambda b: b.factory("import torch\ndef make(): return torch.nn.Linear(2, 2)"),
        EXIT_USAGE,
        ("does not fit the network of --factory", "Missing key(s)"),
    ),
    "pickle without trust": (
        lambda b: [b.models / "torch_module.pth", *IMAGE],
        EXIT_USAGE,
        ("--factory module:callable", "--trust-pickle", "runs its code"),
    ),
    "pickle of something else": (
        lambda b: [pickle_of_no_module(b), *IMAGE, "--trust-pickle"],
        EXIT_USAGE,
        ("holds a list, not a module; give the network with --factory",),
    ),
    "whole module as a state dict": (
        lambda b: [b.models / "torch_module.pth", *IMAGE, "--factory", f"{b.models}/digits_net.py:create"],
        EXIT_CONVERSION,
        ("cannot load", "torch_module.pth as a state dict"),
    ),
}

INPUTS: Table = {
    "PyTorch without": (lambda b: [b.models / "torch_script.pt"], EXIT_USAGE, ("give each of image", "--input image=")),
    "PyTorch unknown": (
        lambda b: [b.models / "torch_script.pt", *IMAGE, "--input", "mask=bool:?"],
        EXIT_USAGE,
        ("--input names 'mask'", "takes: image"),
    ),
    "PyTorch that fails with it": (
        lambda b: [b.models / "torch_script.pt", "--input", "image=float32:?,3,8,8"],
        EXIT_CONVERSION,
        ("the source model itself fails on inputs image [1, 3, 8, 8]", "give the shapes it takes with --input"),
    ),
    "exported otherwise": (
        lambda b: [b.models / "torch_export.pt2", "--input", "image=float32:5,1,8,8"],
        EXIT_USAGE,
        ("was exported with image float32[?, 1, 8, 8]", "leave --input away"),
    ),
    "ONNX unknown": (lambda b: [b.models / "torch.onnx", "--input", "x=float32:?"], EXIT_USAGE, ("inputs are: image",)),
    "ONNX contradicting": (
        lambda b: [b.models / "torch.onnx", "--input", "image=float32:?,1,9,9"],
        EXIT_USAGE,
        ("gives image float32[?, 1, 9, 9], which the model's own image float32[?, 1, 8, 8] does not admit",),
    ),
    "ONNX dtype": (
        lambda b: [b.models / "torch.onnx", "--input", "image=float64:?,1,8,8"],
        EXIT_USAGE,
        ("does not admit",),
    ),
    "unknown dtype": (
        lambda b: [b.models / "torch.onnx", "--input", "image=real:?"],
        EXIT_USAGE,
        ("dtype of float16",),
    ),
    "no dtype": (lambda b: [b.models / "torch.onnx", "--input", "image"], EXIT_USAGE, ("expected NAME=DTYPE:",)),
    "dimension of words": (
        lambda b: [b.models / "torch.onnx", "--input", "image=float32:?,one"],
        EXIT_USAGE,
        ("dimension 'one'", "whole number of at least 1 or ?"),
    ),
    "dimension of nothing": (
        lambda b: [b.models / "torch.onnx", "--input", "image=float32:?,0"],
        EXIT_USAGE,
        ("dimension '0'",),
    ),
    "dimension in another script": (
        lambda b: [b.models / "torch.onnx", "--input", "image=float32:?,8²"],
        EXIT_USAGE,
        ("dimension '8²'",),
    ),
    "the same twice": (
        lambda b: [b.models / "torch.onnx", *IMAGE, *IMAGE],
        EXIT_USAGE,
        ("names the same input twice",),
    ),
}

CALIBRATION: Table = {
    "none for int8": (
        lambda b: [b.models / "torch.onnx", "--precision", "int8"],
        EXIT_USAGE,
        ("int8 needs real samples", "--calibration FILE.npz"),
    ),
    "missing": (
        lambda b: [b.models / "torch.onnx", "--calibration", b.folder / "no.npz"],
        EXIT_USAGE,
        ("there is no calibration file", "no.npz"),
    ),
    "no npz": (
        lambda b: [b.models / "torch.onnx", "--calibration", b.file("c.npz", "a,b\n1,2")],
        EXIT_USAGE,
        ("c.npz is not an npz file",),
    ),
    "one array": (
        lambda b: [b.models / "torch.onnx", "--calibration", one_array(b)],
        EXIT_USAGE,
        ("one.npz is not an npz file",),
    ),
    "wrong name": (lambda b: b.samples(picture=images(9, 1, 8, 8)), EXIT_USAGE, ("['picture']", "input is 'image'")),
    "wrong dtype": (
        lambda b: b.samples(image=np.zeros((9, 1, 8, 8))),
        EXIT_USAGE,
        ("'image' has dtype float64, expected float32",),
    ),
    "wrong shape": (
        lambda b: b.samples(image=images(9, 8, 8, 1)),
        EXIT_USAGE,
        ("'image' has shape [9, 8, 8, 1]", "image float32[?, 1, 8, 8]"),
    ),
    "empty": (lambda b: b.samples(image=images(0, 1, 8, 8)), EXIT_USAGE, ("no complete sample",)),
    "uneven": (
        lambda b: [
            onnx_models.two_inputs_with_weights_beside(b.folder),
            "--calibration",
            npz(b.folder, **{"left hand/in.0": images(5, 64), "right::in": images(4, 48)}),
        ],
        EXIT_USAGE,
        ("different numbers of samples", "'left hand/in.0': 5", "'right::in': 4"),
    ),
}

REQUESTS: Table = {
    "unknown target": (
        lambda b: [b.models / "torch.onnx", "--target", "raspberry-pi4"],
        EXIT_USAGE,
        ("did you mean 'raspberry-pi-4'", "edge-infer targets"),
    ),
    "target file missing": (
        lambda b: [b.models / "torch.onnx", "--target", "my.toml"],
        EXIT_USAGE,
        ("no target file",),
    ),
    "target with an unknown field": (
        lambda b: b.target("cores = 4", "cores = 4\ncore = 5"),
        EXIT_USAGE,
        ("t.toml has a field 'core'", "did you mean 'cores'"),
    ),
    "target without a field": (lambda b: b.target('python = "3.10"', ""), EXIT_USAGE, ("lacks the field 'python'",)),
    "target with a wrong type": (lambda b: b.target("cores = 4", "cores = 4.5"), EXIT_USAGE, ("cores is 4.5",)),
    "target with an unknown format": (
        lambda b: b.target('format = "onnx"', 'format = "onyx"'),
        EXIT_USAGE,
        ("format 'onyx' is not known", "tflite, onnx, torchscript"),
    ),
    "unknown signature": (
        lambda b: [tensorflow_models.made() / "two_signatures", "--signature", "cubed"],
        EXIT_USAGE,
        ("no signature 'cubed', it has: rooted, squared; use --signature",),
    ),
    "signature of ONNX": (
        lambda b: [b.models / "torch.onnx", "--signature", "serve"],
        EXIT_USAGE,
        ("ONNX models have no signatures",),
    ),
    "signature of PyTorch": (
        lambda b: [b.models / "torch_script.pt", *IMAGE, "--signature", "serve"],
        EXIT_USAGE,
        ("PyTorch models have no signatures",),
    ),
    "converter not installed": (
        lambda b: [b.never_converted("torch.onnx"), "--format", "tflite"],
        EXIT_CONVERSION,
        ("the converter onnx2tf (ONNX to TFLite) is not installed", "edge-infer converters install onnx2tf"),
    ),
    "target without a way": (
        lambda b: [
            b.models / "keras.keras",
            *b.target('format = "tflite"\npackage = "ai-edge-litert"', 'format = "onnx"\npackage = "onnxruntime"')[1:],
        ],
        EXIT_USAGE,
        ("lists onnx twice",),
    ),
    "precision that the format lacks": (
        lambda b: [b.models / "torch_script.pt", *IMAGE, "--format", "torchscript", "--precision", "float16"],
        EXIT_USAGE,
        ("torchscript has no float16 here; it has: float32, int8-dynamic, int8",),
    ),
    "attached file missing": (
        lambda b: [b.models / "torch.onnx", "--attach", b.folder / "LICENSE"],
        EXIT_USAGE,
        ("there is no file", "LICENSE to attach"),
    ),
    "attached file of a taken name": (
        lambda b: [b.models / "torch.onnx", "--attach", b.file("manifest.json", "{}")],
        EXIT_USAGE,
        ("'manifest.json' cannot be attached", "rename the file"),
    ),
    "attached file of an odd name": (
        lambda b: [b.models / "torch.onnx", "--attach", b.file("my labels.txt", "a")],
        EXIT_USAGE,
        ("'my labels.txt' cannot be attached",),
    ),
    "attached twice": (
        lambda b: [b.models / "torch.onnx", *2 * ("--attach", b.file("labels.txt", "a"))],
        EXIT_USAGE,
        ("'labels.txt' cannot be attached",),
    ),
    "output taken": (occupied, EXIT_USAGE, ("taken.edge exists and is not a", "choose another name with -o")),
    "odd name": (lambda b: [b.models / "torch.onnx", "--name", "my model"], EXIT_USAGE, ("'my model' cannot name",)),
    "name that leads away": (lambda b: [b.models / "torch.onnx", "--name", "../x"], EXIT_USAGE, ("give --name with",)),
    "odd version": (lambda b: [b.models / "torch.onnx", "--version", "v 1"], EXIT_USAGE, ("--version 'v 1'",)),
    "nothing fits": (
        lambda b: [*b.target("model_storage_share = 0.25", "model_storage_share = 0.0000001"), "--format", "onnx"],
        EXIT_NOTHING_FITS,
        ("nothing fits cpu-x86_64: nearest is onnx", "allowed is at most 3,200 bytes (target cpu-x86_64)"),
    ),
}


def one_array(bench: Bench) -> Path:
    with (bench.folder / "one.npz").open("wb") as file:
        np.save(file, images(3, 1, 8, 8))
    return bench.folder / "one.npz"


TABLES = {
    "model": MODELS,
    "operator": OPERATORS,
    "factory": FACTORIES,
    "input": INPUTS,
    "calibration": CALIBRATION,
    "request": REQUESTS,
}


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, rows in TABLES.items() for name in rows])
def test_one_sentence_and_nothing_left(
    table: str, name: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, status, words = TABLES[table][name]
    (tmp_path / "source").mkdir()
    arguments = build(Bench(models, tmp_path / "source"))
    before = everything_below(tmp_path)
    out = tmp_path / "out" / "m.edge"
    assert cli.main(["package", "--target", "cpu-x86_64", "-o", str(out), *map(str, arguments)]) == status
    *steps, sentence = capsys.readouterr().err.splitlines()
    assert sentence.startswith("edge-infer: ")
    # When nothing fits, the candidates stand above the sentence, and where they were measured.
    candidates = ("  ", "candidate ", "onnx ", "Time and memory: this machine ")
    shown = [line for line in steps if line and not line.startswith(candidates)]
    assert shown == [], "a converter's log for what is explained"
    for word in words:
        assert word in sentence
    assert sentence.count(words[0]) == 1, "the same reason for each candidate"
    assert "\x1b" not in sentence and "Traceback" not in sentence
    assert everything_below(tmp_path) == before


def everything_below(folder: Path) -> dict[Path, bytes]:
    """Every file but the caches that Python keeps beside a factory."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
