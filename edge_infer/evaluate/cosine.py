"""Cosine similarity of an output to the source's, for the report: whether it points the same way, whatever its size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class CosineSimilarity:
    """Of all answers to the source's, as two long vectors, in one pass. https://en.wikipedia.org/wiki/Cosine_similarity"""

    def __init__(self) -> None:
        self._product, self._ours, self._theirs = 0.0, 0.0, 0.0

    def add(self, expected: Array, observed: Array) -> None:
        """Floats of one shape [n, ...]: the source's answers and the model's."""
        ours, theirs = expected.astype(float).ravel(), observed.astype(float).ravel()
        with np.errstate(all="ignore"):  # what is no finite number stays none
            self._product += float(ours @ theirs)
            self._ours += float(ours @ ours)
            self._theirs += float(theirs @ theirs)

    def result(self) -> float:
        """In [-1, 1]; 1 where both are all zeros, 0 where one of them is, or an answer is infinite or NaN."""
        if self._ours == self._theirs == 0:
            return 1.0
        lengths = math.sqrt(self._ours) * math.sqrt(self._theirs)
        return max(-1.0, min(1.0, self._product / lengths)) if 0 < lengths < math.inf else 0.0
