"""How long a session's answers took, and how many there were."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from edge_infer.records import Record

#: Percentiles are those of so many of the latest runs.
LATEST = 1000


@dataclass(eq=False, repr=False)
class Stats(Record):
    """``count``: answers so far; ``errors``: calls that raised; milliseconds of the latest runs, None before the first.

    A call refused for its input is an error too.
    """

    count: int
    errors: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None


class Recorder:
    """Counts; several threads may use it (each of its steps is one that the interpreter does not divide)."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=LATEST)
        self._count = 0
        self._errors = 0

    def answered(self, seconds: float) -> None:
        self._seconds.append(seconds)
        self._count += 1

    def failed(self) -> None:
        self._errors += 1

    def stats(self) -> Stats:
        seconds = sorted(self._seconds)
        return Stats(self._count, self._errors, *(_percentile(seconds, share) for share in (0.5, 0.95, 0.99)))


def _percentile(seconds: list[float], share: float) -> float | None:
    return seconds[min(int(len(seconds) * share), len(seconds) - 1)] * 1e3 if seconds else None
