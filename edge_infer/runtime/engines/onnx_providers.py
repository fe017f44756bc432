"""ONNX Runtime's providers: the order in which they are tried, their options, and which of them really run a model.

A provider that cannot be had fails in three ways. It is not in this build; opening raises, as TensorRT does where its
libraries are missing; or the session is made without it and without a word, as CUDA does it. And one that is listed may
run nothing: it is only offered the operators. So all of that is looked at here, and told.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_infer.errors import OutOfMemory
from edge_infer.runtime.engines import at_least, engine_error

NAMES = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
#: Since 1.17, https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
TIMING_CACHE_SINCE = "1.17"
#: Session.get_provider_graph_assignment_info, since 1.24, needs this setting.
RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
#: So many kinds of operators are named in a note.
MOST_NAMED = 6


def orders(wanted: Sequence[str]) -> list[tuple[str, ...]]:
    """What is tried in turn: all that is wanted, then without the first. What comes after ``cpu`` would run nothing."""
    wanted = tuple(dict.fromkeys(wanted))
    if "cpu" in wanted:
        wanted = wanted[: wanted.index("cpu") + 1]
    return [wanted[number:] for number in range(len(wanted))]


def provider_options(name: str, precision: str, version: str, engines: Path | None = None) -> dict[str, str]:
    """Options of one provider for an artifact of ``precision``; TensorRT keeps what it builds in ``engines``."""
    if name == "cuda":
        # Not twice as much at each step: a Jetson's GPU shares the memory of everything else.
        return {"device_id": "0", "arena_extend_strategy": "kSameAsRequested"}
    if name != "tensorrt":
        return {}
    options = {
        "device_id": "0",
        "trt_fp16_enable": str(precision == "float16"),
        "trt_int8_enable": str(precision in ("int8", "int8-mixed")),
    }
    if engines is not None:
        options |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(engines)}
        options |= {"trt_timing_cache_enable": "True"}
        if at_least(version, TIMING_CACHE_SINCE):
            options |= {"trt_timing_cache_path": str(engines)}
    return options


def with_options(
    order: Sequence[str], precision: str, version: str, engines: Path | None = None
) -> list[tuple[str, dict[str, str]]]:
    """As InferenceSession takes them; the processor comes last, for what the others cannot run."""
    order = order if "cpu" in order else (*order, "cpu")
    return [(NAMES[name], provider_options(name, precision, version, engines)) for name in order]


def why_not(name: str, library: Path, error: Exception | None = None) -> str:
    """Why a provider is not in use: ``error`` is what opening raised, if it did; ``library`` is the provider's own."""
    if error is not None and isinstance(engine_error(error, ""), OutOfMemory):
        return f"{name} ran out of GPU memory: {_last(error)}"
    try:
        ctypes.CDLL(str(library))
    except OSError as missing:
        return f"{name} failed to initialise: {missing}"
    words = _last(error) if error is not None else "onnxruntime does not say why, its standard error may"
    return f"{name} failed to initialise: {words}"


def _last(error: Exception) -> str:
    """The end of an exception's first line: it begins with places in the engine's source."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][-200:]


def library_of(name: str, package: Path) -> Path:
    """A provider's library in onnxruntime's folder."""
    return package / "capi" / f"libonnxruntime_providers_{name}.so"


def assigned(session: Any) -> list[tuple[str, list[str]]] | None:
    """Name of a provider and the operators it was given, some times over; None where this onnxruntime does not tell."""
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        return None
    return [(part.ep_name, [node.op_type for node in part.get_nodes()]) for part in ask()]


def placement(order: Sequence[str], parts: Sequence[tuple[str, Sequence[str]]] | None) -> tuple[str, tuple[str, ...]]:
    """The first of ``order`` that runs anything, and what is to be told of the others."""
    if order[0] == "cpu":
        return "cpu", ()
    if parts is None:
        return order[0], (f"whether {order[0]} runs any operator is not known: onnxruntime tells since 1.24",)
    given = {name: Counter[str]() for name in (*order, "cpu")}
    for full, operators in parts:
        name = next((short for short, long in NAMES.items() if long == full), full)
        given.setdefault(name, Counter()).update(operators)
    total = sum(counts.total() for counts in given.values())
    provider = next((name for name, counts in given.items() if counts), "cpu")
    notes = []
    for name, counts in given.items():
        if not counts and name != "cpu":
            notes.append(f"{name} runs none of the model's {total} operators")
        elif counts and name != provider:
            kinds = ", ".join(kind for kind, _ in counts.most_common(MOST_NAMED))
            notes.append(f"{name} runs {counts.total()} of the model's {total} operators: {kinds}")
    return provider, tuple(notes)
