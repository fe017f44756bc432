"""Three boards of two kinds and one inventory: canary, an end at the first failure, and home by --resume.

The release before is an ONNX model, the new one TFLite; the engine for that answers otherwise on one of the boards. So
that board fails its golden questions, and goes on with the model that it had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import MODELS, SOURCES

from boards.board import TestBoard
from boards.conftest import NewBoard, Provisioned
from boards.record import note
from edge_infer.bundle import Bundle

KINDS = {"fleet-1": "pi-zero-2w", "fleet-2": "pi-zero-2w", "fleet-3": "pi-4"}
TARGETS = {"pi-zero-2w": "raspberry-pi-zero-2w", "pi-4": "raspberry-pi-4"}
CANARY, BROKEN, LAST = KINDS
INVENTORY = """
[groups.zeros]
target = "raspberry-pi-zero-2w"

[groups.fours]
target = "raspberry-pi-4"

[devices.fleet-1]
groups = ["zeros"]

[devices.fleet-2]
groups = ["zeros"]

[devices.fleet-3]
groups = ["fours"]
"""
ENGINE = ".edge-infer/venv/lib/python3.11/site-packages/ai_edge_litert/interpreter.py"
#: As a build for speed does that calculates in half precision.
IN_HALF_PRECISION = """

_exact = Interpreter.get_tensor
Interpreter.get_tensor = lambda self, *asked: _exact(self, *asked).astype("float16").astype("float32")
"""
ASK = """
import json
import numpy as np
import edge_infer

with edge_infer.load("digits") as session, np.load("test.npz") as data:
    (given,), (asked,) = session.inputs, session.outputs
    images = data["image"][:50].reshape(50, *given.shape[1:])
    found = session.run({given.name: images})[asked.name].argmax(1)
    print(json.dumps([session.bundle.digest, session.info.package, int((found == data["label"][:50]).sum())]))
"""


class Fleet:
    """The boards by name, and what every step is to leave."""

    def __init__(self, boards: dict[str, TestBoard], folder: Path) -> None:
        self.boards = boards
        self.inventory = folder / "fleet.toml"
        self.inventory.write_text(INVENTORY)
        self.report = folder / "report.json"
        self.table: list[dict[str, Any]] = []

    @property
    def on(self) -> list[TestBoard]:
        return [board for board in self.boards.values() if board.emulator.pid() is not None]

    def push(self, bundles: dict[str, Bundle], *words: str | Path, status: int = 0) -> dict[str, Any]:
        any_board = next(iter(self.boards.values()))  # which runs the command line here
        paths = [bundle.path for bundle in bundles.values()]
        which = ("--inventory", self.inventory, "--group", "all", "--self-test-timeout", "600")
        how = ("--canary", "1", "--batch", "1", "--abort-after", "0")
        said = any_board.answer("push", *paths, *which, *how, *words, status=status)
        written = json.loads(self.report.read_text())
        assert written["devices"] == said["devices"] and written["reason"] == said["reason"]
        return said

    def models(self) -> dict[str, tuple[str, str, int]]:
        """Digest, engine and right answers of 50, of each board that is on: asked there, all at once."""
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda board: tuple(board.python(ASK)), self.on)
            return dict(zip([board.name for board in self.on], found, strict=True))

    def expect(self, step: str, said: dict[str, Any], states: list[str], serving: list[dict[str, Bundle]]) -> None:
        """Each board's state in the report, and the release that answers on it, where it is on."""
        rows = {row["device"]: row for row in said["devices"]}
        assert [rows[name]["state"] for name in KINDS] == states
        models = self.models()
        for (name, kind), state, bundles in zip(KINDS.items(), states, serving, strict=True):
            digest, engine, right = models.get(name, (None, None, None))
            self.table.append(
                {
                    "step": step, "board": name, "kind": kind, "state": state, "engine": engine, "right_of_50": right,
                    "digest": digest, "said": rows[name]["error"],
                }
            )  # fmt: skip
            if digest is not None:
                assert digest == bundles[kind].digest, (step, name)
                assert right >= 45
        note("fleet", "rollout", steps=self.table, kinds=KINDS)


@pytest.fixture(scope="module")
def releases(packaged: Callable[..., Bundle]) -> list[dict[str, Bundle]]:
    """The release before and the new one, each by kind of board; made before boards take the processor."""
    return [
        {kind: packaged(SOURCES[format], format, "float32", target) for kind, target in TARGETS.items()}
        for format in ("onnx", "tflite")
    ]


@pytest.fixture(scope="module")
def fleet(
    releases: list[dict[str, Bundle]],
    new_board: NewBoard,
    provisioned: Provisioned,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    def switched_on(name: str) -> TestBoard:
        board = new_board(KINDS[name], name, card=provisioned.card)
        board.put((MODELS / "test.npz").read_bytes(), "test.npz")
        return board

    with ThreadPoolExecutor() as pool:
        boards = dict(zip(KINDS, pool.map(switched_on, KINDS), strict=True))
    yield Fleet(boards, tmp_path_factory.mktemp("fleet"))
    for board in boards.values():
        board.emulator.cut_power()


@pytest.mark.long
def test_a_rollout_ends_at_a_board_that_answers_otherwise_and_resume_brings_all_home(
    fleet: Fleet, releases: list[dict[str, Bundle]]
) -> None:
    old, new = releases
    said = fleet.push(old, "--report", fleet.report)
    fleet.expect("the release before", said, ["done"] * 3, [old] * 3)
    broken, last = fleet.boards[BROKEN], fleet.boards[LAST]
    broken.shell(f"cp {ENGINE} engine && cat >> {ENGINE}", given=IN_HALF_PRECISION.encode())

    said = fleet.push(new, "--report", fleet.report, status=5)
    fleet.expect("the new release", said, ["done", "failed", "not started"], [new, old, old])
    assert said["reason"] == "1 of the 1 devices of batch 1 failed, allowed are 0"
    failed = said["devices"][1]
    assert "this engine does not compute what was packaged" in failed["error"]
    assert f"the release {old['pi-zero-2w'].digest[:12]} stays in use" in failed["error"]
    events = broken.answer("history", BROKEN, "digits")["events"]
    assert (events[-1]["event"], events[-1]["digest"]) == ("refused", new["pi-zero-2w"].digest)

    broken.shell(f"cp engine {ENGINE}")
    last.emulator.stop()
    said = fleet.push(new, "--resume", fleet.report, "--retry-failed", status=5)
    fleet.expect("resumed, a board off", said, ["done", "done", "unreachable"], [new, new, old])
    assert said["devices"][0]["kept"] and said["reason"] is None

    last.start()
    said = fleet.push(new, "--resume", fleet.report)
    fleet.expect("resumed, all on", said, ["done"] * 3, [new] * 3)
    assert [row["kept"] for row in said["devices"]] == [True, True, False]
    shown = last.answer("fleet", "status", "--inventory", fleet.inventory)
    assert {row["device"]: row["answer"]["models"][0]["digest"] for row in shown["devices"]} == {
        name: new[kind].digest for name, kind in KINDS.items()
    }
