"""Start the receiver on a device and talk to it: one process, lines of JSON, raw bytes of files."""

from __future__ import annotations

import functools
import getpass
import importlib
import inspect
import json
import os
import socket
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_infer.admission import rebuild
from edge_infer.deploy.local import PREFIX, LocalTransport
from edge_infer.deploy.transport import SLICE_BYTES, Process, Transport
from edge_infer.errors import DeviceError, EdgeInferError, UsageError

#: Modules that go along, in the order of their imports.
MODULES = (
    "edge_infer.errors",
    "edge_infer.records",
    "edge_infer.manifest",
    "edge_infer.bundle",
    "edge_infer.pointer",
    "edge_infer.journal",
    "edge_infer.store",
    "edge_infer.trust",
    "edge_infer.delta",
    "edge_infer.admission",
    "edge_infer.emulation",
    "edge_infer.deploy.device",
    "edge_infer.deploy.incoming",
    "edge_infer.deploy.signers",
    "edge_infer.deploy.trial",
    "edge_infer.deploy.receiver",
)

#: Seconds to wait for what a process that ended had to say.
LAST_WORDS_S = 1.0

BY_SFTP = "push with --sftp, which promises less (no self-test there)"

#: All that stands on the command line: it reads its length, then itself.
BOOTSTRAP = "import sys, zlib; f = sys.stdin.buffer; exec(zlib.decompress(f.read(int(f.readline()))))"

#: Puts the modules into sys.modules under their own names, so that they import each other as on the host.
LOADER = """
import sys, types
if sys.version_info < (3, 8):
    sys.exit("edge-infer needs Python 3.8 or later on the device, this is %d.%d" % sys.version_info[:2])
for name in ("edge_infer", "edge_infer.deploy"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for name, source in {sources!r}:
    module = sys.modules[name] = types.ModuleType(name)
    parent, _, leaf = name.rpartition(".")
    setattr(sys.modules[parent], leaf, module)
    exec(compile(source, "<%s>" % name, "exec"), module.__dict__)
sys.modules[{main!r}].main()
"""


def open_transport(address: str, **ssh_options: Any) -> Transport:
    """The way to a device by its address: ``local:PATH``, or an SSH address or alias. Raises UsageError."""
    if address.startswith(PREFIX):
        return LocalTransport(address)
    from edge_infer.deploy.ssh import SshTransport

    return SshTransport(address, **ssh_options)


@functools.cache
def payload(more: tuple[str, ...] = ()) -> bytes:
    """The receiver and what it needs, as one compressed program with its length before it.

    ``more`` are modules beyond those of a push; the last of them takes the receiver's place.
    """
    names = (*MODULES, *more)
    sources = [(name, inspect.getsource(importlib.import_module(name))) for name in names]
    text = LOADER.replace("{main!r}", repr(names[-1])).replace("{sources!r}", repr(sources))
    program = zlib.compress(text.encode(), 9)
    return b"%d\n" % len(program) + program


def myself() -> str:
    """Who pushes, for the device's journal: ``user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


class Conversation:
    """A running receiver. Use it as a context manager.

    ``store`` is the folder of the device's store (default: ``$EDGE_INFER_HOME`` or ``~/.edge-infer`` there);
    ``more`` as for ``payload``. Raises UsageError for a ``store`` beside ``local:PATH``, which names it already.
    """

    def __init__(self, transport: Transport, store: str | None = None, more: Sequence[str] = ()) -> None:
        self._transport = transport
        self._store, python = store, "python3"
        if isinstance(transport, LocalTransport):
            if store is not None:
                raise UsageError(f"{transport.address} names its store itself, expected no other ({store}) beside it")
            self._store, python = str(transport.store.absolute()), sys.executable
        self._process: Process = transport.start([python, "-c", BOOTSTRAP])
        self._unsent = payload(tuple(more))

    def ask(self, op: str, **request: Any) -> Mapping[str, Any]:
        """Send a request and wait for its answer. Raises the device's own error, or DeviceError."""
        self.send(op, **request)
        line = self._answer()
        try:
            message = json.loads(line)
        except ValueError:
            if b"sftp" in line:  # what OpenSSH's own server says where nothing else is allowed
                raise DeviceError(f"{self._transport.address} runs no commands, only SFTP; {BY_SFTP}") from None
            raise DeviceError(
                f"{self._transport.address} answered {line[:80]!r}, which is no answer of the receiver; see that its "
                "login shell prints nothing of its own"
            ) from None
        if "error" in message:
            raise _from_device(self._transport.address, rebuild(message["error"]))
        answer: Mapping[str, Any] = message["ok"]
        return answer

    def send(self, op: str, **request: Any) -> None:
        """Send a request that has no answer, or whose answer is read later."""
        line = json.dumps({"op": op, "store": self._store, **request}).encode() + b"\n"
        data, self._unsent = self._unsent + line, b""
        self._write(data)

    def send_file(
        self,
        name: str,
        path: Path,
        offset: int,
        progress: Callable[[int], None] = lambda sent: None,
        op: str = "file",
        **more: str,
    ) -> int:
        """Send a file from ``offset`` on; gives the bytes sent, and tells ``progress`` of each part that has gone."""
        size = path.stat().st_size - offset
        self.send(op, name=name, offset=offset, size=size, **more)
        with path.open("rb") as file:
            file.seek(offset)
            while data := file.read(SLICE_BYTES):
                self._write(data)
                progress(len(data))
        return size

    def end(self) -> None:
        """Say that nothing more is asked, and wait until the receiver has put away what it keeps for this only."""
        self._process.close_input()
        self._process.wait()

    def _write(self, data: bytes) -> None:
        """Write; when the receiver is gone, its last words say why better than the broken pipe."""
        try:
            self._process.write(data)
        except DeviceError as error:
            line = b""
            try:
                line = self._process.readline()
                message = json.loads(line)
            except (DeviceError, ValueError):
                raise self._failed(error) from None
            raise _from_device(self._transport.address, rebuild(message.get("error", {}))) from None

    def _answer(self) -> bytes:
        line = self._process.readline()
        if not line:
            raise self._failed(DeviceError("the receiver ended without an answer"))
        return line

    def _failed(self, error: DeviceError) -> DeviceError:
        words = self._last_words().strip().splitlines()
        address = self._transport.address
        if words and ("python3" in words[-1] and "not found" in words[-1]):
            return DeviceError(f"{address} has no python3; install Python 3.10 or later there, or {BY_SFTP}")
        return DeviceError(f"{address}: {words[-1][:300]}" if words else f"{address}: {error}")

    def _last_words(self) -> str:
        """Its standard error, which may arrive a moment after the end of its output."""
        end = time.monotonic() + LAST_WORDS_S
        while not (words := self._process.errors()) and time.monotonic() < end:
            time.sleep(0.02)
        return words

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()


def _from_device(address: str, error: EdgeInferError) -> EdgeInferError:
    """The same error with the device's name before it. Whatever it is there, here it is a device that failed."""
    text = f"{address}: {error}"
    return type(error)(text) if error.exit_status == DeviceError.exit_status else DeviceError(text)
