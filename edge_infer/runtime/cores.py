"""Processor cores of different strength in one chip: which are the strong ones, and how to keep an engine on them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

#: Where Linux says how strong each core is, 1024 the strongest; most machines with cores of one kind say nothing.
#: https://docs.kernel.org/scheduler/sched-capacity.html
CPUS = Path("/sys/devices/system/cpu")


def strongest(folder: Path = CPUS) -> tuple[int, ...]:
    """The strongest of the cores that this process may use, where there are weaker ones as well; else none."""
    strength = {core: _capacity(folder / f"cpu{core}") for core in sorted(os.sched_getaffinity(0))}
    most = max(strength.values())
    cores = tuple(core for core, capacity in strength.items() if capacity == most)
    return cores if len(cores) < len(strength) else ()


def _capacity(core: Path) -> int:
    try:
        return int((core / "cpu_capacity").read_text("ascii"))
    except (OSError, ValueError):
        return 0


def keep_to(cores: Collection[int]) -> None:
    """Let the calling thread, and those it starts from now on, run on ``cores`` alone; on all it may use where none of
    them can be used any more."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def kept_to(cores: Collection[int]) -> Iterator[None]:
    """Threads started meanwhile stay on ``cores``; the calling thread is free again afterwards."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    keep_to(cores)
    try:
        yield
    finally:
        keep_to(before)
