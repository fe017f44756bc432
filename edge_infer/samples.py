"""Samples to calibrate with and to evaluate on: one form on disk whatever they came as, mapped and never all in memory.

``spool`` (in a child) reads any source into a folder; ``Samples`` reads that folder. The folder holds ``0.npy``,
``1.npy``, ... one array an input in the order of the inputs, samples along the first axis, and ``labels.npy`` if there
are labels. An array may have the input's own rank, then its first axis is cut into batches that the model takes (1
where that dimension is dynamic); or one rank more, then each entry is one full input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_infer.errors import UsageError
from edge_infer.manifest import Preprocessing, TensorSpec
from edge_infer.runtime import preprocess

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

LABELS_FILE = "labels.npy"
SEED = 20


class Samples:
    """The samples of a folder that ``spool`` wrote. Raises UsageError when they do not fit ``inputs``."""

    def __init__(self, folder: Path, inputs: Sequence[TensorSpec]) -> None:
        self.inputs = tuple(inputs)
        self._arrays = {spec.name: _mapped(folder / f"{index}.npy") for index, spec in enumerate(inputs)}
        for spec in inputs:
            check_array(folder, spec, self._arrays[spec.name].dtype, self._arrays[spec.name].shape)
        shapes = {name: array.shape for name, array in self._arrays.items()}
        self.count = count_samples(folder, inputs, shapes)
        path = folder / LABELS_FILE
        labels = _mapped(path) if path.is_file() else None
        self._labels_each = 1 if labels is None else labels_each(folder, inputs, shapes, len(labels))
        #: Mapped, the label of a sample after that of the one before; ``None`` where there are none.
        self.labels: Array | None = None if labels is None else labels[: self.count * self._labels_each]

    def feed(self, index: int, batch: int = 1) -> dict[str, Array]:
        """Sample ``index`` for every input; ``batch`` samples in a row where the model's first axis is dynamic.

        The arrays are the caller's own. Raises IndexError.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        if any(self._stacked(spec) for spec in self.inputs if spec.shape and spec.shape[0] is None):
            batch = 1  # full inputs have the batch that they have, so the others keep to one sample
        return {spec.name: self._sample(spec, index, batch) for spec in self.inputs}

    def feeds(self, indices: Iterable[int] | None = None) -> Iterator[dict[str, Array]]:
        """The samples of ``indices`` one after the other; all of them where none are given."""
        return (self.feed(index) for index in (range(self.count) if indices is None else indices))

    def label(self, index: int) -> Array:
        """The labels of sample ``index``: one, or as many as its batch has where the model takes batches of one size.

        Raises UsageError when there are none.
        """
        if self.labels is None:
            raise UsageError("these samples have no labels; give some with labels")
        return np.array(self.labels[index * self._labels_each : (index + 1) * self._labels_each])

    def key(self, index: int) -> bytes:
        """A hash of what sample ``index`` holds: equal for equal samples of any set, whatever their labels."""
        digest = hashlib.blake2b(digest_size=16)
        for array in self.feed(index).values():
            digest.update(repr(array.shape).encode())
            digest.update(array.tobytes())
        return digest.digest()

    def all_keys(self) -> Iterator[bytes]:
        return (self.key(index) for index in range(self.count))

    def _stacked(self, spec: TensorSpec) -> bool:
        return self._arrays[spec.name].ndim == len(spec.shape) + 1

    def _sample(self, spec: TensorSpec, index: int, batch: int) -> Array:
        array = self._arrays[spec.name]
        if self._stacked(spec):
            return np.array(array[index])
        if spec.shape[0] is None:
            return np.take(array, range(index, index + batch), axis=0, mode="wrap")
        return np.array(array[index * spec.shape[0] : (index + 1) * spec.shape[0]])


def _mapped(path: Path) -> Array:
    array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def check_array(where: object, spec: TensorSpec, dtype: np.dtype[Any], shape: Shape) -> None:
    """Raise UsageError unless an array of that dtype and shape holds samples for ``spec``; ``where`` it came from."""
    if dtype != np.dtype(spec.dtype):
        raise UsageError(f"{where}: {spec.name!r} has dtype {dtype}, expected {spec.dtype}")
    extra = len(shape) - len(spec.shape)
    expected = spec.shape if extra == 1 else spec.shape[1:]
    if extra not in (0, 1) or not shape or not fits(expected, shape[1:]):
        raise UsageError(
            f"{where}: {spec.name!r} has shape {list(shape)}, expected samples along the first axis of {spec}"
        )


def fits(expected: Sequence[int | None], shape: Shape) -> bool:
    return len(expected) == len(shape) and all(want in (None, have) for want, have in zip(expected, shape, strict=True))


def count_samples(where: object, inputs: Sequence[TensorSpec], shapes: Mapping[str, Shape]) -> int:
    """How many samples arrays of these ``shapes`` hold. Raises UsageError when not the same, or none, for all."""
    counts = {spec.name: shapes[spec.name][0] // _rows_each(spec, shapes[spec.name]) for spec in inputs}
    if len(set(counts.values())) != 1:
        raise UsageError(f"{where} holds different numbers of samples ({counts}), expected the same for every input")
    count = next(iter(counts.values()))
    if count < 1:
        raise UsageError(f"{where} holds no complete sample, expected at least one of every input")
    return count


def _rows_each(spec: TensorSpec, shape: Shape) -> int:
    """Rows of the array that make one sample: a batch of the model's own size where the array has its rank."""
    return 1 if len(shape) == len(spec.shape) + 1 else spec.shape[0] or 1


def labels_each(where: object, inputs: Sequence[TensorSpec], shapes: Mapping[str, Shape], labels: int) -> int:
    """How many of ``labels`` labels belong to a sample: one, or one a row. Raises UsageError when neither fits."""
    if labels == count_samples(where, inputs, shapes):
        return 1
    rows = {shapes[spec.name][0]: _rows_each(spec, shapes[spec.name]) for spec in inputs}
    if labels not in rows:
        raise UsageError(f"{where} holds {labels} labels for {min(rows)} samples, expected one for each")
    return rows[labels]


def spool(request: dict[str, Any]) -> dict[str, Any]:
    """Read a source into a folder; see ``edge_infer.sample_sources``."""
    from edge_infer import sample_sources

    return sample_sources.spool(request)


# -- parts that have nothing in common -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Indices of one set's samples, ascending; none is in two of the parts."""

    calibration: tuple[int, ...]
    search: tuple[int, ...]
    holdout: tuple[int, ...]


def split(count: int, seed: int = SEED, keys: Iterable[Hashable] | None = None) -> Split:
    """Half of ``count`` samples to calibrate with, a quarter to search with, a quarter held out; the same every time.

    With ``keys``, one a sample, samples of one key (``Samples.all_keys()``: of the same content) stay together. Raises
    UsageError when there are fewer than three different samples: each part needs one.
    """
    groups = _groups(count, keys)
    if len(groups) < 3:
        raise UsageError(
            f"there {_are(len(groups))}, expected at least 3, one each to calibrate, to choose by and to hold out; "
            "give more, or an evaluation set of its own"
        )
    order = _shuffled(range(len(groups)), seed)
    quarter = max(1, len(groups) // 4)
    parts = order[2 * quarter :], order[:quarter], order[quarter : 2 * quarter]
    return Split(*(_indices(groups, part) for part in parts))


def halves(
    count: int, labels: Array | None = None, seed: int = SEED, keys: Iterable[Hashable] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two halves of ``count`` samples, to search with and held out; the same every time.

    With whole-numbered ``labels``, one a sample, each half has as many of every class, or one more. ``keys`` as in
    ``split``. Raises UsageError when there are fewer than two different samples.
    """
    groups = _groups(count, keys)
    if len(groups) < 2:
        raise UsageError(
            f"there {_are(len(groups))} to evaluate on, expected at least 2, one to choose by and one to hold out; "
            "give more"
        )
    order = _shuffled(range(len(groups)), seed)
    if labels is not None and labels.dtype.kind in "biu" and labels.size == count:
        classes = np.asarray(labels).reshape(-1)
        order.sort(key=lambda group: int(classes[groups[group][0]]))  # keeps the order within a class
    return _indices(groups, order[::2]), _indices(groups, order[1::2])


def overlap(a: Samples, b: Samples) -> int:
    """How many samples of ``a`` are in ``b`` too."""
    known = set(b.all_keys())
    return sum(key in known for key in a.all_keys())


def _groups(count: int, keys: Iterable[Hashable] | None) -> list[list[int]]:
    if keys is None:
        return [[index] for index in range(count)]
    found: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return list(found.values())


def _are(count: int) -> str:
    return "is 1 sample" if count == 1 else f"are {count} different samples"


def _shuffled(numbers: Sequence[int], seed: int) -> list[int]:
    """By hash and not by numpy's generator, whose numbers may change between versions
    (https://numpy.org/neps/nep-0019-rng-policy.html)."""
    return sorted(numbers, key=lambda number: hashlib.blake2b(f"{seed}.{number}".encode(), digest_size=16).digest())


def _indices(groups: Sequence[Sequence[int]], chosen: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(index for group in chosen for index in groups[group]))


# -- preprocessing -------------------------------------------------------------------------------------------------


def with_preprocessing(
    inputs: Sequence[TensorSpec], given: Iterable[tuple[str | None, Preprocessing]]
) -> tuple[TensorSpec, ...]:
    """The inputs with the preprocessing that a user gave by name (``None``: of the only input).

    Raises UsageError for a name the model does not have, one given twice, or steps that do not fit the input.
    """
    names = [spec.name for spec in inputs]
    chosen: dict[str, Preprocessing] = {}
    for name, steps in given:
        if name is None and len(names) > 1:
            raise UsageError(f"--preprocess without a name, the model has the inputs {names}; write NAME:KEY=VALUE,...")
        wanted = names[0] if name is None else name
        if wanted not in names:
            raise UsageError(f"--preprocess names {wanted!r}, the model's inputs are {names}")
        if wanted in chosen:
            raise UsageError(f"--preprocess is given twice for {wanted!r}, expected it once")
        chosen[wanted] = steps
    result = tuple(replace(spec, preprocessing=chosen.get(spec.name, spec.preprocessing)) for spec in inputs)
    for spec in result:
        if spec.name in chosen:
            preprocess.check(spec)
    return result
