"""Boards, and bundles for them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from lab.boards import KINDS, Lab

from boards.board import PATIENCE_S, TestBoard
from boards.record import note

#: In this order: each replaces the one before, and the last two stay.
ENVIRONMENTS = (["tflite-runtime"], ["tflite"], ["onnx", "tflite", "torch"])
SHORT_ENVIRONMENTS = (["tflite-runtime"], ["onnx", "tflite"])
#: What there is in the environment that serves.
FACTS = """
import json, os, platform, sys
from importlib.metadata import distributions
print(json.dumps({
    "packages": {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()},
    "python": platform.python_version(),
    "machine": platform.machine(),
    "kernel": platform.release(),
    "debian": open("/etc/debian_version").read().strip(),
    "environment": os.path.basename(os.path.realpath(sys.prefix)),
}))
"""

NewBoard = Callable[..., TestBoard]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--short", action="store_true", help="leave out what is marked long, and PyTorch")
    parser.addoption("--power-cuts", type=int, metavar="N", help="how many; 100, or 4 of a short run")
    parser.addoption("--keep-card", type=Path, metavar="FOLDER", help="where a provisioned card stays for other runs")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: left out by --short")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(4 * PATIENCE_S))
    if config.getoption("--short"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many tests of each file passed and how many did not, for the page in the docs."""
    counts: dict[str, dict[str, int]] = {}
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if outcome in ("passed", "failed", "error", "skipped") and hasattr(report, "nodeid"):
                file = counts.setdefault(Path(report.nodeid.partition("::")[0]).stem, {"passed": 0, "failed": 0})
                file["passed" if outcome == "passed" else "failed"] += 1
    for file, found in counts.items():
        note("tests", file, **found)


def environments(config: pytest.Config) -> tuple[list[str], ...]:
    """The engines of each environment that the provisioned board is given."""
    return SHORT_ENVIRONMENTS if config.getoption("--short") else ENVIRONMENTS


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The lab with boards of this session's own."""
    lab = Lab(tmp_path_factory.mktemp("boards"))
    assert lab.is_built(), f"{lab.folder} is not built; run scripts/test_device, which builds it"
    qemu = subprocess.run(["qemu-system-aarch64", "--version"], capture_output=True, text=True, check=True).stdout
    for kind in KINDS.values():
        release = lab.kernel(kind.kernel).with_name("release").read_text()
        facts = {"cpu": kind.cpu, "cores": kind.cores, "memory": kind.memory_bytes, "pages": kind.kernel}
        note("boards", kind.name, **facts, kernel=release, emulator=qemu.splitlines()[0])
    return lab


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of whoever works with the boards, with the wheels that scripts/test_device has fetched."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir(mode=0o700)
    (home / ".edge-infer").mkdir()
    (home / ".edge-infer" / "wheelhouse").symlink_to(ROOT / "build" / "wheelhouse")
    return home


@pytest.fixture(scope="session")
def new_board(lab: Lab, home: Path) -> Iterator[NewBoard]:
    """``new_board(kind, name, card=None, **how)``: a board that is on, and off when the session ends."""
    made: list[TestBoard] = []

    def make(kind: str, name: str | None = None, card: Path | None = None, **how: Any) -> TestBoard:
        board = TestBoard(lab.new_board(kind, name, card), home)
        made.append(board)
        board.start(**how)
        return board

    yield make
    for board in made:
        board.emulator.cut_power()


@dataclasses.dataclass(frozen=True)
class Provisioned:
    """``card``: what to make boards from; ``steps``: what provision said and what was found there, by engines."""

    card: Path
    steps: dict[str, tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="session")
def provisioned(
    new_board: NewBoard, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Provisioned:
    """A board with nothing but Debian's Python is given one environment after another, the last with all engines."""
    kept: Path | None = request.config.getoption("--keep-card")
    card = (kept or tmp_path_factory.mktemp("cards")) / "provisioned.qcow2"
    steps_file = card.with_suffix(".json")
    if not steps_file.is_file():
        steps = {}
        board = new_board("pi-4", "first")
        for engines in environments(request.config):
            chosen = [word for engine in engines for word in ("--engine", engine)]
            said = board.answer("provision", board.name, "--offline", *chosen)
            steps["+".join(engines)] = said, board.python(FACTS)
        card.parent.mkdir(parents=True, exist_ok=True)
        board.copy_card(card)
        steps_file.write_text(json.dumps(steps))
    return Provisioned(card, json.loads(steps_file.read_text()))


@pytest.fixture(scope="module")
def zero(new_board: NewBoard, provisioned: Provisioned, request: pytest.FixtureRequest) -> Iterator[TestBoard]:
    """A provisioned board of 512 MB for the tests of one file."""
    name = "zero-" + request.module.__name__.rpartition("test_")[2].replace("_", "-")
    board = new_board("pi-zero-2w", name, card=provisioned.card)
    yield board
    board.emulator.cut_power()
