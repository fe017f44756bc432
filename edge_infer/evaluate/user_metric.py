"""A metric that the user wrote: a function of outputs and labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from edge_infer.errors import UsageError
from edge_infer.evaluate import intervals
from edge_infer.evaluate.metrics import sample_count
from edge_infer.evaluate.score import Accumulator, Feed, Metric, Score, column, mean, score_of

Array = np.ndarray[Any, Any]
#: Resamples for a user's metric of the whole set, each of which calls it once.
WHOLE_SET_RESAMPLES = 100


class UserAccumulator(Accumulator):
    """A user's ``function(outputs, labels)``.

    ``outputs`` is the array of the one output, or of several a dict by name. It gives a number for each sample
    [n], whose mean is the score; or one number for all of them: then, which shows at the first batch, outputs and
    labels of all batches are kept in memory and it is called on the whole. More is better, unless the function has an
    attribute ``higher_is_better = False``.
    """

    def __init__(self, name: str, function: Callable[..., Any], output: str) -> None:
        better = bool(getattr(function, "higher_is_better", True))
        super().__init__(Metric(name, "score" if better else "error", better, self._no_rows, mean), output)
        self._function = function
        self._kept: list[tuple[dict[str, Array], Array]] = []

    @property
    def per_sample(self) -> bool:
        return not self._kept

    def add(self, expected: Feed | None, observed: Feed, labels: Array | None = None) -> None:
        if labels is None:
            raise UsageError(f"--metric {self.metric.name} needs labels, but the samples have none; add them")
        outputs = {name: np.asarray(observed[name]) for name in ([self.output] if self.output else observed)}
        count = sample_count(np.asarray(labels), next(iter(outputs.values())))
        rows = None if self._kept else self._each(outputs, np.asarray(labels), count)
        if rows is None:
            self._kept.append((outputs, np.asarray(labels)))
        else:
            self._rows.append(column(rows))

    def _each(self, outputs: dict[str, Array], labels: Array, count: int) -> Array | None:
        """A number for each sample; ``None`` where the function is one of the whole set."""
        try:
            answer = np.asarray(self._call(outputs, labels), float)
        except UsageError:
            if self._rows:
                raise
            return None  # one batch may be too little for it
        if answer.ndim == 0 and not self._rows:
            return None
        if answer.shape != (count,) or not np.isfinite(answer).all():
            raise UsageError(
                f"--metric {self.metric.name} gives an array of shape {list(answer.shape)} for {count} samples, "
                "expected one finite number for each or one for all"
            )
        return answer

    def _call(self, outputs: dict[str, Array], labels: Array) -> Any:
        try:
            return self._function(outputs[self.output] if self.output else outputs, labels)
        except Exception as error:
            raise UsageError(f"--metric {self.metric.name} failed: {type(error).__name__}: {error}") from error

    def score(self) -> Score:
        if not self._kept:
            return super().score()
        outputs = {name: np.concatenate([part[name] for part, _ in self._kept]) for name in self._kept[0][0]}
        labels = np.concatenate([part for _, part in self._kept])
        value = self._whole(outputs, labels)

        def resampled(weights: Array) -> float:
            chosen = np.repeat(np.arange(len(labels)), weights)
            try:
                return self._whole({name: array[chosen] for name, array in outputs.items()}, labels[chosen])
            except UsageError:  # such as a metric that needs every class
                return math.nan

        interval = intervals.bootstrap(resampled, len(labels), WHOLE_SET_RESAMPLES)
        return score_of(self.metric, value, interval, len(labels))

    def _whole(self, outputs: dict[str, Array], labels: Array) -> float:
        answer = np.asarray(self._call(outputs, labels), float)
        if answer.ndim or not np.isfinite(answer):
            raise UsageError(f"--metric {self.metric.name} gives {answer} for the whole set, expected a finite number")
        return float(answer)

    @staticmethod
    def _no_rows(labels: Array, answer: Array) -> Array:
        raise NotImplementedError("a user's metric is asked by its accumulator")
