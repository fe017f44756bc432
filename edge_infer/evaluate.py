"""How good answers are: against labels (accuracy, error), or without labels against the source's answers (agreement).

Answers come batch by batch into an ``Accumulator``, which keeps a few numbers of each sample and no answers:

    accumulator = with_labels("top1", ["scores"])
    accumulator.add(expected, observed, labels)     # as often as there are batches
    accumulator.score()                             # Score("top1", "accuracy", 0.974, 0.956, 0.985, 500, True)

Samples lie along the first axis of outputs and labels. Answers that are no numbers (NaN) are wrong answers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from edge_infer import intervals
from edge_infer.errors import ParityError, UsageError
from edge_infer.histogram import ErrorHistogram
from edge_infer.user_code import resolve

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]
#: The metric without labels.
AGREEMENT = "agreement"
#: What is kept of each sample of a batch, [n, k], from the source's answers, the model's and the labels: two of them.
Rows = Callable[[Array, Array, Array], Array]

NOTHING = np.empty(0)
#: Signal over noise is given within +- this: equal answers would be infinitely good.
MOST_DECIBELS = 150.0
#: Resamples for a user's metric of the whole set, each of which calls it once.
WHOLE_SET_RESAMPLES = 100


@dataclass(frozen=True)
class Score:
    """A figure with its 95 % interval over ``count`` samples.

    ``kind``: "accuracy" (against labels), "error" (against labels, the less the better) or "agreement" (with the
    source's answers; says nothing about being right). ``rows`` [count, k] is what was kept of the samples in their
    order, for paired comparisons; ``None`` where the metric has nothing for single samples.
    """

    name: str
    kind: str
    value: float
    low: float
    high: float
    count: int
    higher_is_better: bool
    rows: Array | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Metric:
    """``statistic`` turns the rows of all samples into a function of weights, which gives the figure."""

    name: str
    kind: str
    higher_is_better: bool
    rows: Rows
    statistic: Callable[[Array], intervals.Statistic]


class Accumulator:
    """One metric of one output, over batches."""

    def __init__(self, metric: Metric, output: str) -> None:
        self.metric, self.output = metric, output
        self._rows: list[Array] = []

    def add(self, expected: Feed | None, observed: Feed, labels: Array | None = None) -> None:
        """A batch: the source's answers (``None`` where labels alone count), the model's, the labels [n, ...].

        Raises UsageError where labels do not fit, ParityError where the answers have not the source's shape.
        """
        kind, name = self.metric.kind, self.metric.name
        if labels is None and kind != "agreement":
            raise UsageError(f"{name} needs labels, but the samples have none; add them, or leave the metric away")
        wanted = NOTHING if expected is None else np.asarray(expected[self.output])
        answer = np.asarray(observed[self.output])
        if kind == "agreement" and wanted.shape != answer.shape:
            raise ParityError(
                f"output {self.output!r} has shape {list(answer.shape)} where the source's has {list(wanted.shape)}"
            )
        self._rows.append(self.metric.rows(wanted, answer, NOTHING if labels is None else np.asarray(labels)))

    def score(self) -> Score:
        """The score so far. Raises UsageError without samples, and where the labels are all of one class for auc."""
        rows = np.concatenate(self._rows) if self._rows else NOTHING
        if not len(rows):
            raise UsageError(f"{self.metric.name} has no samples to go by, expected at least one")
        statistic = self.metric.statistic(rows)
        value = statistic(np.ones(len(rows)))
        if math.isnan(value):
            raise UsageError(f"{self.metric.name} needs samples of two classes, but all labels are of one")
        if self.metric.statistic is _mean and intervals.is_proportion(rows):
            interval = intervals.wilson(value, len(rows))
        else:
            interval = intervals.bootstrap(statistic, len(rows))
        return _score(self.metric, value, interval, len(rows), rows)


def _score(metric: Metric, value: float, interval: tuple[float, float], count: int, rows: Array | None) -> Score:
    low, high = (value, value) if math.isnan(interval[0]) else interval
    low, high = min(low, value), max(high, value)
    return Score(metric.name, metric.kind, value, low, high, count, metric.higher_is_better, rows)


def with_labels(metric: str, outputs: Sequence[str], output: str | None = None) -> Accumulator:
    """For a metric of ``METRICS``, or a user's ``module:callable`` / ``file.py:callable`` (see ``UserAccumulator``).

    ``outputs`` are the model's, ``output`` the one to score, which may be left away where there is only one.
    Raises UsageError.
    """
    if metric in METRICS:
        return Accumulator(METRICS[metric], choose_output(outputs, output))
    if ":" not in metric:
        raise UsageError(f"there is no metric {metric!r}, expected {', '.join(METRICS)}, or module:callable")
    several = output is None and len(outputs) > 1
    return UserAccumulator(metric, resolve(metric, "--metric"), "" if several else choose_output(outputs, output))


def check_metric(name: str) -> None:
    """Raise UsageError for what is no metric's name; a callable's is found out when it is imported."""
    if name not in (*METRICS, AGREEMENT) and ":" not in name:
        raise UsageError(f"there is no metric {name!r}, expected {', '.join(METRICS)}, {AGREEMENT}, or module:callable")


def choose_output(outputs: Sequence[str], output: str | None) -> str:
    """The output to score. Raises UsageError where that is not clear."""
    if output is None and len(outputs) == 1:
        return outputs[0]
    if output is None:
        raise UsageError(f"the model has the outputs {', '.join(outputs)}; name the one to score with --scored")
    if output not in outputs:
        raise UsageError(f"--scored names {output!r}, the model's outputs are: {', '.join(outputs)}")
    return output


# Statistics: the rows of all samples as a function of weights [n], which gives the figure of a resample.


def _mean(rows: Array) -> intervals.Statistic:
    values, finite = rows[:, 0], np.isfinite(rows[:, 0])
    if finite.all():
        return lambda weights: float(values @ weights / weights.sum())
    return lambda weights: (
        math.inf if weights[~finite].any() else float(values[finite] @ weights[finite] / sum(weights))
    )


def _root_mean(rows: Array) -> intervals.Statistic:
    mean = _mean(rows)
    return lambda weights: math.sqrt(mean(weights))


def _auc(rows: Array) -> intervals.Statistic:
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


def _sqnr(rows: Array) -> intervals.Statistic:
    """Signal over quantization noise in dB, of rows (squares, sum, squares of the differences, how many numbers).

    The signal is the source's answers about their mean, since what is constant carries nothing.
    https://en.wikipedia.org/wiki/Signal-to-quantization-noise_ratio
    """

    def decibels(weights: Array) -> float:
        squares, total, noise, numbers = np.sum(rows[weights > 0] * weights[weights > 0, None], axis=0).tolist()
        if noise == 0:
            return MOST_DECIBELS
        signal = squares - total * total / numbers
        if signal <= 0 or not math.isfinite(noise):
            return -MOST_DECIBELS
        return max(-MOST_DECIBELS, min(MOST_DECIBELS, 10 * math.log10(signal / noise)))

    return decibels


def _cosine(rows: Array) -> intervals.Statistic:
    """Cosine of the angle between all answers of the one and of the other, of rows (products, squares, squares)."""

    def cosine(weights: Array) -> float:
        products, ours, theirs = np.sum(rows[weights > 0] * weights[weights > 0, None], axis=0).tolist()
        if ours == theirs == 0:
            return 1.0
        lengths = math.sqrt(ours) * math.sqrt(theirs)
        return products / lengths if 0 < lengths < math.inf else 0.0

    return cosine


# What is kept of each sample, against labels.


def _count(answer: Array, labels: Array) -> int:
    """Samples in a batch. Raises UsageError where outputs and labels differ in it."""
    have, wanted = (len(array) if array.ndim else 1 for array in (labels, answer))
    if have != wanted:
        raise UsageError(f"there are {have} labels for {wanted} samples, expected one for each")
    return wanted


def _class_ids(labels: Array, classes: int | None, metric: str) -> Array:
    """Labels [n], [n, 1] or one-hot [n, classes] as class ids [n]. Raises UsageError."""
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


def _squeezed(answer: Array) -> Array:
    """Class scores [n, k, 1, 1, ...] as [n, k]."""
    return answer.reshape(answer.shape[:2]) if answer.ndim > 2 and set(answer.shape[2:]) == {1} else answer


def _top(most: int) -> Rows:
    """Whether the true class is among the ``most`` best; of equal scores the first counts as better, as in argmax."""
    metric = f"top{most}"

    def rows(expected: Array, answer: Array, labels: Array) -> Array:
        count = _count(answer, labels)
        if most == 1 and answer.dtype.kind in "iu" and answer.size == count:  # the model gives the class itself
            return _column(answer.reshape(-1) == _class_ids(labels, None, metric))
        scores = _squeezed(answer)
        if scores.ndim != 2 or scores.shape[1] <= most:
            raise UsageError(
                f"{metric} expects scores of more than {most} classes [n, classes], the output has shape "
                f"{list(answer.shape)}; choose another metric or another --scored"
            )
        truth = _class_ids(labels, scores.shape[1], metric)[:, None]
        own = np.take_along_axis(scores, truth, axis=1)
        earlier = np.arange(scores.shape[1]) < truth
        better = (scores > own) | ((scores == own) & earlier)
        return _column((better.sum(axis=1) < most) & ~np.isnan(scores.astype(float)).any(axis=1))

    return rows


def _column(values: Array) -> Array:
    return np.asarray(values, float)[:, None]


def _errors(metric: str, power: int) -> Rows:
    """The mean of |difference| ** power over each sample's numbers; infinite where an answer is no number."""

    def rows(expected: Array, answer: Array, labels: Array) -> Array:
        count = _count(answer, labels)
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
        return _column(np.nan_to_num(errors, nan=np.inf, posinf=np.inf))

    return rows


def _auc_rows(expected: Array, answer: Array, labels: Array) -> Array:
    """(score of the positive class, is positive). Of two columns the difference counts, which is right for logits."""
    count = _count(answer, labels)
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


METRICS = {
    "top1": Metric("top1", "accuracy", True, _top(1), _mean),
    "top5": Metric("top5", "accuracy", True, _top(5), _mean),
    "mae": Metric("mae", "error", False, _errors("mae", 1), _mean),
    "rmse": Metric("rmse", "error", False, _errors("rmse", 2), _root_mean),
    "auc": Metric("auc", "accuracy", True, _auc_rows, _auc),
}


class UserAccumulator(Accumulator):
    """A user's ``function(outputs, labels)``.

    ``outputs`` is the array of the one output, or of several a dict by name. It gives a number for each sample
    [n], whose mean is the score; or one number for all of them: then, which shows at the first batch, outputs and
    labels of all batches are kept in memory and it is called on the whole. More is better, unless the function has an
    attribute ``higher_is_better = False``.
    """

    def __init__(self, name: str, function: Callable[..., Any], output: str) -> None:
        better = bool(getattr(function, "higher_is_better", True))
        super().__init__(Metric(name, "accuracy" if better else "error", better, self._no_rows, _mean), output)
        self._function = function
        self._kept: list[tuple[dict[str, Array], Array]] = []

    def add(self, expected: Feed | None, observed: Feed, labels: Array | None = None) -> None:
        if labels is None:
            raise UsageError(f"--metric {self.metric.name} needs labels, but the samples have none; add them")
        outputs = {name: np.asarray(observed[name]) for name in ([self.output] if self.output else observed)}
        count = _count(next(iter(outputs.values())), np.asarray(labels))
        rows = None if self._kept else self._each(outputs, np.asarray(labels), count)
        if rows is None:
            self._kept.append((outputs, np.asarray(labels)))
        else:
            self._rows.append(_column(rows))

    def _each(self, outputs: dict[str, Array], labels: Array, count: int) -> Array | None:
        """A number for each sample; ``None`` where the function is one of the whole set."""
        try:
            answer = np.asarray(self._call(outputs, labels), float)
        except UsageError:
            if self._rows:
                raise
            return None  # one batch may be too little for it
        if answer.ndim == 0 and not self._rows:
            return None
        if answer.shape != (count,) or not np.isfinite(answer).all():
            raise UsageError(
                f"--metric {self.metric.name} gives an array of shape {list(answer.shape)} for {count} samples, "
                "expected one finite number for each or one for all"
            )
        return answer

    def _call(self, outputs: dict[str, Array], labels: Array) -> Any:
        try:
            return self._function(outputs[self.output] if self.output else outputs, labels)
        except Exception as error:
            raise UsageError(f"--metric {self.metric.name} failed: {type(error).__name__}: {error}") from error

    def score(self) -> Score:
        if not self._kept:
            return super().score()
        outputs = {name: np.concatenate([part[name] for part, _ in self._kept]) for name in self._kept[0][0]}
        labels = np.concatenate([part for _, part in self._kept])
        value = self._whole(outputs, labels)

        def resampled(weights: Array) -> float:
            chosen = np.repeat(np.arange(len(labels)), weights)
            try:
                return self._whole({name: array[chosen] for name, array in outputs.items()}, labels[chosen])
            except UsageError:  # such as a metric that needs every class
                return math.nan

        interval = intervals.bootstrap(resampled, len(labels), WHOLE_SET_RESAMPLES)
        return _score(self.metric, value, interval, len(labels), None)

    def _whole(self, outputs: dict[str, Array], labels: Array) -> float:
        answer = np.asarray(self._call(outputs, labels), float)
        if answer.ndim or not np.isfinite(answer):
            raise UsageError(f"--metric {self.metric.name} gives {answer} for the whole set, expected a finite number")
        return float(answer)

    @staticmethod
    def _no_rows(expected: Array, answer: Array, labels: Array) -> Array:
        raise NotImplementedError("a user's metric is asked by its accumulator")


# Agreement: the source's answers in the place of labels.


def kind_of_output(answer: Array) -> str:
    """ "classes" (float scores [n, 2 or more]), "integers" or "values", by a batch of the SOURCE's answers."""
    if answer.dtype.kind in "iub":
        return "integers"
    scores = _squeezed(answer)
    return "classes" if scores.ndim == 2 and scores.shape[1] >= 2 else "values"


def _samples(array: Array) -> Array:
    """[n, numbers of a sample] in float64; an output without dimensions is one sample."""
    return array.reshape(len(array) if array.ndim else 1, -1).astype(float)


def _same_class(expected: Array, answer: Array, labels: Array) -> Array:
    """Whether the answer's best class is the source's best, or equal to it there."""
    ours, theirs = _samples(expected), _samples(answer)
    at_theirs = np.take_along_axis(ours, theirs.argmax(axis=1)[:, None], axis=1)[:, 0]
    return _column((at_theirs == ours.max(axis=1)) & ~np.isnan(theirs).any(axis=1))


def _equal(expected: Array, answer: Array, labels: Array) -> Array:
    """Share of equal integers in each sample; a sample without any is equal."""
    same = (expected == answer).reshape(len(expected) if expected.ndim else 1, -1)
    return _column(same.mean(axis=1) if same.shape[1] else np.ones(len(same)))


def _powers(expected: Array, answer: Array, labels: Array) -> Array:
    signal = _samples(expected)
    noise = np.nan_to_num(((_samples(answer) - signal) ** 2).sum(axis=1), nan=np.inf, posinf=np.inf)
    numbers = np.full(len(signal), signal.shape[1], float)
    return np.stack([(signal**2).sum(axis=1), signal.sum(axis=1), noise, numbers], axis=1)


def _products(expected: Array, answer: Array, labels: Array) -> Array:
    ours, theirs = _samples(expected), np.nan_to_num(_samples(answer), nan=np.inf)
    with np.errstate(invalid="ignore"):
        products = np.nan_to_num((ours * theirs).sum(axis=1))
    return np.stack([products, (ours**2).sum(axis=1), (theirs**2).sum(axis=1)], axis=1)


#: By kind of output, the first is what limits go by. For values that is the signal over the noise, about the mean as
#: parity has it, and not the cosine, to which outputs of half the size look perfect and single numbers always do.
AGREEMENTS = {
    "classes": (Metric("agreement-top1", "agreement", True, _same_class, _mean),),
    "integers": (Metric("agreement-equal", "agreement", True, _equal, _mean),),
    "values": (
        Metric("agreement-sqnr-db", "agreement", True, _powers, _sqnr),
        Metric("agreement-cosine", "agreement", True, _products, _cosine),
    ),
}


def without_labels(answers: Feed, output: str | None = None) -> dict[str, Accumulator]:
    """For each output (or the named one) an accumulator of its agreement; ``answers`` is a batch of the source's.

    Raises UsageError for a name that the model does not have.
    """
    names = list(answers) if output is None else [choose_output(list(answers), output)]
    return {name: Accumulator(AGREEMENTS[kind_of_output(np.asarray(answers[name]))][0], name) for name in names}


def agreement(expected: Array, observed: Array) -> Score:
    """How far ``observed`` agrees with the source's ``expected``, in one go. Raises ParityError for other shapes."""
    accumulator = Accumulator(AGREEMENTS[kind_of_output(expected)][0], "output")
    accumulator.add({"output": expected}, {"output": observed})
    return accumulator.score()


class Judge:
    """The one score that limits go by, sample by sample, and how the errors of each output lie.

    With a metric: that of the scored output. For agreement: that of the one output, or of several the worst, then as
    a share, since outputs of different kinds have different units.
    """

    def __init__(self, metric: str, scored: str | None) -> None:
        self.metric, self.scored = metric, scored
        self._scores: dict[str, Accumulator] = {}
        self._errors: dict[str, ErrorHistogram] = {}

    def add(self, expected: Feed, observed: Feed, labels: Array | None) -> None:
        """One sample: the source's answers, the artifact's, the labels. Raises UsageError, ParityError."""
        if not self._scores:
            self._errors = {name: ErrorHistogram() for name in expected}
            if self.metric == AGREEMENT:
                self._scores = without_labels(expected, self.scored)
            else:
                self._scores = {"": with_labels(self.metric, sorted(expected), self.scored)}
        for accumulator in self._scores.values():
            accumulator.add(expected, observed, labels)
        for name, errors in self._errors.items():
            errors.add(np.asarray(expected[name]), np.asarray(observed[name]))

    def score(self) -> Score:
        scores = [accumulator.score() for accumulator in self._scores.values()]
        if len(scores) == 1:
            return scores[0]
        worst = min(scores, key=share)
        low, high = (share(replace(worst, value=value)) for value in (worst.low, worst.high))
        return Score(AGREEMENT, "agreement", share(worst), low, high, worst.count, True)

    def histograms(self) -> list[dict[str, Any]]:
        """As the report has them: an output's errors (artifact minus source) in bins."""
        rows = []
        for name, errors in sorted(self._errors.items()):
            found = errors.result()
            rows.append({"name": name, "edges": found.edges, "counts": found.counts, "largest": found.largest})
        return rows


def to_json(score: Score) -> dict[str, Any]:
    """What JSON can hold of a score: infinite errors become the largest number, the rows stay behind."""
    row = {item.name: getattr(score, item.name) for item in fields(score) if item.name != "rows"}
    most = sys.float_info.max
    return row | {name: min(max(row[name], -most), most) for name in ("value", "low", "high")}


def from_json(row: Mapping[str, Any]) -> Score:
    return Score(**row)


# A candidate against a reference.


@dataclass(frozen=True)
class Drop:
    """What a candidate lost against a reference.

    ``kept``: the share of the reference's score that is left, 1.0 where nothing was lost (MLPerf asks for 0.99,
    https://docs.mlcommons.org/inference/), above 1 where the candidate is better. ``difference``: candidate minus
    reference in the metric's own unit, with its 95 % interval; ``paired``: of the same samples one by one, which is
    narrower. ``worse``: the interval lies on the bad side of 0 altogether.
    """

    kept: float
    difference: float
    low: float
    high: float
    paired: bool
    worse: bool


def drop(reference: Score, candidate: Score) -> Drop:
    """Compare two scores by one metric; paired where both hold rows, which must be of the same samples in one order.

    Yes-or-no results are compared as matched proportions, others by resampling both alike (``intervals`` names the
    sources). Raises UsageError for scores by different metrics.
    """
    if reference.name != candidate.name:
        raise UsageError(f"{candidate.name} cannot be compared with {reference.name}; score both by one metric")
    difference = candidate.value - reference.value if candidate.value != reference.value else 0.0
    paired = reference.rows is not None and candidate.rows is not None and len(reference.rows) == len(candidate.rows)
    if paired:
        low, high = _paired(reference, candidate)
    else:
        low, high = intervals.unpaired(
            (reference.value, reference.low, reference.high), (candidate.value, candidate.low, candidate.high)
        )
    low, high = (difference, difference) if math.isnan(low) or math.isnan(high) else (low, high)
    low, high = min(low, difference), max(high, difference)
    worse = high < 0 if reference.higher_is_better else low > 0
    return Drop(_kept(reference, candidate), difference, low, high, paired, worse)


def _paired(reference: Score, candidate: Score) -> tuple[float, float]:
    ours, theirs = reference.rows, candidate.rows
    assert ours is not None and theirs is not None
    if intervals.is_proportion(ours) and intervals.is_proportion(theirs):
        return intervals.paired_proportions(ours[:, 0], theirs[:, 0])
    metrics = [*METRICS.values(), *(metric for row in AGREEMENTS.values() for metric in row)]
    statistic = next((metric.statistic for metric in metrics if metric.name == reference.name), _mean)
    old, new = statistic(ours), statistic(theirs)

    def difference(weights: Array) -> float:
        return new(weights) - old(weights)

    return intervals.bootstrap(difference, len(ours))


def _kept(reference: Score, candidate: Score) -> float:
    old, new = share(reference), share(candidate)
    if not reference.higher_is_better:
        old, new = new, old
    if old <= 0 or not math.isfinite(old):  # no share of nothing
        return 1.0 if new >= old else 0.0
    return new / old


def share(score: Score) -> float:
    """The score on a scale where shares make sense: of dB the part of the signal's power that noise leaves.

    20 dB is 0.99: noise has a hundredth of the signal's power.
    """
    return max(0.0, 1 - 10 ** (-score.value / 10)) if score.name.endswith("-db") else score.value


def allowed(reference: Score, lost: float) -> float:
    """The figure of a score that lost this share of the reference's, in the metric's own unit."""
    if reference.name.endswith("-db"):
        return min(MOST_DECIBELS, -10 * math.log10(1 - share(reference) * (1 - lost))) if lost else MOST_DECIBELS
    return reference.value * (1 - lost if reference.higher_is_better else 1 + lost)
