"""One figure over many samples, with its interval: what is kept of each sample, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_infer.errors import ParityError, UsageError
from edge_infer.evaluate import intervals

Array = np.ndarray[Any, Any]
#: Outputs by name, each an array with the samples along its first axis.
Feed = Mapping[str, Array]
#: From a batch's labels or the source's answers [n, ...] and the model's answers [n, ...]: what is kept of each sample,
#: float64 [n, k]. Raises UsageError where they do not fit.
Rows = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Score:
    """A figure with its 95 % interval over ``count`` samples.

    ``kind``: "accuracy" (against labels), "error" (the less the better), "score" (a user's own) or "agreement" (with
    the source's answers; says nothing about being right).
    """

    name: str
    kind: str
    value: float
    low: float
    high: float
    count: int
    higher_is_better: bool


@dataclass(frozen=True)
class Metric:
    """``kind`` as in ``Score``; ``statistic`` turns the rows of all samples into a function of weights."""

    name: str
    kind: str
    higher_is_better: bool
    rows: Rows
    statistic: Callable[[Array], intervals.Statistic]


class Accumulator:
    """One metric of one output, over batches.

    accumulator = Accumulator(METRICS["top1"], "scores")
    accumulator.add(expected, observed, labels)     # as often as there are batches
    accumulator.score()                             # Score("top1", "accuracy", 0.974, 0.956, 0.985, 500, True)
    """

    def __init__(self, metric: Metric, output: str) -> None:
        self.metric, self.output = metric, output
        self._rows: list[Array] = []

    def add(self, expected: Feed | None, observed: Feed, labels: Array | None = None) -> None:
        """A batch: the source's answers (``None`` where labels alone count), the model's, the labels [n, ...].

        Raises UsageError where labels do not fit, ParityError where the answers have not the source's shape.
        """
        answer = np.asarray(observed[self.output])
        if self.metric.kind == "agreement":
            assert expected is not None
            wanted = np.asarray(expected[self.output])
            if wanted.shape != answer.shape:
                raise ParityError(
                    f"output {self.output!r} has shape {list(answer.shape)} where the source's has {list(wanted.shape)}"
                )
        elif labels is None:
            raise UsageError(
                f"{self.metric.name} needs labels, but the samples have none; add them, or leave the metric away"
            )
        else:
            wanted = np.asarray(labels)
        self._rows.append(self.metric.rows(wanted, answer))

    @property
    def per_sample(self) -> bool:
        """Whether figures of each sample are kept, which ``rows`` gives."""
        return True

    def rows(self) -> Array:
        """What was kept of the samples in their order, float64 [n, k]. Raises UsageError without samples."""
        rows = np.concatenate(self._rows) if self._rows else np.empty((0, 1))
        if not len(rows):
            raise UsageError(f"{self.metric.name} has no samples to go by, expected at least one")
        return rows

    def score(self) -> Score:
        """The score so far. Raises UsageError without samples, and where the labels are all of one class for auc."""
        rows = self.rows()
        statistic = self.metric.statistic(rows)
        value = statistic(np.ones(len(rows)))
        if math.isnan(value):
            raise UsageError(f"{self.metric.name} needs samples of two classes, but all labels are of one")
        if self.metric.statistic is mean and intervals.is_proportion(rows):
            interval = intervals.wilson(value, len(rows))
        else:
            interval = intervals.bootstrap(statistic, len(rows))
        return score_of(self.metric, value, interval, len(rows))


def score_of(metric: Metric, value: float, interval: tuple[float, float], count: int) -> Score:
    """A score whose interval holds its value; without an interval (NaN) it is the value alone."""
    low, high = (value, value) if math.isnan(interval[0]) else interval
    low, high = min(low, value), max(high, value)
    return Score(metric.name, metric.kind, value, low, high, count, metric.higher_is_better)


def mean(rows: Array) -> intervals.Statistic:
    """The mean of rows [n, 1], which is infinite as soon as one of them is and counts."""
    values, finite = rows[:, 0], np.isfinite(rows[:, 0])
    if finite.all():
        return lambda weights: float(values @ weights / weights.sum())
    return lambda weights: (
        math.inf if weights[~finite].any() else float(values[finite] @ weights[finite] / weights.sum())
    )


def column(values: Array) -> Array:
    """One figure a sample, [n], as rows: float64 [n, 1]."""
    return np.asarray(values, float)[:, None]
