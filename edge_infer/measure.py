"""Ask a bundle the probe inputs with the device's own runtime, and compare two sets of answers."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from edge_infer import admission, probe, user_code
from edge_infer.bundle import Bundle
from edge_infer.convert import ANSWERS_FILE, SAMPLE_ANSWERS_FILE, Read, spec_from_json, spec_to_json
from edge_infer.errors import ConversionError, ParityError
from edge_infer.evaluate.judge import Judge
from edge_infer.evaluate.loss import Loss
from edge_infer.evaluate.score import Score
from edge_infer.manifest import Check
from edge_infer.request import Request
from edge_infer.runtime.session import load
from edge_infer.samples import Samples
from edge_infer.sets import Sets
from edge_infer.steps import Made, Steps

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]

#: Golden cases: so many that they fit in this, but never fewer or more than the range.
GOLDEN_BYTES, GOLDEN_CASES = 1 << 20, (2, 4)
#: Runs on a device that is measured on; there they also end after two seconds.
FIRST_LOOK_RUNS, DEVICE_RUNS = 10, 200
#: Golden answers must differ between cases by this many tolerances for the self-test to prove anything.
SENSITIVITY = 10.0


@dataclass(frozen=True)
class Tolerance:
    """What an artifact in one precision may differ.

    ``peak``: float32 and float16, largest difference over the largest value of the output. ``rms``: quantized,
    root mean square of the difference over that of the output about its mean. ``flips``: share of integers that
    may change. ``golden``: as ``peak``, for the same artifact run by another build of its engine.
    """

    golden: float
    flips: float
    peak: float | None = None
    rms: float | None = None


TOLERANCES = {
    "float32": Tolerance(golden=1e-4, flips=0.0, peak=1e-4),
    "float16": Tolerance(golden=1e-2, flips=0.02, peak=2e-2),
    "int8-dynamic": Tolerance(golden=5e-2, flips=0.05, rms=0.15),
    "int8-weights": Tolerance(golden=1e-2, flips=0.05, rms=0.05),
    "int4-weights": Tolerance(golden=1e-2, flips=0.1, rms=0.35),
    "int16x8": Tolerance(golden=1e-2, flips=0.05, rms=0.05),
    "int8": Tolerance(golden=5e-2, flips=0.05, rms=0.25),
    "int8-mixed": Tolerance(golden=5e-2, flips=0.05, rms=0.25),
}


def scoring(request: Request, model: Read, sets: Sets) -> dict[str, Any]:
    """The part of a judgement's request that says which samples are scored, against what, by which metric."""
    if not sets.search:
        return {"sets": {}}
    return {
        "sets": {"search": list(sets.search), "holdout": list(sets.holdout)},
        "samples": str(model.made.folder / sets.kind),
        "inputs": [spec_to_json(spec) for spec in model.inputs],
        "expected": str(model.made.folder / SAMPLE_ANSWERS_FILE),
        "metric": request.metric,
        "scored": request.scored,
    }


def judged(steps: Steps, request: dict[str, Any], title: str, identity: dict[str, str], bundle: Bundle) -> Made:
    """Run ``judge`` as a step. Raises what the runtime raises, ConversionError when the engine itself crashes."""
    try:
        return steps.run("edge_infer.measure:judge", request, title, identity)
    except ConversionError as error:  # the child crashed: nothing that the runtime raises is one
        artifact = bundle.manifest.artifact
        raise ConversionError(
            f"the engine itself fails on the {artifact.format} {artifact.precision} artifact: {error}", error.log
        ) from None


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: a bundle's answers to the probe inputs, its scores on each set of samples, and on the one held out
    what it lost against the source and how its errors lie.

    One thread, so that sums are added in the same order every time.
    """
    out = Path(request["out"])
    with load(Path(request["bundle"]), threads=1, cache_dir=out) as session:
        feeds = probe.iter_feeds(Path(request["feeds"]))
        probe.save_feeds(out / ANSWERS_FILE, (session.run(feed) for feed in feeds))
        sets = _judge_sets(request, lambda index, feed: session.run(feed))
    held_out = sets.get("holdout", {})
    return {
        "scores": {name: row["score"] for name, row in sets.items()},
        "loss": held_out.get("loss"),
        "outputs": held_out.get("outputs", []),
        "depends_on": user_code.imported_files(),
    }


def judge_source(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: the source's own scores, from the answers that its reader kept."""
    expected = Path(request["expected"])
    sets = _judge_sets(request, lambda index, feed: next(probe.iter_feeds(expected, [index])))
    return {"scores": {name: row["score"] for name, row in sets.items()}, "depends_on": user_code.imported_files()}


def _judge_sets(request: dict[str, Any], answer: Callable[[int, Feed], Feed]) -> dict[str, dict[str, Any]]:
    return {name: _judge_set(request, indices, answer) for name, indices in request["sets"].items()}


def _judge_set(request: dict[str, Any], indices: list[int], answer: Callable[[int, Feed], Feed]) -> dict[str, Any]:
    """Judge one sample at a time, so that nothing is held but a few figures of each."""
    samples = Samples(Path(request["samples"]), [spec_from_json(row) for row in request["inputs"]])
    judge = Judge(request["metric"], request["scored"])
    for index, expected in zip(indices, probe.iter_feeds(Path(request["expected"]), indices), strict=True):
        labels = None if samples.labels is None else samples.label(index)
        judge.add(expected, answer(index, samples.feed(index)), labels)
    loss = judge.loss()
    return {
        "score": _to_json(judge.score()),
        "loss": None if loss is None else _to_json(loss),
        "outputs": judge.outputs(),
    }


def _to_json(figure: Score | Loss) -> dict[str, Any]:
    """What JSON can hold of it: infinite errors become the largest number."""
    row, most = asdict(figure), sys.float_info.max
    return row | {name: min(max(row[name], -most), most) for name in ("value", "low", "high")}


def bench(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: a bundle's self-test, and its time and memory in a process that does nothing else."""
    modules = os.pathsep.join(path for path in sys.path if path)
    # What engines keep of large models is not kept with the step: it would be the weights twice more.
    with tempfile.TemporaryDirectory(dir=request["out"]) as home:
        environment = {"EDGE_INFER_HOME": home, "PYTHONPATH": modules}
        admission.run_child(sys.executable, ["selftest", request["bundle"]], environment=environment)
        return admission.run_child(
            sys.executable,
            ["bench", request["bundle"], "--threads", str(request["threads"])],
            environment=environment,
        )


def bench_on(request: Request, bundle: Bundle, promising: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The same on the device of the request: a first look of few runs, and all when that is ``promising``.

    Raises DeviceError, EngineMissing, and EngineError when the bundle fails there.
    """
    from edge_infer.deploy.conversation import open_transport
    from edge_infer.deploy.push import measuring

    assert request.device is not None
    timeout_s = request.self_test_timeout or admission.TIMEOUT_S
    transport = open_transport(request.device, **request.ssh_options)
    try:
        with measuring(bundle, transport, python=request.python, timeout_s=timeout_s) as bench:
            look = dict(bench(FIRST_LOOK_RUNS))
            return {**bench(DEVICE_RUNS), "first_look": False} if promising(look) else {**look, "first_look": True}
    finally:
        transport.close()


def compare(
    what: str, expected: Sequence[Feed], observed: Sequence[Feed], precision: str, same_model: bool = False
) -> tuple[Check, ...]:
    """One check an output, over all cases. Raises ParityError naming the worst output, observed and allowed.

    ``same_model``: nothing was quantized between the two, so they may differ only as two builds of an engine do.
    """
    tolerance = TOLERANCES[precision]
    if same_model:
        tolerance = replace(tolerance, peak=tolerance.golden)
    checks = [_check(what, name, expected, observed, tolerance) for name in sorted(expected[0])]
    worst = max(checks, key=lambda check: check.observed / (check.allowed or 1e-30) if check.observed else 0.0)
    if not worst.observed <= worst.allowed:
        raise ParityError(
            f"{what}: output {worst.output!r} differs by {worst.observed:.3g} ({worst.unit}), allowed is "
            f"{worst.allowed:.3g}; choose another precision or format"
        )
    return tuple(checks)


def _check(what: str, name: str, expected: Sequence[Feed], observed: Sequence[Feed], tolerance: Tolerance) -> Check:
    for want, have in zip((case[name] for case in expected), (case[name] for case in observed), strict=True):
        if want.shape != have.shape or want.dtype != have.dtype:
            raise ParityError(
                f"{what}: output {name!r} is {have.dtype}{list(have.shape)}, expected {want.dtype}{list(want.shape)}; "
                "fix the shapes with --input, or choose another format"
            )
    a, b = _joined(expected, name), _joined(observed, name)
    if a.dtype.kind != "f":
        changed = float(np.mean(a != b)) if a.size else 0.0
        return _rounded(what, name, changed, tolerance.flips, "share of values changed")
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(a)
    if not np.isfinite(b[finite]).all() or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        raise ParityError(
            f"{what}: output {name!r} has NaN or infinity where the other has none; choose another precision"
        )
    a, b = a[finite], b[finite]
    if tolerance.peak is not None:
        peak = np.abs(a - b).max(initial=0.0) / max(np.abs(a).max(initial=0.0), 1e-30)
        return _rounded(what, name, float(peak), tolerance.peak, "largest difference over largest value")
    assert tolerance.rms is not None
    rms = np.sqrt(np.square(a - b).mean()) / max(float(a.std()), 1e-30) if a.size else 0.0
    return _rounded(what, name, float(rms), tolerance.rms, "rms difference over rms of the output")


def _joined(cases: Sequence[Feed], name: str) -> Array:
    return np.concatenate([case[name].ravel() for case in cases])


def _rounded(what: str, name: str, observed: float, allowed: float, unit: str) -> Check:
    """Three digits: the last bits differ between runs of some engines and would change the bundle's digest."""
    return Check(what, name, float(f"{observed:.3g}"), allowed, unit)


@dataclass(frozen=True)
class GoldenChoice:
    """Which probe cases become golden, what each output may differ there, and which outputs prove nothing."""

    cases: tuple[int, ...]
    tolerance: Mapping[str, float]
    blind: tuple[str, ...]


def choose_golden(
    feeds: Sequence[Feed], results: Sequence[Feed], precision: str, share: float | None = None
) -> GoldenChoice:
    """Take the cases whose answers lie farthest apart, and say for which outputs even these are too alike.

    ``share``: of an output's largest value, what the target's engine may differ by, where the target says so.
    """
    size = max(
        sum(array.nbytes for array in (*feed.values(), *result.values()))
        for feed, result in zip(feeds, results, strict=True)
    )
    count = min(max(GOLDEN_BYTES // max(size, 1), GOLDEN_CASES[0]), GOLDEN_CASES[1], len(feeds))
    names = sorted(results[0])
    factor = TOLERANCES[precision].golden if share is None else share
    tolerance = {}
    for name in names:
        finite = [np.abs(result[name][np.isfinite(result[name])]).max(initial=0.0) for result in results]
        tolerance[name] = factor * float(max(finite)) if results[0][name].dtype.kind == "f" else 0.0
    cases = _farthest(results, names, count)
    blind = tuple(
        name for name in names if not _spread([results[case][name] for case in cases]) > SENSITIVITY * tolerance[name]
    )
    return GoldenChoice(tuple(cases), tolerance, blind)


def _farthest(results: Sequence[Feed], names: Sequence[str], count: int) -> list[int]:
    """Greedy: begin with the first case, add the one whose nearest neighbour among the chosen is farthest."""
    scale = {name: max(_spread([result[name] for result in results]), 1e-30) for name in names}

    def apart(a: int, b: int) -> float:
        return sum(_distance(results[a][name], results[b][name]) / scale[name] for name in names)

    chosen = [0]
    while len(chosen) < count:
        rest = [case for case in range(len(results)) if case not in chosen]
        chosen.append(max(rest, key=lambda case: min(apart(case, other) for other in chosen)))
    return chosen


def _spread(values: Sequence[Array]) -> float:
    """The largest distance between any two."""
    return max((_distance(a, b) for a, b in combinations(values, 2)), default=0.0)


def _distance(a: Array, b: Array) -> float:
    """Largest difference over the elements both have: dynamic dimensions differ between cases."""
    count = min(a.size, b.size)
    x, y = a.ravel()[:count].astype(np.float64), b.ravel()[:count].astype(np.float64)
    return float(np.nan_to_num(np.abs(x - y)).max(initial=0.0))
