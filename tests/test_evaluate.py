"""Scores and their intervals, against scikit-learn, against known values, and on the real digits network."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score, top_k_accuracy_score

from edge_infer.errors import ParityError, UsageError
from edge_infer.evaluate import agreement, histogram, intervals, judge, metrics
from edge_infer.evaluate.cosine import CosineSimilarity
from edge_infer.evaluate.loss import Loss, allowed, paired_loss, share
from edge_infer.evaluate.score import Accumulator, Score
from edge_infer.report import units

RNG = np.random.default_rng()


@pytest.fixture(autouse=True)
def same_draws_for_each_test_alone() -> None:
    RNG.bit_generator.state = np.random.default_rng(3).bit_generator.state


def scored(metric: str, answers: np.ndarray, labels: np.ndarray, batch: int = 7) -> Score:
    accumulator = judge.with_labels(metric, ["y"])
    for start in range(0, len(answers), batch):
        accumulator.add(None, {"y": answers[start : start + batch]}, labels[start : start + batch])
    return accumulator.score()


def guesses(count: int = 200, classes: int = 10, signal: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    labels = RNG.integers(0, classes, count)
    scores = RNG.standard_normal((count, classes)).astype(np.float32)
    scores[np.arange(count), labels] += signal
    return scores, labels


def test_the_digits_network_scores_what_its_training_measured(models: Path) -> None:
    with np.load(models / "test_nchw.npz") as data:
        images, labels = data["image"], data["label"]
    session = onnxruntime.InferenceSession(models / "torch.onnx", providers=["CPUExecutionProvider"])
    accumulator = judge.with_labels("top1", ["digit"])
    for start in range(0, len(images), 64):
        (answer,) = session.run(None, {"image": images[start : start + 64]})
        accumulator.add(None, {"digit": answer}, labels[start : start + 64])
    score = accumulator.score()
    assert score.value == json.loads((models / "accuracy.json").read_text())["torch"]
    assert (score.kind, score.count, score.higher_is_better) == ("accuracy", len(images), True)
    assert 0.955 < score.low < score.value < score.high < 0.99


@pytest.mark.parametrize("shape", ["ids", "column", "one-hot", "trailing ones"])
def test_top_k_is_scikit_learns(shape: str) -> None:
    scores, labels = guesses()
    given = {"column": labels[:, None], "one-hot": np.eye(10)[labels]}.get(shape, labels)
    answers = scores[:, :, None, None] if shape == "trailing ones" else scores
    assert scored("top1", answers, given).value == pytest.approx(accuracy_score(labels, scores.argmax(axis=1)))
    assert scored("top5", answers, given).value == pytest.approx(top_k_accuracy_score(labels, scores, k=5))


def test_equal_scores_are_no_lucky_hits() -> None:
    labels = np.arange(10)
    constant = np.zeros((10, 10), np.float32)
    assert scored("top1", constant, labels).value == 0.1
    assert scored("top5", constant, labels).value == 0.5
    assert scored("top1", np.full((10, 10), np.nan, np.float32), labels).value == 0.0


def test_a_model_that_gives_the_class_itself_has_a_top1() -> None:
    assert scored("top1", np.array([[1], [2], [3], [3]]), np.array([1, 2, 3, 4])).value == 0.75


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_scikit_learns(columns: int, ties: bool) -> None:
    labels = RNG.integers(0, 2, 300)
    scores = labels + RNG.standard_normal(300)
    scores = np.round(scores) if ties else scores
    answers = np.stack([-scores, scores], axis=1) if columns == 2 else scores[:, None]
    score = scored("auc", answers, labels)
    assert score.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert score.low < score.value < score.high


def test_resampled_auc_is_that_of_the_samples_repeated() -> None:
    labels, scores = RNG.integers(0, 2, 50), np.round(RNG.standard_normal(50), 1)
    weights = np.bincount(RNG.integers(0, 50, 50), minlength=50)
    area = metrics.area_under_roc(np.stack([scores, labels], axis=1))(weights)
    assert area == pytest.approx(roc_auc_score(np.repeat(labels, weights), np.repeat(scores, weights)))


def test_errors_are_those_of_the_formula_however_the_batches_fall() -> None:
    answers, labels = RNG.standard_normal((2, 90, 4, 3))
    for batch in (1, 13, 90):
        mae, rmse = scored("mae", answers, labels, batch), scored("rmse", answers, labels, batch)
        assert mae.value == pytest.approx(np.abs(answers - labels).mean())
        assert rmse.value == pytest.approx(math.sqrt(((answers - labels) ** 2).mean()))
        assert (mae.kind, mae.higher_is_better) == ("error", False)
    assert scored("mae", answers[:, :1, 0], labels[:, 0, 0]).count == 90


def test_an_answer_that_is_no_number_is_infinitely_wrong() -> None:
    answers = np.array([[1.0], [np.nan], [3.0]])
    score = scored("mae", answers, np.ones((3, 1)))
    assert score.value == score.high == math.inf


def test_an_interval_of_an_error_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(8)
    hits = 0
    for _ in range(60):
        score = scored("mae", rng.standard_normal((120, 1)), np.zeros((120, 1)), 120)
        hits += score.low <= math.sqrt(2 / math.pi) <= score.high
    assert 52 <= hits <= 60


def test_wilson_gives_the_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29. https://doi.org/10.1002/sim.2780170802
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert intervals.wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)
    assert intervals.wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@pytest.mark.parametrize(
    ("metric", "answers", "labels", "words"),
    [
        ("top1", np.zeros((3, 4)), np.zeros(3), "dtype float64, top1 expects integer class ids"),
        ("top1", np.zeros((3, 4)), np.array([0, 1, 4]), "class 4, top1 expects 0 to 3"),
        ("top1", np.zeros((3, 4)), np.array([0, -1, 3]), "class -1"),
        ("top1", np.zeros((3, 4)), np.zeros(4, int), "4 labels for 3 samples"),
        ("top1", np.zeros((3, 4)), np.ones((3, 4)), "one class a sample"),
        ("top1", np.zeros((3, 4)), np.ones((3, 5), int), "one-hot rows [n, 4]"),
        ("top1", np.zeros((3, 4, 5)), np.zeros(3, int), "the output has shape [3, 4, 5]"),
        ("top1", np.zeros((3, 1)), np.zeros(3, int), "more than 1 classes"),
        ("top5", np.zeros((3, 5)), np.zeros(3, int), "more than 5 classes"),
        ("auc", np.zeros((3, 1)), np.ones(3, int), "two classes, but all labels are of one"),
        ("auc", np.zeros((3, 1)), np.array([0, 1, 2]), "class 2, auc expects 0 to 1"),
        ("auc", np.zeros((3, 4)), np.zeros(3, int), "for more than two classes choose top1"),
        ("mae", np.zeros((3, 2)), np.zeros((3, 3)), "expects the output's, [3, 2]"),
        ("rmse", np.zeros((3, 2)), np.full((3, 2), np.nan), "NaN or infinity"),
        ("rmse", np.zeros((3, 1)), np.array(["a", "b", "c"]), "expects numbers"),
        ("f1", np.zeros((3, 1)), np.zeros(3), "no metric 'f1', expected top1, top5, mae, rmse, auc"),
    ],
)
def test_what_does_not_fit_is_refused(metric: str, answers: np.ndarray, labels: np.ndarray, words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("[", r"\[")):
        scored(metric, answers, labels)


def test_no_samples_and_no_labels_are_refused() -> None:
    accumulator = judge.with_labels("top1", ["y"])
    with pytest.raises(UsageError, match="no samples"):
        accumulator.score()
    with pytest.raises(UsageError, match="needs labels"):
        accumulator.add(None, {"y": np.zeros((1, 3))})


def test_of_several_outputs_one_is_named() -> None:
    with pytest.raises(UsageError, match="boxes, scores; name the one to score with --scored"):
        judge.with_labels("top1", ["boxes", "scores"])
    with pytest.raises(UsageError, match="'score', the model's outputs are: boxes, scores"):
        judge.with_labels("top1", ["boxes", "scores"], "score")
    accumulator = judge.with_labels("top1", ["boxes", "scores"], "scores")
    accumulator.add(None, {"boxes": np.zeros(0), "scores": np.eye(3)}, np.array([0, 1, 1]))
    assert accumulator.score().value == pytest.approx(2 / 3)


USERS = """
import numpy as np

def within_one(answers, labels):
    return np.abs(answers.argmax(axis=1) - labels) <= 1

def macro_recall(answers, labels):
    predicted = answers.argmax(axis=1)
    return np.mean([np.mean(predicted[labels == label] == label) for label in np.unique(labels)])

def both(outputs, labels):
    return (outputs["a"] + outputs["b"])[:, 0] - labels

both.higher_is_better = False

def fails_on_less_than_all(answers, labels):
    if len(set(labels.tolist())) < 10:
        raise ValueError("a class is missing")
    return 0.5

def broken(answers, labels):
    raise KeyError("no such thing")

def pages(answers, labels):
    return answers
"""


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users_metrics.py"
    path.write_text(USERS)
    return path


def test_a_users_metric_gives_numbers_of_samples_or_one_of_all(users: Path) -> None:
    scores, labels = guesses()
    near = scored(f"{users}:within_one", scores, labels)
    assert near.value == np.mean(np.abs(scores.argmax(axis=1) - labels) <= 1)
    assert near.kind == "score"  # nobody knows whether it is a share
    assert units.score(30.0, {"kind": near.kind}) == "30"
    assert (near.low, near.high) == intervals.wilson(near.value, 200)
    recall = scored(f"{users}:macro_recall", scores, labels)
    hit = scores.argmax(axis=1) == labels
    assert recall.value == pytest.approx(np.mean([hit[labels == label].mean() for label in range(10)]))
    assert recall.low < recall.value < recall.high
    assert scored(f"{users}:fails_on_less_than_all", scores, labels).value == 0.5


def test_a_users_metric_may_take_all_outputs_and_be_an_error(users: Path) -> None:
    accumulator = judge.with_labels(f"{users}:both", ["a", "b"])
    accumulator.add(None, {"a": np.ones((4, 1)), "b": np.ones((4, 1))}, np.array([0, 1, 0, 1]))
    score = accumulator.score()
    assert (score.value, score.kind, score.higher_is_better) == (1.5, "error", False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", "failed: KeyError"),
        ("pages", "an array of shape"),
        ("absent", "no callable 'absent'"),
    ],
)
def test_a_users_metric_that_fails_is_named(users: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        scored(f"{users}:{name}", *guesses())


def agreed(expected: np.ndarray, observed: np.ndarray) -> Score:
    (accumulator,) = judge.without_labels({"y": expected}).values()
    accumulator.add({"y": expected}, {"y": observed})
    return accumulator.score()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (np.zeros((2, 10), np.float32), "classes"),
        (np.zeros((2, 10, 1, 1), np.float32), "classes"),
        (np.zeros((2, 1), np.float32), "values"),
        (np.zeros((2, 8, 8), np.float16), "values"),
        (np.zeros((), np.float32), "values"),
        (np.zeros((2, 3), np.int64), "integers"),
        (np.zeros((2, 3), bool), "integers"),
    ],
)
def test_the_kind_of_an_output_goes_by_the_sources_answers(answer: np.ndarray, kind: str) -> None:
    assert agreement.kind_of_output(answer) == kind
    same = agreed(answer, answer)
    assert same.kind == "agreement"
    assert same.value == (agreement.MOST_DECIBELS if kind == "values" else 1.0)


def test_agreement_of_classes_and_integers_is_a_share() -> None:
    scores, _ = guesses()
    other = scores.copy()
    other[:30] = np.roll(scores[:30], 1, axis=1)
    assert agreed(scores, other).value == pytest.approx(170 / 200)
    assert agreed(scores, np.full_like(scores, np.nan)).value == 0.0
    tied = np.array([[1.0, 1.0, 0.0]])
    assert agreed(tied, np.array([[0.0, 1.0, 0.5]])).value == 1.0
    assert agreed(np.array([[1, 2], [3, 4]]), np.array([[1, 0], [3, 4]])).value == 0.75


def test_agreement_of_values_is_signal_over_noise_about_the_mean() -> None:
    signal = RNG.standard_normal((400, 3, 2))
    noise = 0.1 * RNG.standard_normal((400, 3, 2))
    wanted = 10 * math.log10(signal.var() / (noise**2).mean())
    with np.errstate(all="raise"):
        for offset in (0.0, 1000.0):
            score = agreed(signal + offset, signal + offset + noise)
            assert score.name == "agreement-sqnr-db"
            assert score.value == pytest.approx(wanted, abs=0.01)
            assert score.low < score.value < score.high
    assert agreed(signal, signal / 2).value == pytest.approx(6.02, abs=0.05)
    assert agreed(signal, np.full_like(signal, np.nan)).value == -agreement.MOST_DECIBELS


def test_agreement_of_a_kind_that_the_user_names() -> None:
    """A row of numbers may be scores of classes, or a box."""
    boxes = RNG.standard_normal((4, 4)) * 100
    assert judge.without_labels({"box": boxes})["box"].metric.name == "agreement-top1"
    named = judge.without_labels({"box": boxes}, None, "agreement-sqnr-db")["box"]
    named.add({"box": boxes}, {"box": boxes + np.array([0, 0, 0, 10])})
    assert 10 < named.score().value < 40
    with pytest.raises(UsageError, match=r"agreement-equal cannot be of output 'box', which holds classes; expected"):
        judge.without_labels({"box": boxes}, "box", "agreement-equal")


def test_agreement_is_one_accumulator_an_output_and_shapes_must_be_the_sources() -> None:
    first = {"scores": np.eye(4), "count": np.array([3, 1, 2, 2]), "mask": RNG.standard_normal((4, 5, 5))}
    accumulators = judge.without_labels(first)
    for _ in range(3):
        for accumulator in accumulators.values():
            accumulator.add(first, {**first, "count": np.array([3, 1, 2, 1])})
    scores = {name: accumulator.score() for name, accumulator in accumulators.items()}
    assert [score.count for score in scores.values()] == [12, 12, 12]
    assert (scores["scores"].value, scores["count"].value) == (1.0, 0.75)
    with pytest.raises(ParityError, match=r"output 'mask' has shape \[4, 5\] where the source's has \[4, 5, 5\]"):
        accumulators["mask"].add(first, {"mask": np.zeros((4, 5))})


def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    made = CosineSimilarity()
    for index in range(len(ours)):
        made.add(ours[index : index + 1], theirs[index : index + 1])
    return made.result()


def test_the_cosine_is_over_all_answers() -> None:
    ours, theirs = RNG.standard_normal((2, 50, 3, 2))
    wanted = (ours * theirs).sum() / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert cosine(ours, theirs) == pytest.approx(wanted)
    assert cosine(ours, -3 * ours) == pytest.approx(-1)


def test_the_cosine_of_nothing_and_of_no_numbers() -> None:
    ours, nothing = RNG.standard_normal((5, 4)).astype(np.float32), np.zeros((5, 4), np.float32)
    assert cosine(nothing, nothing) == 1
    assert cosine(ours, nothing) == cosine(nothing, ours) == 0
    for broken in (np.nan, np.inf):
        with np.errstate(all="raise"):
            assert cosine(ours, np.where(ours == ours.max(), broken, ours)) == 0


def yes_no(*answers: int) -> np.ndarray:
    return np.array(answers, float)[:, None]


def accumulated(metric: str, answers: np.ndarray, labels: np.ndarray) -> Accumulator:
    accumulator = judge.with_labels(metric, ["y"])
    for start in range(0, len(answers), 7):
        accumulator.add(None, {"y": answers[start : start + 7]}, labels[start : start + 7])
    return accumulator


def top1(results: np.ndarray) -> Accumulator:
    return accumulated("top1", results[:, 0].astype(int), np.ones(len(results), int))


def lost(source: Accumulator, candidate: Accumulator) -> Loss:
    found = paired_loss(source, candidate)
    assert found is not None
    return found


def test_a_loss_looks_at_the_samples_that_changed() -> None:
    old = yes_no(*[1] * 90, *[0] * 10)
    new = yes_no(*[0] * 6, *[1] * 86, *[0] * 8)  # 6 lost, 2 won
    loss = lost(top1(old), top1(new))
    assert loss.value == pytest.approx(4 / 90)
    # By hand: cells 6.5 and 2.5 of 102, so 4/102 -+ 1.96 * sqrt(9 - 16/102)/102, and as a share of 0.9.
    assert (loss.low, loss.high) == pytest.approx((-0.01792 / 0.9, 0.09635 / 0.9), abs=1e-4)


def test_a_loss_is_seen_where_the_two_intervals_overlap() -> None:
    old = yes_no(*[1] * 900, *[0] * 100)
    new = yes_no(*[0] * 15, *[1] * 885, *[0] * 100)
    loss = lost(top1(old), top1(new))
    assert 0 < loss.low < loss.value == pytest.approx(15 / 900)
    assert top1(new).score().high > top1(old).score().value
    unpaired = sum(score.high - score.low for score in (top1(old).score(), top1(new).score()))
    assert loss.high - loss.low < unpaired / 2


def test_no_change_is_no_loss_and_no_certainty() -> None:
    loss = lost(*[top1(yes_no(*[1] * 45, *[0] * 5))] * 2)
    assert loss.value == 0
    assert loss.low < 0 < loss.high == pytest.approx(-loss.low)


def test_the_loss_of_an_error_and_of_auc_is_resampled_alike() -> None:
    labels = RNG.standard_normal((300, 1))
    noise = RNG.standard_normal((300, 1))
    old, new = accumulated("rmse", labels + noise, labels), accumulated("rmse", labels + 1.02 * noise, labels)
    loss = lost(old, new)
    assert loss.value == pytest.approx(0.02)
    assert loss.low > 0  # each of the errors is larger, though the two intervals nearly coincide
    assert loss.low == pytest.approx(0.02 * old.score().low / old.score().value, rel=1e-6)
    assert lost(new, old).value == pytest.approx(1 / 1.02 - 1)
    classes = (labels[:, 0] > 0).astype(int)
    auc, worse = (accumulated("auc", labels + factor * noise, classes) for factor in (1, 1.3))
    assert lost(auc, auc) == Loss(0, 0, 0)
    loss = lost(auc, worse)
    assert loss.value == pytest.approx(1 - worse.score().value / auc.score().value)
    assert 0 < loss.low < loss.value < loss.high
    assert loss.high - loss.low < (auc.score().high - auc.score().low) / auc.score().value


def test_answers_that_are_no_numbers_lose_everything() -> None:
    answers = RNG.standard_normal((20, 1))
    labels = answers + 1
    broken = np.where(np.arange(20)[:, None] == 3, np.nan, answers)
    loss = lost(accumulated("mae", answers, labels), accumulated("mae", broken, labels))
    assert loss.value == loss.high == math.inf


@pytest.mark.parametrize("metric", ["top1", "mae"])
def test_what_limits_allow_is_the_loss_that_they_name(metric: str) -> None:
    labels = np.zeros((100, 1), int)
    right = np.arange(100) < 80
    answers = np.where(right, 0, 5)[:, None]
    worse = np.where(right & (np.arange(100) != 3), 0, 5)[:, None]  # one more is wrong
    if metric == "top1":
        source, candidate = (accumulated(metric, array[:, 0], labels[:, 0]) for array in (answers, worse))
    else:
        source, candidate = (accumulated(metric, array.astype(float), labels) for array in (answers, worse))
    loss = lost(source, candidate)
    assert loss.value > 0
    assert allowed(source.score(), loss.value) == pytest.approx(candidate.score().value)


def test_nothing_is_lost_of_nothing() -> None:
    nothing, something = (accumulated("mae", np.full((9, 1), off), np.zeros((9, 1))) for off in (0.0, 0.1))
    assert paired_loss(nothing, something) is None
    assert paired_loss(top1(yes_no(0, 0, 0)), top1(yes_no(1, 0, 0))) is None


def test_decibels_are_a_share_of_power() -> None:
    def sqnr(value: float) -> Score:
        return Score("agreement-sqnr-db", "agreement", value, value, value, 10, True)

    assert share(sqnr(20.0)) == pytest.approx(0.99)
    assert share(sqnr(-3.0)) == 0.0
    assert allowed(sqnr(150.0), 0.01) == pytest.approx(20.0)


def judged(metric: str, expected: np.ndarray, observed: np.ndarray, labels: np.ndarray | None) -> judge.Judge:
    """Sample by sample, as the packager does."""
    made = judge.Judge(metric, None)
    for index in range(len(expected)):
        one = slice(index, index + 1)
        made.add({"y": expected[one]}, {"y": observed[one]}, None if labels is None else labels[one])
    return made


def test_the_judge_compares_with_the_sources_own_score(users: Path) -> None:
    scores, labels = guesses()
    worse = scores + RNG.standard_normal(scores.shape).astype(np.float32)
    right, still = scores.argmax(axis=1) == labels, worse.argmax(axis=1) == labels
    found = judged("top1", scores, worse, labels)
    assert still.mean() < right.mean()
    assert found.score().value == pytest.approx(still.mean())
    assert found.loss() == lost(top1(yes_no(*right)), top1(yes_no(*still)))
    by_users = judged(f"{users}:within_one", scores, worse, labels).loss()
    near, nearer = (np.abs(array.argmax(axis=1) - labels) <= 1 for array in (worse, scores))
    assert by_users is not None and by_users.value == pytest.approx(1 - near.mean() / nearer.mean())


def test_the_judge_has_no_loss_without_figures_of_single_samples_or_labels(users: Path) -> None:
    scores, labels = guesses()
    whole = judged(f"{users}:macro_recall", scores, scores, labels)
    assert whole.score().low < whole.score().value < whole.score().high
    assert whole.loss() is None
    assert judged("agreement", scores, scores[:, ::-1], None).loss() is None


def test_the_judge_says_of_each_output_how_far_it_is_off() -> None:
    expected = {"a": RNG.standard_normal((6, 3)).astype(np.float32), "b": np.arange(6)}
    observed = {"a": expected["a"] * np.float32(1.5), "b": expected["b"] + [0, 0, 2, 0, 0, -3]}
    observed["a"][4, 1] = np.nan
    made = judge.Judge("agreement", None)
    for index in range(6):
        one = slice(index, index + 1)
        asked = {name: array[one] for name, array in expected.items()}
        made.add(asked, {name: array[one] for name, array in observed.items()}, None)
    floats, integers = made.outputs()
    assert (floats["name"], floats["not_finite"], floats["cosine"], sum(floats["counts"])) == ("a", 1, 0, 17)
    assert (integers["name"], integers["not_finite"], integers["cosine"]) == ("b", 0, None)
    assert (integers["largest"], sum(integers["counts"]), len(integers["edges"])) == (3, 6, len(integers["counts"]) + 1)


def counted(expected: np.ndarray, observed: np.ndarray, bins: int = 21) -> histogram.Histogram:
    made = histogram.ErrorHistogram()
    made.add(expected, observed)
    return made.result(bins)


def test_the_histogram_holds_every_error_once_however_it_is_fed() -> None:
    expected = RNG.standard_normal(5000).astype(np.float32)
    errors = np.concatenate([np.zeros(100), 10 ** RNG.uniform(-6, 1, 4900) * RNG.choice([-1, 1], 4900)])
    observed = (expected + errors).astype(np.float64)
    whole = counted(expected, observed, 31)
    parts = histogram.ErrorHistogram()
    for start in range(0, 5000, 900):
        parts.add(expected[start : start + 900], observed[start : start + 900])
    assert parts.result(31) == whole
    assert len(whole.counts) <= 31
    assert len(whole.edges) == len(whole.counts) + 1
    exact = observed - expected.astype(float)
    assert whole.largest == np.abs(exact).max()
    assert list(whole.edges) == sorted(whole.edges)
    assert list(whole.counts) == np.histogram(exact, whole.edges)[0].tolist()
    assert sum(whole.counts) == 5000


def test_the_histogram_of_nothing_wrong_and_of_nothing_finite() -> None:
    same = counted(np.ones(7), np.ones(7))
    assert (sum(same.counts), same.largest, same.not_finite) == (7, 0.0, 0)
    assert same.counts[len(same.counts) // 2] == 7
    lost = counted(np.ones(4), np.array([np.nan, np.inf, 1.5, 1e30]))
    assert (sum(lost.counts), lost.largest, lost.not_finite) == (2, 1e30, 2)
