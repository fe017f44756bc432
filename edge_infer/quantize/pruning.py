"""Weight pruning by magnitude: which weights become 0, the same for every format.

Zeros make the model smaller to send, not smaller on the device: engines keep them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edge_infer.errors import ConversionError, UsageError

Array = np.ndarray[Any, Any]

SCOPES = ("global", "layer")
#: Weights looked at in one go.
CHUNK = 1 << 20


def masks(weights: Mapping[str, Array], sparsity: float, scope: str) -> dict[str, Array]:
    """For each array of weights a boolean one of its shape: whether a weight stays.

    The ``sparsity`` (share of 0 <= s < 1) smallest magnitudes go: of each layer, or of all together with scope
    "global", which takes more from layers with small weights, and may take all of one; exactly, rounded to a
    whole weight. Of equal magnitudes the first go, in the order of the mapping, then of the array. Weights that are
    no numbers stay. Beside the masks it needs memory for a chunk of weights only. Raises UsageError.
    """
    check(sparsity, scope)
    if scope == "global":
        return _masks(weights, sparsity)
    return {name: mask for name, array in weights.items() for mask in _masks({name: array}, sparsity).values()}


def check(sparsity: float, scope: str) -> None:
    if not 0 <= sparsity < 1:
        raise UsageError(f"a sparsity of {sparsity} was asked for, expected a share of 0 or more, and less than 1")
    if scope not in SCOPES:
        raise UsageError(f"there is no pruning scope {scope!r}, expected {' or '.join(SCOPES)}")


def prune(weights: Mapping[str, Array], sparsity: float, scope: str) -> dict[str, Any]:
    """Set the weights to 0 in their arrays; gives the "sparsity" reached and "layers" with weights and zeros of each.

    Counted are all zeros, also those that were there before. Raises UsageError, and ConversionError without weights.
    """
    check(sparsity, scope)
    if not weights:
        raise ConversionError("the model has no convolution, dense or recurrent layer with float weights to prune")
    for name, mask in masks(weights, sparsity, scope).items():
        weights[name][~mask] = 0
    sizes = {name: (int(array.size), int(array.size - np.count_nonzero(array))) for name, array in weights.items()}
    total, zeros = (sum(column) for column in zip(*sizes.values(), strict=True))
    layers = [{"name": name, "weights": size, "zeros": zero} for name, (size, zero) in sizes.items()]
    return {"sparsity": zeros / total if total else 0.0, "layers": layers}


def _masks(weights: Mapping[str, Array], sparsity: float) -> dict[str, Array]:
    total = sum(array.size for array in weights.values())
    count = round(sparsity * total)
    if not count:
        return {name: np.ones(array.shape, bool) for name, array in weights.items()}
    threshold, ties = _threshold(list(weights.values()), count)
    result = {}
    for name, array in weights.items():
        mask = np.empty(array.size, bool)
        start = 0
        for keys in _keys(array):
            mask[start : start + len(keys)] = keys > threshold
            tied = np.flatnonzero(keys == threshold)
            mask[start + tied[ties:]] = True
            ties -= min(ties, len(tied))
            start += len(keys)
        result[name] = mask.reshape(array.shape)
    return result


def _threshold(arrays: Sequence[Array], count: int) -> tuple[int, int]:
    """The key of the ``count`` th smallest weight, and how many of those that have it are among them.

    Found as in a radix sort: a histogram of the upper 16 bits, then of the lower ones of those that share the upper.
    """
    high, before = _place(arrays, count, lambda keys: keys >> 16)
    low, more = _place(arrays, count - before, lambda keys: keys[keys >> 16 == high] & 0xFFFF)
    return high << 16 | low, count - before - more


def _place(arrays: Sequence[Array], count: int, digits: Any) -> tuple[int, int]:
    """The digit at which ``count`` weights are reached, and how many have a smaller one."""
    histogram = np.zeros(1 << 16, np.int64)
    for array in arrays:
        for keys in _keys(array):
            histogram += np.bincount(digits(keys), minlength=1 << 16)
    reached = np.cumsum(histogram)
    digit = int(np.searchsorted(reached, count))
    return digit, int(reached[digit] - histogram[digit])


def _keys(array: Array) -> Iterator[Array]:
    """Magnitudes as integers in the same order: the bits of a float32 without its sign."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        with np.errstate(over="ignore"):
            chunk = flat[start : start + CHUNK].astype(np.float32)
        yield (chunk.view(np.uint32) & 0x7FFFFFFF).astype(np.int64)
