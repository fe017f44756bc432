"""Choose among measured candidates: which fit the limits, which are on the Pareto front, which is preferred.

Pure: no candidate is made here. Sizes are in bytes, times in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edge_infer.errors import EdgeInferError
from edge_infer.evaluate.loss import Loss
from edge_infer.evaluate.score import Score
from edge_infer.manifest import Check

#: What ``--prefer`` takes. ``target``: the first in the target's own order of engines and precisions.
PREFERENCES = ("target", "size", "latency", "accuracy")
#: A time of few runs may be so many times what many runs find.
FIRST_LOOK_NOISE = 1.5


@dataclass(frozen=True)
class Candidate:
    """One artifact that was tried. ``error`` says why there is nothing to measure; otherwise all figures are there.

    ``size`` counts all files of the bundle, ``download`` the same compressed. ``measured`` holds ``peak_bytes``,
    ``private_bytes``, ``load_ms``, ``p50_ms``, ``p95_ms``, ``runs`` and ``throttled``, taken on ``measured_on``, and
    ``emulated`` where that machine is; ``first_look`` is true where a few runs were enough to see that it would not be
    chosen. ``search`` and ``holdout`` are the scores on the set that the choice is made with and on the one that is
    only reported; ``loss`` is against the source on the latter.
    """

    format: str
    precision: str
    order: int = 0
    way: tuple[str, ...] = ()
    size: int = 0
    download: int = 0
    measured: dict[str, Any] = field(default_factory=dict)
    measured_on: str = ""
    search: Score | None = None
    holdout: Score | None = None
    loss: Loss | None = None
    checks: tuple[Check, ...] = ()
    kept_float: tuple[str, ...] = ()
    kept_share: float = 0.0
    sparsity: float = 0.0
    error: EdgeInferError | None = None

    @property
    def id(self) -> str:
        return f"{self.format} {self.precision}"


@dataclass(frozen=True)
class Limit:
    """A figure that a candidate must not exceed, or with ``least`` not fall short of; ``origin`` says who set it."""

    name: str
    allowed: float
    unit: str
    origin: str
    least: bool = False

    def observed(self, candidate: Candidate) -> float | None:
        """The candidate's figure; None when it has none."""
        return FIGURES[self.name](candidate)

    def excess(self, candidate: Candidate) -> float:
        """How far beyond the limit, as a share of it; 0 within."""
        value = self.observed(candidate)
        if value is None:
            return 0.0
        beyond = self.allowed - value if self.least else value - self.allowed
        return max(0.0, beyond / max(abs(self.allowed), 1e-12))

    def words(self, value: float) -> str:
        """A figure of this limit for people."""
        if self.unit == "bytes":
            return f"{int(value):,} bytes"
        return f"{value:.4g} {self.unit}".strip()

    def miss(self, candidate: Candidate) -> str:
        """One clause on a candidate that violates this limit."""
        verb = "at least" if self.least else "at most"
        found = self.figure(candidate)
        return f"{self.name} is {found}, allowed is {verb} {self.words(self.allowed)} ({self.origin})"

    def figure(self, candidate: Candidate) -> str:
        """The candidate's figure for people, with the mark of an emulated machine where it was taken on one."""
        said = self.words(self.observed(candidate) or 0.0)
        return f"{said} as emulated" if self.name in OF_THE_MACHINE and candidate.measured.get("emulated") else said


def _score(candidate: Candidate) -> float | None:
    return candidate.search.value if candidate.search else None


FIGURES: dict[str, Callable[[Candidate], float | None]] = {
    "size": lambda candidate: candidate.size,
    "memory": lambda candidate: candidate.measured.get("peak_bytes"),
    "latency": lambda candidate: candidate.measured.get("p50_ms"),
    "load time": lambda candidate: candidate.measured.get("load_ms"),
    "score": _score,
}
#: Those that are a board's only where they were taken on one.
OF_THE_MACHINE = ("memory", "latency", "load time")


@dataclass(frozen=True)
class NothingFits:
    """The candidate that came nearest, the limit that binds it, and the cheapest way to let something through."""

    nearest: Candidate
    binding: Limit
    relax: str


@dataclass(frozen=True)
class Verdict:
    """``reasons`` holds a sentence for each candidate that does not fit, by id."""

    chosen: Candidate | None
    front: frozenset[str]
    reasons: dict[str, str]
    nothing_fits: NothingFits | None


def decide(candidates: Sequence[Candidate], limits: Sequence[Limit], prefer: str) -> Verdict:
    """Judge all candidates. ``chosen`` is None when none fits; ``nothing_fits`` then explains, if any was measured."""
    measured = [candidate for candidate in candidates if candidate.error is None]
    reasons = {candidate.id: str(candidate.error) for candidate in candidates if candidate.error is not None}
    fitting = []
    for candidate in measured:
        missed = violated(candidate, limits)
        if missed:
            reasons[candidate.id] = "; ".join(limit.miss(candidate) for limit in missed)
        else:
            fitting.append(candidate)
    chosen = min(fitting, key=ORDERS[prefer]) if fitting else None
    explained = _nothing_fits(measured, limits) if measured and not fitting else None
    return Verdict(chosen, front(measured), reasons, explained)


def violated(candidate: Candidate, limits: Sequence[Limit]) -> list[Limit]:
    """The limits that a candidate does not keep, the worst first."""
    return sorted(
        (limit for limit in limits if limit.excess(candidate) > 0), key=lambda limit: -limit.excess(candidate)
    )


def promising(looked: Candidate, others: Sequence[Candidate], limits: Sequence[Limit], prefer: str) -> bool:
    """Whether a candidate may still be the one to choose after a first look at its times, whose noise is granted."""
    times = {name: looked.measured[name] / FIRST_LOOK_NOISE for name in ("load_ms", "p50_ms")}
    granted = replace(looked, measured={**looked.measured, **times})
    rivals = [item for item in others if item.error is None and not violated(item, limits)]
    return not violated(granted, limits) and all(ORDERS[prefer](granted) < ORDERS[prefer](item) for item in rivals)


def _badness(candidate: Candidate) -> float:
    """The score turned so that less is better."""
    if candidate.search is None:
        return 0.0
    return -candidate.search.value if candidate.search.higher_is_better else candidate.search.value


ORDERS: dict[str, Callable[[Candidate], tuple[float, ...]]] = {
    "target": lambda item: (item.order,),
    "size": lambda item: (item.size, _badness(item), item.order),
    "latency": lambda item: (item.measured.get("p50_ms", float("inf")), _badness(item), item.order),
    "accuracy": lambda item: (_badness(item), item.size, item.order),
}


def front(candidates: Sequence[Candidate]) -> frozenset[str]:
    """Those that no other beats in size, latency and score at once."""

    def figures(item: Candidate) -> tuple[float, float, float]:
        return item.size, item.measured.get("p50_ms", float("inf")), _badness(item)

    def beaten(item: Candidate) -> bool:
        mine = figures(item)
        return any(
            all(a <= b for a, b in zip(figures(other), mine, strict=True)) and figures(other) != mine
            for other in candidates
        )

    return frozenset(item.id for item in candidates if not beaten(item))


def _nothing_fits(measured: Sequence[Candidate], limits: Sequence[Limit]) -> NothingFits:
    """Nearest: the candidate whose worst excess is smallest, fewest violated limits first."""

    def distance(item: Candidate) -> tuple[int, float]:
        missed = violated(item, limits)
        return len(missed), missed[0].excess(item)

    nearest = min(measured, key=distance)
    missed = violated(nearest, limits)
    needs = " and ".join(f"{limit.name} {limit.figure(nearest)}" for limit in missed)
    return NothingFits(nearest, missed[0], f"allow {needs} and it fits, or choose another target")
