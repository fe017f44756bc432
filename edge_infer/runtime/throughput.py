"""How many answers a second a ``Pool`` gives on this device: by its sessions, their threads and the size of a batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_infer.errors import UsageError
from edge_infer.runtime import batching, memory
from edge_infer.runtime.golden import read_golden
from edge_infer.runtime.plan import PoolMeasured, PoolSetting
from edge_infer.runtime.pool import Pool
from edge_infer.runtime.session import load
from edge_infer.runtime.threads import default_threads
from edge_infer.runtime.tuning import counts, in_turn, median

if TYPE_CHECKING:
    from edge_infer.bundle import Bundle

#: Sizes of a batch that are tried where requests can be joined.
BATCHES = (1, 4, 16)
#: A setting with more sessions or a larger batch has to give so many times more answers: it takes more memory, and a
#: request waits longer for its answer.
WORTH = 1.05


def settings(usable: int, joins: bool) -> list[PoolSetting]:
    """What is tried, the smallest first: the usable cores divided among 1, 2, 4 ... sessions."""
    batches = BATCHES if joins else (1,)
    return [PoolSetting(count, max(1, usable // count), batch) for batch in batches for count in counts(usable)]


def can_join(bundle: Bundle) -> bool:
    """Whether the model answers joined requests as each alone."""
    with load(bundle.path, threads=1) as session:
        try:
            batching.check_joins(session)
        except UsageError:
            return False
    return True


def choose(rows: Sequence[PoolMeasured]) -> PoolMeasured:
    """The setting with the most answers a second; a later one only where that is worth it."""
    best = rows[0]
    for row in rows[1:]:
        if row.per_second > best.per_second * WORTH:
            best = row
    return best


def measure(bundle: Bundle, progress: Callable[[str], None] = lambda step: None) -> list[PoolMeasured]:
    """Time each setting in children of its own. Raises what opening the bundle raises."""
    tried = settings(default_threads(), can_join(bundle))
    options = {one: ["--pool", str(one.sessions), str(one.threads), str(one.batch)] for one in tried}
    return [
        PoolMeasured(
            setting, median(rows, "per_second"), median(rows, "p50_ms"), max(row["peak_bytes"] for row in rows)
        )
        for setting, rows in in_turn(bundle, options, progress).items()
    ]


def measure_here(bundle: Bundle, setting: PoolSetting, seconds: float) -> PoolMeasured:
    """Keep a pool's queue filled for so long, and count its answers.

    A request is one row of the first golden question where requests can be joined, else that question.
    """
    waiting = 2 * setting.sessions * setting.batch
    with Pool(
        bundle.path, sessions=setting.sessions, threads=setting.threads, batch=setting.batch, waiting=waiting
    ) as pool:
        asked = one_row(bundle)
        _keep_busy(pool, asked, waiting, seconds / 4)  # engines still take memory and compile
        times, took = _keep_busy(pool, asked, waiting, seconds)
    return PoolMeasured(setting, len(times) / took, sorted(times)[len(times) // 2] * 1e3, memory.peak_bytes())


def one_row(bundle: Bundle) -> Mapping[str, np.ndarray[Any, Any]]:
    """The first golden question, cut to one row where the first size of all inputs is open."""
    asked, _ = read_golden(bundle)[0]
    if all(spec.shape and spec.shape[0] is None for spec in bundle.manifest.inputs):
        return {name: array[:1] for name, array in asked.items()}
    return asked


def _keep_busy(
    pool: Pool, asked: Mapping[str, np.ndarray[Any, Any]], waiting: int, seconds: float
) -> tuple[list[float], float]:
    """Seconds from question to answer of each request, and how long it took in all."""
    times: list[float] = []
    begun = time.perf_counter()
    pending = deque((pool.submit(asked), begun) for _ in range(waiting))
    while pending:
        future, since = pending.popleft()
        future.result()
        now = time.perf_counter()
        times.append(now - since)
        if now - begun < seconds:
            pending.append((pool.submit(asked), now))
    return times, time.perf_counter() - begun
