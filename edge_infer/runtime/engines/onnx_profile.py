"""ONNX Runtime's own profiler on a session that is opened as ``load`` opens it.

https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_infer.errors import EngineError
from edge_infer.runtime.engines import EngineOptions
from edge_infer.runtime.engines.onnx import open_model
from edge_infer.runtime.profile import CALLER, WARM_UP, Event, Limit, Profile, Run, spans

if TYPE_CHECKING:
    import numpy as np

    from edge_infer.bundle import Bundle

#: How the event of an operator's computation is named after its node.
KERNEL = "_kernel_time"


def profile(bundle: Bundle, options: EngineOptions, arrays: Sequence[np.ndarray[Any, Any]], limit: Limit) -> Profile:
    with tempfile.TemporaryDirectory(prefix="edge-infer-profile-") as folder:

        def adjust(settings: Any) -> None:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(folder) / "profile")

        engine = open_model(bundle, options, adjust)
        try:
            for _ in range(WARM_UP):
                engine.run(arrays)
            timed = list(spans(lambda: engine.run(arrays), limit))
        finally:  # the file is written now or when the session goes, which is after the folder did
            file = Path(engine.end_profiling())
            engine.close()
        runs = list(_runs(file))[WARM_UP:]
    if len(runs) != len(timed):
        raise EngineError(f"ONNX Runtime's profile has {len(runs)} of {len(timed)} runs; ask for fewer with --runs")
    notes: tuple[str, ...] = ()
    if engine.info.provider != "cpu":
        notes = (
            f"times are the processor's: what {engine.info.provider} does after it was told to is in none of them",
        )
    return Profile(engine.info, tuple(Run(*row) for row in zip(timed, runs)), notes)


def _runs(file: Path) -> Iterator[tuple[Event, ...]]:
    """The operators of each run. They stand in the file before the run's own event, one event a line."""
    nodes: list[dict[str, Any]] = []
    with file.open() as lines:
        for line in lines:
            text = line.strip().rstrip(",")
            if text in ("", "[", "]"):
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise EngineError(f"ONNX Runtime's profile cannot be read ({error}); is the disk full?") from None
            if row["cat"] == "Node" and row["name"].endswith(KERNEL):
                nodes.append(row)
            elif row["name"] == "model_run":
                yield tuple(_event(node, row) for node in nodes)
                nodes = []


def _event(node: dict[str, Any], run: dict[str, Any]) -> Event:
    args = node["args"]
    name = node["name"].removesuffix(KERNEL) or f"node {args.get('node_index', '?')}"
    thread = CALLER if node["tid"] == run["tid"] else f"thread {node['tid']}"
    return Event(name, args["op_name"], node["ts"] - run["ts"], node["dur"], thread)
