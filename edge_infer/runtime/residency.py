"""Which pages of a model's files are in memory, and how to get and keep them there."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_infer.errors import OutOfMemory
from edge_infer.records import Record

RESIDENCIES = ("lazy", "prefault", "lock")
#: From the kernel's include/uapi/asm-generic/mman-common.h; the second since Linux 5.14.
MADV_WILLNEED, MADV_POPULATE_READ = 3, 22
MLOCK_ONFAULT = 1
HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(/.*)$")


@dataclass(eq=False, repr=False)
class Memory(Record):
    """Bytes. ``mapped``: of the model's files in this process's address space; ``resident``: of these in memory now;
    ``shared``: of the resident what other processes use too or the page cache keeps anyway. ``private``: anonymous
    memory of the whole process, other models' included."""

    private: int
    mapped: int
    resident: int
    shared: int


@dataclass(eq=False, repr=False)
class Mapping(Record):
    """A stretch of a file in the address space, bytes."""

    start: int
    end: int
    resident: int
    changed: int


def mappings(files: tuple[Path, ...]) -> list[Mapping]:
    """Where these files, or what lies in these folders, are mapped (/proc/self/smaps)."""
    wanted = [str(path.resolve()) for path in files]
    found = []
    for start, end, path, rows in _smaps():
        if any(path == name or path.startswith(f"{name}/") for name in wanted):
            found.append(Mapping(start, end, rows.get("Rss", 0), rows.get("Private_Dirty", 0)))
    return found


def _smaps() -> Iterator[tuple[int, int, str, dict[str, int]]]:
    header, rows = None, {}
    for line in Path("/proc/self/smaps").read_text("utf-8", "surrogateescape").splitlines():
        words = line.split()
        if words[0].endswith(":"):
            if len(words) == 3 and words[2] == "kB":
                rows[words[0][:-1]] = int(words[1]) * 1024
            continue
        if header:
            yield int(header[1], 16), int(header[2], 16), header[3], rows
        header, rows = HEADER.match(line), {}
    if header:
        yield int(header[1], 16), int(header[2], 16), header[3], rows


def prefault(files: tuple[Path, ...]) -> None:
    """Read all mapped pages of the files now, so that the first run does not wait for the storage."""
    for mapping in mappings(files):
        length = mapping.end - mapping.start
        if _call("madvise", mapping.start, length, MADV_POPULATE_READ):
            _call("madvise", mapping.start, length, MADV_WILLNEED)


def lock(files: tuple[Path, ...]) -> None:
    """Keep all mapped pages of the files in memory as long as they are mapped. Raises OutOfMemory."""
    for mapping in mappings(files):
        length = mapping.end - mapping.start
        error = _lock(mapping.start, length)
        if error:
            allowed = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            raise OutOfMemory(
                f"cannot lock {length:,} bytes in memory ({os.strerror(error)}), this process may lock {allowed:,} "
                "(ulimit -l); raise that, or use residency='prefault'"
            )


def _lock(start: int, length: int) -> int:
    """Plain ``mlock`` would write to each page of a mapping that may be written, and so make it this process's own."""
    if _call("madvise", start, length, MADV_POPULATE_READ):
        return _call("mlock", start, length)  # an older Linux, which cannot bring them in for reading
    return _call("mlock2", start, length, MLOCK_ONFAULT)


def _call(name: str, start: int, *arguments: int) -> int:
    """A function of the C library on a stretch of memory; gives its errno, 0 when it did it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)[: len(arguments) + 1]
    return ctypes.get_errno() if function(start, *arguments) else 0
