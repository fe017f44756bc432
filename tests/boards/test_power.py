"""The power fails in the middle: the old model serves or the new one, whole, and nothing stays locked.

The board runs from a card with a volatile cache. A cut comes at one flush of the card out of those that the operation
takes, or at any moment of it; of what was not flushed nothing, everything or any part survives.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SOURCES
from lab import card

from boards.board import TestBoard
from boards.conftest import NewBoard, Provisioned
from boards.record import note
from edge_infer.bundle import Bundle, describe_files, write_bundle

#: Each of these is cut once before the next.
OPERATIONS = ("push", "rollback", "activation", "collection")
#: Releases that a collection leaves.
KEPT = {"collection": "1", "nothing": "4"}
#: Random bytes that come with every release, so that there is something to stream.
ATTACHED_BYTES = 2**18
SHORT, WHOLE = 4, 100

SERVING = """
import json
import edge_infer
from edge_infer.bundle import verify
from edge_infer.runtime.golden import self_test
from edge_infer.store import Store, default_root
bundle = Store(default_root()).open_current("digits")
verify(bundle)
with edge_infer.load("digits") as session:
    self_test(session)
print(json.dumps(bundle.digest))
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        count = metafunc.config.getoption("--power-cuts") or (SHORT if metafunc.config.getoption("--short") else WHOLE)
        metafunc.parametrize("number", range(count))


class Releases:
    """The model on the board, release after release, and what the last operation is to make of it."""

    def __init__(self, board: TestBoard, first: Bundle, folder: Path) -> None:
        self.board = board
        self.folder = folder
        self.newest = self.first = first
        self.serving = self.before = first.digest
        self.made = 0
        #: Flushes of the card and seconds that each operation took when it was let be.
        self.taken: dict[str, tuple[int, float]] = {}

    def make(self) -> Bundle:
        """Another release: the same network, another version, and random bytes beside it."""
        self.made += 1
        parts = self.folder / str(self.made)
        shutil.copytree(self.first.path, parts)
        (parts / "attached.bin").write_bytes(random.Random(self.made).randbytes(ATTACHED_BYTES))
        files = describe_files(parts, [*self.first.manifest.files, "attached.bin"])
        manifest = dataclasses.replace(self.first.manifest, version=f"1.{self.made}", files=files)
        bundle = write_bundle(manifest, parts, self.folder / f"{self.made}.edge")
        shutil.rmtree(parts)
        return bundle

    def prepare(self, operation: str) -> str:
        """The release that is to serve after the operation."""
        if operation == "push":
            self.newest = self.make()
        return {"rollback": self.before, "collection": self.serving}.get(operation, self.newest.digest)

    def words(self, operation: str) -> tuple[str | Path, ...]:
        name = self.board.name
        if operation == "rollback":
            return ("rollback", name, "digits")
        if operation in KEPT:
            return ("gc", name, "--keep", KEPT[operation])
        return ("push", self.newest.path, name, "--self-test-timeout", "600")

    def observe(self) -> str:
        """The release that serves: every file has its hash, and the golden questions are answered."""
        self.serving, old = str(self.board.python(SERVING)), self.serving
        if self.serving != old:
            self.before = old
        return self.serving

    def finish(self, operation: str) -> None:
        """Let the operation be done, and count what it takes."""
        started, flushes = time.monotonic(), flushes_of(self.board)
        self.board.edge_infer(*self.words(operation))
        self.taken[operation] = (flushes_of(self.board) - flushes, time.monotonic() - started)


def flushes_of(board: TestBoard) -> int:
    state = card.ask(board.board.folder, "state")
    assert state is not None, "the card is gone"
    return int(state["flushes"])


@pytest.fixture(scope="module")
def releases(
    new_board: NewBoard,
    provisioned: Provisioned,
    packaged: Callable[..., Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Releases]:
    board = new_board("pi-zero-2w", "power", card=provisioned.card, volatile=True)
    first = packaged(SOURCES["tflite"], "tflite", "float32", "raspberry-pi-zero-2w")
    board.edge_infer("push", first.path, board.name, "--self-test-timeout", "600")
    yield Releases(board, first, tmp_path_factory.mktemp("releases"))
    board.emulator.cut_power()


def cut(releases: Releases, operation: str, number: int) -> dict[str, Any]:
    """Begin the operation and cut the power in it; where that was, and what the card lost."""
    board, seed = releases.board, number
    flushes, seconds = releases.taken.get(operation, (1, 2.0))
    at_flush = 1 + number // (2 * len(OPERATIONS)) % max(1, flushes) if number // len(OPERATIONS) % 2 == 0 else None
    moment = random.Random(seed).uniform(0, seconds)
    if at_flush:
        card.ask(board.board.folder, "hold", flush=at_flush)
    started = time.monotonic()
    process = subprocess.Popen(
        board.command(*releases.words(operation)),
        env=board.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not over(board, at_flush, time.monotonic() - started - moment):
        time.sleep(0.01)
    lost = board.emulator.cut_power(card.MODES[number % len(card.MODES)], seed)
    assert lost is not None, "the card was gone before its power was"
    _, said = process.communicate(timeout=600)
    assert "Traceback" not in said, said
    where = f"flush {at_flush} of {flushes}" if at_flush else f"{moment / seconds:.0%} of its time"
    return {"operation": operation, "where": where, "told": process.returncode == 0, "card": lost}


def over(board: TestBoard, at_flush: int | None, late_s: float) -> bool:
    if at_flush is None:
        return late_s >= 0
    state = card.ask(board.board.folder, "state")
    return state is None or bool(state["held"])


def test_after_a_power_cut_one_of_both_serves_and_the_next_operation_is_done(releases: Releases, number: int) -> None:
    operation = OPERATIONS[number % len(OPERATIONS)]
    old, new = releases.serving, releases.prepare(operation)
    done = cut(releases, operation, number)
    note("power", f"{number:03}", **done, found="torn")  # unless it turns out otherwise
    releases.board.start(volatile=True)
    assert "EXT4-fs error" not in releases.board.emulator.console.read_text("utf-8", "replace")
    found = releases.observe()
    assert found in (old, new)
    if done["told"]:
        assert found == new
    note("power", f"{number:03}", **done, found="new" if found == new else "old")
    # A rollback that is done would be undone by another; anything else that takes the lock shows that it is free.
    releases.finish("nothing" if operation == "rollback" and found == new else operation)
    assert releases.observe() == new
