"""What a candidate lost against a reference, and what it may lose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_infer.errors import UsageError
from edge_infer.evaluate import intervals
from edge_infer.evaluate.agreement import AGREEMENTS, MOST_DECIBELS
from edge_infer.evaluate.metrics import METRICS
from edge_infer.evaluate.score import Score, mean

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Drop:
    """What a candidate lost against a reference.

    ``kept``: the share of the reference's score that is left, 1.0 where nothing was lost (MLPerf asks for 0.99,
    https://docs.mlcommons.org/inference/), above 1 where the candidate is better. ``difference``: candidate minus
    reference in the metric's own unit, with its 95 % interval; ``paired``: of the same samples one by one, which is
    narrower. ``worse``: the interval lies on the bad side of 0 altogether.
    """

    kept: float
    difference: float
    low: float
    high: float
    paired: bool
    worse: bool


def drop(reference: Score, candidate: Score) -> Drop:
    """Compare two scores by one metric; paired where both hold rows, which must be of the same samples in one order.

    Yes-or-no results are compared as matched proportions, others by resampling both alike (``intervals`` names the
    sources). Raises UsageError for scores by different metrics.
    """
    if reference.name != candidate.name:
        raise UsageError(f"{candidate.name} cannot be compared with {reference.name}; score both by one metric")
    difference = candidate.value - reference.value if candidate.value != reference.value else 0.0
    paired = reference.rows is not None and candidate.rows is not None and len(reference.rows) == len(candidate.rows)
    if paired:
        low, high = _paired(reference, candidate)
    else:
        low, high = intervals.unpaired(
            (reference.value, reference.low, reference.high), (candidate.value, candidate.low, candidate.high)
        )
    low, high = (difference, difference) if math.isnan(low) or math.isnan(high) else (low, high)
    low, high = min(low, difference), max(high, difference)
    worse = high < 0 if reference.higher_is_better else low > 0
    return Drop(_kept(reference, candidate), difference, low, high, paired, worse)


def _paired(reference: Score, candidate: Score) -> tuple[float, float]:
    ours, theirs = reference.rows, candidate.rows
    assert ours is not None and theirs is not None
    if intervals.is_proportion(ours) and intervals.is_proportion(theirs):
        return intervals.paired_proportions(ours[:, 0], theirs[:, 0])
    metrics = [*METRICS.values(), *(metric for row in AGREEMENTS.values() for metric in row)]
    statistic = next((metric.statistic for metric in metrics if metric.name == reference.name), mean)
    old, new = statistic(ours), statistic(theirs)

    def difference(weights: Array) -> float:
        return new(weights) - old(weights)

    return intervals.bootstrap(difference, len(ours))


def _kept(reference: Score, candidate: Score) -> float:
    old, new = share(reference), share(candidate)
    if not reference.higher_is_better:
        old, new = new, old
    if old <= 0 or not math.isfinite(old):  # no share of nothing
        return 1.0 if new >= old else 0.0
    return new / old


def share(score: Score) -> float:
    """The score on a scale where shares make sense: of dB the part of the signal's power that noise leaves.

    20 dB is 0.99: noise has a hundredth of the signal's power.
    """
    return max(0.0, 1 - 10 ** (-score.value / 10)) if score.name.endswith("-db") else score.value


def allowed(reference: Score, lost: float) -> float:
    """The figure of a score that lost this share of the reference's, in the metric's own unit."""
    if reference.name.endswith("-db"):
        return min(MOST_DECIBELS, -10 * math.log10(1 - share(reference) * (1 - lost))) if lost else MOST_DECIBELS
    return reference.value * (1 - lost if reference.higher_is_better else 1 + lost)
