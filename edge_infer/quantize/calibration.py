"""Calibration data: an ``.npz`` with one array an input, samples along the first axis."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_infer.errors import UsageError
from edge_infer.manifest import TensorSpec

Array = np.ndarray[Any, Any]


class Calibration:
    """Samples for a model's inputs.

    An array may have the model's own rank, then its first axis is cut into batches that the model takes (1 where
    that dimension is dynamic); or one rank more, then each entry is one full input.
    """

    def __init__(self, path: Path, inputs: Sequence[TensorSpec]) -> None:
        self.inputs = tuple(inputs)
        self._arrays = _read(path, inputs)
        counts = {spec.name: self._count(spec) for spec in inputs}
        if len(set(counts.values())) != 1:
            raise UsageError(f"{path} holds different numbers of samples ({counts}), expected the same for every input")
        self.count = next(iter(counts.values()))
        if self.count < 1:
            raise UsageError(f"{path} holds no complete sample, expected at least one of every input")

    def feed(self, index: int, batch: int = 1) -> dict[str, Array]:
        """Sample ``index`` for every input; ``batch`` samples in a row where the model's first axis is dynamic."""
        if any(self._stacked(spec) for spec in self.inputs if spec.shape and spec.shape[0] is None):
            batch = 1  # full inputs have the batch that they have, so the others keep to one sample
        return {spec.name: self._sample(spec, index, batch) for spec in self.inputs}

    def feeds(self) -> Iterator[dict[str, Array]]:
        return (self.feed(index) for index in range(self.count))

    def _stacked(self, spec: TensorSpec) -> bool:
        return self._arrays[spec.name].ndim == len(spec.shape) + 1

    def _count(self, spec: TensorSpec) -> int:
        rows = len(self._arrays[spec.name])
        return rows if self._stacked(spec) else rows // (spec.shape[0] or 1)

    def _sample(self, spec: TensorSpec, index: int, batch: int) -> Array:
        array = self._arrays[spec.name]
        if self._stacked(spec):
            return np.asarray(array[index])
        if spec.shape[0] is None:
            return np.take(array, range(index, index + batch), axis=0, mode="wrap")
        return array[index * spec.shape[0] : (index + 1) * spec.shape[0]]


def _read(path: Path, inputs: Sequence[TensorSpec]) -> Mapping[str, Array]:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it holds one array without a name")
        with file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UsageError(f"there is no calibration file {path}") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not an npz file of plain arrays ({error})") from None
    for spec in inputs:
        if spec.name not in arrays:
            raise UsageError(f"{path} holds arrays named {sorted(arrays)}, the model's input is {spec.name!r}")
        _check(path, spec, arrays[spec.name])
    return arrays


def _check(path: Path, spec: TensorSpec, array: Array) -> None:
    if array.dtype != np.dtype(spec.dtype):
        raise UsageError(f"{path}: {spec.name!r} has dtype {array.dtype}, expected {spec.dtype}")
    extra = array.ndim - len(spec.shape)
    sample = array.shape[1:]
    expected = spec.shape if extra == 1 else spec.shape[1:]
    fits = (
        extra in (0, 1)
        and array.ndim > 0
        and all(want is None or want == have for want, have in zip(expected, sample, strict=True))
    )
    if not fits:
        raise UsageError(
            f"{path}: {spec.name!r} has shape {list(array.shape)}, expected samples along the first axis of {spec}"
        )
