"""AI Edge Quantizer 0.10 on weights of more than 32 MiB that have more than two dimensions, as large convolutions have.

It quantizes what is larger than that in pieces, to save memory, and flattens the weights to two dimensions for it but
not their scales, which then do not fit. Here the pieces are cut along the first dimension, each small enough for it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

#: The quantizer's own limit.
PIECE_BYTES = 32 * 1024 * 1024

Array = np.ndarray[Any, Any]


def mend() -> None:
    """Let the quantizer of this process take such weights; may be called again."""
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor

    original = uniform_quantize_tensor.uniform_quantize
    if getattr(original, "mended", False):
        return

    def uniform_quantize(tensor: Array, parameters: Any, blockwise: bool = False) -> Array:
        if tensor.ndim < 3 or tensor.nbytes <= PIECE_BYTES or blockwise:
            whole: Array = original(tensor, parameters, blockwise)
            return whole
        rows = max(1, PIECE_BYTES * len(tensor) // tensor.nbytes)
        starts = range(0, len(tensor), rows)
        return np.concatenate(
            [original(tensor[start : start + rows], _of_rows(parameters, tensor, start, rows)) for start in starts]
        )

    uniform_quantize.mended = True  # type: ignore[attr-defined]
    uniform_quantize_tensor.uniform_quantize = uniform_quantize


def _of_rows(parameters: Any, tensor: Array, start: int, rows: int) -> Any:
    """The scales of some of the first dimension's channels, where each has its own; else those of all."""
    if parameters.quantized_dimension != 0 or np.size(parameters.scale) != len(tensor):
        return parameters
    part = slice(start, start + rows)
    return dataclasses.replace(
        parameters, scale=np.ravel(parameters.scale)[part], zero_point=np.ravel(parameters.zero_point)[part]
    )
