"""What a candidate lost of the source's figure, and what it may lose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_infer.evaluate import intervals
from edge_infer.evaluate.agreement import MOST_DECIBELS
from edge_infer.evaluate.score import Accumulator, Score, mean

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Loss:
    """The share of the source's figure that a candidate lost on the same samples, with its 95 % interval.

    0.01 is an accuracy of 0.891 where the source has 0.9, or an error of 1.01 where it has 1. Below 0 the candidate is
    the better one; an interval that is above 0 altogether shows a loss that is not chance.
    """

    value: float
    low: float
    high: float


def paired_loss(source: Accumulator, candidate: Accumulator) -> Loss | None:
    """From one metric of both on the same samples in one order, which is narrower than from their two intervals.

    The interval is that of the difference; the source's figure, which it is a share of, is taken as given, as limits
    take it (``allowed``). ``None`` where the metric keeps nothing of single samples, and where the source's figure is
    not above 0 or not finite: nothing is a share of it.
    """
    if not (source.per_sample and candidate.per_sample):
        return None
    ours, theirs = source.rows(), candidate.rows()
    statistic, count = candidate.metric.statistic, len(theirs)
    old, new = statistic(ours), statistic(theirs)
    reference = old(np.ones(count))
    if not 0 < reference < math.inf:
        return None

    def difference(weights: Array) -> float:
        return new(weights) - old(weights)

    value = difference(np.ones(count))
    if statistic is mean and intervals.is_proportion(ours) and intervals.is_proportion(theirs):
        low, high = intervals.paired_proportions(ours[:, 0], theirs[:, 0])
    else:
        low, high = intervals.bootstrap(difference, count)
    low, high = (value, value) if math.isnan(low) else (min(low, value), max(high, value))
    if candidate.metric.higher_is_better:
        low, value, high = 0 - high, 0 - value, 0 - low
    return Loss(value / reference, low / reference, high / reference)


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
