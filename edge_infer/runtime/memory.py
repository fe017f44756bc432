"""What this process takes of the machine's memory, read from /proc."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path


def _kilobytes(path: str) -> dict[str, int]:
    rows = {}
    for line in Path(path).read_text("ascii").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            rows[name] = int(words[0])
    return rows


def private_bytes() -> int:
    """Anonymous memory of this process: what it shares with nobody and no file can give back (RssAnon)."""
    return _kilobytes("/proc/self/status")["RssAnon"] * 1024


def peak_bytes() -> int:
    """The largest resident size so far, mapped files included (VmHWM)."""
    return _kilobytes("/proc/self/status")["VmHWM"] * 1024


def proportional_bytes() -> int:
    """What this process adds to the machine's use of memory: pages that it shares count in part (Pss)."""
    return _kilobytes("/proc/self/smaps_rollup")["Pss"] * 1024


def total_bytes() -> int:
    """Memory of the machine (MemTotal)."""
    return _kilobytes("/proc/meminfo")["MemTotal"] * 1024


def give_back() -> None:
    """Let the C library return to the system what was freed, which it otherwise keeps: up to 40 MB after an open.

    https://man7.org/linux/man-pages/man3/malloc_trim.3.html; other C libraries than glibc have no such function.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
