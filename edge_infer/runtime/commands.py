"""What the command lines do with one bundle. Each function gives plain data; printing is the caller's."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_infer import bundle as bundles
from edge_infer import emulation, trust
from edge_infer.bundle import Bundle
from edge_infer.errors import EngineError, InputError, UsageError
from edge_infer.manifest import SetScore, to_json
from edge_infer.runtime import memory, plan, room, thermal
from edge_infer.runtime.arrays import read_npz, write_npz
from edge_infer.runtime.engines import EngineOptions, check_model, engine_module, prepare_engine
from edge_infer.runtime.golden import read_golden, self_test
from edge_infer.runtime.plan import Measured, PoolMeasured, PoolSetting, Setting
from edge_infer.runtime.session import Session, cache_of, find_bundle, load, open_session
from edge_infer.runtime.threads import default_threads

Source = str | os.PathLike[str]

#: A benchmark ends after so many runs or so much time, whichever comes first.
BENCH_RUNS = 200
BENCH_SECONDS = 2.0


def info(source: Source) -> dict[str, Any]:
    """The manifest in short: contract, artifact, checks, files."""
    bundle = find_bundle(source)
    manifest = bundle.manifest
    tuned, pool = plan.read(bundle, cache_of(bundle)), plan.read_pool(bundle, cache_of(bundle))
    return {
        "name": manifest.name,
        "version": manifest.version,
        "digest": bundle.digest,
        "signed": trust.said(bundle),
        "path": str(bundle.path),
        "target": manifest.target.name,
        "format": manifest.artifact.format,
        "precision": manifest.artifact.precision,
        "needs": " or ".join(str(item) for item in manifest.artifact.requires),
        "providers": list(manifest.artifact.providers),
        "inputs": [str(spec) for spec in manifest.inputs],
        "outputs": [str(spec) for spec in manifest.outputs],
        "operators": list(manifest.artifact.operators),
        "blind outputs": list(manifest.golden.blind),
        "checks": [
            f"{check.what}: {check.observed:.3g} {check.unit} at {check.output}, allowed {check.allowed:.3g}"
            for check in manifest.checks
        ],
        "scores": [_score(score) for score in manifest.scores],
        "images become": [
            f"{spec.name}: {_said(spec.preprocessing)}" for spec in manifest.inputs if spec.preprocessing
        ],
        "answers become": [_said(manifest.postprocessing)] if manifest.postprocessing else [],
        "tuned": f"{tuned.setting}: {tuned.p95_ms:.3g} ms at 95 %{_emulated(tuned)}" if tuned else None,
        "tuned pool": f"{pool.setting}: {pool.per_second:.3g} answers a second{_emulated(pool)}" if pool else None,
        "files": {name: entry.size for name, entry in sorted(manifest.files.items())},
        "provenance": dict(manifest.provenance),
    }


def _emulated(found: Measured | PoolMeasured) -> str:
    return f", emulated ({found.emulated})" if found.emulated else ""


def _said(steps: Any) -> str:
    """What the manifest says of the steps, defaults left out."""
    said = to_json(steps)
    if len(said) == 1 and isinstance(next(iter(said.values())), dict):
        ((kind, said),) = said.items()
        return f"{kind} {_pairs(said)}".rstrip()
    return _pairs(said)


def _pairs(row: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={':'.join(map(str, value)) if isinstance(value, list) else value}" for key, value in row.items()
    )


def _score(score: SetScore) -> str:
    of = f"{score.low:.4g} to {score.high:.4g}, {score.count} samples"
    return f"{score.samples}: {score.metric} {score.value:.4g} ({of}), the source {score.source:.4g}"


def verify(source: Source) -> dict[str, Any]:
    """Hash every file and ask the golden questions in this process."""
    bundle = find_bundle(source)
    bundles.verify(bundle, mode="full", inspect=check_model)
    return {"name": bundle.manifest.name, "digest": bundle.digest, "files": len(bundle.manifest.files)} | selftest(
        source
    )


def selftest(source: Source, max_memory: int | None = None) -> dict[str, Any]:
    """Open the bundle with this device's engine and ask the golden questions.

    ``max_memory``: the most private memory in bytes that this process may take, Python and the engine included. It is
    held to that from now on, as far as the system can. Raises OutOfMemory.
    """
    if max_memory is not None:
        room.limit(find_bundle(source), max_memory)
    with load(source) as session:
        worst = self_test(session)
        if max_memory is not None:
            room.require_within(session.bundle, max_memory)
        return {"engine": dataclasses.asdict(session.info), "largest_difference": worst}


def prepare(path: Path, folder: Path, provider: str | None = None, prepack: bool | None = None) -> dict[str, Any]:
    """Fill ``folder`` with what the engine, or this ``provider`` of it, makes of the model once, and ask it the golden
    questions.

    ``prepack``: whether ONNX Runtime repacks weights, None as the bundle says.

    Raises EngineError, SelfTestFailed, InputError where the engine cannot be used in that way.
    """
    bundle = bundles.open_bundle(path)
    bundles.verify(bundle, mode="full", inspect=check_model)
    trust.require_signed(bundle)
    if provider is None:
        _require_different_sizes(bundle)
    options = EngineOptions(default_threads(), (provider,) if provider else None, prepack=prepack)
    with Session(bundle, prepare_engine(bundle, options, folder)) as session:
        return {"largest_difference": self_test(session)}


def _require_different_sizes(bundle: Bundle) -> None:
    """An engine that does not see how sizes follow from each other shows it only when they change."""
    cases = [asked for asked, _ in read_golden(bundle)]
    for spec in bundle.manifest.inputs:
        for axis, size in enumerate(spec.shape):
            if size is None and len({asked[spec.name].shape[axis] for asked in cases}) < 2:
                raise EngineError(f"all golden questions have the same size of {spec} in dimension {axis}")


def run(source: Source, inputs: Path | None, output: Path | None, max_memory: int | None = None) -> dict[str, Any]:
    """Run once on the arrays of an npz file (default: the first golden case); store or summarize the answers."""
    with load(source, max_memory=max_memory) as session:
        arrays = read_arrays(inputs, session) if inputs else read_golden(session.bundle)[0][0]
        answers = session.run(arrays)
    if output:
        _write_aside(output, answers)
    return _summary(answers)


def predict(source: Source, image: Path) -> dict[str, Any]:
    """What the bundle makes of an image file. Raises UsageError where it says nothing of images, InputError."""
    with load(source) as session:
        found = session.predict(image)
    if isinstance(found, dict):
        return {"outputs": _summary(found)}
    return {"predictions": [dataclasses.asdict(row) for row in found]}


def _summary(answers: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    return {
        name: {"dtype": str(array.dtype), "shape": list(array.shape), "first": array.ravel()[:8].tolist()}
        for name, array in answers.items()
    }


def _write_aside(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write an npz file beside its place and rename it, so that a half-written one never shows."""
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} to store the answers in")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_npz(aside, arrays)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read_arrays(path: Path, session: Session) -> Mapping[str, np.ndarray[Any, Any]]:
    """The session's inputs from an npz file that may hold more. Raises UsageError, InputError."""
    try:
        arrays = read_npz(path)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not an npz file of plain arrays ({error})") from None
    absent = [spec.name for spec in session.inputs if spec.name not in arrays]
    if absent:
        raise InputError(f"{path} holds {sorted(arrays)}, expected an array {absent[0]!r}")
    return {spec.name: arrays[spec.name] for spec in session.inputs}


def tune(
    source: Source,
    max_memory: int | None = None,
    by: str = "p95",
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Find how the bundle runs fastest here ``by`` its p95 or p50, and keep that for every later load.

    On an emulated machine ``emulated`` says so, and what is kept counts there alone. Raises OutOfMemory.
    """
    from edge_infer.runtime import tuning

    bundle = find_bundle(source)
    best, rows = tuning.tune(bundle, max_memory, by, progress)
    return {
        "name": bundle.manifest.name,
        "chosen": str(best.setting),
        "kept": plan.keep(bundle, cache_of(bundle), best),
        **emulation.mark(),
        "settings": {
            str(row.setting): {"p50_ms": row.p50_ms, "p95_ms": row.p95_ms, "peak_bytes": row.peak_bytes} for row in rows
        },
    }


def throughput(
    source: Source, keep: bool = False, progress: Callable[[str], None] = lambda step: None
) -> dict[str, Any]:
    """Answers a second of a ``Pool`` by sessions, threads of each and batch; ``keep`` the best for later ones."""
    from edge_infer.runtime import throughput as pools

    bundle = find_bundle(source)
    rows = pools.measure(bundle, progress)
    best = pools.choose(rows)
    kept = {"kept": plan.keep_pool(bundle, cache_of(bundle), best)} if keep else {}
    return {
        "name": bundle.manifest.name,
        "best": dataclasses.asdict(best.setting),
        **kept,
        **emulation.mark(),
        "throughput": [_pool_row(row) for row in rows],
    }


def throughput_of(source: Source, setting: PoolSetting, seconds: float) -> dict[str, Any]:
    """``throughput`` of one setting, in this process."""
    from edge_infer.runtime import throughput as pools

    return _pool_row(pools.measure_here(find_bundle(source), setting, seconds))


def _pool_row(row: PoolMeasured) -> dict[str, Any]:
    figures = {"per_second": row.per_second, "p50_ms": row.p50_ms, "peak_bytes": row.peak_bytes}
    return {**dataclasses.asdict(row.setting), **figures}


def bench(
    source: Source,
    threads: int | None = None,
    runs: int = BENCH_RUNS,
    seconds: float = BENCH_SECONDS,
    spinning: bool | None = None,
    profile: bool = False,
    trace: Path | None = None,
    setting: Setting | None = None,
    max_memory: int | None = None,
) -> dict[str, Any]:
    """Time opening and running the bundle's first golden case in this process.

    ``load_ms``: open with the files' hashes already known. ``private_bytes``: anonymous memory added over the
    imported engine, after the runs. ``peak_bytes``: the largest resident size of the whole process.
    ``throttled``: whether the machine slowed its processor meanwhile, None where it does not say.
    ``emulated``: what emulates the machine, where something does: these are no figures of a board then.
    ``profile``: afterwards, the time of each operator as well; ``trace``: and a Chrome trace of it in that file.
    ``setting`` is what ``threads`` and ``spinning`` would choose, whole.
    """
    bundle = find_bundle(source)
    if trace is not None:
        from edge_infer.runtime.profile import check_trace

        check_trace(trace)
    engine_module(bundle).import_engine(bundle)
    cache = cache_of(bundle)
    setting = setting or plan.chosen(bundle, cache, threads, spinning)

    def opened(limit: int | None = None) -> Session:
        bundles.verify(bundle, "auto", cache, check_model)
        return open_session(bundle, cache, setting, max_memory=limit)

    opened(max_memory).close()  # hashes the files and leaves the stamp
    asked = read_golden(bundle)[0][0]
    baseline = memory.private_bytes()
    cool = thermal.read()
    started = time.perf_counter()
    with opened() as session:
        loaded = time.perf_counter()
        session.run(asked)
        answered = time.perf_counter()
        latencies = _latencies(session, asked, runs, seconds)
        measured = {
            "engine": dataclasses.asdict(session.info),
            "load_ms": (loaded - started) * 1e3,
            "first_ms": (answered - loaded) * 1e3,
            "p50_ms": statistics.median(latencies) * 1e3,
            "p95_ms": sorted(latencies)[int(len(latencies) * 0.95)] * 1e3,
            "runs": len(latencies),
            "private_bytes": max(0, memory.private_bytes() - baseline),
            "peak_bytes": memory.peak_bytes(),
            **thermal.between(cool, thermal.read()),
            **emulation.mark(),
        }
    if profile or trace is not None:
        options = EngineOptions(setting.threads, None, cache, spinning=setting.spinning, prepack=setting.prepack)
        found = _profile(bundle, options, asked, runs, seconds, trace)
        measured["profile"] = found | {"unprofiled_p50_ms": measured["p50_ms"]}
    return measured


def _profile(
    bundle: Bundle,
    options: EngineOptions,
    asked: Mapping[str, np.ndarray[Any, Any]],
    runs: int,
    seconds: float,
    trace: Path | None,
) -> dict[str, Any]:
    from edge_infer.runtime import profile as profiles  # who only times pays nothing for it

    arrays = [asked[spec.name] for spec in bundle.manifest.inputs]
    taken = profiles.take(bundle, options, arrays, profiles.Limit(runs, seconds))
    if trace is not None:
        profiles.write_trace(taken, bundle.manifest.name, trace)
    return profiles.summary(taken) | {"trace": None if trace is None else str(trace)}


def _latencies(session: Session, asked: Mapping[str, np.ndarray[Any, Any]], runs: int, seconds: float) -> list[float]:
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    while not latencies or (len(latencies) < runs and time.perf_counter() < end):
        started = time.perf_counter()
        session.run(asked)
        latencies.append(time.perf_counter() - started)
    return latencies
