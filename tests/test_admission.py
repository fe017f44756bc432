"""A bundle's first run happens in a child: however that ends, here it is a report or a typed error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from handmade import make_bundle, rebuild

from edge_infer import errors
from edge_infer.admission import describe, run_child, self_test, slow_s
from edge_infer.admission import rebuild as rebuild_error
from edge_infer.bundle import Bundle
from edge_infer.errors import (
    BundleError,
    DeviceError,
    EdgeInferError,
    EngineMissing,
    OutOfMemory,
    SelfTestFailed,
    UsageError,
)
from edge_infer.runtime.arrays import read_npz, write_npz

Script = Callable[[str], str]
NOWHERE = Path("/nowhere/tiny.edge")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def bundle(packaged: Callable[..., Bundle]) -> Bundle:
    return packaged("torch.onnx", "onnx", "float32")


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """``script(lines)``: a stand-in for a device's Python that does what no real one does when asked to."""

    def make(lines: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def bare_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Python of its own with nothing installed."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    return str(tmp_path / "venv" / "bin" / "python")


# -- the real thing ----------------------------------------------------------------------------------------------


def test_a_sound_bundle_passes_with_a_report(bundle: Bundle) -> None:
    report = self_test(bundle.path, sys.executable)
    assert report["engine"]["package"] == "onnxruntime"
    assert report["engine"]["provider"] == "cpu"
    assert 0 <= report["largest_difference"]["digit"] <= bundle.manifest.golden.tolerance["digit"]


def test_a_relative_path_means_the_same_to_the_child(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.path.parent)
    assert self_test(Path(bundle.path.name), sys.executable)["engine"]["package"] == "onnxruntime"


def shifted(case: int, by: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        arrays = read_npz(folder / "golden.npz")
        arrays[f"out.0.{case}"] = arrays[f"out.0.{case}"] + np.float32(by)
        write_npz(folder / "golden.npz", arrays)

    return change


def test_wrong_golden_answers_name_output_observed_and_allowed(bundle: Bundle, tmp_path: Path) -> None:
    wrong = rebuild(bundle, tmp_path / "wrong.edge", shifted(1, 0.25))
    with pytest.raises(SelfTestFailed) as caught:
        self_test(wrong.path, sys.executable)
    allowed = bundle.manifest.golden.tolerance["digit"]
    assert f"golden case 1: output 'digit' differs by 0.25, allowed is {allowed:.3g} (onnxruntime" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_golden_answers_that_are_no_numbers_are_not_passed(bundle: Bundle, tmp_path: Path, value: float) -> None:
    wrong = rebuild(bundle, tmp_path / "wrong.edge", shifted(0, value))
    with pytest.raises(SelfTestFailed, match="golden case 0: output 'digit' differs by inf"):
        self_test(wrong.path, sys.executable)


def test_golden_answers_within_the_tolerance_pass(bundle: Bundle, tmp_path: Path) -> None:
    allowed = bundle.manifest.golden.tolerance["digit"]
    close = rebuild(bundle, tmp_path / "close.edge", shifted(0, allowed / 2))
    assert self_test(close.path, sys.executable)["largest_difference"]["digit"] > allowed / 4


def test_the_childs_own_errors_come_back_typed(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no bundle at /nowhere/tiny\.edge"):
        self_test(NOWHERE, sys.executable)
    damaged = rebuild(bundle, tmp_path / "damaged.edge")
    damaged.file("model.onnx").write_bytes(bytes(damaged.manifest.files["model.onnx"].size))
    with pytest.raises(BundleError, match=r"model\.onnx has SHA-256"):
        self_test(damaged.path, sys.executable)


# -- the wrong Python --------------------------------------------------------------------------------------------


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=f"cannot start {tmp_path}/python: No such file .* --python"):
        self_test(NOWHERE, str(tmp_path / "python"))


def test_a_python_that_may_not_be_started_is_named(tmp_path: Path) -> None:
    (tmp_path / "python").mkdir()
    with pytest.raises(DeviceError, match=f"cannot start {tmp_path}/python: Permission denied"):
        self_test(NOWHERE, str(tmp_path / "python"))


def test_a_python_without_edge_infer_gets_the_command_that_installs_it(bare_python: str) -> None:
    with pytest.raises(EngineMissing) as caught:
        self_test(NOWHERE, bare_python)
    assert str(caught.value).startswith("edge-infer is not installed")
    assert f"{bare_python} -m pip install edge-infer" in str(caught.value)


def test_a_python_without_numpy_gets_the_command_that_installs_it(bare_python: str) -> None:
    with pytest.raises(EngineMissing) as caught:
        run_child(bare_python, ["selftest", str(NOWHERE)], environment={"PYTHONPATH": str(ROOT)})
    assert str(caught.value).startswith("numpy is not installed")
    assert f"{bare_python} -m pip install edge-infer" in str(caught.value)


def test_a_python_without_the_engine_gets_the_command_that_installs_it(
    bare_python: str, bundle: Bundle, tmp_path: Path
) -> None:
    site = Path(np.__file__).parents[1]
    (tmp_path / "site").mkdir()
    for path in (ROOT / "edge_infer", site / "numpy", site / "numpy.libs"):
        (tmp_path / "site" / path.name).symlink_to(path)
    with pytest.raises(EngineMissing) as caught:
        run_child(bare_python, ["selftest", str(bundle.path)], environment={"PYTHONPATH": str(tmp_path / "site")})
    assert f"digits needs {bundle.manifest.artifact.requires[0]}" in str(caught.value)
    assert f"{bare_python} -m pip install 'edge-infer[onnx]'" in str(caught.value)


# -- children that die -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signal", "kind", "words"),
    [
        ("KILL", OutOfMemory, "SIGKILL: it was killed, most likely for lack of memory"),
        ("SEGV", SelfTestFailed, "SIGSEGV: segmentation fault in the engine"),
        ("ILL", SelfTestFailed, "SIGILL: illegal instruction: this engine build does not fit the processor"),
        ("BUS", SelfTestFailed, "SIGBUS: bus error"),
        ("ABRT", SelfTestFailed, "SIGABRT: the engine aborted"),
        ("FPE", SelfTestFailed, "SIGFPE: arithmetic error"),
        ("TERM", SelfTestFailed, "SIGTERM: it was stopped from outside"),
        ("40", SelfTestFailed, "signal 40: it was stopped from outside"),
    ],
)
def test_a_killed_child_is_named_by_its_signal(script: Script, signal: str, kind: type[Exception], words: str) -> None:
    python = script(f"ulimit -c 0; echo '{{}}'; echo 'loading the model' >&2; kill -{signal} $$")
    with pytest.raises(kind) as caught:
        self_test(NOWHERE, python)
    assert type(caught.value) is kind
    assert f"the process that opened the model ended with {words}" in str(caught.value)
    assert "(loading the model)" in str(caught.value)


def test_a_hanging_child_is_stopped(script: Script, tmp_path: Path) -> None:
    python = script(f"echo $$ > {tmp_path}/pid; sleep 10; echo '{{}}'")
    with pytest.raises(SelfTestFailed, match=r"no answer within 0\.4 s; the engine hangs or the device is too slow"):
        self_test(NOWHERE, python, timeout_s=0.4)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_a_large_model_is_given_the_time_of_a_slow_card(script: Script, tmp_path: Path) -> None:
    """And so is what the child starts itself, which is told."""
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(100_000_000)
    assert slow_s(tmp_path) == 25 and slow_s(NOWHERE) == 0
    assert self_test(tmp_path, script('echo "{\\"patience\\": $EDGE_INFER_PATIENCE_S}"'), 0.5) == {"patience": 25.5}


def test_a_child_that_ends_without_an_answer_is_quoted(script: Script) -> None:
    python = script("echo 'starting'; echo 'cannot open shared object file' >&2; echo >&2; exit 7")
    with pytest.raises(SelfTestFailed, match=r"ended with status 7 and no answer \(cannot open shared object file\)"):
        self_test(NOWHERE, python)


def test_a_child_that_is_content_but_silent_has_not_passed(script: Script) -> None:
    with pytest.raises(SelfTestFailed, match=r"ended with status 0 and no answer$"):
        self_test(NOWHERE, script("exit 0"))


def test_an_engines_json_is_no_answer_when_the_child_failed(script: Script) -> None:
    with pytest.raises(SelfTestFailed, match="status 1 and no answer"):
        self_test(NOWHERE, script("""echo '{"level": "info"}'; exit 1"""))


@pytest.mark.parametrize(
    "output",
    [
        """echo 'INFO: created a delegate'; echo '{"engine": 1}'""",
        """echo '{"level": "info"}'; echo '{"engine": 1}'""",
        """echo '{"engine": 1}'; echo; echo 'closing'; echo '{not json'""",
        """printf '\\377\\000\\n'; echo '{"engine": 1}'""",
        """printf '{"engine": 1}'""",
    ],
)
def test_an_engine_may_print_around_the_answer(script: Script, output: str) -> None:
    assert self_test(NOWHERE, script(output)) == {"engine": 1}


def test_the_child_gets_its_arguments_and_no_input(script: Script, tmp_path: Path) -> None:
    python = script(f'echo "$@" > {tmp_path}/arguments; pwd >> {tmp_path}/arguments; cat; echo "{{}}"')
    self_test(Path("/some bundle"), python)
    assert (tmp_path / "arguments").read_text().splitlines() == ["-m edge_infer selftest /some bundle --json", "/"]


def test_the_environment_is_added_to_ones_own(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN", "kept")
    python = script("""echo "{\\"found\\": \\"$OWN $ADDED\\"}" """)
    assert run_child(python, [], environment={"ADDED": "new"}) == {"found": "kept new"}
    assert run_child(python, []) == {"found": "kept "}
    assert "ADDED" not in os.environ


def test_an_error_the_child_wrote_down_is_raised(script: Script) -> None:
    python = script("""echo '{"error": {"type": "LimitError", "message": "too large"}}'; exit 3""")
    with pytest.raises(errors.LimitError, match=r"^too large$"):
        self_test(NOWHERE, python)


# -- errors between processes ------------------------------------------------------------------------------------

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EdgeInferError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_the_way_between_processes(kind: type[EdgeInferError]) -> None:
    error = rebuild_error(describe(kind("what was wrong")))
    assert type(error) is kind
    assert str(error) == "what was wrong"
    assert error.exit_status in range(1, 7)


@pytest.mark.parametrize("name", ["OSError", "SystemExit", "annotations", "EXIT_DONE", "FromTheFuture", None])
def test_an_unknown_error_is_a_device_error(name: object) -> None:
    error = rebuild_error({"type": name, "message": "what was wrong"})
    assert type(error) is DeviceError
    assert str(error) == f"{name}: what was wrong"


def test_a_bundle_no_engine_opens_is_refused_by_the_child(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny.edge")
    with pytest.raises(errors.EngineError, match=f"cannot open {bundle.path}"):
        self_test(bundle.path, sys.executable)
