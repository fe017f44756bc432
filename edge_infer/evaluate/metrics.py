"""Metrics of one output against labels: accuracy of classes, errors of values, the area under the ROC curve."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edge_infer.errors import UsageError
from edge_infer.evaluate import intervals
from edge_infer.evaluate.score import Metric, Rows, column, mean

Array = np.ndarray[Any, Any]


def sample_count(labels: Array, answer: Array) -> int:
    """Samples in a batch of labels and answers [n, ...]. Raises UsageError where they differ in it."""
    have, wanted = (len(array) if array.ndim else 1 for array in (labels, answer))
    if have != wanted:
        raise UsageError(f"there are {have} labels for {wanted} samples, expected one for each")
    return wanted


def class_scores(answer: Array) -> Array:
    """Class scores [n, k, 1, 1, ...] as [n, k]; any other array as it is."""
    return answer.reshape(answer.shape[:2]) if answer.ndim > 2 and set(answer.shape[2:]) == {1} else answer


def _class_ids(labels: Array, classes: int | None, metric: str) -> Array:
    """Labels [n], [n, 1] or one-hot [n, classes] as class ids int64 [n]. Raises UsageError."""
    if labels.ndim == 2 and labels.shape[1] > 1 and labels.shape[1] == classes:
        if not (np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all()):
            raise UsageError(f"{metric} takes one class a sample, but rows of the labels hold other than a single 1")
        return np.asarray(labels.argmax(axis=1))
    if labels.size != (len(labels) if labels.ndim else 1):
        rows = f", or one-hot rows [n, {classes}]" if classes else ""
        raise UsageError(f"the labels have shape {list(labels.shape)}, {metric} expects class ids [n] or [n, 1]{rows}")
    if labels.dtype.kind not in "iub":
        raise UsageError(f"the labels have dtype {labels.dtype}, {metric} expects integer class ids")
    ids = labels.reshape(-1).astype(np.int64)
    if classes and ((ids < 0) | (ids >= classes)).any():
        wrong = ids[(ids < 0) | (ids >= classes)][0]
        raise UsageError(
            f"the labels hold class {wrong}, {metric} expects 0 to {classes - 1} as the output numbers them"
        )
    return ids


def _top(most: int) -> Rows:
    """Whether the true class is among the ``most`` best; of equal scores the first counts as better, as in argmax."""
    metric = f"top{most}"

    def rows(labels: Array, answer: Array) -> Array:
        count = sample_count(labels, answer)
        if most == 1 and answer.dtype.kind in "iu" and answer.size == count:  # the model gives the class itself
            return column(answer.reshape(-1) == _class_ids(labels, None, metric))
        scores = class_scores(answer)
        if scores.ndim != 2 or scores.shape[1] <= most:
            raise UsageError(
                f"{metric} expects scores of more than {most} classes [n, classes], the output has shape "
                f"{list(answer.shape)}; choose another metric or another --scored"
            )
        truth = _class_ids(labels, scores.shape[1], metric)[:, None]
        own = np.take_along_axis(scores, truth, axis=1)
        earlier = np.arange(scores.shape[1]) < truth
        better = (scores > own) | ((scores == own) & earlier)
        return column((better.sum(axis=1) < most) & ~np.isnan(scores.astype(float)).any(axis=1))

    return rows


def _errors(metric: str, power: int) -> Rows:
    """The mean of |difference| ** power over each sample's numbers; infinite where an answer is no number."""

    def rows(labels: Array, answer: Array) -> Array:
        count = sample_count(labels, answer)
        if labels.dtype.kind not in "iuf":
            raise UsageError(f"the labels have dtype {labels.dtype}, {metric} expects numbers")
        if labels.shape != answer.shape and not labels.size == answer.size == count:
            raise UsageError(
                f"the labels have shape {list(labels.shape)}, {metric} expects the output's, {list(answer.shape)}"
            )
        wanted = labels.reshape(count, -1).astype(float)
        if not np.isfinite(wanted).all():
            raise UsageError(f"the labels hold NaN or infinity, {metric} expects finite numbers")
        errors = (np.abs(answer.reshape(count, -1).astype(float) - wanted) ** power).mean(axis=1)
        return column(np.nan_to_num(errors, nan=np.inf, posinf=np.inf))

    return rows


def _root_mean(rows: Array) -> intervals.Statistic:
    mean_of = mean(rows)
    return lambda weights: math.sqrt(mean_of(weights))


def _auc_rows(labels: Array, answer: Array) -> Array:
    """(score of the positive class, is positive). Of two columns the difference counts, which is right for logits."""
    count = sample_count(labels, answer)
    if answer.dtype.kind != "f" or answer.size not in (count, 2 * count):
        raise UsageError(
            f"auc expects one or two float scores a sample, the output is {answer.dtype} {list(answer.shape)}; "
            "for more than two classes choose top1"
        )
    scores = answer.reshape(count, -1).astype(float)
    with np.errstate(invalid="ignore"):  # the difference of two infinities
        score = scores[:, -1] - scores[:, 0] if scores.shape[1] == 2 else scores[:, 0]
    positive = _class_ids(labels, 2, "auc").astype(float)
    score = np.where(np.isnan(score), np.where(positive > 0, -np.inf, np.inf), score)
    return np.stack([score, positive], axis=1)


def area_under_roc(rows: Array) -> intervals.Statistic:
    """Area under the ROC curve of rows (score, is positive): how often a positive beats a negative, ties half.

    The Mann-Whitney statistic; NaN without both classes. https://en.wikipedia.org/wiki/Mann-Whitney_U_test
    """
    order = np.argsort(rows[:, 0], kind="stable")
    scores, positive = rows[order, 0], rows[order, 1]
    starts = np.concatenate([[0], np.flatnonzero(scores[1:] != scores[:-1]) + 1])  # of runs of equal scores

    def area(weights: Array) -> float:
        ours = weights[order] * positive
        theirs = weights[order] - ours
        wins, losses = np.add.reduceat(ours, starts), np.add.reduceat(theirs, starts)
        pairs = float(ours.sum() * theirs.sum())
        return float(wins @ (np.cumsum(losses) - losses / 2)) / pairs if pairs else math.nan

    return area


#: Answers: float scores [n, classes] for top1 and top5 (for top1 also the integer class [n]), one or two float scores
#: [n, 1 or 2] for auc, numbers [n, ...] for mae and rmse, whose unit is the output's own. Labels: class ids [n], [n, 1]
#: or one-hot [n, classes]; for errors numbers of the output's shape.
METRICS = {
    "top1": Metric("top1", "accuracy", True, _top(1), mean),
    "top5": Metric("top5", "accuracy", True, _top(5), mean),
    "mae": Metric("mae", "error", False, _errors("mae", 1), mean),
    "rmse": Metric("rmse", "error", False, _errors("rmse", 2), _root_mean),
    "auc": Metric("auc", "accuracy", True, _auc_rows, area_under_roc),
}
