"""What a device needs: a Python, numpy, one engine. What it types there: ``python -m edge_infer``."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import rebuild

from edge_infer import __version__
from edge_infer.bundle import Bundle
from edge_infer.deploy.conversation import MODULES
from edge_infer.deploy.provision import MORE
from edge_infer.runtime.arrays import read_npz, write_npz

ROOT = Path(__file__).parents[1]
SITE = Path(np.__file__).parents[1]
LIBRARIES = {"tflite": "ai_edge_litert", "onnx": "onnxruntime"}
SOURCES = {"tflite": "keras.keras", "onnx": "torch.onnx", "torchscript": "torch_script.pt"}

#: What a push sends to devices with nothing installed.
SENT = [
    "errors",
    "records",
    "manifest",
    "bundle",
    "pointer",
    "journal",
    "store",
    "trust",
    "delta",
    "admission",
    "emulation",
    "deploy/device",
    "deploy/incoming",
    "deploy/signers",
    "deploy/trial",
    "deploy/receiver",
]
#: What provision and doctor send beyond that.
SENT_MORE = ["deploy/venvs", "deploy/checkup", "deploy/installer"]
ALL_SENT, ALL_MODULES = SENT + SENT_MORE, MODULES + MORE


# -- sent along: Python 3.8, standard library --------------------------------------------------------------------


def test_the_modules_sent_along_are_the_ones_held_to_python_3_8() -> None:
    assert [f"edge_infer.{name.replace('/', '.')}" for name in ALL_SENT] == list(ALL_MODULES)


@pytest.mark.parametrize("name", ALL_SENT)
def test_a_module_sent_along_is_python_3_8(name: str) -> None:
    ast.parse((ROOT / "edge_infer" / f"{name}.py").read_text(), feature_version=(3, 8))


def test_python_3_8_is_really_asked_for() -> None:
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n    case 1: pass", feature_version=(3, 8))


def imported(tree: ast.Module) -> set[str]:
    """Dotted names of all modules that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            base = node.module or ""
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "edge_infer" else {base}
    return found


@pytest.mark.parametrize("number", range(len(ALL_SENT)))
def test_a_module_sent_along_imports_the_standard_library_and_those_before_it(number: int) -> None:
    names = imported(ast.parse((ROOT / "edge_infer" / f"{ALL_SENT[number]}.py").read_text()))
    own = {name for name in names if name.split(".")[0] == "edge_infer"}
    assert own <= set(ALL_MODULES[:number])
    assert {name.split(".")[0] for name in names - own} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", ALL_SENT)
def test_annotations_of_a_module_sent_along_are_not_evaluated(name: str) -> None:
    """``list[int]`` in an annotation would fail on Python 3.8 were it evaluated; elsewhere it must not stand."""
    tree = ast.parse((ROOT / "edge_infer" / f"{name}.py").read_text())
    future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert [alias.name for node in future for alias in node.names] == ["annotations"]


# -- imports -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., Any]:
    """``bare(code, *packages)``: run code in a Python that has the standard library, edge_infer and these."""

    def run(code: str, *packages: str) -> Any:
        folder = tmp_path / "bare"
        folder.mkdir()
        (folder / "edge_infer").symlink_to(ROOT / "edge_infer")
        for package in packages:
            for path in SITE.glob(package):
                (folder / path.name).symlink_to(path)
        # -S leaves out site-packages, -I the current folder and PYTHON* variables.
        program = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
        command = [sys.executable, "-I", "-S", "-c", program]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


FOREIGN = """
import json
own = set(sys.stdlib_module_names) | {"__main__", "edge_infer"}
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules} - own)))
"""


def test_importing_the_package_needs_nothing(bare: Callable[..., Any]) -> None:
    assert bare(f"import edge_infer; edge_infer.EdgeInferError, edge_infer.__version__\n{FOREIGN}") == []


@pytest.mark.parametrize("module", [*ALL_MODULES, "edge_infer.runtime.cli"])
def test_each_module_sent_along_and_the_command_line_import_nothing_foreign(
    bare: Callable[..., Any], module: str
) -> None:
    assert bare(f"import {module}\n{FOREIGN}") == []


LOAD = """
from pathlib import Path
import edge_infer
from edge_infer.runtime.golden import read_golden, self_test
with edge_infer.load(Path({path!r}), cache_dir={cache!r}) as session:
    session.run(read_golden(session.bundle)[0][0])
    self_test(session)
"""


def load_and_run(bundle: Bundle, cache: Path) -> str:
    return LOAD.format(path=str(bundle.path), cache=str(cache))


@pytest.mark.parametrize("format", LIBRARIES)
def test_a_bundle_runs_with_numpy_and_its_engine_alone(
    bare: Callable[..., Any], packaged: Callable[..., Bundle], tmp_path: Path, format: str
) -> None:
    code = load_and_run(packaged(SOURCES[format], format, "float32"), tmp_path) + FOREIGN
    library = LIBRARIES[format]
    packages = ("numpy", "numpy.libs", library, f"{library}-*.dist-info")
    assert bare(code, *packages) == sorted({"numpy", library})


@pytest.mark.parametrize("format", SOURCES)
def test_no_host_module_or_other_framework_is_imported_to_run_a_bundle(
    packaged: Callable[..., Bundle], tmp_path: Path, format: str
) -> None:
    """The same with everything installed, where an import too many would succeed."""
    code = load_and_run(packaged(SOURCES[format], format, "float32"), tmp_path)
    code += "import json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    names = json.loads(done.stdout.splitlines()[-1])
    frameworks = {
        "torch",
        "tensorflow",
        "onnx",
        "onnxruntime",
        "ai_edge_litert",
        "paramiko",
        "rich",
        "scipy",
        "sklearn",
    }
    own = {"tflite": "ai_edge_litert", "onnx": "onnxruntime", "torchscript": "torch"}[format]
    assert frameworks & {name.split(".")[0] for name in names} == {own}
    modules = {name for name in names if name.startswith("edge_infer.")}
    allowed = {"errors", "records", "manifest", "bundle", "pointer", "journal", "store", "trust"}
    allowed |= {"runtime", "admission"}
    assert {name.split(".")[1] for name in modules} <= allowed
    parts = {"tflite": {"tflite", "litert", "litert_library"}, "onnx": {"onnx", "onnx_providers"}}.get(format, {format})
    assert {name.rpartition(".")[2] for name in modules if ".engines." in name} == parts


# -- the device's command line -----------------------------------------------------------------------------------


@pytest.fixture
def bundle(packaged: Callable[..., Bundle]) -> Bundle:
    return packaged("torch.onnx", "onnx", "float32")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "edge_infer", *map(str, arguments)]
    return subprocess.run(line, check=False, capture_output=True, text=True)


def answer(*arguments: object) -> dict[str, Any]:
    """The JSON of a command that is expected to succeed."""
    done = command(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def error(status: int, *arguments: object) -> str:
    """The sentence of a command that is expected to fail; the same with ``--json``."""
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("python -m edge_infer: ")
    assert done.stderr.count("\n") == 1
    sentence = done.stderr.removeprefix("python -m edge_infer: ").rstrip("\n")
    again = command(*arguments, "--json")
    assert again.returncode == status
    row = json.loads(again.stdout)["error"]
    assert (row["message"], row["exit_status"]) == (sentence, status)
    return f"{row['type']}: {sentence}"


def test_info_says_what_a_bundle_is(bundle: Bundle) -> None:
    info = answer("info", bundle.path)
    assert (info["name"], info["digest"], info["format"], info["precision"]) == (
        "digits",
        bundle.digest,
        "onnx",
        "float32",
    )
    assert info["inputs"] == ["image float32[?, 1, 8, 8]"]
    assert info["outputs"] == ["digit float32[?, 10]"]
    assert info["files"] == {name: entry.size for name, entry in bundle.manifest.files.items()}
    plain = command("info", bundle.path)
    assert plain.returncode == 0
    for word in ("digits", bundle.digest, "image float32[?, 1, 8, 8]", "weights.bin", "onnxruntime>="):
        assert word in plain.stdout


def test_verify_hashes_and_asks_the_golden_questions(bundle: Bundle) -> None:
    report = answer("verify", bundle.path)
    assert (report["digest"], report["files"]) == (bundle.digest, 3)
    assert report["engine"]["package"] == "onnxruntime"
    assert report["largest_difference"].keys() == {"digit"}
    assert command("verify", bundle.path).returncode == 0


def test_run_without_input_answers_the_first_golden_case(bundle: Bundle, tmp_path: Path) -> None:
    summary = answer("run", bundle.path, "--output", tmp_path / "out.npz")
    answers = read_npz(tmp_path / "out.npz")
    assert answers.keys() == summary.keys() == {"digit"}
    assert summary["digit"]["dtype"] == "float32"
    assert summary["digit"]["shape"] == list(answers["digit"].shape)
    assert np.allclose(summary["digit"]["first"], answers["digit"].ravel()[:8])
    expected = read_npz(bundle.file("golden.npz"))["out.0.0"]
    assert np.allclose(answers["digit"], expected, atol=bundle.manifest.golden.tolerance["digit"])


def test_run_takes_arrays_from_a_file(
    bundle: Bundle, tmp_path: Path, digits_test_set: Callable[[str], tuple[np.ndarray, np.ndarray]]
) -> None:
    images, labels = digits_test_set("torch.onnx")
    write_npz(tmp_path / "in.npz", {"image": images, "label": labels})
    assert command("run", bundle.path, "--input", tmp_path / "in.npz", "--output", tmp_path / "o.npz").returncode == 0
    answers = read_npz(tmp_path / "o.npz")["digit"]
    assert np.mean(answers.argmax(axis=1) == labels) >= 0.97


def test_bench_measures_this_machine(bundle: Bundle) -> None:
    report = answer("bench", bundle.path, "--threads", 1, "--runs", 5)
    assert (report["runs"], report["engine"]["threads"]) == (5, 1)
    assert 0 < report["p50_ms"] <= report["p95_ms"]
    assert min(report["load_ms"], report["first_ms"], report["peak_bytes"]) > 0
    assert report["private_bytes"] >= 0


def test_selftest_gives_its_report(bundle: Bundle) -> None:
    assert answer("selftest", bundle.path)["largest_difference"].keys() == {"digit"}


def test_version() -> None:
    assert command("--version").stdout == f"{__version__}\n"


@pytest.mark.parametrize("verb", ["info", "verify", "run", "bench", "selftest"])
def test_a_damaged_bundle_ends_with_status_4(bundle: Bundle, tmp_path: Path, verb: str) -> None:
    damaged = rebuild(bundle, tmp_path / "damaged.edge")
    damaged.file("weights.bin").write_bytes(b"short")
    assert error(4, verb, damaged.path).startswith(f"BundleError: {damaged.path}/weights.bin has 5 bytes, expected")


@pytest.mark.parametrize("verb", ["verify", "run", "bench", "selftest"])
def test_a_flipped_byte_ends_with_status_4(bundle: Bundle, tmp_path: Path, verb: str) -> None:
    damaged = rebuild(bundle, tmp_path / "damaged.edge")
    damaged.file("model.onnx").write_bytes(bytes(damaged.manifest.files["model.onnx"].size))
    assert "model.onnx has SHA-256" in error(4, verb, damaged.path)


@pytest.mark.parametrize("verb", ["info", "verify", "run", "bench"])
def test_an_unknown_model_ends_with_status_4_and_an_absent_path_with_2(verb: str, tmp_path: Path) -> None:
    assert error(4, verb, "digits").startswith("ReleaseNotFound: no model 'digits' in the store")
    assert error(2, verb, tmp_path / "no.edge") == f"UsageError: there is no bundle at {tmp_path}/no.edge"


def no_file(path: Path) -> None:
    assert not path.exists()


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros((1, 1, 8, 8), np.float32))


def pickles(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, image=np.array([{}], dtype=object))


def other_names(path: Path) -> None:
    write_npz(path, {"picture": np.zeros((1, 1, 8, 8), np.float32)})


def other_shape(path: Path) -> None:
    write_npz(path, {"image": np.zeros((1, 8, 8, 1), np.float32)})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (no_file, "UsageError: there is no file"),
        (empty_file, "is not an npz file of plain arrays"),
        (one_array, "is not an npz file of plain arrays (one array without a name)"),
        (pickles, "is not an npz file of plain arrays"),
        (other_names, "holds ['picture'], expected an array 'image'"),
        (other_shape, "InputError: input 'image' has shape [1, 8, 8, 1], expected image float32[?, 1, 8, 8]"),
    ],
)
def test_a_wrong_input_file_ends_with_status_2(
    bundle: Bundle, tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    make(tmp_path / "in.npz")
    assert words in error(2, "run", bundle.path, "--input", tmp_path / "in.npz")


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["info"], ["bench", "x.edge", "--threads", "0"], ["bench", "x.edge", "--runs", "many"]]
)
def test_a_wrong_command_line_ends_with_status_2(arguments: list[str]) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: python -m edge_infer" in done.stderr


def test_wrong_golden_answers_end_with_status_5(bundle: Bundle, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        arrays = read_npz(folder / "golden.npz")
        arrays["out.0.0"] = 1 - arrays["out.0.0"]
        write_npz(folder / "golden.npz", arrays)

    wrong = rebuild(bundle, tmp_path / "wrong.edge", change)
    for verb in ("verify", "selftest"):
        assert error(5, verb, wrong.path).startswith("SelfTestFailed: golden case 0: output 'digit' differs by")
