"""The answers to one image become classes or boxes as the bundle says; numpy does all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_infer.errors import EngineError, UsageError
from edge_infer.manifest import Boxes, Classes, Postprocessing, TensorSpec
from edge_infer.runtime.preprocess import Placement

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ClassScore:
    """A class by its place in the output, and its label where the bundle has labels."""

    index: int
    label: str | None
    score: float


@dataclass(frozen=True)
class Detection:
    """A box in pixels of the image that was given, within its edges; ``right`` and ``bottom`` are past the last."""

    index: int
    label: str | None
    score: float
    left: float
    top: float
    right: float
    bottom: float


# -- classes -----------------------------------------------------------------------------------------------------------


def classes(answers: Mapping[str, Array], steps: Classes, labels: Sequence[str] | None) -> list[ClassScore]:
    """The best classes, best first; of equal ones the first. Scores that are no numbers are left out."""
    scores = activate(_one(answers, steps.output).reshape(-1), steps.activation)
    order = np.argsort(-scores, kind="stable")
    order = order[~np.isnan(scores[order])]
    if steps.threshold is not None:
        order = order[scores[order] >= steps.threshold]
    return [ClassScore(int(i), _label(labels, int(i)), float(scores[i])) for i in order[: steps.top]]


def activate(scores: Array, activation: str) -> Array:
    """Softmax over the last axis or sigmoid, in float64 without overflow."""
    scores = scores.astype(np.float64)
    if activation == "softmax":
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
    if activation == "sigmoid":
        small = np.exp(-np.abs(scores))
        return np.asarray(np.where(scores >= 0, 1 / (1 + small), small / (1 + small)))
    return scores


# -- boxes -------------------------------------------------------------------------------------------------------------


def detections(
    answers: Mapping[str, Array],
    steps: Boxes,
    labels: Sequence[str] | None,
    anchors: Array | None,
    placed: Placement,
) -> list[Detection]:
    """Boxes in the image that lies in the input as ``placed`` says, best first.

    Raises EngineError when the outputs have other shapes than ``steps`` say.
    """
    boxes, scores, ids = _candidates(answers, steps)
    if anchors is not None and len(anchors) != len(boxes):
        raise EngineError(f"the detector gives {len(boxes)} boxes for {len(anchors)} anchors, expected one each")
    # What is no number is no candidate: NaN is not >= anything.
    likely = np.flatnonzero((scores >= steps.threshold) & np.isfinite(boxes).all(axis=1))
    corners = _corners(boxes[likely], steps, None if anchors is None else anchors[likely], placed)
    kept = suppress(corners, scores[likely], ids[likely], steps.iou, steps.top)
    found = _in_image(corners[kept], placed)
    return [
        Detection(int(ids[i]), _label(labels, int(ids[i])), float(scores[i]), *map(float, box))
        for i, box in zip(likely[kept], found)
    ]


def _candidates(answers: Mapping[str, Array], steps: Boxes) -> tuple[Array, Array, Array]:
    """Boxes [N, 4], the best score of each [N], and whose that is [N]."""
    table = _rows(_one(answers, steps.scores), steps)
    boxes = table[:, :4] if steps.boxes is None else _rows(answers[steps.boxes], steps)
    scores = table[:, 4:] if steps.boxes is None else table
    if steps.ids is not None:
        ids = answers[steps.ids].reshape(-1).astype(np.int64)
        scores = activate(scores.reshape(-1), steps.activation)
    else:
        factor = activate(scores[:, :1], steps.activation) if steps.objectness else 1.0
        scores = activate(scores[:, 1:] if steps.objectness else scores, steps.activation) * factor
        first = 1 if steps.background else 0
        if scores.shape[1] <= first:
            raise EngineError(f"the detector's scores have shape {list(table.shape)}, expected a column a class")
        ids = scores[:, first:].argmax(axis=1) + first
        scores = np.take_along_axis(scores, ids[:, None], axis=1)[:, 0]
    if not (boxes.shape == (len(scores), 4) and ids.shape == scores.shape):
        raise EngineError(
            f"the detector gives {list(boxes.shape)} boxes, {list(scores.shape)} scores and {list(ids.shape)} classes, "
            "expected one score and class a box of 4 numbers"
        )
    return boxes.astype(np.float64), scores, ids


def _rows(answer: Array, steps: Boxes) -> Array:
    """[1, N, columns], [1, N], or transposed, as [N, columns]."""
    if answer.ndim not in (2, 3) or len(answer) != 1:
        raise EngineError(f"the detector's output has shape {list(answer.shape)}, expected 1 x candidates x columns")
    table: Array = answer[0] if answer.ndim == 3 else answer[0][:, None]
    return table.T if steps.transposed and answer.ndim == 3 else table


def _corners(boxes: Array, steps: Boxes, anchors: Array | None, placed: Placement) -> Array:
    """Left, top, right, bottom in pixels of the input."""
    if anchors is not None:
        a, b, c, d = boxes.T
        if steps.form == "yxyx":  # the offsets come in the order of the box
            a, b, c, d = b, a, d, c
        center, size = steps.variances
        x, y = anchors[:, 0] + a * center * anchors[:, 2], anchors[:, 1] + b * center * anchors[:, 3]
        with np.errstate(over="ignore"):  # an absurd size is cut to the image
            width, height = anchors[:, 2] * np.exp(c * size), anchors[:, 3] * np.exp(d * size)
        corners = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
    else:
        corners = _from_form(boxes, steps.form)
    if steps.unit == "share":
        height, width = placed.size
        corners = corners * (width, height, width, height)
    return corners


def _from_form(boxes: Array, form: str) -> Array:
    a, b, c, d = boxes.T
    if form == "xyxy":
        return boxes
    if form == "yxyx":
        return np.stack([b, a, d, c], axis=1)
    if form == "xywh":
        return np.stack([a, b, a + c, b + d], axis=1)
    return np.stack([a - c / 2, b - d / 2, a + c / 2, b + d / 2], axis=1)


def suppress(corners: Array, scores: Array, ids: Array, iou: float, top: int) -> Array:
    """Greedy non-maximum suppression within each class: which boxes stay, best first, ``top`` at most.

    ``corners`` [N, 4] left, top, right, bottom; a box goes when it overlaps a better one by more than ``iou``.
    """
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(order) and len(kept) < top:
        best, order = order[0], order[1:]
        kept.append(int(best))
        rivals = ids[order] == ids[best]
        order = order[~(rivals & (_iou(corners[best], corners[order]) > iou))]
    return np.array(kept, np.int64)


def _iou(box: Array, others: Array) -> Array:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    areas = np.prod(np.maximum(others[:, 2:] - others[:, :2], 0), axis=1)
    whole = np.prod(np.maximum(box[2:] - box[:2], 0)) + areas - shared
    shares: Array = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
    return shares


def _in_image(corners: Array, placed: Placement) -> Array:
    """From pixels of the input to pixels of the image, cut at its edges."""
    sides = np.array([placed.left, placed.top] * 2)
    scale = np.array([have / new for have, new in zip(placed.image, placed.resized)])[[1, 0, 1, 0]]
    height, width = placed.image
    inside: Array = np.clip((corners - sides) * scale, 0, (width, height, width, height))
    return inside


# -- both --------------------------------------------------------------------------------------------------------------


def _one(answers: Mapping[str, Array], name: str | None) -> Array:
    return next(iter(answers.values())) if name is None else answers[name]


def _label(labels: Sequence[str] | None, index: int) -> str | None:
    return labels[index] if labels is not None and 0 <= index < len(labels) else None


def read_labels(data: bytes, name: str) -> list[str]:
    """One label a line; empty lines at the end do not count. Raises UsageError."""
    try:
        return data.decode("utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text, expected a label a line; convert it") from None


def check(
    steps: Postprocessing, outputs: Sequence[TensorSpec], labels: Sequence[str] | None, anchors: Array | None
) -> None:
    """Raise UsageError for steps that do not fit the outputs."""
    kind = steps.kind
    if kind is None or (steps.classes and steps.boxes):
        raise UsageError("the postprocessing names classes and boxes or neither, expected one of them")
    for name in _named(kind):
        _check_output(name, outputs)
    columns = _class_count(kind, outputs)
    if labels is not None and columns is not None and len(labels) != columns:
        raise UsageError(f"{kind.labels} has {len(labels)} labels, the output has {columns} classes; give one for each")
    if isinstance(kind, Boxes):
        _check_boxes(kind, anchors, outputs)


def _named(kind: Classes | Boxes) -> list[str | None]:
    if isinstance(kind, Classes):
        return [kind.output]
    return [kind.scores, *(name for name in (kind.boxes, kind.ids) if name is not None)]


def _check_output(name: str | None, outputs: Sequence[TensorSpec]) -> TensorSpec:
    names = [spec.name for spec in outputs]
    if name is None and len(outputs) > 1:
        raise UsageError(f"the postprocessing names no output, the model has {names}; name one")
    if name is not None and name not in names:
        raise UsageError(f"the postprocessing names the output {name!r}, the model has {names}")
    spec = outputs[0 if name is None else names.index(name)]
    if not spec.shape or spec.shape[0] not in (None, 1):
        raise UsageError(f"the output {spec} does not begin with a batch of 1, so it is not about one image")
    return spec


def _class_count(kind: Classes | Boxes, outputs: Sequence[TensorSpec]) -> int | None:
    """Classes of the scores, where their shape says so."""
    if isinstance(kind, Classes):
        sizes = _check_output(kind.output, outputs).shape[1:]
        known = [size for size in sizes if size is not None]
        return int(np.prod(known)) if len(known) == len(sizes) else None
    shape = _check_output(kind.scores, outputs).shape
    if kind.ids is not None or len(shape) != 3:
        return None
    columns = shape[1 if kind.transposed else 2]
    return None if columns is None else columns - (0 if kind.boxes else 4) - bool(kind.objectness)


def _check_boxes(kind: Boxes, anchors: Array | None, outputs: Sequence[TensorSpec]) -> None:
    if len(kind.variances) != 2:
        raise UsageError(f"the variances are {list(kind.variances)}, expected two: of the centre and of the size")
    if kind.ids is not None and kind.boxes is None:
        raise UsageError("the postprocessing names ids but no boxes; name the output with the boxes as well")
    spec = _check_output(kind.boxes or kind.scores, outputs)
    count = spec.shape[2 if kind.transposed else 1] if len(spec.shape) == 3 else None
    if anchors is not None and (anchors.ndim != 2 or anchors.shape[1] != 4 or len(anchors) != (count or len(anchors))):
        raise UsageError(f"{kind.anchors} has anchors of shape {list(anchors.shape)}, expected [{count or 'N'}, 4]")
