"""The one score of a model that limits go by, and which metric it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from edge_infer.errors import UsageError
from edge_infer.evaluate.agreement import AGREEMENTS, kind_of_output
from edge_infer.evaluate.cosine import CosineSimilarity
from edge_infer.evaluate.histogram import ErrorHistogram
from edge_infer.evaluate.loss import Loss, paired_loss, share
from edge_infer.evaluate.metrics import METRICS
from edge_infer.evaluate.score import Accumulator, Feed, Metric, Score
from edge_infer.evaluate.user_metric import UserAccumulator
from edge_infer.user_code import resolve

Array = np.ndarray[Any, Any]
#: The metric without labels: by the kind of output. Asked for by its own name, one stands for every output.
AGREEMENT = "agreement"
WITHOUT_LABELS = (AGREEMENT, *(metric.name for metric in AGREEMENTS.values()))


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
    if name not in (*METRICS, *WITHOUT_LABELS) and ":" not in name:
        known = ", ".join((*METRICS, *WITHOUT_LABELS))
        raise UsageError(f"there is no metric {name!r}, expected {known}, or module:callable")


def choose_output(outputs: Sequence[str], output: str | None) -> str:
    """The output to score. Raises UsageError where that is not clear."""
    if output is None and len(outputs) == 1:
        return outputs[0]
    if output is None:
        raise UsageError(f"the model has the outputs {', '.join(outputs)}; name the one to score with --scored")
    if output not in outputs:
        raise UsageError(f"--scored names {output!r}, the model's outputs are: {', '.join(outputs)}")
    return output


def without_labels(answers: Feed, output: str | None = None, metric: str = AGREEMENT) -> dict[str, Accumulator]:
    """For each output (or the named one) an accumulator of its agreement; ``answers`` is a batch of the source's.

    Raises UsageError for a name that the model does not have, and a metric that cannot be of such an output.
    """
    names = list(answers) if output is None else [choose_output(list(answers), output)]
    return {name: Accumulator(_agreement(metric, name, np.asarray(answers[name])), name) for name in names}


def _agreement(metric: str, name: str, answer: Array) -> Metric:
    kind = kind_of_output(answer)
    if metric == AGREEMENT or AGREEMENTS[kind].name == metric:
        return AGREEMENTS[kind]
    # Scores of classes look as any row of numbers does, so they may be taken for what they are not.
    if kind == "classes" and metric == AGREEMENTS["values"].name:
        return AGREEMENTS["values"]
    raise UsageError(
        f"--metric {metric} cannot be of output {name!r}, which holds {kind}; expected {AGREEMENTS[kind].name}, or "
        "another output named with --scored"
    )


class Judge:
    """The one score that limits go by, sample by sample, what it lost against the source, and how the errors lie.

    With a metric: that of the scored output. For agreement: that of the one output, or of several the worst, then as
    a share, since outputs of different kinds have different units.
    """

    def __init__(self, metric: str, scored: str | None) -> None:
        self.metric, self.scored = metric, scored
        self._scores: dict[str, Accumulator] = {}
        self._source: Accumulator | None = None
        self._errors: dict[str, ErrorHistogram] = {}
        self._cosines: dict[str, CosineSimilarity] = {}

    def add(self, expected: Feed, observed: Feed, labels: Array | None) -> None:
        """One sample: the source's answers, the artifact's, the labels. Raises UsageError, ParityError."""
        if not self._scores:
            self._begin(expected)
        for accumulator in self._scores.values():
            accumulator.add(expected, observed, labels)
            # What keeps no figures keeps the answers themselves: those of the source are not kept too.
            if self._source is not None and accumulator.per_sample:
                self._source.add(expected, expected, labels)
        for name, errors in self._errors.items():
            errors.add(np.asarray(expected[name]), np.asarray(observed[name]))
        for name, cosine in self._cosines.items():
            cosine.add(np.asarray(expected[name]), np.asarray(observed[name]))

    def _begin(self, expected: Feed) -> None:
        self._errors = {name: ErrorHistogram() for name in expected}
        floats = [name for name, answer in expected.items() if np.asarray(answer).dtype.kind == "f"]
        self._cosines = {name: CosineSimilarity() for name in floats}
        if self.metric in WITHOUT_LABELS:
            self._scores = without_labels(expected, self.scored, self.metric)
        else:
            self._scores = {"": with_labels(self.metric, sorted(expected), self.scored)}
            self._source = with_labels(self.metric, sorted(expected), self.scored)

    def score(self) -> Score:
        """Raises UsageError without samples, and where the labels are all of one class for auc."""
        scores = [accumulator.score() for accumulator in self._scores.values()]
        if len(scores) == 1:
            return scores[0]
        worst = min(scores, key=share)
        low, high = (share(replace(worst, value=value)) for value in (worst.low, worst.high))
        return Score(AGREEMENT, "agreement", share(worst), low, high, worst.count, True)

    def loss(self) -> Loss | None:
        """Against the source's own score; see ``paired_loss``. None for agreement, which is less by it than 1."""
        return None if self._source is None else paired_loss(self._source, self._scores[""])

    def outputs(self) -> list[dict[str, Any]]:
        """As the report has them: of each output the errors (artifact minus source) in bins, of floats the cosine."""
        rows = []
        for name, errors in sorted(self._errors.items()):
            cosine = self._cosines[name].result() if name in self._cosines else None
            rows.append({"name": name, **asdict(errors.result()), "cosine": cosine})
        return rows
