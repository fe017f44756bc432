"""Every step from one form of a model to another: the same answers as the source's, or a sentence that says why not."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch_models
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from route_steps import TORCH_MODELS, Json, specs, worst
from safetensors.torch import save_file, save_model

from edge_infer import probe, worker
from edge_infer.convert import source, tflite_files, torch_source, torch_to_onnx
from edge_infer.errors import ConversionError, UsageError

#: Relative to the largest value of an output, over all probe inputs in all their sizes.
TOLERANCE = 1e-5

TOKENS = specs(("tokens", "int64", (None, None)), ("features", "float32", (None, 4)))
IMAGE = specs(("image", "float32", (None, 1, 8, 8)))
IDS = specs(("ids", "int64", (None, None)))
FOUR_IDS = specs(("ids", "int64", (None, 4)))
STEPS = specs(("x", "float32", (None, None, 3)))
FOUR_STEPS = specs(("x", "float32", (None, 4, 3)))
ROWS = specs(("x", "float32", (None, 4)))
GAIN = specs(("x", "float32", (None, 6)), ("gain", "float32", ()), ("keep", "bool", (None, 6)))
LINES = specs(("x", "float32", (None, 2, None)))

ONNX, LEGACY, SCRIPT = "torch_to_onnx", "torch_to_onnx_legacy", "torch_to_torchscript"
PROGRAM = "torch_to_onnx_program"
#: Network, how it is saved, inputs; then steps that answer as it does, and steps that refuse it, with words they use.
CASES: dict[str, tuple[str, str, list[Json], tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "two in, four out": ("TokensAndFeatures", "state", TOKENS, (ONNX, LEGACY, SCRIPT), {}),
    "image": ("Lenet", "state", IMAGE, (ONNX, LEGACY, SCRIPT), {}),
    "attention": ("Encoder", "state", IDS, (ONNX, SCRIPT), {}),
    "scalar and mask": ("GainAndMask", "state", GAIN, (LEGACY, SCRIPT), {}),
    "recurrent": ("Recurrent", "state", STEPS, (LEGACY, SCRIPT), {}),
    "scripted": ("GainAndMask", "script", GAIN, (LEGACY, SCRIPT), {ONNX: ("older one",)}),
    "traced attention": ("Encoder", "trace", FOUR_IDS, (PROGRAM, SCRIPT), {LEGACY: ("for each number of dimensions",)}),
    "exported": ("Lenet", "export", IMAGE, (ONNX, SCRIPT), {LEGACY: ("newer one",), PROGRAM: ("for TorchScript",)}),
    "loop": ("Halving", "state", ROWS, (LEGACY, SCRIPT), {ONNX: ("depends on its values", "torch.cond")}),
    "cond": ("Chosen", "state", ROWS, (ONNX,), {SCRIPT: ("torch.cond", "--format onnx"), LEGACY: ("torch.cond",)}),
    "unknown": ("Bessel", "state", ROWS, (SCRIPT,), {ONNX: ("bessel_j0 in layer wave",), LEGACY: ("bessel_j0",)}),
}
TFLITE = "torch_to_tflite"
TFLITE_CASES: dict[str, tuple[str, str, list[Json], str]] = {
    "two in, four out": ("TokensAndFeatures", "state", TOKENS, ""),
    "image": ("Lenet", "state", IMAGE, ""),
    "attention": ("Encoder", "state", IDS, ""),
    "large image": ("Lenet", "state", IMAGE, ""),
    "large attention": ("Encoder", "state", IDS, ""),
    "scalar and mask": ("GainAndMask", "state", GAIN, ""),
    "four steps": ("Recurrent", "state", FOUR_STEPS, ""),
    "scripted": ("GainAndMask", "script", GAIN, ""),
    "traced attention": ("Encoder", "trace", FOUR_IDS, ""),
    "exported": ("GainAndMask", "export", GAIN, ""),
    "traced attention of any length": ("Encoder", "trace", IDS, "axis 1 of input 'ids'.*--input"),
    "any number of steps": ("Recurrent", "state", STEPS, "--input x=float32:?,64,3"),
    "loop": ("Halving", "state", ROWS, "depends on its values"),
    "unknown": ("Bessel", "state", ROWS, "bessel_j0"),
    "positions": ("Smooth", "state", LINES, "axis 2 of input 'x'.*GATHER_ND.*--input"),
}


def saved(folder: Path, name: str, how: str, inputs: list[Json]) -> Json:
    """A network of ``torch_models`` on disk, as a case of ``route_steps.torch_steps``."""
    torch.manual_seed(0)
    model = getattr(torch_models, name)().eval()
    path = folder / f"{name}.{how}"
    if how == "state":
        torch.save(model.state_dict(), path)
        return {"file": str(path), "kind": "torch-pickle", "factory": f"{TORCH_MODELS}:{name}", "inputs": inputs}
    if how == "script":
        torch.jit.script(model).save(str(path))
        return {"file": str(path), "kind": "torchscript", "inputs": inputs}
    sizes = (3, 33)
    shapes = [[sizes[axis > 0] if size is None else size for axis, size in enumerate(row["shape"])] for row in inputs]
    args = tuple(
        torch.ones(shape, dtype=getattr(torch, row["dtype"])) for shape, row in zip(shapes, inputs, strict=True)
    )
    if how == "trace":
        torch.jit.trace(model, args, check_trace=False).save(str(path))
        return {"file": str(path), "kind": "torchscript", "inputs": inputs}
    dynamic = [{n: torch.export.Dim.DYNAMIC for n, size in enumerate(row["shape"]) if size is None} for row in inputs]
    torch.export.save(torch.export.export(model, args, dynamic_shapes=tuple(dynamic)), path)
    return {"file": str(path), "kind": "torch-export", "inputs": []}


def child(call: str, request: Json, folder: Path) -> Json:
    return worker.run(f"route_steps:{call}", {**request, "folder": str(folder)}, folder / "log")


@pytest.fixture(scope="module")
def torch_answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Json]:
    folder = tmp_path_factory.mktemp("torch")
    cases = []
    for name, (network, how, inputs, works, refuses) in CASES.items():
        cases.append({"name": name, **saved(folder, network, how, inputs), "steps": [*works, *refuses]})
    return folder, child("torch_steps", {"cases": cases}, folder)


@pytest.fixture(scope="module")
def tflite_answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Json]:
    folder = tmp_path_factory.mktemp("litert-torch")
    cases = []
    for name, (network, how, inputs, _) in TFLITE_CASES.items():
        cases.append({"name": name, **saved(folder, network, how, inputs), "steps": [TFLITE]})
    again = next(case for case in cases if case["name"] == "scalar and mask")
    cases.append({**again, "name": "again"})
    return folder, child("torch_steps", {"cases": cases}, folder)


@pytest.fixture(scope="module")
def tensorflow_answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Json]:
    folder = tmp_path_factory.mktemp("tensorflow")
    return folder, child("tensorflow_steps", {}, folder)


def ask_onnx(path: str) -> probe.Feed:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, feed), strict=True))


def ask_torchscript(path: str, names: list[str], inputs: list[str]) -> probe.Feed:
    module = torch.jit.load(path)

    def ask(feed: probe.Feed) -> probe.Feed:
        with torch.inference_mode():
            answer = module(*(torch.from_numpy(feed[name].copy()) for name in inputs))
        return {name: tensor.numpy() for name, tensor in zip(names, answer, strict=True)}

    return ask


def ask_tflite(path: str, signature: str, resolver: OpResolverType) -> probe.Feed:
    runner = Interpreter(path, experimental_op_resolver_type=resolver, num_threads=1).get_signature_runner(signature)
    return lambda feed: {name: np.array(array) for name, array in runner(**feed).items()}


@pytest.mark.parametrize(("case", "step"), [(name, step) for name, row in CASES.items() for step in row[3]])
def test_torch_steps_answer_as_the_source(torch_answers: tuple[Path, Json], case: str, step: str) -> None:
    folder, answers = torch_answers
    details, tools = answers[case][step]["details"], answers[case][step]["tools"]
    names, inputs = ([row["name"] for row in answers[case][key]] for key in ("outputs", "inputs"))
    if step == SCRIPT:
        ask = ask_torchscript(details["model"], names, inputs)
    else:
        graph = onnx.load(details["model"]).graph
        assert ([item.name for item in graph.input], [item.name for item in graph.output]) == (inputs, names)
        ask = ask_onnx(details["model"])
    assert worst(folder / case, ask) < TOLERANCE
    assert tools["torch"] == torch.__version__
    assert bool(details.get("notes")) == (case == "loop")  # tracing lost the loop, so it was scripted


@pytest.mark.parametrize(("case", "step"), [(name, step) for name, row in CASES.items() for step in row[4]])
def test_torch_steps_refuse_in_a_sentence(torch_answers: tuple[Path, Json], case: str, step: str) -> None:
    error = torch_answers[1][case][step]["error"]
    assert all(word in error for word in CASES[case][4][step]), error
    assert "\n" not in error


@pytest.mark.parametrize("case", [name for name, row in TFLITE_CASES.items() if not row[3]])
@pytest.mark.parametrize("resolver", [OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES, OpResolverType.AUTO])
def test_torch_to_tflite_answers_as_the_source(
    tflite_answers: tuple[Path, Json], case: str, resolver: OpResolverType
) -> None:
    folder, answers = tflite_answers
    details = answers[case][TFLITE]["details"]
    assert worst(folder / case, ask_tflite(details["model"], details["signature"], resolver)) < TOLERANCE
    runner = Interpreter(details["model"]).get_signature_runner(details["signature"])
    shapes = {name: [int(n) for n in row["shape_signature"]] for name, row in runner.get_input_details().items()}
    assert shapes == {
        row["name"]: [-1 if size is None else size for size in row["shape"]] for row in answers[case]["inputs"]
    }


@pytest.mark.parametrize("case", [name for name, row in TFLITE_CASES.items() if row[3]])
def test_torch_to_tflite_refuses_in_a_sentence(tflite_answers: tuple[Path, Json], case: str) -> None:
    with pytest.raises(AssertionError, match=f"ConversionError: .*{TFLITE_CASES[case][3]}".replace("?", r"\?")):
        raise AssertionError(tflite_answers[1][case][TFLITE]["error"])


def test_torch_to_tflite_gives_the_same_bytes_in_any_folder(tflite_answers: tuple[Path, Json]) -> None:
    files = [tflite_answers[1][case][TFLITE]["details"]["model"] for case in ("scalar and mask", "again")]
    first, second = (hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files)
    assert first == second


def test_a_length_between_those_converted_works_too(tflite_answers: tuple[Path, Json]) -> None:
    """The sizes of the probe are those of the conversions, so ask others."""
    path = tflite_answers[1]["attention"][TFLITE]["details"]["model"]
    torch.manual_seed(0)
    model = torch_models.Encoder().eval()
    ask = ask_tflite(path, "serving_default", OpResolverType.AUTO)
    for batch, length in ((1, 1), (7, 5), (2, 47), (1, 64)):
        ids = np.random.default_rng(length).integers(0, 16, (batch, length))
        with torch.inference_mode():
            expected = model(torch.from_numpy(ids)).numpy()
        np.testing.assert_allclose(ask({"ids": ids})["output"], expected, atol=1e-5)


@pytest.mark.parametrize("case", ["vision", "language", "gate", "tied"])
def test_saved_model_to_onnx_answers_as_the_source(tensorflow_answers: tuple[Path, Json], case: str) -> None:
    folder, answers = tensorflow_answers
    path = answers[case]["onnx"]["details"]["model"]
    assert worst(folder / case, ask_onnx(path)) < TOLERANCE
    model = onnx.load(path)
    assert [item.name for item in model.graph.input] == [row["name"] for row in answers[case]["inputs"]]
    assert model.opset_import[0].version == 18
    dims = [[dim.dim_value or None for dim in item.type.tensor_type.shape.dim] for item in model.graph.input]
    assert dims == [row["shape"] for row in answers[case]["inputs"]]


LARGE = [("vision", "large", 3), ("vision", "large.tflite", 3), ("language", "large", 2), ("tied", "large", 1)]


@pytest.mark.parametrize(("case", "way", "aside"), [*LARGE, ("tied", "large.tflite", 3)])
def test_weights_of_large_models_are_set_aside(
    tensorflow_answers: tuple[Path, Json], case: str, way: str, aside: int
) -> None:
    """What is done with many weights, done with few."""
    folder, answers = tensorflow_answers
    path = answers[case][way]["details"]["model"]
    assert worst(folder / case, ask_onnx(path)) < TOLERANCE
    assert answers[case][way.replace("large", "aside")] == aside
    assert [item.name for item in onnx.load(path).graph.input] == [row["name"] for row in answers[case]["inputs"]]


def test_saved_model_to_onnx_refuses_an_unknown_operator(tensorflow_answers: tuple[Path, Json]) -> None:
    assert "operator Betainc" in tensorflow_answers[1]["strange"]["onnx"]["error"]


@pytest.mark.parametrize("case", ["vision", "gate", "tied"])
def test_tflite_to_onnx_answers_as_the_source(tensorflow_answers: tuple[Path, Json], case: str) -> None:
    folder, answers = tensorflow_answers
    assert worst(folder / case, ask_onnx(answers[case]["float.tflite"]["details"]["model"])) < TOLERANCE


def test_tflite_to_onnx_refuses_what_is_quantized(tensorflow_answers: tuple[Path, Json]) -> None:
    assert "quantized already" in tensorflow_answers[1]["vision"]["int8.tflite"]["error"]


@pytest.fixture(scope="module")
def read_answers(tensorflow_answers: tuple[Path, Json], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Json]:
    made, folder = tensorflow_answers[0] / "vision", tmp_path_factory.mktemp("tflite")
    whole = (made / "float.tflite").read_bytes()
    files = {name: folder / f"{name}.tflite" for name in ("unsigned", "two", "cut", "garbled", "custom")}
    model = tflite_files.read(whole)
    model.signatureDefs = None
    tflite_files.write(model, files["unsigned"])
    model = tflite_files.read(whole)
    other = tflite_files.only_signature(tflite_files.read(whole))
    other.signatureKey = b"other"
    other.inputs[0].name = b"picture"
    model.signatureDefs = [*model.signatureDefs, other]
    tflite_files.write(model, files["two"])
    files["cut"].write_bytes(whole[: len(whole) // 2])
    files["garbled"].write_bytes(whole[:8] + bytes(range(256)) * 8)
    model = tflite_files.read(whole)
    model.operatorCodes[0].builtinCode = model.operatorCodes[0].deprecatedBuiltinCode = tflite_files.CUSTOM
    model.operatorCodes[0].customCode = b"Swirl"
    tflite_files.write(model, files["custom"])
    two = specs(("image", "float32", (2, 8, 8, 3)))
    cases = {name: (str(path), None, []) for name, path in files.items()}
    cases |= {"float": (str(made / "float.tflite"), None, []), "int8": (str(made / "int8.tflite"), None, [])}
    cases |= {"other": (str(files["two"]), "other", []), "absent": (str(files["two"]), "third", [])}
    cases |= {"fixed": (str(made / "float.tflite"), None, two)}
    return folder, child("read_tflites", {"cases": cases}, folder)


def test_read_tflite_tells_the_precision(read_answers: tuple[Path, Json]) -> None:
    answers = read_answers[1]
    kinds = {name: answers[name]["details"]["precision"] for name in ("float", "int8")}
    assert kinds == {"float": "float32", "int8": "int8-dynamic"}
    assert answers["float"]["inputs"] == specs(("image", "float32", (None, 8, 8, 3)))
    assert [row["name"] for row in answers["float"]["outputs"]] == ["output_0"]


@pytest.mark.parametrize("case", ["float", "int8", "unsigned", "two", "other", "fixed"])
def test_read_tflite_leaves_what_answers_the_same(read_answers: tuple[Path, Json], case: str) -> None:
    folder, answers = read_answers
    details = answers[case]["details"]
    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    assert worst(folder / case, ask_tflite(details["model"], details["signature"], resolver)) == 0
    runner = Interpreter(details["model"]).get_signature_runner()
    assert set(runner.get_input_details()) == {row["name"] for row in answers[case]["inputs"]}


def test_read_tflite_takes_names_of_tensors_where_there_is_no_signature(read_answers: tuple[Path, Json]) -> None:
    (row,) = read_answers[1]["unsigned"]["inputs"]
    assert row["name"] == "serving_default_image:0"


def test_read_tflite_chooses_a_signature(read_answers: tuple[Path, Json]) -> None:
    answers = read_answers[1]
    assert answers["other"]["inputs"][0]["name"] == "picture"
    assert "no signature 'third', it has: serving_default, other" in answers["absent"]["error"]


def test_read_tflite_fixes_the_sizes_that_are_given(read_answers: tuple[Path, Json]) -> None:
    details = read_answers[1]["fixed"]["details"]
    (row,) = Interpreter(details["model"]).get_input_details()
    assert list(row["shape"]) == [2, 8, 8, 3]
    assert -1 not in row["shape_signature"]


@pytest.mark.parametrize(
    ("case", "words"), [("cut", "TFLite cannot open"), ("garbled", "TFLite cannot open"), ("custom", "Swirl")]
)
def test_read_tflite_refuses_in_a_sentence(read_answers: tuple[Path, Json], case: str, words: str) -> None:
    error = read_answers[1][case]["error"]
    assert error.startswith("ConversionError: ") and words in error and "\n" not in error, error


def torch_request(path: Path, factory: str | None) -> Json:
    inputs = specs(("tokens", "int64", (None, None)))
    request = {"source": str(path), "kind": source.read_source(path).kind, "factory": factory, "inputs": inputs}
    return {**request, "signature": None, "trust_pickle": False}


class TestSafetensors:
    FACTORY = f"{TORCH_MODELS}:TiedWords"

    def test_tied_weights_are_kept_once_and_found_again(self, tmp_path: Path) -> None:
        model = torch_models.TiedWords()
        save_model(model, str(tmp_path / "m.safetensors"))
        loaded = torch_source.load(torch_request(tmp_path / "m.safetensors", self.FACTORY))
        tokens = np.arange(6).reshape(2, 3)
        expected = model(torch.from_numpy(tokens)).detach().numpy()
        np.testing.assert_array_equal(loaded.run({"tokens": tokens})["output"], expected)

    def test_a_missing_weight_is_named(self, tmp_path: Path) -> None:
        save_file({"other.weight": torch.zeros(2)}, tmp_path / "m.safetensors")
        with pytest.raises(UsageError, match=r"does not fit the network of --factory .*Missing key.*words\.weight"):
            torch_source.load(torch_request(tmp_path / "m.safetensors", self.FACTORY))

    def test_the_code_of_the_network_is_asked_for(self, tmp_path: Path) -> None:
        save_file({"w": torch.zeros(2)}, tmp_path / "m.safetensors")
        with pytest.raises(UsageError, match=r"holds weights alone.*--factory"):
            torch_source.load(torch_request(tmp_path / "m.safetensors", None))

    def test_a_damaged_file_is_refused(self, tmp_path: Path) -> None:
        header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        with pytest.raises(ConversionError, match="not a sound safetensors file"):
            torch_source.load(torch_request(tmp_path / "m.safetensors", self.FACTORY))


def test_sources_are_told_by_content(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "weights.onnx")
    (tmp_path / "a.bin").write_bytes(b"\x1c\0\0\0TFL3" + bytes(64))
    found = [source.read_source(tmp_path / name) for name in ("weights.onnx", "a.bin")]
    assert [(item.kind, item.family) for item in found] == [("torch-safetensors", "torch"), ("tflite", "tflite")]


def test_telling_sources_apart_needs_no_framework() -> None:
    code = "import sys, edge_infer.convert.source; print([m for m in sys.modules if m in %r])"
    frameworks = ("torch", "tensorflow", "safetensors", "onnx", "ai_edge_litert")
    done = subprocess.run([sys.executable, "-c", code % (frameworks,)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_scripted_code_of_unknown_rank_is_explained_by_operator_and_layer() -> None:
    """The exporter's own words for a scripted transformer, shortened; the layer stands in the last path of modules."""
    words = (
        "Unsupported: ONNX export of transpose for tensor of unknown rank.  [Caused by the value '94 defined in (%94 : "
        "Float = onnx::Unsqueeze(%92, %93), scope: edge_infer.convert.torch_source.FlatOutputs::/nets.Words::module/"
        "torch.nn.modules.transformer.TransformerEncoder::encoder/torch.nn.modules.activation.MultiheadAttention::attn\n)'"
    )
    said = str(torch_to_onnx.explain(ValueError(words)))
    assert said.startswith("the operator transpose in layer encoder.attn has another ONNX form for each number of dim")
    assert said.endswith("package the network itself, or use --format torchscript")


def test_a_shape_with_one_open_size_is_a_constant(tmp_path: Path) -> None:
    """What computed it is gone, and what two open sizes need stays."""
    answer = child("sizes", {}, tmp_path)
    assert {"SHAPE", "PACK", "RESHAPE"} <= set(answer["before"])
    assert answer["after"].count("RESHAPE") == 2 and answer["after"].count("PACK") == 1
    before, after = (
        ask_tflite(tmp_path / f"{name}.tflite", "serving_default", OpResolverType.AUTO) for name in ("before", "after")
    )
    for batch, length in ((1, 1), (3, 5), (2, 7)):
        x = np.random.default_rng(length).random((batch, length, 8), dtype=np.float32)
        for name, want in before({"x": x}).items():
            assert after({"x": x})[name].shape == want.shape
            np.testing.assert_array_equal(after({"x": x})[name], want)
