"""Probe inputs: what a model is asked while packaging, from the same seed every time.

The first cases become the bundle's golden questions, so they should move the outputs: real samples where there is
calibration data, otherwise several kinds of noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_infer.errors import ConversionError
from edge_infer.manifest import DTYPES, TensorSpec
from edge_infer.runtime.arrays import write_items
from edge_infer.samples import Samples

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]

SEED = 20
#: Cases with calibration data and without.
CALIBRATED_CASES, NOISE_CASES = 32, 8
#: Sizes that a dynamic dimension takes in turn: the first axis (a batch), and any other (length, height, width).
BATCHES, LENGTHS = (1, 2, 3), (32, 64)
#: What a dynamic dimension is multiplied by that calibration data has in one size only; the first that works.
STRETCHES = (2.0, 0.5)


def make_feeds(inputs: Sequence[TensorSpec], samples: Samples | None) -> list[Feed]:
    """Inputs by name, one dict a case: real samples where there are any."""
    rng = np.random.default_rng(SEED)
    if samples is None:
        return [_noise(inputs, case, rng) for case in range(NOISE_CASES)]
    order = rng.permutation(samples.count)
    return [samples.feed(int(order[case % samples.count]), BATCHES[case % 3]) for case in range(CALIBRATED_CASES)]


def examples(inputs: Sequence[TensorSpec], feeds: Sequence[Feed]) -> list[Feed]:
    """Noise in each of the shapes of ``feeds``, for converters that trace: they need shapes and not the samples."""
    rng = np.random.default_rng(SEED)
    shapes = {tuple(feed[spec.name].shape for spec in inputs): None for feed in feeds}
    return [
        {spec.name: _draw(np.dtype(spec.dtype), shape, case, rng) for spec, shape in zip(inputs, row, strict=True)}
        for case, row in enumerate(shapes)
    ]


def _noise(inputs: Sequence[TensorSpec], case: int, rng: np.random.Generator) -> Feed:
    return {spec.name: _draw(np.dtype(spec.dtype), _shape(spec, case), case, rng) for spec in inputs}


def _shape(spec: TensorSpec, case: int) -> tuple[int, ...]:
    sizes = (BATCHES[case % 3], LENGTHS[case % 2])
    return tuple(sizes[axis > 0] if size is None else size for axis, size in enumerate(spec.shape))


def _draw(dtype: np.dtype[Any], shape: tuple[int, ...], case: int, rng: np.random.Generator) -> Array:
    """Noise of the usual ranges of inputs. Integers are 0 or 1: safe as indices into any table."""
    if dtype.kind != "f":
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    kinds = (rng.standard_normal(shape), rng.random(shape), 3 * rng.standard_normal(shape), 2 * rng.random(shape) - 1)
    return np.asarray(kinds[case % len(kinds)]).astype(dtype)


def stretched(inputs: Sequence[TensorSpec], feeds: Sequence[Feed], factor: float) -> list[Feed]:
    """The first feeds again with dynamic dimensions in a size that no feed has: values are repeated, or cut off.

    Without them an artifact that fixed such a dimension would pass every check.
    """
    axes = {
        spec.name: [
            axis
            for axis, size in enumerate(spec.shape)
            if size is None and len({feed[spec.name].shape[axis] for feed in feeds}) == 1
        ]
        for spec in inputs
    }
    if not any(axes.values()):
        return []
    return [{name: _resized(array, axes[name], factor) for name, array in feed.items()} for feed in feeds[:2]]


def _resized(array: Array, axes: Sequence[int], factor: float) -> Array:
    for axis in axes:
        array = np.take(array, range(max(1, int(array.shape[axis] * factor))), axis=axis, mode="wrap")
    return array


def observed_specs(names: Sequence[str], answers: Sequence[Feed]) -> list[TensorSpec]:
    """Specs of outputs from what they were in all cases: a dimension that changed is dynamic."""
    specs = []
    for name in names:
        shapes = [answer[name].shape for answer in answers]
        if len({len(shape) for shape in shapes}) > 1:
            raise ConversionError(f"output {name!r} has another number of dimensions for other inputs; fix the inputs")
        shape = tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))
        dtype = str(answers[0][name].dtype)
        if dtype not in DTYPES:
            raise ConversionError(f"output {name!r} has dtype {dtype}, expected one of {', '.join(DTYPES)}")
        specs.append(TensorSpec(name, dtype, shape))
    return specs


def save_feeds(path: Path, feeds: Iterable[Feed]) -> None:
    """Store cases of arrays by name, one in memory at a time; names may hold any character, so they stand apart."""
    write_items(path, _items(feeds))


def _items(feeds: Iterable[Feed]) -> Iterator[tuple[str, Array]]:
    names: list[str] = []
    for case, feed in enumerate(feeds):
        if not names:
            names = sorted(feed)
            yield "names", np.array(names)
        yield from ((f"{case}.{index}", feed[name]) for index, name in enumerate(names))


def load_feeds(path: Path) -> list[Feed]:
    return list(iter_feeds(path))


def iter_feeds(path: Path, cases: Iterable[int] | None = None) -> Iterator[Feed]:
    """The cases of a file, or those asked for, one in memory at a time."""
    with np.load(path, allow_pickle=False) as file:
        names = [str(name) for name in file["names"]]
        if cases is None:
            cases = range((len(file.files) - 1) // len(names))
        for case in cases:
            yield {name: file[f"{case}.{index}"] for index, name in enumerate(names)}
