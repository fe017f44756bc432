"""A short run of scripts/fuzz_bundles.py: damaged bundles are refused, or answer rightly."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from edge_infer.bundle import Bundle

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "fuzz_bundles.py"
VARIANTS = {
    "tflite": ("keras.keras", "int8"),
    "onnx": ("torch.onnx", "float32"),
    "torchscript": ("torch_script.pt", "float32"),
}
COUNT = 150


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_bundles", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("format", VARIANTS)
def test_damaged_bundles_are_refused_or_answer_rightly(packaged: Callable[..., Bundle], format: str) -> None:
    source, precision = VARIANTS[format]
    bundle = packaged(source, format, precision)
    # A process of its own, since it forks, which engines that have threads already do not survive.
    command = [sys.executable, str(SCRIPT), str(bundle.path), "--count", str(COUNT), "--seed", "11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("failed: 0\n"), done.stdout + done.stderr
    found: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        if header := re.fullmatch(r"\S+, (\w+): \d+", line):
            rows = found.setdefault(header[1], {})
        elif row := re.fullmatch(r" +(\d+)  (.+)", line):
            rows[row[2]] = int(row[1])
    assert found["lying"]["refused: BundleError"] > COUNT // 3 * 0.8
    assert found["manifest"]["refused: BundleError"] > COUNT // 3 * 0.4
    # The engine saw the sealed ones: some it refused, and one went through verify().
    assert sum(count for outcome, count in found["sealed"].items() if outcome != "answers rightly") > 5
    assert any(outcome.startswith("verify") for outcome in found["sealed"])


def test_a_mutation_is_made_again_from_its_number(
    fuzz: ModuleType, packaged: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = packaged("keras.keras", "tflite", "int8")
    for number in range(12):
        copies = []
        for way in ("first", "second"):
            folder = tmp_path / f"{way}{number}"
            folder.mkdir()
            copies.append(listing(fuzz.mutation(bundle, 3, number, folder)[1]))
        assert copies[0] == copies[1] != listing(bundle.path)


def listing(folder: Path) -> dict[str, object]:
    return {
        path.name: path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.iterdir()
    }


def test_wrong_answers_and_strange_errors_are_seen(
    fuzz: ModuleType, packaged: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = packaged("keras.keras", "tflite", "float32")
    assert fuzz.opened(bundle.path, bundle) == "answers rightly"
    monkeypatch.setattr(fuzz, "largest_difference", lambda expected, observed: 1.0)
    assert fuzz.opened(bundle.path, bundle) == "FAILED: a wrong answer"
    monkeypatch.setattr(fuzz, "self_test", lambda session: 1 / 0)
    assert fuzz.opened(bundle.path, bundle) == "FAILED: ZeroDivisionError: division by zero"


def test_crashes_and_hangs_are_seen(
    fuzz: ModuleType, packaged: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fuzz.in_child(os.abort) == "ended by SIGABRT"
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    assert fuzz.in_child(signal.pause) == "ended by SIGALRM"
    monkeypatch.setattr(fuzz, "in_child", lambda call: "ended by SIGSEGV")
    bundle = packaged("keras.keras", "tflite", "float32")
    assert [fuzz.try_one(bundle, 1, number)[1][0] for number in range(1, 4)] == [
        "FAILED: ended by SIGSEGV",
        "ended by SIGSEGV",  # sealed: only a faulty or evil packager makes these
        "FAILED: ended by SIGSEGV",
    ]
