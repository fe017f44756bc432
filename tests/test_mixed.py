"""The search for layers to keep in float, on landscapes small enough to try every set."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from edge_infer.errors import ConversionError, UsageError
from edge_infer.quantize.mixed import Layer, Mixed, search

Scorer = Callable[[frozenset[str]], float]


def drawn(rng: np.random.Generator, count: int, noise: float, zero: float = 0.2) -> tuple[list[Layer], np.ndarray]:
    """Layers with errors as measured, and the true ones, which are those times a factor, and add up to 1."""
    sizes = (1000 * np.exp(rng.normal(0, 1.0, count))).astype(int) * (rng.random(count) >= zero)
    measured = np.exp(rng.normal(0, 1.0, count))
    true = measured * np.exp(rng.normal(0, noise, count))
    layers = [Layer(f"layer{i}", "Conv", int(sizes[i]) + (i == 0), float(measured[i])) for i in range(count)]
    return layers, true / true.sum()


def additive(layers: list[Layer], true: np.ndarray) -> Scorer:
    return lambda keep: -sum(float(error) for layer, error in zip(layers, true) if layer.name not in keep)


def fewest_bytes(layers: list[Layer], true: np.ndarray, need: float) -> int:
    """By trying every set."""
    bits = (np.arange(2 ** len(layers))[:, None] >> np.arange(len(layers))) & 1
    return int((bits @ np.array([layer.bytes for layer in layers]))[bits @ true >= need - 1e-12].min())


@pytest.mark.parametrize(("noise", "mean"), [(0.0, 1.02), (0.3, 1.1), (0.7, 1.3)])
def test_it_is_near_the_fewest_bytes(noise: float, mean: float) -> None:
    ratios, asked = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        layers, true = drawn(rng, 10, noise)
        need = rng.uniform(0.1, 0.9)
        found = search(layers, additive(layers, true), need - 1 - 1e-9, 40)
        assert found.met
        total = sum(layer.bytes for layer in layers)
        ratios.append((found.bytes_share * total + total / 1000) / (fewest_bytes(layers, true, need) + total / 1000))
        asked.append(found.evaluations)
    assert np.mean(ratios) <= mean
    assert min(ratios) >= 1.0 - 1e-9
    assert np.mean(asked) <= 14
    assert max(asked) <= 2 + 8 + 2 * 10


@pytest.mark.parametrize("count", [40, 150])
def test_of_many_layers_it_beats_keeping_the_worst_ones(count: int) -> None:
    kept, worst_first = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        layers, true = drawn(rng, count, 0.3)
        found = search(layers, additive(layers, true), -0.5, 60)
        assert found.met
        kept.append(found.bytes_share)
        order = np.argsort([-layer.error for layer in layers])
        needed = int(np.searchsorted(np.cumsum(true[order]), 0.5)) + 1
        sizes = np.array([layer.bytes for layer in layers])
        worst_first.append(sizes[order[:needed]].sum() / sizes.sum())
    assert np.mean(kept) < 0.8 * np.mean(worst_first)


def test_a_limit_that_all_layers_in_float_meet_is_always_met() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        layers, true = drawn(rng, 12, 1.5)
        wobble = {}

        def wobbling(keep: frozenset[str], layers=layers, true=true, wobble=wobble, rng=rng) -> float:
            if len(keep) == len(layers):
                return 0.0
            return wobble.setdefault(keep, additive(layers, true)(keep) + rng.normal(0, 0.1))

        found = search(layers, wobbling, -0.2, 25)
        assert found.met
        assert found.score >= -0.2
        assert found.evaluations <= 25
        cheapest = min(trial.bytes_share for trial in found.trials if trial.met)
        assert found.bytes_share <= cheapest + 0.02


def counted(score: Scorer) -> tuple[Scorer, list[frozenset[str]]]:
    asked: list[frozenset[str]] = []

    def count(keep: frozenset[str]) -> float:
        asked.append(keep)
        return score(keep)

    return count, asked


def test_plain_int8_that_is_good_enough_is_asked_once() -> None:
    score, asked = counted(lambda keep: 1.0)
    found = search([Layer("a", "Conv", 10, 0.5)], score, 0.9, 10)
    assert (found.keep_float, found.met, found.score, found.bytes_share) == ((), True, 1.0, 0.0)
    assert asked == [frozenset()]


def test_no_set_is_asked_twice_and_every_trial_is_on_record() -> None:
    layers, true = drawn(np.random.default_rng(1), 12, 0.7)
    score, asked = counted(additive(layers, true))
    found = search(layers, score, -0.3, 50)
    assert len(asked) == len(set(asked)) == found.evaluations
    assert [frozenset(trial.keep_float) for trial in found.trials] == asked
    assert [trial.met for trial in found.trials] == [trial.score >= -0.3 for trial in found.trials]
    order = [layer.name for layer in layers]
    assert list(found.keep_float) == sorted(found.keep_float, key=order.index)
    assert search(layers, additive(layers, true), -0.3, 50) == found


def test_out_of_reach_gives_the_best_seen_after_few_questions() -> None:
    layers, true = drawn(np.random.default_rng(2), 20, 0.3)
    found = search(layers, additive(layers, true), 0.5, 50)
    assert not found.met
    assert found.score == max(trial.score for trial in found.trials) == 0.0
    assert found.evaluations <= 8


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_the_budget_is_kept_and_the_best_so_far_given(budget: int) -> None:
    layers, true = drawn(np.random.default_rng(3), 30, 0.3)
    found = search(layers, additive(layers, true), -0.4, budget)
    assert found.evaluations == budget
    assert found.met == (budget > 1)
    assert found.bytes_share <= min((trial.bytes_share for trial in found.trials if trial.met), default=1.0)


def test_no_budget_is_refused() -> None:
    with pytest.raises(UsageError, match="0 trials"):
        search([Layer("a", "Conv", 10, 0.5)], lambda keep: 1.0, 0.9, 0)


def one_culprit(name: str) -> Scorer:
    return lambda keep: 1.0 if name in keep else 0.0


@pytest.mark.parametrize("error", [0.0, 0.3, math.nan, math.inf])
def test_errors_that_say_nothing_leave_the_bytes_to_go_by(error: float) -> None:
    layers = [Layer(f"l{i}", "Conv", 1000 * (9 - i), error) for i in range(8)]
    found = search(layers, one_culprit("l5"), 0.5, 40)
    assert found.keep_float == ("l5",)


def test_a_layer_whose_error_was_measured_as_nothing_is_still_found() -> None:
    layers = [Layer(f"l{i}", "Conv", 1000, 0.0 if i == 4 else 1.0 + i) for i in range(10)]
    assert search(layers, one_culprit("l4"), 0.5, 40).keep_float == ("l4",)


def test_a_layer_that_int8_breaks_comes_first() -> None:
    layers = [Layer(f"l{i}", "Conv", 1000, math.inf if i == 3 else 1.0) for i in range(40)]
    found = search(layers, one_culprit("l3"), 0.5, 12)
    assert found.keep_float == ("l3",)


def test_layers_without_weights_are_kept_where_they_matter_and_not_for_being_free() -> None:
    layers = [Layer(f"{kind}{i}", kind, size, 0.1) for i in range(6) for kind, size in (("Conv", 5000), ("Softmax", 0))]
    assert search(layers, one_culprit("Softmax2"), 0.5, 40).keep_float == ("Softmax2",)
    weightless = [Layer(f"Add{i}", "Add", 0, 0.1) for i in range(6)]
    found = search(weightless, one_culprit("Add4"), 0.5, 40)
    assert found.keep_float == ("Add4",)
    assert found.bytes_share == pytest.approx(1 / 6)


def test_small_gaps_between_layers_kept_are_closed() -> None:
    layers = [
        Layer("first", "Conv", 100_000, 5.0),
        Layer("relu", "Relu", 0, 0.0),
        Layer("second", "Conv", 100_000, 5.0),
        Layer("between", "Conv", 90_000, 0.001),
        Layer("third", "Conv", 100_000, 5.0),
    ]
    found = search(layers, lambda keep: float({"first", "second", "third"} <= keep), 0.5, 40)
    assert found.keep_float == ("first", "relu", "second", "third")


def test_a_set_that_cannot_be_built_counts_as_failing_and_is_on_record() -> None:
    layers, true = drawn(np.random.default_rng(5), 10, 0.3)
    plain = additive(layers, true)

    def fussy(keep: frozenset[str]) -> float:
        if len(keep) in (3, 10):
            raise ConversionError(f"{len(keep)} layers are one too many")
        return plain(keep)

    found = search(layers, fussy, -0.4, 60)
    assert found.met
    failed = [trial for trial in found.trials if trial.failure]
    assert failed
    assert all(trial.score is None and not trial.met and "one too many" in trial.failure for trial in failed)


def test_nothing_that_can_be_built_is_an_error_with_the_cause() -> None:
    def never(keep: frozenset[str]) -> float:
        raise ConversionError("the quantizer knows no Conv")

    with pytest.raises(ConversionError, match="none of 4 mixed artifacts could be built: the quantizer knows no Conv"):
        search([Layer(f"l{i}", "Conv", 9, 1.0) for i in range(20)], never, 0.5, 4)


def test_other_errors_are_not_swallowed() -> None:
    def wrong(keep: frozenset[str]) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search([Layer("a", "Conv", 10, 0.5)], wrong, 0.9, 10)


def test_a_score_that_is_no_number_is_not_good_enough() -> None:
    layers = [Layer(f"l{i}", "Conv", 10, 1.0) for i in range(4)]
    found: Mixed = search(layers, lambda keep: 1.0 if len(keep) == 4 else math.nan, 0.5, 40)
    assert found.met
    assert len(found.keep_float) == 4


def test_a_model_without_layers_gives_its_one_score() -> None:
    found = search([], lambda keep: 0.4, 0.5, 10)
    assert (found.met, found.keep_float, found.evaluations) == (False, (), 1)
