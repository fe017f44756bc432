"""The model on a board: releases of it, what serves now, and a push that runs while a test does something else."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from handmade import rebuild

from boards.board import PATIENCE_S, TestBoard
from edge_infer.bundle import Bundle

#: Loaded by name, every file by its hash; the golden questions are answered.
SERVES = """
import json
import edge_infer
from edge_infer.bundle import verify
from edge_infer.runtime.golden import self_test

with edge_infer.load("digits", verify="full") as session:
    self_test(session)
    print(json.dumps(session.bundle.digest))
"""

#: Waits until so many of the random bytes of a release have come, and says how many it is.
STAGED = """
file=/home/pi/.edge-infer/staging/{}/attached.bin
until [ $(stat -c %s $file 2>/dev/null || echo 0) -ge {} ]; do sleep 0.1; done
stat -c %s $file
""".strip()


def serving(board: TestBoard) -> str:
    """The digest of the release that serves and answers."""
    return str(board.python(SERVES))


def release(bundle: Bundle, folder: Path, number: int, size: int) -> Bundle:
    """The same network beside ``size`` random bytes, which no two numbers have in common."""

    def attach(files: Path) -> None:
        (files / "attached.bin").write_bytes(random.Random(number).randbytes(size))

    return rebuild(bundle, folder / f"{number}.edge", attach, version=f"1.{number}")


def staged(board: TestBoard, bundle: Bundle, enough: int = 1) -> int:
    """Wait until ``enough`` of the bundle's random bytes have come; gives how many there are."""
    return int(board.shell(STAGED.format(bundle.digest, enough)).stdout)


class Started:
    """A command line of the host that runs beside the test."""

    def __init__(self, board: TestBoard, *words: str | Path, home: Path | None = None) -> None:
        environment = board.environment()
        if home is not None:
            environment.update(HOME=str(home), EDGE_INFER_HOME=str(home / ".edge-infer"))
        self.process = subprocess.Popen(
            board.command(*words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self) -> tuple[int, str]:
        """Its exit status, and all that it said."""
        said = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, "".join(said)

    def kill(self) -> None:
        """Without a word to the board, as far as it goes: the system closes its connection."""
        self.process.kill()
        self.process.communicate()


def wait_for(is_so: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)
