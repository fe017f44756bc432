"""From an image to classes or boxes, as the bundle says: preprocessing, the model, postprocessing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np

from edge_infer.bundle import Bundle
from edge_infer.errors import OutOfMemory, UsageError
from edge_infer.manifest import Boxes, Postprocessing
from edge_infer.runtime import postprocess
from edge_infer.runtime.arrays import read_npz
from edge_infer.runtime.postprocess import ClassScore, Detection
from edge_infer.runtime.preprocess import decode, placement, preprocess

Array = np.ndarray[Any, Any]
Image = Union[Array, str, "os.PathLike[str]"]
Prediction = Union["list[ClassScore]", "list[Detection]", "dict[str, Array]"]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]

ANCHORS = "anchors"


class Predictor:
    """What a bundle says of images, read once. Raises UsageError where it says nothing, or what cannot be."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        if len(manifest.inputs) != 1:
            names = [spec.name for spec in manifest.inputs]
            raise UsageError(f"predict() takes models with one input, this one has {names}; call run() with arrays")
        self._input = manifest.inputs[0]
        self._steps = manifest.postprocessing
        self._labels, self._anchors = read_files(self._steps, bundle.file)
        if self._steps is not None:
            postprocess.check(self._steps, manifest.outputs, self._labels, self._anchors)

    def __call__(self, run: Run, image: Image) -> Prediction:
        try:
            pixels = image if isinstance(image, np.ndarray) else decode(image)
            given = preprocess(pixels, self._input)
        except MemoryError as error:  # a bundle may ask for as many pixels as the input takes
            raise OutOfMemory(f"there is no memory to make {self._input} of the image; close other programs") from error
        answers = run({self._input.name: given})
        steps = self._steps
        if steps is None:
            return answers
        if steps.classes:
            return postprocess.classes(answers, steps.classes, self._labels)
        assert steps.boxes, "check() knows one of the two"
        assert self._input.preprocessing, "preprocess() has used it"
        placed = placement(self._input.preprocessing, (pixels.shape[0], pixels.shape[1]))
        return postprocess.detections(answers, steps.boxes, self._labels, self._anchors, placed)


def read_files(steps: Postprocessing | None, find: Callable[[str], Path]) -> tuple[Sequence[str] | None, Array | None]:
    """Labels and anchors, where the steps name them and ``find`` says that they lie. Raises UsageError."""
    kind = steps.kind if steps else None
    labels = anchors = None
    if kind is not None and kind.labels is not None:
        labels = postprocess.read_labels(find(kind.labels).read_bytes(), kind.labels)
    if isinstance(kind, Boxes) and kind.anchors is not None:
        anchors = _read_anchors(find(kind.anchors))
    return labels, anchors


def _read_anchors(path: Path) -> Array:
    try:
        return read_npz(path)[ANCHORS].astype(np.float64)
    except (ValueError, KeyError) as error:
        raise UsageError(f"{path} is no npz file with numbers named {ANCHORS!r} ({error})") from None
