"""Agreement with the source, whose answers stand in the place of labels: by the kind of output, never an accuracy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edge_infer.evaluate import intervals
from edge_infer.evaluate.metrics import class_scores
from edge_infer.evaluate.score import Metric, column, mean

Array = np.ndarray[Any, Any]
#: Signal over noise is given within +- this: equal answers would be infinitely good.
MOST_DECIBELS = 150.0


def kind_of_output(answer: Array) -> str:
    """By a batch of the SOURCE's answers: "classes" (float scores [n, 2 or more], also with dimensions of 1 behind),
    "integers" (booleans too) or "values" (any other floats)."""
    if answer.dtype.kind in "iub":
        return "integers"
    scores = class_scores(answer)
    return "classes" if scores.ndim == 2 and scores.shape[1] >= 2 else "values"


def _samples(array: Array) -> Array:
    """[n, numbers of a sample] in float64; an output without dimensions is one sample."""
    return array.reshape(len(array) if array.ndim else 1, -1).astype(float)


def _same_class(expected: Array, answer: Array) -> Array:
    """Whether the answer's best class is the source's best, or equal to it there."""
    ours, theirs = _samples(expected), _samples(answer)
    at_theirs = np.take_along_axis(ours, theirs.argmax(axis=1)[:, None], axis=1)[:, 0]
    return column((at_theirs == ours.max(axis=1)) & ~np.isnan(theirs).any(axis=1))


def _equal(expected: Array, answer: Array) -> Array:
    """Share of equal integers in each sample; a sample without any is equal."""
    same = (expected == answer).reshape(len(expected) if expected.ndim else 1, -1)
    return column(same.mean(axis=1) if same.shape[1] else np.ones(len(same)))


def _powers(expected: Array, answer: Array) -> Array:
    """(squares, sum, squares of the differences, how many numbers) of each sample, float64 [n, 4]."""
    signal = _samples(expected)
    noise = np.nan_to_num(((_samples(answer) - signal) ** 2).sum(axis=1), nan=np.inf, posinf=np.inf)
    numbers = np.full(len(signal), signal.shape[1], float)
    return np.stack([(signal**2).sum(axis=1), signal.sum(axis=1), noise, numbers], axis=1)


def _sqnr(rows: Array) -> intervals.Statistic:
    """Signal over quantization noise in dB, of the rows that ``_powers`` makes.

    The signal is the source's answers about their mean, since what is constant carries nothing.
    https://en.wikipedia.org/wiki/Signal-to-quantization-noise_ratio
    """

    def decibels(weights: Array) -> float:
        squares, total, noise, numbers = np.sum(rows[weights > 0] * weights[weights > 0, None], axis=0).tolist()
        if noise == 0:
            return MOST_DECIBELS
        signal = squares - total * total / numbers
        if signal <= 0 or not math.isfinite(noise):
            return -MOST_DECIBELS
        return max(-MOST_DECIBELS, min(MOST_DECIBELS, 10 * math.log10(signal / noise)))

    return decibels


#: By kind of output. For values that is the signal over the noise, about the mean as parity has it, and not the cosine,
#: to which outputs of half the size look perfect and single numbers always do; the report shows it beside.
AGREEMENTS = {
    "classes": Metric("agreement-top1", "agreement", True, _same_class, mean),
    "integers": Metric("agreement-equal", "agreement", True, _equal, mean),
    "values": Metric("agreement-sqnr-db", "agreement", True, _powers, _sqnr),
}
