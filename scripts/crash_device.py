"""Devices on this machine whose receiver is watched, killed, or runs fast: for the scripts that try crash points."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from crash_trace import strace

from edge_infer.deploy import receiver
from edge_infer.deploy.local import LocalProcess, LocalTransport

#: The kernel's EXT4_IOC_SHUTDOWN and EXT4_GOING_FLAGS_NOLOGFLUSH: nothing that is not on the disk by now comes there.
SHUTDOWN, NOLOGFLUSH = 0x8004587D, 2

#: Answers for the serving Python in a millisecond, where the engine's answer is not what is tested. It makes no
#: environments.
QUICK_PYTHON = """#!/bin/sh
case "$1 $2" in
"-I -c") exec %s "$@" ;;
"-I "*) exit 1 ;;
"-c "*) echo '%s' ;;
*) echo '{"kept": true, "chosen": "1 thread", "engine": {"package": "onnxruntime", "version": "1"}}' ;;
esac
"""


def quick_python(folder: Path) -> str:
    """A stand-in for a device's Python, whose self-test always passes."""
    from importlib.metadata import version

    facts = {"python": "3.11", "packages": {name: version(name) for name in ("edge-infer", "onnxruntime")}}
    path = folder / "python"
    path.write_text(QUICK_PYTHON % (sys.executable, json.dumps(facts)))
    path.chmod(0o755)
    return str(path)


class Watched(LocalTransport):
    """A device whose receivers run under strace; ``records`` are what it wrote. ``python`` serves the models.

    ``before`` is Python code that a receiver runs before anything else, to break it on purpose.
    """

    def __init__(self, store: Path, records: Path, before: str = "") -> None:
        super().__init__(f"local:{store}")
        self.python = sys.executable
        self.records: list[Path] = []
        self._folder, self._before = records, before
        self._inject: list[str] = []

    def start(self, command: list[str]) -> LocalProcess:
        *python, code = command
        return super().start([*self._strace(), *python, self._before + code])

    def run(self, code: str, *arguments: str) -> None:
        """Run Python code as an application on the device does."""
        subprocess.run([*self._strace(), self.python, "-c", code, *arguments], check=True)

    def _strace(self) -> list[str]:
        path = self._folder / f"record-{len(self.records)}"
        self.records.append(path)
        return strace(path, *self._inject)

    @contextmanager
    def killed_at(self, call: str, number: int) -> Iterator[None]:
        """A receiver started in here dies by SIGKILL when it makes that call for the ``number``-th time."""
        self._inject = ["-e", f"inject={call}:signal=KILL:when={number}"]
        try:
            yield
        finally:
            self._inject = []


class Killed(LocalTransport):
    """A device whose receiver dies by SIGKILL when it makes ``call`` for the ``number``-th time."""

    def __init__(self, store: Path, python: str, call: str, number: int) -> None:
        super().__init__(f"local:{store}")
        self.python = python
        # strace ends by the signal that ended what it watched.
        self._strace = ["strace", "-qq", "-e", "signal=none", "-e", f"trace={call}"]
        self._strace += ["-e", f"inject={call}:signal=KILL:when={number}", "-o", os.devnull, "--"]
        self._started: LocalProcess | None = None

    def start(self, command: list[str]) -> LocalProcess:
        self._started = super().start([*self._strace, *command])
        return self._started

    @property
    def died(self) -> bool:
        """Whether the receiver was killed."""
        assert self._started is not None
        return self._started._child.wait() == -signal.SIGKILL


class Quick(LocalTransport):
    """A device whose receiver is a fork of this process, so that it starts in milliseconds."""

    def __init__(self, store: Path, python: str) -> None:
        super().__init__(f"local:{store}")
        self.python = python

    def start(self, command: list[str]) -> LocalProcess:
        spool = tempfile.TemporaryFile()  # noqa: SIM115  LocalProcess closes it
        return LocalProcess(cast("subprocess.Popen[bytes]", Fork(spool)), spool)


class Fork:
    """What ``subprocess.Popen`` is to LocalProcess, for a forked receiver."""

    def __init__(self, spool: IO[bytes]) -> None:
        asked, told = os.pipe(), os.pipe()
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                for number, descriptor in enumerate((asked[0], told[1], spool.fileno())):
                    os.dup2(descriptor, number)
                os.closerange(3, 256)
                serve()
            finally:
                os._exit(1)  # a second copy of the caller must not go on
        os.close(asked[0])
        os.close(told[1])
        self.stdin, self.stdout = os.fdopen(asked[1], "wb", 0), os.fdopen(told[0], "rb")

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Waits as long as it takes: the receiver ends once its input does."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


def serve() -> None:
    """Run the receiver on descriptors 0 to 2, passing over the program that the host sends."""
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    length = b""
    while not length.endswith(b"\n"):
        length += os.read(0, 1)
    left = int(length)
    while left:
        left -= len(os.read(0, left))
    receiver.main()
    sys.stdout.flush()
    os._exit(0)


# -- a disk of its own -------------------------------------------------------------------------------------------------


def make_image(path: Path) -> None:
    """An empty ext4 file system of 64 MB in a file."""
    with path.open("wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True)


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """The image's file system at ``folder``, which writes by itself only after ten minutes. Needs root."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop,commit=600", str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def cut_power(folder: Path) -> None:
    """Stop the ext4 file system at ``folder`` at once, as a power cut would. It must be mounted anew."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, SHUTDOWN, bytes(ctypes.c_uint32(NOLOGFLUSH)))
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Let everything written so far reach the disk."""
    subprocess.run(["sync", "-f", str(folder)], check=True)
