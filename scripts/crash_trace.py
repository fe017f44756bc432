"""What a process and its children do to a folder, as the kernel sees it: strace's record turned into a Disk's events.

The record holds every byte written, so it is meant for small bundles. A call on the folder that is not understood
ends the reading with an error, and whoever records compares the outcome with the real folder: nothing goes unseen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from crash_disk import Disk, Node

#: All calls that change files, say that they are to last, or make and copy descriptors.
CALLS = (
    *("openat", "open", "creat", "openat2", "close", "dup", "dup2", "dup3", "fcntl", "lseek"),
    *("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range", "splice"),
    *("ftruncate", "truncate", "fallocate", "mmap"),
    *("mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir"),
    *("link", "linkat", "symlink", "symlinkat"),
    *("fsync", "fdatasync", "sync", "syncfs", "sync_file_range", "msync"),
    *("clone", "clone3", "fork", "vfork"),
)
#: Those that change what is on the disk, or make it last.
CHANGES = (
    *("write", "pwrite64", "writev", "sendfile", "copy_file_range", "ftruncate"),
    *("mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "symlink", "link"),
    *("fsync", "fdatasync", "openat", "flock"),
)
#: Calls on the folder that would need a model of their own, and that nothing here makes.
UNKNOWN = ("openat2", "pwritev", "pwritev2", "splice", "fallocate", "link", "linkat", "sync_file_range", "msync")


def strace(record: Path, *options: str) -> list[str]:
    """The command line before a command whose calls go to the file ``record``."""
    # No limit on strings, everything in hexadecimal: names and data may hold quotes and newlines.
    # The filter makes it five times as fast, but with it strace kills nothing.
    fast = () if options else ("--seccomp-bpf",)
    return ["strace", "-f", "-y", "-xx", "-s", str(2**26), *fast, "-e", "signal=none", *options,
            "-e", "trace=" + ",".join(CALLS), "-o", str(record), "--"]  # fmt: skip


@dataclass
class Open:
    """What a descriptor stands for."""

    node: Node
    append: bool
    offset: int = 0


@dataclass
class Call:
    pid: int
    name: str
    arguments: list[str]
    result: str

    @property
    def value(self) -> int:
        return int(self.result.split("<")[0].split()[0], 0)


HEX = re.compile(r"\\x([0-9a-f]{2})")
LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (.+)\Z", re.S)
UNFINISHED = re.compile(r"(\d+) +(\w+\(.*) <unfinished \.\.\.>\Z", re.S)
RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)\Z", re.S)
DESCRIPTOR = re.compile(r"(-?\d+|AT_FDCWD)(?:<(.*)>)?(?:\(deleted\))?\Z")


def calls(record: Path) -> Iterator[Call]:
    """The calls that succeeded, in the order in which they ended; the last ones of a killed process have no end."""
    begun: dict[str, str] = {}
    for line in record.read_text("ascii").splitlines():
        if found := UNFINISHED.match(line):
            begun[found[1]] = found[2]
            continue
        if found := RESUMED.match(line):
            line = f"{found[1]} {begun.pop(found[1])}{found[2]}"  # noqa: PLW2901
        if (found := LINE.match(line)) and found[4][0] not in "-?":
            yield Call(int(found[1]), found[2], _split(found[3]), found[4])


def _split(text: str) -> list[str]:
    """Arguments; commas within brackets separate nothing."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        if letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and not depth:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def _bytes(text: str) -> bytes:
    """A string of the record, or all strings of a list of buffers."""
    return b"".join(bytes.fromhex(part.replace("\\x", "")) for part in re.findall(r'"([^"]*)"', text))


def _path(text: str) -> str:
    return os.fsdecode(_bytes(text))


class Replay:
    """Reads records, one after the other, into the events of ``disk``."""

    def __init__(self, disk: Disk) -> None:
        self.disk, self.root = disk, str(disk.root)
        self.tables: dict[int, dict[int, Open]] = {}
        self.host = 0  # the process whose standard output goes to the host

    def read(self, record: Path) -> None:
        """Add a record. Raises ValueError for a call on the folder that has no model."""
        self.tables, self.host = {}, 0
        for call in calls(record):
            self.host = self.host or call.pid
            handle = HANDLERS.get(call.name)
            if handle is not None:
                handle(self, call)
            elif call.name in UNKNOWN and os.fsencode(self.root).hex() in "".join(call.arguments).replace("\\x", ""):
                raise ValueError(f"{call} is not modelled")

    # -- finding things ----------------------------------------------------------------------------------------

    def table(self, pid: int) -> dict[int, Open]:
        return self.tables.setdefault(pid, {})

    def open_at(self, call: Call, argument: int = 0) -> Open | None:
        """What the descriptor stands for; None when it is nothing in the folder."""
        found = DESCRIPTOR.match(call.arguments[argument])
        if found is None or found[2] is None or not self.is_inside(_hex_text(found[2])):
            return None
        opened = self.table(call.pid).get(int(found[1]))
        if opened is None:
            raise ValueError(f"{call} is on a descriptor that nobody opened")
        return opened

    def is_inside(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + "/")

    def key(self, call: Call, path: int, folder: int | None = None) -> tuple[Node, str] | None:
        """Folder and name that the arguments mean; None outside."""
        name = _path(call.arguments[path])
        if folder is not None and not name.startswith("/"):
            found = DESCRIPTOR.match(call.arguments[folder])
            assert found is not None and found[2] is not None, call
            name = _hex_text(found[2]) + "/" + name
        if not name.startswith("/"):
            raise ValueError(f"{call.name} of {name!r} is relative to a folder that the record does not say")
        name = os.path.normpath(name)
        if not self.is_inside(name) or name == self.root:
            return None
        node = self.disk.top
        *parents, last = name[len(self.root) + 1 :].split("/")
        for part in parents:
            node = node.names[part]
            if node.kind == "link":
                return None  # leads out, such as to an environment's Python
        return node, last

    # -- handlers ----------------------------------------------------------------------------------------------

    def openat(self, call: Call) -> None:
        self.opened(call, 1, 0)

    def open(self, call: Call) -> None:
        self.opened(call, 0, None)

    def opened(self, call: Call, path: int, folder: int | None) -> None:
        number, flags = call.value, call.arguments[path + 1].split("|")
        self.table(call.pid).pop(number, None)
        shown = DESCRIPTOR.match(call.result.split("(deleted)")[0])
        where = _hex_text(shown[2]) if shown and shown[2] else ""
        if not self.is_inside(where):
            return
        if where == self.root:
            self.table(call.pid)[number] = Open(self.disk.top, False)
            return
        key = self.key(call, path, folder)
        if key is None:
            return
        node = key[0].names.get(key[1])
        if node is None:
            node = Node("file")
            self.disk.name((key, node))
        elif node.kind == "link":
            raise ValueError(f"{call} follows a link")
        elif "O_TRUNC" in flags:
            self.disk.cut(node, 0)
        self.table(call.pid)[number] = Open(node, "O_APPEND" in flags)

    def close(self, call: Call) -> None:
        found = DESCRIPTOR.match(call.arguments[0])
        assert found is not None
        self.table(call.pid).pop(int(found[1]), None)

    def dup(self, call: Call) -> None:
        """dup, dup2, dup3 and fcntl's F_DUPFD: another number for the same."""
        if call.name == "fcntl" and not call.arguments[1].startswith("F_DUPFD"):
            return
        self.table(call.pid).pop(call.value, None)
        opened = self.open_at(call)
        if opened is not None:
            self.table(call.pid)[call.value] = opened

    def lseek(self, call: Call) -> None:
        opened = self.open_at(call)
        if opened is not None:
            opened.offset = call.value

    def write(self, call: Call) -> None:
        """write and writev."""
        opened, data = self.open_at(call), _bytes(call.arguments[1])[: call.value]
        if opened is not None:
            self.put(opened, data)
        elif call.pid == self.host and call.arguments[0].split("<")[0] == "1":
            self.disk.say(data)

    def put(self, opened: Open, data: bytes) -> None:
        if opened.append:
            opened.offset = len(opened.node.content)
        self.disk.write(opened.node, opened.offset, data)
        opened.offset += len(data)

    def pwrite64(self, call: Call) -> None:
        opened = self.open_at(call)
        if opened is not None:
            self.disk.write(opened.node, int(call.arguments[3]), _bytes(call.arguments[1])[: call.value])

    def sendfile(self, call: Call) -> None:
        target = self.open_at(call)
        if target is not None:
            self.copied(call, target, self.open_at(call, 1), call.arguments[2])

    def copy_file_range(self, call: Call) -> None:
        target = self.open_at(call, 2)
        if target is not None:
            assert call.arguments[3] == "NULL", call
            self.copied(call, target, self.open_at(call), call.arguments[1])

    def copied(self, call: Call, target: Open, source: Open | None, offset: str) -> None:
        if source is None:
            raise ValueError(f"{call} copies from outside")
        start = source.offset if offset == "NULL" else int(re.findall(r"\d+", offset)[0])
        if call.value:
            self.put(target, bytes(source.node.content[start : start + call.value]))
        if offset == "NULL":
            source.offset += call.value

    def ftruncate(self, call: Call) -> None:
        opened = self.open_at(call)
        if opened is not None:
            self.disk.cut(opened.node, int(call.arguments[1]))

    def truncate(self, call: Call) -> None:
        key = self.key(call, 0)
        if key is not None:
            self.disk.cut(key[0].names[key[1]], int(call.arguments[1]))

    def mmap(self, call: Call) -> None:
        shared = "MAP_SHARED" in call.arguments[3] and "PROT_WRITE" in call.arguments[2]
        if shared and self.open_at(call, 4) is not None:
            raise ValueError(f"{call} writes past the record")

    def mkdir(self, call: Call) -> None:
        self.make(self.key(call, 0), Node("folder"))

    def mkdirat(self, call: Call) -> None:
        self.make(self.key(call, 1, 0), Node("folder"))

    def symlink(self, call: Call) -> None:
        self.make(self.key(call, 1), Node("link", target=_path(call.arguments[0])))

    def symlinkat(self, call: Call) -> None:
        self.make(self.key(call, 2, 1), Node("link", target=_path(call.arguments[0])))

    def make(self, key: tuple[Node, str] | None, node: Node) -> None:
        if key is not None:
            self.disk.name((key, node))

    def rename(self, call: Call) -> None:
        self.renamed(call, self.key(call, 0), self.key(call, 1))

    def renameat(self, call: Call) -> None:
        """renameat and renameat2."""
        self.renamed(call, self.key(call, 1, 0), self.key(call, 3, 2))

    def renamed(self, call: Call, old: tuple[Node, str] | None, new: tuple[Node, str] | None) -> None:
        if old is None and new is None:
            return
        if old is None or new is None or "EXCHANGE" in call.arguments[-1]:
            raise ValueError(f"{call} is not modelled")
        self.disk.name((old, None), (new, old[0].names[old[1]]))

    def unlink(self, call: Call) -> None:
        """unlink and rmdir."""
        self.make_none(self.key(call, 0))

    def unlinkat(self, call: Call) -> None:
        self.make_none(self.key(call, 1, 0))

    def make_none(self, key: tuple[Node, str] | None) -> None:
        if key is not None:
            self.disk.name((key, None))

    def fsync(self, call: Call) -> None:
        """fsync and fdatasync, which also makes a new length last."""
        opened = self.open_at(call)
        if opened is not None:
            self.disk.sync(opened.node)

    def sync(self, call: Call) -> None:
        """sync and syncfs."""
        self.disk.sync(None)

    def clone(self, call: Call) -> None:
        """A thread has its process's descriptors, a child begins with copies; its calls may come before this one."""
        mine, its = self.table(call.pid), self.table(call.value)
        if "CLONE_FILES" in str(call.arguments):
            mine.update(its)
            self.tables[call.value] = mine
        else:
            self.tables[call.value] = {**mine, **its}


def _hex_text(text: str) -> str:
    return os.fsdecode(bytes.fromhex(text.replace("\\x", ""))) if "\\x" in text else text


HANDLERS: dict[str, Callable[[Replay, Call], None]] = {
    **{name: getattr(Replay, name) for name in CALLS if hasattr(Replay, name)},
    **dict.fromkeys(("creat",), Replay.open),
    **dict.fromkeys(("dup2", "dup3", "fcntl"), Replay.dup),
    "writev": Replay.write,
    "renameat2": Replay.renameat,
    "rmdir": Replay.unlink,
    "fdatasync": Replay.fsync,
    "syncfs": Replay.sync,
    **dict.fromkeys(("clone3", "fork", "vfork"), Replay.clone),
}


# -- where to kill -----------------------------------------------------------------------------------------------------


def steps(record: Path, root: Path) -> list[tuple[str, int]]:
    """Calls with which the recorded process itself changes ``root`` or answers its host: name, and which of that name.

    Failed calls count, since strace counts them when it is to kill at one.
    """
    host, counted, found = "", dict.fromkeys(CHANGES, 0), []
    wanted = os.fsencode(root).hex()
    for line in record.read_text("ascii").splitlines():
        entered = re.match(r"(\d+) +(\w+)\((.*)", line)
        if entered is None:
            continue
        host = host or entered[1]
        pid, name, rest = entered.groups()
        if pid != host or name not in counted:
            continue
        counted[name] += 1
        answers = name == "write" and rest.startswith("1<")
        changes = wanted in rest.replace("\\x", "") and (name != "openat" or "O_CREAT" in rest)
        if answers or changes:
            found.append((name, counted[name]))
    return found
