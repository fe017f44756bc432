#!/usr/bin/env python3
"""One run of a case in one way, in a process of its own; scripts/bench.py starts these and compares.

    python scripts/bench_ways.py run WAY CASE SETTING     load, first answer, latency, memory: one line of JSON
    python scripts/bench_ways.py hold WAY CASE SETTING    opened, and held until standard input says so
    python scripts/bench_ways.py calls CASE               what a call costs, the ways taking turns

WAY is `plain` or `edge_infer`, SETTING a JSON object such as {"threads": 2}; edge_infer without threads runs as tuned.
The plain way is what the engine's documentation shows: `Interpreter(model_path=)`, `InferenceSession` on one
inline `.onnx`, `torch.jit.load` on a whole TorchScript archive.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_cases import FOLDER, plain_model_of

Call = Callable[[Any], Any]
Setting = dict[str, Any]
#: Calls of a run, and seconds.
RUNS, SECONDS = 300, 1.5
#: What a call costs is the median over blocks of so many calls each, the ways taking turns; the first do not count.
BLOCKS, BLOCK, WARM_UP = 400, 20, 40


# -- the plain engines: what opens a model, and what makes a callable of it --------------------------------------------


def plain_tflite(path: Path, setting: Setting) -> tuple[Callable[[], Any], Callable[[Any], Call]]:
    from ai_edge_litert.interpreter import Interpreter

    def load() -> Any:
        interpreter = Interpreter(model_path=str(path), num_threads=setting["threads"])
        interpreter.allocate_tensors()
        return interpreter

    def caller(interpreter: Any) -> Call:
        given, answer = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

        def call(array: Any) -> Any:
            interpreter.set_tensor(given, array)
            interpreter.invoke()
            return interpreter.get_tensor(answer)

        return call

    return load, caller


def plain_onnx(path: Path, setting: Setting) -> tuple[Callable[[], Any], Callable[[Any], Call]]:
    import onnxruntime

    def load() -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setting["threads"]
        if not setting.get("spinning", True):
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def caller(session: Any) -> Call:
        name = session.get_inputs()[0].name
        return lambda array: session.run(None, {name: array})[0]

    return load, caller


def plain_torchscript(path: Path, setting: Setting) -> tuple[Callable[[], Any], Callable[[Any], Call]]:
    import torch

    torch.backends.quantized.engine = "qnnpack"
    torch.set_num_threads(setting["threads"])

    def load() -> Any:
        module = torch.jit.load(str(path)).eval()
        return torch.jit.optimize_for_inference(module) if setting.get("optimized") else module

    def caller(module: Any) -> Call:
        def call(array: Any) -> Any:
            with torch.inference_mode():
                return module(torch.from_numpy(array))[0].numpy()

        return call

    return load, caller


PLAIN = {"tflite": plain_tflite, "onnx": plain_onnx, "torchscript": plain_torchscript}


def plain_settings(format: str, cores: int) -> list[Setting]:
    """The settings that an engine's documentation names for speed, its default first."""
    threads = [{"threads": count} for count in sorted({cores, 1}, reverse=True)]
    more = {"tflite": {}, "onnx": {"spinning": False}, "torchscript": {"optimized": True}}[format]
    return threads + ([row | more for row in threads if format == "torchscript" or row["threads"] > 1] if more else [])


def fit(interpreter: Any, array: Any) -> None:
    """Let an interpreter take the question's batch."""
    details = interpreter.get_input_details()[0]
    if list(details["shape"]) != list(array.shape):
        interpreter.resize_tensor_input(details["index"], array.shape)
        interpreter.allocate_tensors()


# -- edge_infer --------------------------------------------------------------------------------------------------------


def ours(bundle: Path, setting: Setting) -> tuple[Callable[[], Any], Callable[[Any], Call]]:
    from edge_infer import load
    from edge_infer.bundle import open_bundle
    from edge_infer.runtime.engines import engine_module

    opened = open_bundle(bundle)
    engine_module(opened).import_engine(opened)
    return lambda: load(bundle, **setting), lambda session: session


# -- measuring ---------------------------------------------------------------------------------------------------------


def imported(way: str, case: str, setting: Setting) -> tuple[Callable[[], Any], Callable[[Any], Call]]:
    """The engine is imported; gives what opens the model, and what makes a callable of it."""
    bundle = FOLDER / f"{case}.edge"
    if way == "plain":
        return PLAIN[case.split("-")[1]](plain_model_of(case, bundle), setting)
    return ours(bundle, setting)


def question(case: str) -> tuple[Any, Any]:
    """The first golden case."""
    import numpy as np

    with np.load(FOLDER / f"{case}.edge" / "golden.npz") as golden:
        return golden["in.0.0"], golden["out.0.0"]


def run(way: str, case: str, setting: Setting) -> dict[str, float]:
    """One run of one way; gives its figures."""
    import numpy as np

    array, expected = question(case)
    load, caller = imported(way, case, setting)
    from edge_infer.runtime import memory

    baseline = memory.private_bytes()
    before = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    call = caller(model)
    if way == "plain" and "-tflite-" in case:
        fit(model, array)
    answer = call(array)
    answered = time.perf_counter()
    np.testing.assert_allclose(answer, expected, atol=float(np.abs(expected).max()) * 0.05)
    latencies = []
    while len(latencies) < RUNS and time.perf_counter() - answered < SECONDS:
        begin = time.perf_counter()
        call(array)
        latencies.append(time.perf_counter() - begin)
    return {
        "load_ms": (loaded - before) * 1e3,
        "first_ms": (answered - loaded) * 1e3,
        "p50_ms": statistics.median(latencies) * 1e3,
        "private_bytes": max(0, memory.private_bytes() - baseline),
        "peak_bytes": memory.peak_bytes(),
    }


def hold(way: str, case: str, setting: Setting) -> None:
    """Import, tell the memory, open and run, tell it again; at a word from standard input each."""
    array, _ = question(case)
    load, caller = imported(way, case, setting)
    from edge_infer.runtime.memory import proportional_bytes

    for step in ("imported", "open"):
        if step == "open":
            model = load()
            if way == "plain" and "-tflite-" in case:
                fit(model, array)
            caller(model)(array)
        print(step, flush=True)
        sys.stdin.readline()
        print(proportional_bytes(), flush=True)
        sys.stdin.readline()


# -- what a call costs -------------------------------------------------------------------------------------------------


def fastest_tflite(interpreter: Any, array: Any) -> Callable[[], Any]:
    """The interpreter has no way around a copy in and one out."""
    call = plain_tflite(Path(), {})[1](interpreter)
    return lambda: call(array)


def fastest_onnx(session: Any, array: Any) -> Callable[[], Any]:
    """Input and output bound once, as ONNX Runtime's documentation has it for speed."""
    import numpy as np

    name, answer = session.get_inputs()[0].name, session.run(None, {session.get_inputs()[0].name: array})[0]
    output = np.empty_like(answer)
    binding = session.io_binding()
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    binding.bind_output(session.get_outputs()[0].name, "cpu", 0, output.dtype.type, output.shape, output.ctypes.data)
    return lambda: session.run_with_iobinding(binding)


def fastest_torchscript(module: Any, array: Any) -> Callable[[], Any]:
    """The tensor is there already; ``calls`` enters inference mode once for many calls."""
    import torch

    tensor = torch.from_numpy(array)
    return lambda: module(tensor)


FASTEST = {"tflite": fastest_tflite, "onnx": fastest_onnx, "torchscript": fastest_torchscript}


def calls(case: str) -> dict[str, float]:
    """Microseconds of a call with one thread: the engine as its documentation shows, its fastest way, a session's
    `run`, and its `run_buffers`."""
    format = case.split("-")[1]
    array, _ = question(case)
    load, caller = imported("plain", case, {"threads": 1})
    model = load()
    if format == "tflite":
        fit(model, array)
    plain = caller(model)
    load, _ = imported("edge_infer", case, {"threads": 1})
    session = load()
    name = session.inputs[0].name
    session.bind({name: array.shape})
    session.input_buffers[name][...] = array
    ways: dict[str, Callable[[], Any]] = {
        "engine": lambda: plain(array),
        "run": lambda: session.run({name: array}),
        "run_buffers": session.run_buffers,
        "fastest": FASTEST[format](model, array),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(BLOCKS + WARM_UP):
        for way, call in ways.items():
            with inference_mode() if way == "fastest" and format == "torchscript" else contextlib.nullcontext():
                begin = time.perf_counter()
                for _ in range(BLOCK):
                    call()
                if number >= WARM_UP:
                    times[way].append((time.perf_counter() - begin) / BLOCK * 1e6)
    return {way: statistics.median(rows) for way, rows in times.items()}


def inference_mode() -> Any:
    import torch

    return torch.inference_mode()


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "calls":
        print(json.dumps(calls(*arguments)))
        return
    way, case, setting = arguments
    if what == "hold":
        hold(way, case, json.loads(setting))
    else:
        print(json.dumps(run(way, case, json.loads(setting))))


if __name__ == "__main__":
    main()
