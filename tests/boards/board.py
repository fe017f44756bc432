"""A board as tests use it: the command line from this machine, Python and a shell over there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lab.boards import Board
from lab.emulator import Emulator
from lab.network import Link

#: Everything takes tens of times longer there than on a board.
PATIENCE_S = 900
#: The environment that provision makes.
PYTHON = ".edge-infer/venv/bin/python"


class TestBoard:
    """``board`` with ``home`` on this machine: an ssh_config that knows it, and what edge-infer keeps."""

    __test__ = False

    def __init__(self, board: Board, home: Path) -> None:
        self.board = board
        self.name = board.name
        self.emulator = Emulator(board)
        self.home = home

    # -- switching -----------------------------------------------------------------------------------------------------

    def start(self, **how: Any) -> None:
        """Switched on and answering, at the same port as before."""
        port = json.loads(self.emulator.state.read_text())["port"] if self.emulator.state.is_file() else None
        port = self.emulator.start(port=port, **how)
        config = self.home / ".ssh" / "config.d" / self.name
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(self.board.ssh_config(port))
        (self.home / ".ssh" / "config").write_text("Include config.d/*\n")
        self.emulator.wait()

    def restart(self, **how: Any) -> None:
        """Off without a warning, and on again."""
        self.emulator.cut_power()
        self.start(**how)

    def resize(self, memory_bytes: int) -> None:
        """With so much memory, on again after an orderly stop unless it has that already."""
        if self.board.kind.memory_bytes == memory_bytes:
            return
        self.emulator.stop()
        self.board = dataclasses.replace(
            self.board, kind=dataclasses.replace(self.board.kind, memory_bytes=memory_bytes)
        )
        self.emulator = Emulator(self.board)
        self.start()

    def copy_card(self, place: Path) -> Path:
        """The card as it is after an orderly stop; the board is off then."""
        self.emulator.stop()
        shutil.copyfile(self.board.card, place)
        return place

    # -- from here -----------------------------------------------------------------------------------------------------

    def command(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "edge_infer.cli", *map(str, words)]

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name != "SSH_AUTH_SOCK"}
        return {**inherited, "HOME": str(self.home), "EDGE_INFER_HOME": str(self.home / ".edge-infer")}

    def edge_infer(self, *words: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the host's command line; it must end with ``status``."""
        done = subprocess.run(
            self.command(*words),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def answer(self, *words: str | Path, status: int = 0) -> dict[str, Any]:
        """What the command line says with --json."""
        return json.loads(self.edge_infer(*words, "--json", status=status).stdout)

    # -- over there ----------------------------------------------------------------------------------------------------

    def shell(
        self, script: str, *, user: str = "pi", given: bytes = b"", check: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            self.emulator.ssh(user, script), input=given, capture_output=True, timeout=PATIENCE_S, check=False
        )
        if check:
            assert done.returncode == 0, f"{script}: {done.returncode}\n{done.stdout!r}\n{done.stderr!r}"
        return done

    def python(self, code: str, *, python: str = PYTHON, user: str = "pi") -> Any:
        """Run ``code`` in the environment of the board; what it prints as JSON in its last line."""
        done = self.shell(f"{python} -", given=code.encode(), user=user)
        return json.loads(done.stdout.splitlines()[-1])

    def put(self, content: bytes, path: str, *, user: str = "pi") -> None:
        self.shell(f"cat > {path}", given=content, user=user)

    def link(self, link: Link) -> None:
        self.emulator.link(link)
