"""A model takes arrays of exactly the names, dtypes and shapes of its inputs; anything else is refused in one sentence.

Nothing is converted silently: a model that is fed float64 or another layout answers, and wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_infer.errors import InputError, OutOfMemory
from edge_infer.runtime.buffers import zeros

if TYPE_CHECKING:
    from edge_infer.manifest import TensorSpec

Array = np.ndarray[Any, Any]


class InputCheck:
    """Checks what a session is given.

    The shape that fitted last is kept for each input, since most callers send one shape forever and a tiny model
    answers in less time than the whole check takes. Several threads may use it: at worst one checks again.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._names = {spec.name for spec in specs}
        self._inputs = [_Input(spec) for spec in specs]

    def arrays(self, inputs: Mapping[str, Array]) -> list[Array]:
        """The arrays in the model's order, C-contiguous and aligned; copied where they are not. Raises InputError."""
        if type(inputs) is not dict and not isinstance(inputs, Mapping):
            raise InputError(
                f"the inputs are a {type(inputs).__name__}, expected arrays by name: {sorted(self._names)}"
            )
        if inputs.keys() != self._names:
            raise InputError(f"inputs named {sorted(map(str, inputs))}, expected {sorted(self._names)}")
        arrays = []
        for expected in self._inputs:
            array = inputs[expected.name]
            if type(array) is not np.ndarray or array.shape != expected.fitted or array.dtype is not expected.dtype:
                check_array(expected.spec, expected.dtype, array)
                expected.fitted = array.shape
            flags = array.flags
            arrays.append(array if flags.c_contiguous and flags.aligned else array.copy())
        return arrays

    def empty(self, shapes: Mapping[str, Sequence[int]]) -> list[Array]:
        """Aligned arrays of zeros in the model's order; a size that is open and not given is 1.

        Raises InputError, OutOfMemory.
        """
        if shapes.keys() - self._names:
            raise InputError(f"shapes of {sorted(map(str, shapes))}, expected some of {sorted(self._names)}")
        return [_empty(row.spec, tuple(shapes.get(row.name, _least(row.spec)))) for row in self._inputs]


class _Input:
    __slots__ = ("dtype", "fitted", "name", "spec")

    def __init__(self, spec: TensorSpec) -> None:
        self.spec, self.name, self.dtype = spec, spec.name, np.dtype(spec.dtype)
        self.fitted: tuple[int, ...] | None = None


def _least(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(size or 1 for size in spec.shape)


def _empty(spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    if not fits(spec, shape) or min(shape, default=1) < 1:
        raise InputError(f"shape {list(shape)} for the input {spec.name!r}, expected {spec}, each size at least 1")
    try:
        return zeros(shape, spec.dtype)
    except (MemoryError, ValueError) as error:  # numpy has no arrays beyond the address space
        raise OutOfMemory(f"there is no memory for {spec.name!r} of shape {list(shape)}; ask for less") from error


def check_array(spec: TensorSpec, dtype: np.dtype[Any], array: object) -> None:
    """Raise InputError unless ``array`` is a numpy array of the dtype and shape of ``spec``."""
    if not isinstance(array, np.ndarray):
        raise InputError(f"input {spec.name!r} is a {type(array).__name__}, expected a numpy array of {spec.dtype}")
    if array.dtype != dtype:
        raise InputError(f"input {spec.name!r} has dtype {array.dtype}, expected {spec.dtype}; convert it with astype")
    if not fits(spec, array.shape):
        raise InputError(f"input {spec.name!r} has shape {list(array.shape)}, expected {spec}")


def fits(spec: TensorSpec, shape: Sequence[int]) -> bool:
    """Whether ``spec`` takes arrays of ``shape``."""
    return len(shape) == len(spec.shape) and all(
        expected is None or expected == observed for expected, observed in zip(spec.shape, shape)
    )
