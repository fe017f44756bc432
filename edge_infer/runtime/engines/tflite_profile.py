"""LiteRT's profiler on a compiled model, with XNNPACK's own times of each of its kernels.

A compiled model has a profiler, an interpreter has none. Where ``load`` takes an interpreter, what is timed here is
the compiled model of the same package: the same operators and kernels, and another way to call them. tflite-runtime
has no compiled models and so no profile.

The structure is that of
https://github.com/google-ai-edge/LiteRT/blob/main/litert/c/litert_profiler_event.h; tried with 2.1.6, 2.2.0 and 2.3.0.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_infer.errors import EngineError
from edge_infer.runtime.engines import EngineOptions, litert
from edge_infer.runtime.engines.litert_library import Library
from edge_infer.runtime.engines.tflite import PACKAGES, engine_info, import_engine
from edge_infer.runtime.profile import WARM_UP, Event, Limit, Profile, Run, spans
from edge_infer.runtime.quiet import quiet

if TYPE_CHECKING:
    import numpy as np

    from edge_infer.bundle import Bundle

    Arrays = Sequence[np.ndarray[Any, Any]]

#: ``LiteRtProfilerEventType``: something of the library's own; an operator of TFLite's; one of a delegate's, which says
#: how long it took and not when.
OWN, OPERATOR, DELEGATED = 1, 2, (4, 8)
WHOLE = "LiteRT counts whole microseconds: what takes less counts as none, and its time as no operator's"


class ProfiledEvent(ctypes.Structure):
    """``ProfiledEventData``. ``index``: of the operator in its subgraph, or within the part that a delegate took."""

    _fields_ = (
        ("tag", c_char_p),
        ("type", c_int),
        ("start_us", c_uint64),
        ("elapsed_us", c_uint64),
        ("_memory", c_size_t * 6),
        ("index", c_uint64),
        ("subgraph", c_uint64),
        ("source", c_int),
    )


def profile(bundle: Bundle, options: EngineOptions, arrays: Arrays, limit: Limit) -> Profile:
    package, module = import_engine(bundle)
    info = engine_info(bundle, options, package, module.__name__)
    if package != PACKAGES[0][0]:
        raise EngineError(
            f"{package} {info.version} has no profiler of operators; install ai-edge-litert {litert.LIBRARY_SINCE} "
            "or later, or leave out --profile"
        )
    if not litert.can_compile(bundle):
        raise EngineError(
            f"{package} {info.version} profiles compiled models alone, and {bundle.manifest.name} cannot be one here; "
            f"ai-edge-litert {litert.LIBRARY_SINCE} or later can, for inputs and outputs of plain numbers in at most 8 "
            "dimensions"
        )
    mapped = options.cache is not None and litert.suits(bundle)
    with ExitStack() as stack:
        cache = options.cache
        if cache is None or not mapped:
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-infer-profile-")))
        # Made in a child, which asks the golden questions: a compiled model crashes on some that an interpreter takes.
        entry = litert.repacked(bundle, info.version, cache, options.verify)
        if entry.failed:
            raise EngineError(f"{package} profiles compiled models alone, which failed on this one: {entry.failed}")
        runs = _profiled(bundle, info.threads, entry.file(litert.WEIGHTS), arrays, limit)
    notes = () if mapped else ("timed in a compiled model, since the interpreter that runs this one has no profiler",)
    return Profile(info, tuple(runs), (*notes, WHOLE))


def _profiled(bundle: Bundle, threads: int, weights: Path, arrays: Arrays, limit: Limit) -> list[Run]:
    with ExitStack() as stack:
        with quiet():
            model = _Profiled(bundle, threads, weights)
            stack.callback(model.close)
            compiled = litert._Compiled(model, [array.shape for array in arrays])
            stack.callback(compiled.close)
        for _ in range(WARM_UP):
            compiled.answer(arrays)
        lib, profiler = model.library, compiled.profiler()
        if not profiler:
            raise EngineError("this build of LiteRT has no profiler of operators; leave out --profile")
        lib.StartProfiler(profiler)
        runs = []
        for span in spans(lambda: compiled.answer(arrays), limit):
            runs.append(Run(span, tuple(_placed(_read(lib, profiler)))))
            lib.StartProfiler(profiler)  # which forgets what was read
        lib.StopProfiler(profiler)
        return runs


class _Profiled(litert._Model):
    def options(self) -> c_void_p:
        options = super().options()
        self.library.ask(options, "runtime_options_string", "enable_profiling = true\n")
        return options


def _read(lib: Library, profiler: c_void_p) -> list[ProfiledEvent]:
    count = c_int()
    lib.GetNumProfilerEvents(profiler, byref(count))
    rows = (ProfiledEvent * count.value)()
    lib.GetProfilerEvents(profiler, len(rows), rows)
    return list(rows)


def _placed(rows: Sequence[ProfiledEvent]) -> Iterator[Event]:
    """The events of one run, its operators named after their places.

    A delegate's operators are laid one after the other, from where the delegate can have begun.
    """
    begin = min((row.start_us for row in rows if row.type not in DELEGATED and row.start_us), default=0)
    places: dict[int, _Place] = {}
    parts: dict[tuple[int, int, int], int] = {}
    for row in rows:
        place = places.setdefault(row.subgraph, _Place())
        tag = (row.tag or b"").decode(errors="replace")
        duration = float(row.elapsed_us)
        if row.type in DELEGATED:
            key = (row.subgraph, *place.part(row.index))
            name = f"delegate {parts.setdefault(key, len(parts) + 1)}, operator {row.index}"
            yield Event(name, tag, place.now, duration)
            place.now += duration
        elif row.type in (OPERATOR, OWN):
            start = float(row.start_us - begin)
            if row.type == OWN:  # it may be the subgraph that is run, and once more in a loop
                places[row.subgraph] = _Place(start)
                yield Event("", tag, start, duration, inner=True)
            else:
                places[row.subgraph] = _Place(start + duration, row.index)
                where = f"subgraph {row.subgraph}, " if row.subgraph else ""
                yield Event(f"{where}node {row.index}", tag, start, duration)


@dataclass
class _Place:
    """How far a subgraph is: the time, the last operator of TFLite's own, and what a delegate did since then."""

    now: float = 0.0
    node: int = -1
    delegate: int = 0
    operator: int = -1

    def part(self, operator: int) -> tuple[int, int]:
        """Tells delegates apart, of which each counts its operators from zero."""
        if operator <= self.operator:
            self.delegate += 1
        self.operator = operator
        return self.node, self.delegate
