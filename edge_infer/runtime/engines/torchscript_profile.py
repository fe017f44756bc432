"""torch's profiler on a module that is opened as ``load`` opens it.

An operator is what the program calls: ``aten::linear``, say. What that calls in its turn is in the trace alone.
https://docs.pytorch.org/docs/stable/autograd.html#profiler
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edge_infer.runtime.engines import EngineOptions
from edge_infer.runtime.engines.torchscript import open_model
from edge_infer.runtime.profile import CALLER, WARM_UP, Event, Limit, Profile, Run, Span, spans
from edge_infer.runtime.quiet import quiet

if TYPE_CHECKING:
    import numpy as np

    from edge_infer.bundle import Bundle

#: What a run is called among the events.
MARK = "edge_infer run"
#: Where the packager's module of a flat tuple of outputs has the user's.
WRAPPER = "module."
#: ``at::RecordScope``: an operator; a method of the program, whose operators are what it is profiled for.
OPERATOR, METHOD = 0, 2


def profile(bundle: Bundle, options: EngineOptions, arrays: Sequence[np.ndarray[Any, Any]], limit: Limit) -> Profile:
    import torch

    engine = open_model(bundle, options)

    def run() -> None:
        with torch.autograd.profiler.record_function(MARK):
            engine.run(arrays)

    try:
        for _ in range(WARM_UP):
            engine.run(arrays)
        # torch.profiler is a layer over this one that imports a compiler, which leaves a folder behind.
        device = None if engine.info.provider == "cpu" else engine.info.provider
        profiler = torch.autograd.profiler.profile(use_kineto=True, use_device=device)
        with quiet():
            profiler.__enter__()
        try:
            timed = list(spans(run, limit))
        finally:
            with quiet():
                profiler.__exit__(None, None, None)
        runs = _runs(profiler.function_events, timed, _layers(engine._module))
    finally:
        engine.close()
    return Profile(engine.info, tuple(runs))


def _runs(found: Iterable[Any], timed: Sequence[Span], layers: Sequence[tuple[str, str]]) -> list[Run]:
    rows = sorted((row for row in found if not row.is_async), key=lambda row: row.time_range.start)
    # On an accelerator the mark is there a second time, and it ends before the run does.
    marks = [row for row in rows if row.name == MARK and _is_cpu(row)]
    runs = []
    for span, mark in zip(timed, marks, strict=True):
        begin, end = mark.time_range.start, mark.time_range.end
        within = [row for row in rows if begin <= row.time_range.start < end and row.name != MARK]
        runs.append(Run(span, tuple(_named([_event(row, mark) for row in within], layers))))
    return runs


def _is_cpu(row: Any) -> bool:
    return str(row.device_type).endswith("CPU")


def _event(row: Any, mark: Any) -> Event:
    if not _is_cpu(row):
        thread, inner = str(row.device_type).rsplit(".", maxsplit=1)[-1].lower(), False
    else:
        thread = CALLER if row.thread == mark.thread else f"thread {row.thread}"
        inner = not _called_by_the_program(row, thread == CALLER)
    start = row.time_range.start - mark.time_range.start
    return Event("", row.name, start, row.time_range.end - row.time_range.start, thread, inner)


def _called_by_the_program(row: Any, by_caller: bool) -> bool:
    """Whether no other operator called it. What the caller's thread does around the program, such as copies, is not."""
    if row.scope != OPERATOR:
        return False
    methods, outer = 0, row.cpu_parent
    while outer is not None and outer.name != MARK:
        if outer.scope != METHOD:
            return False
        methods, outer = methods + 1, outer.cpu_parent
    return methods > 0 or not by_caller


def _named(events: list[Event], layers: Sequence[tuple[str, str]]) -> list[Event]:
    """The operators with the names of their layers, where the run followed the graph step by step; else numbered."""
    counted = [event for event in events if not event.inner and event.thread == CALLER]
    kinds = {event.operator for event in counted}
    steps = [layer for layer in layers if layer[0] in kinds]  # not all that a graph does is an operator of the engine's
    follows = [event.operator for event in counted] == [operator for operator, _ in steps]
    names = [name for _, name in steps] if follows else [""] * len(counted)
    named = {
        id(event): replace(event, name=name or f"operator {number}")
        for number, (event, name) in enumerate(zip(counted, names))
    }
    return [named.get(id(event), event) for event in events]


def _layers(module: Any) -> list[tuple[str, str]]:
    """Kind and layer of each operator in the module's graph; nothing where it branches.

    A layer is named after where its weights lie: ``features.0`` for ``features.0.weight``.
    """
    layers = []
    for node in module.inlined_graph.nodes():
        if any(True for _ in node.blocks()):
            return []
        made = [str(value.type()) for value in node.outputs()]
        if not node.kind().startswith("prim::") and any(kind.startswith(("Tensor", "Float(")) for kind in made):
            paths = filter(None, (_path(value) for value in node.inputs()))
            layers.append((node.kind(), next(paths, "").rpartition(".")[0].removeprefix(WRAPPER)))
    return layers


def _path(value: Any) -> str:
    """``features.0.weight`` for a value that the graph reads there from the module; else an empty text."""
    names: list[str] = []
    while value.node().kind() == "prim::GetAttr":
        names.insert(0, value.node().s("name"))
        value = next(iter(value.node().inputs()))
    return ".".join(names)
