"""Where a model's errors lie, for the report: counted batch by batch, in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_infer.errors import ParityError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Histogram:
    """``counts`` [b] of errors (model minus source) between ``edges`` [b + 1]; ``largest``: of |error|, if finite.

    Edges lie evenly by powers about a middle bin that holds 0; ``not_finite`` errors are in no bin.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    largest: float
    not_finite: int


class ErrorHistogram:
    """Errors counted batch by batch on a fixed grid, half a power of two wide, from which any coarser one is made."""

    #: From 2**-60 to 2**60, which holds float32's errors; what is smaller counts as 0, what is larger as the largest.
    SMALLEST, STEPS = -60, 240

    def __init__(self) -> None:
        self._counts = np.zeros(2 * self.STEPS + 1, np.int64)
        self._largest, self._not_finite = 0.0, 0

    def add(self, expected: Array, observed: Array) -> None:
        """Arrays of one shape. Raises ParityError for others."""
        if expected.shape != observed.shape:
            raise ParityError(f"the output has shape {list(observed.shape)}, the source's {list(expected.shape)}")
        with np.errstate(invalid="ignore"):
            errors = observed.astype(float).ravel() - expected.astype(float).ravel()
        finite = errors[np.isfinite(errors)]
        self._not_finite += errors.size - finite.size
        self._largest = max(self._largest, float(np.abs(finite).max(initial=0.0)))
        with np.errstate(divide="ignore"):
            places = np.floor(2 * (np.log2(np.abs(finite)) - self.SMALLEST)) + 1
        steps = np.clip(places, 0, self.STEPS).astype(np.int64) * np.sign(finite).astype(np.int64)
        self._counts += np.bincount(steps + self.STEPS, minlength=len(self._counts))

    def result(self, bins: int = 21) -> Histogram:
        """At most ``bins`` bins, symmetric about 0, from the smallest to the largest error seen."""
        both = self._counts[self.STEPS + 1 :] + self._counts[: self.STEPS][::-1]
        seen = np.flatnonzero(both)
        low, high = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 1)
        width = -(-(high - low) // max(1, (bins - 1) // 2))  # steps to a bin
        starts = np.arange(low, high, width)
        positive = np.add.reduceat(self._counts[self.STEPS + 1 :][:high], starts)
        negative = np.add.reduceat(self._counts[: self.STEPS][::-1][:high], starts)
        edges = 2.0 ** (np.append(starts, starts[-1] + width) / 2 + self.SMALLEST)
        return Histogram(
            tuple((-edges[::-1]).tolist() + edges.tolist()),
            (*negative[::-1].tolist(), int(self._counts[self.STEPS]), *positive.tolist()),
            self._largest,
            self._not_finite,
        )
