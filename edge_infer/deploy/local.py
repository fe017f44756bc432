"""This machine as a device: ``local:PATH`` addresses, PATH being the device's store folder."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from edge_infer.deploy.transport import SLICE_BYTES
from edge_infer.errors import DeviceError, UsageError

#: A line of output longer than this is refused: it is no answer to anything that a push asks.
MAX_LINE_BYTES = 1 << 20
#: How much of a command's standard error is kept.
ERRORS_BYTES = 8 * 1024
#: Seconds that a stopped command has to clean up before it is killed.
STOP_S = 2.0

PREFIX = "local:"


class LocalTransport:
    """Runs commands on this machine. ``store`` is the folder that the address names.

    Raises UsageError when ``address`` is not ``local:PATH``.
    """

    def __init__(self, address: str) -> None:
        path = address.removeprefix(PREFIX)
        if path == address or not path:
            raise UsageError(f"{address!r} names no folder, expected {PREFIX}PATH")
        self.address = address
        self.store = Path(path).expanduser()

    def start(self, command: list[str]) -> LocalProcess:
        """Start ``command``. Raises DeviceError when that is not possible."""
        with contextlib.ExitStack() as undo:
            spool = undo.enter_context(tempfile.TemporaryFile())
            pipe = subprocess.PIPE
            try:
                # A session of its own: Ctrl-C reaches this process alone, which then stops the command in close().
                child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=spool, start_new_session=True)
            except (OSError, ValueError) as error:
                raise DeviceError(f"cannot start {shlex.join(command)} on this machine: {error}") from error
            undo.pop_all()
        return LocalProcess(child, spool)

    def close(self) -> None:
        """Nothing to end: each process is let go of by its own ``close``."""


class LocalProcess:
    """A command running on this machine. Use it from one thread, or read in one and write in another."""

    def __init__(self, child: subprocess.Popen[bytes], spool: IO[bytes]) -> None:
        assert child.stdin is not None and child.stdout is not None
        self.pid = child.pid
        self._child = child
        self._input = child.stdin
        self._output = child.stdout
        # A file, not a pipe: it cannot fill up and block the command, and needs no thread to empty it.
        self._spool = spool

    def write(self, data: bytes | memoryview) -> None:
        """Write all of ``data`` to its standard input. Raises DeviceError when the command has ended."""
        if self._input.closed:
            raise DeviceError(after_the_end("this machine"))
        view = memoryview(data).cast("B")
        try:
            while view:
                view = view[os.write(self._input.fileno(), view[:SLICE_BYTES]) :]
        except OSError as error:
            raise DeviceError(ended_early("this machine", self.errors())) from error

    def readline(self) -> bytes:
        """One line of its standard output, or ``b""`` at the end. Raises DeviceError for one over 1 MiB."""
        return read_line(self._output, "this machine")

    def close_input(self) -> None:
        """End of its standard input."""
        self._input.close()

    def wait(self) -> int:
        """Wait for the end and return the exit status; output not read by then is thrown away.

        Raises DeviceError when a signal ended the command, so that there is no status.
        """
        drain(self._output)
        status = self._child.wait()
        if status < 0:
            name = signal.Signals(-status).name
            raise DeviceError(f"the command was ended by {name} on this machine{last_words(self.errors())}")
        return status

    def errors(self) -> str:
        """The last 8 KiB of its standard error so far; nothing after ``close``."""
        if self._spool.closed:
            return ""
        # pread, because the command shares this file's position.
        size = os.fstat(self._spool.fileno()).st_size
        tail = os.pread(self._spool.fileno(), ERRORS_BYTES, max(0, size - ERRORS_BYTES))
        return tail.decode("utf-8", "replace")

    def close(self) -> None:
        """Let go of it; a command that still runs is stopped, with all that it started. May be called again."""
        self._input.close()
        if self._child.poll() is None:
            self._stop()
        self._output.close()
        self._spool.close()

    def _stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(STOP_S)
                return


def read_line(stream: IO[bytes], where: str) -> bytes:
    """The next line of a command's output, ``b""`` at the end. Raises DeviceError when it is over 1 MiB."""
    line = stream.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise DeviceError(
            f"a line of output on {where} is over {MAX_LINE_BYTES} bytes, which no answer is; "
            "see whether the login shell there prints something of its own"
        )
    return line


def drain(stream: IO[bytes]) -> None:
    """Throw away the rest of a command's output: a full pipe would keep the command from ending."""
    while stream.read(SLICE_BYTES):
        pass


def ended_early(where: str, errors: str) -> str:
    """The sentence for a write that nobody reads any more."""
    return f"the command on {where} ended while data was being sent to it{last_words(errors)}"


def after_the_end(where: str) -> str:
    """The sentence for a write after ``close_input``, which paramiko would try for ever."""
    return f"nothing can be written to the command on {where}: its input has been ended"


def last_words(errors: str) -> str:
    """The last line of a command's standard error, ready to end a sentence with; empty when there is none."""
    lines = errors.split("\n")
    return next((f": {line.strip()[:200]}" for line in reversed(lines) if line.strip()), "")
