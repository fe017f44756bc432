"""Ask a bundle the probe inputs with the device's own runtime, and compare two sets of answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from edge_infer import admission, probe, worker
from edge_infer.bundle import Bundle
from edge_infer.errors import ConversionError, ParityError
from edge_infer.manifest import Check
from edge_infer.runtime.session import load

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]

#: Golden cases: so many that they fit in this, but never fewer or more than the range.
GOLDEN_BYTES, GOLDEN_CASES = 1 << 20, (2, 4)
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
    "int8": Tolerance(golden=5e-2, flips=0.05, rms=0.25),
}


def answers(bundle: Bundle, feeds: Path, work: Path, log: Path) -> list[Feed]:
    """Run the bundle on all feeds in a child process. Raises what the runtime raises."""
    out = work / "answers.npz"
    try:
        worker.run("edge_infer.measure:answer", {"bundle": str(bundle.path), "feeds": str(feeds), "out": str(out)}, log)
    except ConversionError as error:  # the child crashed: nothing that the runtime raises is one
        artifact = bundle.manifest.artifact
        raise ConversionError(
            f"the engine itself fails on the {artifact.format} {artifact.precision} artifact: {error}", error.log
        ) from None
    return probe.load_feeds(out)


def answer(request: dict[str, str]) -> dict[str, Any]:
    """The child's side of ``answers``. One thread, so that sums are added in the same order every time."""
    with load(Path(request["bundle"]), threads=1, cache_dir=Path(request["out"]).parent) as session:
        probe.save_feeds(Path(request["out"]), [session.run(feed) for feed in probe.load_feeds(Path(request["feeds"]))])
    return {}


def bench(bundle: Bundle, threads: int, work: Path) -> dict[str, Any]:
    """Time and memory of the bundle here, and its golden questions, in child processes of the device command line."""
    environment = {
        "EDGE_INFER_HOME": str(work / "store"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    admission.run_child(sys.executable, ["selftest", str(bundle.path)], environment=environment)
    return admission.run_child(
        sys.executable, ["bench", str(bundle.path), "--threads", str(threads)], environment=environment
    )


def compare(what: str, expected: Sequence[Feed], observed: Sequence[Feed], precision: str) -> tuple[Check, ...]:
    """One check an output, over all cases. Raises ParityError naming the worst output, observed and allowed."""
    tolerance = TOLERANCES[precision]
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


def choose_golden(feeds: Sequence[Feed], results: Sequence[Feed], precision: str) -> GoldenChoice:
    """Take the cases whose answers lie farthest apart, and say for which outputs even these are too alike."""
    size = max(
        sum(array.nbytes for array in (*feed.values(), *result.values()))
        for feed, result in zip(feeds, results, strict=True)
    )
    count = min(max(GOLDEN_BYTES // max(size, 1), GOLDEN_CASES[0]), GOLDEN_CASES[1], len(feeds))
    names = sorted(results[0])
    factor = TOLERANCES[precision].golden
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
