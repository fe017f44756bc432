"""Arrays that an engine reads and writes where they lie, for those who want no copy at all.

What is handed out belongs to numpy and stays valid after the session is closed; only nothing writes to it any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from edge_infer.errors import EngineError

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

#: An array begins at a multiple of that, so that any engine can take it as it is; LiteRT insists
#: (``LITERT_HOST_MEMORY_BUFFER_ALIGNMENT``).
ALIGNMENT = 64


class Buffers(Protocol):
    """Arrays in the order of the manifest's inputs and outputs, of one shape each."""

    inputs: list[Array]
    outputs: list[Array]

    def run(self) -> None:
        """Read the inputs, write the outputs. One thread at a time."""

    def close(self) -> None:
        """Let go of what the engine holds."""


class CopiedBuffers:
    """For an engine that insists on memory of its own: one copy in and one out."""

    def __init__(self, run: Callable[[Sequence[Array]], list[Array]], inputs: list[Array]) -> None:
        self._run = run
        self.inputs = inputs
        self.outputs = run(inputs)

    def run(self) -> None:
        for buffer, answer in zip(self.outputs, self._run(self.inputs)):
            write(buffer, answer)

    def close(self) -> None:
        pass


def write(buffer: Array, answer: Array) -> None:
    """Copy ``answer`` to its place. Raises EngineError when it has another shape this time."""
    if buffer.shape != answer.shape:
        raise EngineError(
            f"an output has shape {list(answer.shape)} this time and {list(buffer.shape)} when the buffers were made; "
            "sizes of this model follow from its values, use run()"
        )
    buffer[...] = answer


def zeros(shape: Shape, dtype: np.dtype[Any] | str, size: int | None = None) -> Array:
    """An aligned array of zeros with at least ``size`` bytes of memory from its begin on."""
    dtype = np.dtype(dtype)
    length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.zeros(max(length, size or 0) + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + length].view(dtype).reshape(shape)
