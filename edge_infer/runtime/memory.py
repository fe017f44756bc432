"""What this process takes of the machine's memory, read from /proc."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
#: Files of a control group, version 2 and then 1: most, now, and the rows of memory.stat that can be given back.
#: https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
CGROUP_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


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


def available_bytes(
    meminfo: str = "/proc/meminfo", own_groups: str = "/proc/self/cgroup", groups: Path = CGROUPS
) -> int:
    """What this process can take before the system refuses or kills: the least of the machine's MemAvailable, the room
    in each control group above it (files that the group has in memory count as room), and RLIMIT_DATA."""
    rooms = [_kilobytes(meminfo)["MemAvailable"] * 1024, *_group_rooms(Path(own_groups), groups)]
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit != resource.RLIM_INFINITY:
        rooms.append(limit - _kilobytes("/proc/self/status")["VmData"] * 1024)
    return max(0, min(rooms))


def _group_rooms(own_groups: Path, groups: Path) -> Iterator[int]:
    try:
        lines = own_groups.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # a kernel without control groups
        return
    for line in lines:
        number, controllers, own = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root = groups if number == "0" else groups / "memory"
        # A container sees itself at the root, whatever its name outside.
        inner = root / own.lstrip("/")
        for folder in (inner, *inner.parents) if inner.is_relative_to(root) else (root,):
            yield from _group_room(folder)
            if folder == root:
                break


def _group_room(folder: Path) -> Iterator[int]:
    for most, now, given_back in CGROUP_FILES:
        try:
            limit, used = int((folder / most).read_text()), int((folder / now).read_text())
            rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield limit - used + sum(int(rows[name]) for name in given_back)
        except (OSError, ValueError, KeyError):  # not there, or "max": no limit
            continue


def be_killed_first() -> None:
    """Where memory runs out, let the system kill this process and not the one that waits for it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def give_back() -> None:
    """Let the C library return to the system what was freed, which it otherwise keeps: up to 40 MB after an open.

    https://man7.org/linux/man-pages/man3/malloc_trim.3.html; other C libraries than glibc have no such function.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
