"""Value ranges of a model's tensors, from which a quantizer takes its scales. Knows no engine.

    ranges = Ranges("percentile")
    for sample in samples:
        ranges.update(every tensor's values on that sample)
    ranges.result()  # name -> (least, largest)

Memory depends on the number of tensors alone, not on how many samples are seen or how large their values are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_infer.errors import UsageError
from edge_infer.quantize import RANGES

Array = np.ndarray[Any, Any]

#: How a range is chosen. "minmax": all that was seen. "percentile": without the rarest values. "entropy": the one in
#: which 8 bits tell the values apart best (least Kullback-Leibler divergence).
METHODS = RANGES
#: Share of the values (percent) that a percentile range holds.
PERCENTILE = 99.99
#: Histogram bins. The entropy search takes time with their square.
BINS = {"percentile": 8192, "entropy": 2048}
#: Steps that the entropy search tells apart within a range, and the share of a value that it gives to empty bins.
#: Szymon Migacz, 8-bit Inference with TensorRT, 2017,
#: https://on-demand.gputechconf.com/gtc/2017/presentation/s7310-8-bit-inference-with-tensorrt.pdf
STEPS, SMOOTHING = 128, 1e-4
#: Larger values stand for infinity (masks of attention), which no scale can hold.
LARGEST = 3e38


@dataclass
class _Seen:
    """What is known of a tensor: its least and largest value, and a histogram over [-reach, reach]."""

    least: float
    largest: float
    reach: float
    bins: Array


class Ranges:
    """Collects values tensor by tensor; ``method`` is one of METHODS. Raises UsageError for another."""

    def __init__(self, method: str) -> None:
        if method not in METHODS:
            raise UsageError(f"there are no {method!r} ranges, expected one of {', '.join(METHODS)}")
        self.method = method
        self._seen: dict[str, _Seen] = {}

    def update(self, values: Mapping[str, Array]) -> None:
        """Take in values by tensor name: arrays of any shape and number type. What is not finite is left out."""
        for name, array in values.items():
            flat = np.asarray(array, np.float32).reshape(-1)
            flat = flat[np.abs(flat) < LARGEST]  # false for not-a-number
            if flat.size:
                self._add(name, flat)

    def result(self) -> dict[str, tuple[float, float]]:
        """Least and largest value by tensor name, for the tensors that had any finite value."""
        narrowed = {"percentile": _without_tails, "entropy": _least_divergence}.get(self.method)
        found = {}
        for name, seen in self._seen.items():
            least, largest = narrowed(seen) if narrowed and seen.reach else (seen.least, seen.largest)
            found[name] = (max(least, seen.least), min(largest, seen.largest))
        return found

    def _add(self, name: str, flat: Array) -> None:
        least, largest = float(flat.min()), float(flat.max())
        reach = max(-least, largest)
        count = BINS.get(self.method, 0)
        seen = self._seen.get(name)
        if seen is None:
            seen = self._seen[name] = _Seen(least, largest, reach, np.zeros(count, np.int64))
        seen.least, seen.largest = min(seen.least, least), max(seen.largest, largest)
        if not count:
            return
        _widen(seen, reach)
        if seen.reach > 0:
            seen.bins = seen.bins + np.histogram(flat, count, range=(-seen.reach, seen.reach))[0]
        else:
            seen.bins[count // 2] += flat.size


def _edges(seen: _Seen) -> Array:
    return np.linspace(-seen.reach, seen.reach, len(seen.bins) + 1)


def _without_tails(seen: _Seen) -> tuple[float, float]:
    """The range that leaves out as many of the least as of the largest values."""
    share = np.cumsum(seen.bins) / seen.bins.sum()
    tail = (100.0 - PERCENTILE) / 200.0
    edges = _edges(seen)
    first, last = (int(np.searchsorted(share, limit)) for limit in (tail, 1.0 - tail))
    return float(edges[first]), float(edges[min(last + 1, len(seen.bins))])


def _least_divergence(seen: _Seen) -> tuple[float, float]:
    """The range around 0 in which the values, told apart in so many steps, are most like what they were.

    For each range the distribution with all beyond it put on its ends is compared with the one that is left when
    ``STEPS`` values are kept: the least Kullback-Leibler divergence wins, the smallest range among equals.
    """
    bins, middle = seen.bins, len(seen.bins) // 2
    before = np.concatenate([[0], np.cumsum(bins)])
    best, chosen = np.inf, middle
    for half in range(STEPS // 2, middle + 1):
        start, end = middle - half, min(middle + half + 1, len(bins))
        inside = bins[start:end]
        clipped = inside.astype(np.float64)
        clipped[0] += before[start]
        clipped[-1] += before[-1] - before[end]
        divergence = _divergence(clipped, _stepped(inside, clipped > 0))
        if divergence < best:
            best, chosen = divergence, half
    edges = _edges(seen)
    return float(edges[middle - chosen]), float(edges[min(middle + chosen + 1, len(bins))])


def _stepped(inside: Array, used: Array) -> Array:
    """The distribution that ``STEPS`` steps can tell: each step's sum spread over those of its bins that are used."""
    starts = np.arange(STEPS) * (len(inside) // STEPS)
    sums, counts = np.add.reduceat(inside, starts), np.add.reduceat(used.astype(np.int64), starts)
    each = np.divide(sums, counts, out=np.zeros(STEPS), where=counts > 0)
    lengths = np.diff(np.append(starts, len(inside)))
    return np.asarray(np.repeat(each, lengths) * used)


def _divergence(exact: Array, rough: Array) -> float:
    """Kullback-Leibler divergence of two histograms, a little of each given to their empty bins."""
    one, other = _smoothed(exact), _smoothed(rough)
    return np.inf if one is None or other is None else float(np.sum(one * np.log(one / other)))


def _smoothed(counts: Array) -> Array | None:
    used = counts > 0
    number = int(used.sum())
    taken = SMOOTHING * (len(counts) - number) / number if number else 1.0
    if taken >= 1.0:
        return None
    smooth: Array = np.where(used, counts - taken, SMOOTHING)
    if (smooth <= 0).any():
        return None
    return np.asarray(smooth / smooth.sum())


def _widen(seen: _Seen, reach: float) -> None:
    """Double the histogram's reach until it holds ``reach``: two bins become one, so their number stays."""
    if seen.reach == 0:
        seen.reach = reach  # so far all values were 0, which is in the middle of any reach
        return
    while seen.reach < reach:
        quarter = len(seen.bins) // 4
        merged = seen.bins.reshape(-1, 2).sum(axis=1)
        seen.bins = np.concatenate([np.zeros(quarter, np.int64), merged, np.zeros(quarter, np.int64)])
        seen.reach *= 2
