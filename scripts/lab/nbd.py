"""The Network Block Device protocol over a unix socket, as server and as client: what QEMU speaks to a card.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: the fixed newstyle handshake, one export without
a name, simple replies.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Protocol

SECTOR = 512
#: The longest read or write in one request.
MAX_BYTES = 32 * 2**20
#: No option that means something here is longer.
MAX_OPTION_BYTES = 8192

GREETING, OPTION_MAGIC, OPTION_REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
OPTION, OPTION_REPLY = struct.Struct(">QII"), struct.Struct(">QIII")
REQUEST, REPLY = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")
EXPORT = struct.Struct(">QH")
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
#: Errors that the protocol has, under the numbers of Linux; others arrive as EIO.
ERRORS = {errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.ESHUTDOWN}


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7


class Answer(IntEnum):
    """To an option; errors have the highest bit."""

    ACK = 1
    SERVER = 2
    INFO = 3
    UNSUPPORTED = 2**31 + 1
    INVALID = 2**31 + 3
    UNKNOWN = 2**31 + 6


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


class Handshake(IntFlag):
    FIXED = 1
    NO_ZEROES = 2


class Can(IntFlag):
    """What an export says of itself."""

    FLAGS = 1
    READ_ONLY = 2
    FLUSH = 4
    FUA = 8
    TRIM = 32
    WRITE_ZEROES = 64


class With(IntFlag):
    """What a request asks for besides. FUA: durable before it is answered."""

    FUA = 1
    NO_HOLE = 2


class Device(Protocol):
    """What a server serves. Offsets and lengths are whole sectors within ``size`` bytes; OSErrors go to the client."""

    size: int
    read_only: bool

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes, durable: bool) -> None: ...
    def trim(self, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...


class Gone(ConnectionError):
    """The other side has left, or speaks so that nothing after it can be understood."""


class Wire:
    """Whole messages over a connection; Gone when one stops halfway."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.reader = connection.makefile("rb")
        self.give = connection.sendall

    def take(self, length: int) -> bytes:
        data = self.reader.read(length)
        if len(data) < length:
            raise Gone(f"{len(data)} of {length} bytes arrived")
        return data

    def close(self) -> None:
        self.reader.close()
        self.connection.close()


# -- server ------------------------------------------------------------------------------------------------------------


def serve(connection: socket.socket, device: Device) -> None:
    """Answer one client until it leaves or cannot be understood."""
    wire = Wire(connection)
    try:
        _offer(wire, device)
        while _answer_request(wire, device):
            pass
    except ConnectionError:
        pass
    finally:
        wire.close()


def _offer(wire: Wire, device: Device) -> None:
    """The handshake, until the client has taken the export."""
    wire.give(struct.pack(">QQH", GREETING, OPTION_MAGIC, Handshake.FIXED | Handshake.NO_ZEROES))
    (flags,) = struct.unpack(">I", wire.take(4))
    if flags & ~int(Handshake.FIXED | Handshake.NO_ZEROES):
        raise Gone(f"unknown flags {flags:#x}")
    while True:
        magic, option, length = OPTION.unpack(wire.take(OPTION.size))
        if magic != OPTION_MAGIC or length > MAX_OPTION_BYTES:
            raise Gone(f"no option: magic {magic:#x}, {length} bytes")
        data = wire.take(length)
        if option == Option.EXPORT_NAME:
            if data:
                raise Gone(f"no export {data!r}")
            wire.give(_export(device) + (b"" if flags & Handshake.NO_ZEROES else bytes(124)))
            return
        answers = _answers(option, data, device)
        for answer, content in answers:
            wire.give(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, answer, len(content)) + content)
        if option == Option.ABORT:
            raise Gone("nothing here was wanted")
        if option == Option.GO and answers[-1][0] == Answer.ACK:
            return


def _answers(option: int, data: bytes, device: Device) -> list[tuple[Answer, bytes]]:
    if option == Option.ABORT:
        return [(Answer.ACK, b"")]
    if option == Option.LIST:
        return [(Answer.INVALID, b"")] if data else [(Answer.SERVER, bytes(4)), (Answer.ACK, b"")]
    if option not in (Option.INFO, Option.GO):
        return [(Answer.UNSUPPORTED, b"")]
    # The length of a name, the name, the number of details that are asked for, two bytes for each.
    name_bytes = int.from_bytes(data[:4], "big")
    asked = int.from_bytes(data[4 + name_bytes : 6 + name_bytes], "big")
    if len(data) != 6 + name_bytes + 2 * asked:
        return [(Answer.INVALID, b"")]
    if name_bytes:
        return [(Answer.UNKNOWN, b"")]
    export = struct.pack(">H", INFO_EXPORT) + _export(device)
    sizes = struct.pack(">HIII", INFO_BLOCK_SIZE, SECTOR, 8 * SECTOR, MAX_BYTES)
    return [(Answer.INFO, export), (Answer.INFO, sizes), (Answer.ACK, b"")]


def _export(device: Device) -> bytes:
    can = Can.FLAGS | Can.FLUSH | Can.FUA | Can.TRIM | Can.WRITE_ZEROES
    return EXPORT.pack(device.size, can | Can.READ_ONLY if device.read_only else can)


def _answer_request(wire: Wire, device: Device) -> bool:
    """Answer one request; False when the client takes its leave."""
    magic, flags, command, handle, offset, length = REQUEST.unpack(wire.take(REQUEST.size))
    if magic != REQUEST_MAGIC or (command == Command.WRITE and length > MAX_BYTES):
        raise Gone(f"no request: magic {magic:#x}, command {command}, {length} bytes")
    if command == Command.DISCONNECT:
        return False
    given = wire.take(length) if command == Command.WRITE else b""
    try:
        _check(device, flags, command, offset, length)
        status, data = 0, _do(device, flags, command, offset, length, given)
    except OSError as error:
        status, data = error.errno if error.errno in ERRORS else errno.EIO, b""
    wire.give(REPLY.pack(REPLY_MAGIC, status, handle) + data)
    return True


def _check(device: Device, flags: int, command: int, offset: int, length: int) -> None:
    """OSError for what no card could do."""
    allowed = With.FUA | With.NO_HOLE if command == Command.WRITE_ZEROES else With.FUA
    if flags & ~int(allowed):
        raise OSError(errno.EINVAL, f"flags {flags:#x} with command {command}")
    if command == Command.FLUSH:
        return
    if command != Command.READ and device.read_only:
        raise OSError(errno.EPERM, "read-only")
    if (offset | length) % SECTOR or (length > MAX_BYTES and command != Command.TRIM):
        raise OSError(errno.EINVAL, f"{length} bytes at {offset}")
    if offset + length > device.size:
        outside = errno.EINVAL if command == Command.READ else errno.ENOSPC
        raise OSError(outside, f"{length} bytes at {offset} of {device.size}")


def _do(device: Device, flags: int, command: int, offset: int, length: int, given: bytes) -> bytes:
    if command == Command.READ:
        return device.read(offset, length)
    if command == Command.FLUSH:
        device.flush()
    elif command == Command.TRIM:
        device.trim(offset, length)
    elif command == Command.WRITE:
        device.write(offset, given, bool(flags & With.FUA))
    elif command == Command.WRITE_ZEROES:
        device.write(offset, bytes(length), bool(flags & With.FUA))
    else:
        raise OSError(errno.EINVAL, f"command {command}")
    return b""


# -- client ------------------------------------------------------------------------------------------------------------


class Client:
    """A server's export without a name, one request after another; OSError for what the server refuses."""

    def __init__(self, path: Path) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(os.fspath(path))
        self.wire = Wire(connection)
        self.wire.take(18)  # the greeting
        self.wire.give(struct.pack(">I", Handshake.FIXED | Handshake.NO_ZEROES))
        self.size = self.flags = 0
        for answer, content in self.option(Option.GO, struct.pack(">IHH", 0, 1, INFO_BLOCK_SIZE)):
            if answer not in (Answer.ACK, Answer.INFO):
                raise Gone(f"the server answers {answer:#x}: {content!r}")
            if answer == Answer.INFO and content[:2] == struct.pack(">H", INFO_EXPORT):
                self.size, self.flags = EXPORT.unpack(content[2:])

    def option(self, option: int, data: bytes) -> list[tuple[int, bytes]]:
        """The answers to an option, the last of which is ACK or an error."""
        self.wire.give(OPTION.pack(OPTION_MAGIC, option, len(data)) + data)
        answers: list[tuple[int, bytes]] = []
        while not answers or answers[-1][0] in (Answer.SERVER, Answer.INFO):
            _, _, answer, length = OPTION_REPLY.unpack(self.wire.take(OPTION_REPLY.size))
            answers.append((answer, self.wire.take(length)))
        return answers

    def request(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> bytes:
        self.wire.give(REQUEST.pack(REQUEST_MAGIC, flags, command, 1, offset, length) + data)
        _, status, _ = REPLY.unpack(self.wire.take(REPLY.size))
        if status:
            raise OSError(status, os.strerror(status))
        return self.wire.take(length) if command == Command.READ else b""

    def read(self, offset: int, length: int) -> bytes:
        return self.request(Command.READ, offset, length)

    def write(self, offset: int, data: bytes, durable: bool = False) -> None:
        self.request(Command.WRITE, offset, len(data), data, With.FUA if durable else 0)

    def flush(self) -> None:
        self.request(Command.FLUSH)

    def close(self) -> None:
        """Take leave."""
        self.wire.give(REQUEST.pack(REQUEST_MAGIC, 0, Command.DISCONNECT, 0, 0, 0))
        self.wire.close()
