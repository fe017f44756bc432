"""Which operators of a model its time goes to: as a table, and as a trace that chrome://tracing and Perfetto open.

Each engine has a profiler of its own, which lies beside it in ``engines/`` and opens the model as ``load`` does. What
is common is here: time that is not counted twice, the time which no operator accounts for, and the trace.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_infer.errors import EngineError, EngineMissing, UsageError
from edge_infer.runtime.engines import ENGINES, EngineInfo, EngineOptions, engine_error

if TYPE_CHECKING:
    import numpy as np

    from edge_infer.bundle import Bundle

    Arrays = Sequence[np.ndarray[Any, Any]]

#: A profile has so many runs at most: engines keep a record of each operator of each run in memory.
MOST_RUNS = 30
#: So many runs go before, in which an engine still takes memory and compiles.
WARM_UP = 3
#: So many single operators are listed.
SLOWEST = 20
#: The thread that asked for the run; whoever waits for the answer waits for it.
CALLER = "caller"


@dataclass(frozen=True)
class Event:
    """Something an engine did; microseconds, ``start_us`` since the run began.

    ``operator``: the kind, in the engine's words; ``name``: which one of the model. ``inner``: part of an operator, or
    of the engine's own work, which is shown in the trace and not counted.
    """

    name: str
    operator: str
    start_us: float
    duration_us: float
    thread: str = CALLER
    inner: bool = False

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us


@dataclass(frozen=True)
class Span:
    """When a run began, in microseconds of the machine's clock, and how long the caller waited for it."""

    start_us: float
    duration_us: float


@dataclass(frozen=True)
class Run:
    span: Span
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Profile:
    """``notes``: how what was timed differs from what runs otherwise, and what the figures leave out."""

    info: EngineInfo
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Limit:
    """A profile ends after so many runs or so much time, whichever comes first."""

    runs: int
    seconds: float


def take(bundle: Bundle, options: EngineOptions, arrays: Arrays, limit: Limit) -> Profile:
    """Open ``bundle`` with its engine's profiler and run it on ``arrays``. Raises EngineMissing, EngineError."""
    limit = Limit(min(limit.runs, MOST_RUNS), limit.seconds)
    module = importlib.import_module(f"{ENGINES[bundle.manifest.artifact.format]}_profile")
    try:
        profile: Profile = module.profile(bundle, options, arrays, limit)
    except (EngineError, EngineMissing, OSError):
        raise
    except Exception as error:  # engines raise whatever they like
        raise engine_error(error, f"cannot profile {bundle.path}") from error
    if not any(event for run in profile.runs for event in run.events if not event.inner):
        raise EngineError(f"{profile.info.package} {profile.info.version} named no operator of {bundle.path}")
    return profile


def spans(run: Callable[[], object], limit: Limit) -> Iterator[Span]:
    """Run again and again. What is done with a span before the next one is asked for takes no part in any."""
    end, count = time.monotonic() + limit.seconds, 0
    while not count or (count < limit.runs and time.monotonic() < end):
        started = time.monotonic_ns()
        run()
        ended = time.monotonic_ns()
        count += 1
        yield Span(started / 1e3, (ended - started) / 1e3)


def self_times(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """The counted events of a run with their own microseconds: without those of the events that they enclose."""
    own: list[list[Any]] = []
    enclosing: dict[str, list[list[Any]]] = {}
    counted = (event for event in events if not event.inner)
    for event in sorted(counted, key=lambda event: (event.start_us, -event.duration_us)):
        row = [event, event.duration_us]
        stack = enclosing.setdefault(event.thread, [])
        while stack and stack[-1][0].end_us <= event.start_us:
            stack.pop()
        if stack:  # clocks of whole microseconds let the inner one end later than the outer one
            outer = stack[-1]
            outer[1] -= min(event.end_us, outer[0].end_us) - event.start_us
        stack.append(row)
        own.append(row)
    return [(event, max(0.0, duration)) for event, duration in own]


def summary(profile: Profile) -> dict[str, Any]:
    """Plain data: time by kind of operator, the slowest single operators, and what is left.

    ``share`` is of the time that the caller waited; what other threads and devices did meanwhile is on top of it.
    """
    timed = [row for run in profile.runs for row in self_times(run.events)]
    waited = sum(run.span.duration_us for run in profile.runs)
    rest = max(0.0, waited - sum(own for event, own in timed if event.thread == CALLER))
    kinds = _grouped(((event.operator, event.thread), own) for event, own in timed)
    single = _grouped(((event.name, event.operator, event.thread), own) for event, own in timed)
    return {
        "runs": len(profile.runs),
        "p50_ms": statistics.median(run.span.duration_us for run in profile.runs) / 1e3,
        "operators": [
            {"operator": _shown(*key), **_figures(rows, waited)} for key, rows in _by_time(kinds)
        ],
        "nodes": len(single),
        "slowest": [
            {"name": name, "operator": _shown(operator, thread), **_figures(rows, waited)}
            for (name, operator, thread), rows in _by_time(single)[:SLOWEST]
        ],
        "rest": {"total_ms": rest / 1e3, "mean_us": rest / len(profile.runs), "share": rest / waited},
        "notes": list(profile.notes),
    }  # fmt: skip


def _grouped(timed: Iterable[tuple[tuple[str, ...], float]]) -> dict[tuple[str, ...], list[float]]:
    groups: dict[tuple[str, ...], list[float]] = {}
    for key, own in timed:
        groups.setdefault(key, []).append(own)
    return groups


def _by_time(groups: dict[tuple[str, ...], list[float]]) -> list[tuple[tuple[str, ...], list[float]]]:
    return sorted(groups.items(), key=lambda item: (-sum(item[1]), item[0]))


def _shown(operator: str, thread: str) -> str:
    return operator if thread == CALLER else f"{operator} ({thread})"


def _figures(rows: Sequence[float], waited: float) -> dict[str, Any]:
    total = sum(rows)
    return {"calls": len(rows), "total_ms": total / 1e3, "mean_us": total / len(rows), "share": total / waited}


# -- the trace -----------------------------------------------------------------------------------------------------


def check_trace(path: Path) -> None:
    """Raise UsageError unless a trace can be written there, before anything is measured."""
    if path.suffix != ".json":
        raise UsageError(f"the trace would be written to {path}, expected a name that ends in .json")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} to write the trace in")
    if path.is_dir():
        raise UsageError(f"the trace cannot be written to {path}, which is a folder; give a file's name")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"the trace cannot be written to {path}: the folder takes no files; choose another")


def write_trace(profile: Profile, title: str, path: Path) -> None:
    """Write ``trace`` beside its place and rename it, so that a half-written one never shows."""
    check_trace(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(trace(profile, title), separators=(",", ":")))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def trace(profile: Profile, title: str) -> dict[str, Any]:
    """The trace event format: complete events (``X``), microseconds since the first run began, a row for each thread.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    pid, begin = os.getpid(), profile.runs[0].span.start_us
    names = {event.thread for run in profile.runs for event in run.events} - {CALLER}
    threads = {name: number for number, name in enumerate([CALLER, *sorted(names)], start=1)}
    rows: list[dict[str, Any]] = [
        _named("process_name", title, pid, 0),
        *(_named("thread_name", name, pid, number) for name, number in threads.items()),
    ]

    def add(name: str, kind: str, start: float, duration: float, thread: str, args: dict[str, Any]) -> None:
        place = {"pid": pid, "tid": threads[thread], "ts": round(start, 3), "dur": round(duration, 3)}
        rows.append({"name": name, "cat": kind, "ph": "X", **place, "args": args})

    for number, run in enumerate(profile.runs):
        start = run.span.start_us - begin
        add("run", "run", start, run.span.duration_us, CALLER, {"number": number})
        for event in run.events:
            kind = "inner" if event.inner else "operator"
            add(event.operator, kind, start + event.start_us, event.duration_us, event.thread, {"node": event.name})
    info = profile.info
    about = {"engine": f"{info.package} {info.version}", "provider": info.provider, "threads": info.threads}
    return {"traceEvents": rows, "displayTimeUnit": "ms", "otherData": {**about, "notes": list(profile.notes)}}


def _named(kind: str, name: str, pid: int, tid: int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "cat": "__metadata", "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


# -- the table -----------------------------------------------------------------------------------------------------

COLUMNS = ("calls", "total ms", "mean us", "share")
#: A longer name is cut: kernels of accelerators have names of several lines.
WIDEST = 48


def table(found: dict[str, Any]) -> list[str]:
    """Lines for the eye: what ``summary`` gives, beside it ``unprofiled_p50_ms`` and ``trace``, a path or None."""
    lines = [
        f"profile of {found['runs']} runs, {found['p50_ms']:.4g} ms in the median; "
        f"{found['unprofiled_p50_ms']:.4g} ms without a profiler",
        *(f"  {note}" for note in found["notes"]),
        "",
    ]
    rest = ("(no operator)", {"calls": found["runs"], **found["rest"]})
    kinds = [(row["operator"], row) for row in found["operators"]]
    lines += _lines(("operator",), [((name,), row) for name, row in [*kinds, rest]])
    count, all_of_them = len(found["slowest"]), found["nodes"]
    lines += ["", f"the slowest {count} of {all_of_them} nodes" if count < all_of_them else "each node", ""]
    lines += _lines(("node", "operator"), [((row["name"], row["operator"]), row) for row in found["slowest"]])
    return lines if found["trace"] is None else [*lines, "", f"trace: {found['trace']}"]


def _lines(names: tuple[str, ...], rows: Sequence[tuple[tuple[str, ...], dict[str, Any]]]) -> list[str]:
    texts = [(*names, *COLUMNS)]
    for keys, row in rows:
        figures = (f"{row['calls']}", f"{row['total_ms']:.3f}", f"{row['mean_us']:.2f}", f"{row['share']:.1%}")
        texts.append((*(key if len(key) <= WIDEST else key[: WIDEST - 1] + "…" for key in keys), *figures))
    widths = [max(len(text[column]) for text in texts) for column in range(len(texts[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < len(names) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(text, widths))
        )
        for text in texts
    ]
