"""Which candidate is chosen, which are on the Pareto front, and what is said when nothing fits."""

from __future__ import annotations

import pytest

from edge_infer.errors import ConversionError
from edge_infer.evaluate.score import Score
from edge_infer.search import FIRST_LOOK_NOISE, Candidate, Limit, decide, front, promising


def score(value: float, *, error: bool = False) -> Score:
    kind = "error" if error else "accuracy"
    return Score("mae" if error else "top1", kind, value, value, value, 100, not error)


def made(name: str, size: int, p50: float, value: float, order: int = 0, memory: int = 50) -> Candidate:
    measured = {"p50_ms": p50, "peak_bytes": memory, "load_ms": 1.0}
    return Candidate("onnx", name, order, size=size, measured=measured, search=score(value))


SMALL = made("small", 10, 3.0, 0.90, order=2)
FAST = made("fast", 30, 1.0, 0.95, order=1)
EXACT = made("exact", 40, 2.0, 0.99, order=0)
WORSE = made("worse", 40, 3.0, 0.95, order=3)
FAILED = Candidate("onnx", "failed", 4, error=ConversionError("no such operator"))
ALL = (SMALL, FAST, EXACT, WORSE, FAILED)
SIZE = Limit("size", 35, "bytes", "--max-size")
FLOOR = Limit("score", 0.94, "top1", "--min-accuracy", least=True)


@pytest.mark.parametrize(
    ("prefer", "chosen"), [("target", EXACT), ("size", SMALL), ("latency", FAST), ("accuracy", EXACT)]
)
def test_the_preferred_one_is_chosen(prefer: str, chosen: Candidate) -> None:
    verdict = decide(ALL, [], prefer)
    assert verdict.chosen == chosen
    assert verdict.reasons == {"onnx failed": "no such operator"}


@pytest.mark.parametrize(("prefer", "chosen"), [("target", FAST), ("size", FAST), ("accuracy", FAST)])
def test_limits_are_hard(prefer: str, chosen: Candidate) -> None:
    verdict = decide(ALL, [SIZE, FLOOR], prefer)
    assert verdict.chosen == chosen
    assert verdict.reasons["onnx exact"] == "size is 40 bytes, allowed is at most 35 bytes (--max-size)"
    assert verdict.reasons["onnx small"] == "score is 0.9 top1, allowed is at least 0.94 top1 (--min-accuracy)"


def test_a_figure_just_at_the_limit_fits() -> None:
    assert decide(
        [FAST], [Limit("size", 30, "bytes", "x"), Limit("score", 0.95, "top1", "x", least=True)], "size"
    ).chosen
    assert decide([FAST], [Limit("size", 29, "bytes", "x")], "size").chosen is None
    assert decide([FAST], [Limit("score", 0.951, "top1", "x", least=True)], "size").chosen is None


def test_errors_are_better_when_lower() -> None:
    rough = Candidate("onnx", "rough", size=1, search=score(0.5, error=True))
    fine = Candidate("onnx", "fine", size=2, search=score(0.1, error=True))
    assert decide([rough, fine], [], "accuracy").chosen == fine
    ceiling = Limit("score", 0.3, "mae", "--min-accuracy")
    assert decide([rough, fine], [ceiling], "size").chosen == fine


def test_the_front_holds_what_nothing_beats() -> None:
    assert front(ALL[:4]) == {"onnx small", "onnx fast", "onnx exact"}
    twin = made("twin", 10, 3.0, 0.90)
    assert front([SMALL, twin]) == {"onnx small", "onnx twin"}


def test_nothing_fits_names_the_nearest_and_the_binding_limit() -> None:
    limits = [Limit("size", 9, "bytes", "--max-size"), FLOOR]
    found = decide(ALL, limits, "target").nothing_fits
    assert found is not None
    # The small one misses both, the fast one by far: one missed limit is nearer than two.
    assert (found.nearest, found.binding) == (FAST, limits[0])
    assert found.relax == "allow size 30 bytes and it fits, or choose another target"


def test_what_is_said_to_relax_lets_it_through() -> None:
    limits = [Limit("size", 9, "bytes", "--max-size"), Limit("memory", 49, "bytes", "--max-ram")]
    found = decide(ALL, limits, "target").nothing_fits
    assert found is not None
    assert found.relax.startswith("allow size 10 bytes and memory 50 bytes and it fits")
    wider = [Limit("size", 10, "bytes", "--max-size"), Limit("memory", 50, "bytes", "--max-ram")]
    assert decide(ALL, wider, "target").chosen == SMALL


def test_a_limit_on_what_was_not_measured_binds_nobody() -> None:
    unscored = Candidate("onnx", "unscored", size=1)
    assert decide([unscored], [FLOOR], "target").chosen == unscored


def test_without_a_measured_candidate_there_is_no_nearest() -> None:
    verdict = decide([FAILED], [SIZE], "target")
    assert (verdict.chosen, verdict.nothing_fits) == (None, None)


@pytest.mark.parametrize(
    ("prefer", "looked", "worth"),
    [
        ("target", made("late", 5, 0.1, 1.0, order=4), False),
        ("target", made("early", 90, 9.0, 0.5, order=-1), True),
        ("size", made("smaller", 5, 9.0, 0.5), True),
        ("size", made("larger", 31, 0.1, 1.0), False),
        ("latency", made("a little slower", 5, 1.4, 0.5), True),
        ("latency", made("much slower", 5, 1.6, 1.0), False),
    ],
)
def test_a_first_look_tells_who_cannot_be_chosen_any_more(prefer: str, looked: Candidate, worth: bool) -> None:
    assert promising(looked, [FAST, FAILED], [], prefer) is worth


def test_a_first_look_grants_its_noise_to_times_and_to_nothing_else() -> None:
    looked = made("new", 30, 3.0, 0.95, order=-1)
    assert promising(looked, ALL, [Limit("latency", 3.0 / FIRST_LOOK_NOISE, "ms", "--max-latency")], "target")
    assert not promising(looked, ALL, [Limit("latency", 2.9 / FIRST_LOOK_NOISE, "ms", "--max-latency")], "target")
    assert not promising(looked, ALL, [Limit("size", 29, "bytes", "--max-size")], "target")
    # One that does not fit is no rival.
    assert promising(made("late", 5, 0.1, 1.0, order=4), [EXACT], [SIZE], "target")
