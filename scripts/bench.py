#!/usr/bin/env python3
"""edge_infer beside the plain engine API: import, load, first inference, latency, memory.

    python scripts/bench.py [--runs 7] [--threads 2] [--cases digits-onnx-int8 ...] [--json FILE] [--docs]

Each figure is the median over runs. Every run is a fresh child process, and the two ways take turns, so that a
machine that slows down slows both. The page cache is warm and the bundle was opened before (second and later
opens). Both ways run the same artifact with the same number of threads. Private memory is anonymous memory added
over the imported engine after all runs; peak is the largest resident size of the whole process.

The plain way is what the engine's documentation shows: `Interpreter(model_path=)`, `InferenceSession` on one
inline `.onnx`, `torch.jit.load` on a whole TorchScript archive.

The first call makes the bundles: the digits networks, and a dense network of 12 layers and 100 MB of float32
weights (random, scaled so that signals stay alive).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "bench"
MODELS = ROOT / "build" / "models"
FIGURES = ("import_ms", "load_ms", "first_ms", "p50_ms", "private_bytes", "peak_bytes")

#: case -> source, format, precision, further options
CASES: dict[str, tuple[str, str, str, list[str]]] = {
    "digits-tflite-float32": ("models/keras.keras", "tflite", "float32", []),
    "digits-tflite-int8": ("models/keras.keras", "tflite", "int8", []),
    "digits-onnx-float32": ("models/torch.onnx", "onnx", "float32", []),
    "digits-onnx-int8": ("models/torch.onnx", "onnx", "int8", []),
    "digits-torchscript-float32": ("models/torch_export.pt2", "torchscript", "float32", []),
    "digits-torchscript-int8": ("models/torch_export.pt2", "torchscript", "int8", []),
    "dense100mb-tflite-float32": ("bench/dense.keras", "tflite", "float32", []),
    "dense100mb-onnx-float32": ("bench/dense.pt2", "onnx", "float32", []),
    "dense100mb-torchscript-float32": ("bench/dense.pt2", "torchscript", "float32", []),
}
LAYERS, WIDTH = 12, 1444


# -- making what is compared -------------------------------------------------------------------------------------------


def make_dense_torch(path: Path) -> None:
    import torch

    torch.manual_seed(1)
    layers: list[torch.nn.Module] = []
    for _ in range(LAYERS):
        linear = torch.nn.Linear(WIDTH, WIDTH)
        torch.nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, torch.nn.ReLU()]
    program = torch.export.export(torch.nn.Sequential(*layers).eval(), (torch.zeros(1, WIDTH),))
    torch.export.save(program, path)


def make_dense_keras(path: Path) -> None:
    import keras

    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(WIDTH, "relu", kernel_initializer="he_normal") for _ in range(LAYERS)]
    keras.Sequential([keras.Input((WIDTH,), batch_size=1), *layers]).save(path)


MAKERS = {"dense.pt2": make_dense_torch, "dense.keras": make_dense_keras}


def bundle_of(case: str) -> Path:
    """The case's bundle, packaged when it is not there."""
    source, format, precision, options = CASES[case]
    path, model = FOLDER / f"{case}.edge", ROOT / "build" / source
    if path.exists():
        return path
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        command = [__file__, "--make", model.name] if model.name in MAKERS else [str(ROOT / "scripts/make_models.py")]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    if precision == "int8":
        data = "calibration.npz" if "keras" in source else "calibration_nchw.npz"
        options = [*options, "--calibration", str(MODELS / data)]
    subprocess.run(
        [sys.executable, "-m", "edge_infer.cli", "package", str(model), "--target", "cpu-x86_64", "--format", format,
         "--precision", precision, *options, "-o", str(path)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return path


def plain_model_of(case: str, bundle: Path) -> Path:
    """The same artifact as the plain engine takes it: one file with everything in it."""
    format = CASES[case][1]
    if format == "tflite":
        return bundle / "model.tflite"
    path = FOLDER / f"{case}.{'onnx' if format == 'onnx' else 'pt'}"
    if not path.exists():
        subprocess.run([sys.executable, __file__, "--inline", case], check=True)
    return path


def write_inline(case: str) -> None:
    from edge_infer.bundle import open_bundle

    bundle = open_bundle(bundle_of(case))
    if CASES[case][1] == "onnx":
        import onnx

        onnx.save(onnx.load(bundle.path / "model.onnx"), FOLDER / f"{case}.onnx")
        return
    from edge_infer.runtime.engines.torchscript import load_mapped

    load_mapped(bundle).save(str(FOLDER / f"{case}.pt"))


# -- the two ways, each in a child of its own --------------------------------------------------------------------------


def plain_tflite(path: Path, threads: int) -> tuple[Callable[[], Any], Callable[[Any], Callable[[Any], Any]]]:
    from ai_edge_litert.interpreter import Interpreter

    def load() -> Any:
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
        return interpreter

    def caller(interpreter: Any) -> Callable[[Any], Any]:
        given, answer = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

        def call(array: Any) -> Any:
            interpreter.set_tensor(given, array)
            interpreter.invoke()
            return interpreter.get_tensor(answer)

        return call

    return load, caller


def resize(interpreter: Any, array: Any) -> None:
    details = interpreter.get_input_details()[0]
    if list(details["shape"]) != list(array.shape):
        interpreter.resize_tensor_input(details["index"], array.shape)
        interpreter.allocate_tensors()


def plain_onnx(path: Path, threads: int) -> tuple[Callable[[], Any], Callable[[Any], Callable[[Any], Any]]]:
    import onnxruntime

    def load() -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def caller(session: Any) -> Callable[[Any], Any]:
        name = session.get_inputs()[0].name
        return lambda array: session.run(None, {name: array})[0]

    return load, caller


def plain_torchscript(path: Path, threads: int) -> tuple[Callable[[], Any], Callable[[Any], Callable[[Any], Any]]]:
    import torch

    torch.backends.quantized.engine = "qnnpack"
    torch.set_num_threads(threads)

    def load() -> Any:
        return torch.jit.load(str(path)).eval()

    def caller(module: Any) -> Callable[[Any], Any]:
        def call(array: Any) -> Any:
            with torch.inference_mode():
                return module(torch.from_numpy(array))[0].numpy()

        return call

    return load, caller


PLAIN = {"tflite": plain_tflite, "onnx": plain_onnx, "torchscript": plain_torchscript}


def ours(bundle: Path, threads: int) -> tuple[Callable[[], Any], Callable[[Any], Callable[[Any], Any]]]:
    import edge_infer
    from edge_infer.bundle import open_bundle
    from edge_infer.runtime.engines import engine_module

    opened = open_bundle(bundle)
    engine_module(opened).import_engine(opened)
    return lambda: edge_infer.load(bundle, threads=threads), lambda session: session


def child(way: str, case: str, threads: int) -> dict[str, float]:
    """One run of one way; gives its figures."""
    import numpy as np

    bundle = FOLDER / f"{case}.edge"
    with np.load(bundle / "golden.npz") as golden:
        array, expected = golden["in.0.0"], golden["out.0.0"]
    started = time.perf_counter()
    if way == "plain":
        load, caller = PLAIN[CASES[case][1]](plain_model_of(case, bundle), threads)
    else:
        load, caller = ours(bundle, threads)
    imported = time.perf_counter()
    from edge_infer.runtime import memory

    baseline = memory.private_bytes()
    before = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    call = caller(model)
    if (
        way == "plain"
        and CASES[case][1] == "tflite"
        and list(model.get_input_details()[0]["shape"]) != list(array.shape)
    ):
        model.resize_tensor_input(model.get_input_details()[0]["index"], array.shape)
        model.allocate_tensors()
    answer = call(array)
    answered = time.perf_counter()
    np.testing.assert_allclose(answer, expected, atol=float(np.abs(expected).max()) * 0.05)
    latencies = []
    while len(latencies) < 300 and time.perf_counter() - answered < 3:
        begin = time.perf_counter()
        call(array)
        latencies.append(time.perf_counter() - begin)
    return {
        "import_ms": (imported - started) * 1e3,
        "load_ms": (loaded - before) * 1e3,
        "first_ms": (answered - loaded) * 1e3,
        "p50_ms": statistics.median(latencies) * 1e3,
        "private_bytes": max(0, memory.private_bytes() - baseline),
        "peak_bytes": memory.peak_bytes(),
    }


# -- comparing ---------------------------------------------------------------------------------------------------------


def compare(case: str, runs: int, threads: int) -> dict[str, dict[str, float]]:
    """Medians of both ways over alternating children, one of each first that does not count."""
    plain_model_of(case, bundle_of(case))
    figures: dict[str, list[dict[str, float]]] = {"plain": [], "edge_infer": []}
    for number in range(runs + 1):
        for way, rows in figures.items():
            command = [sys.executable, __file__, "--child", way, case, "--threads", str(threads)]
            output = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**os.environ, "EDGE_INFER_HOME": str(FOLDER / "store")},
            ).stdout  # fmt: skip
            if number:
                rows.append(json.loads(output.splitlines()[-1]))
    return {
        way: {name: statistics.median(row[name] for row in rows) for name in FIGURES} for way, rows in figures.items()
    }


COLUMNS = ["case", "way", "import ms>", "load ms>", "first ms>", "p50 ms>", "private>", "peak>"]


def table(results: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """Rows for COLUMNS: both ways and their ratio, case by case."""
    from edge_infer.cli.console import size

    rows = []
    for case, ways in results.items():
        for way, figures in ways.items():
            times = [f"{figures[name]:.3g}" for name in ("import_ms", "load_ms", "first_ms", "p50_ms")]
            memory = [size(figures[name]) for name in ("private_bytes", "peak_bytes")]
            rows.append([case if way == "plain" else "", way, *times, *memory])
        ratios = [f"{ways['plain'][name] / max(ways['edge_infer'][name], 1e-9):.2f}x" for name in FIGURES]
        rows.append(["", "plain / edge_infer", *ratios])
    return rows


def surroundings(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on: machine, versions, how they were taken."""
    from importlib.metadata import version

    cpu = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    packages = ("ai-edge-litert", "onnxruntime", "torch", "numpy")
    return {
        "processor": cpu[0] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "threads": args.threads,
        "runs": args.runs,
    }


def write_docs(report: dict[str, Any]) -> None:
    """Put the report into docs/: benchmark.json, and its table into benchmark.md."""
    (ROOT / "docs" / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
    page = ROOT / "docs" / "benchmark.md"
    around = report["surroundings"]
    versions = ", ".join(f"{name} {version}" for name, version in around["versions"].items())
    lines = [
        f"{around['processor']}, {around['cores']} cores, Python {around['python']}, {versions}; "
        f"{around['threads']} threads, medians of {around['runs']} alternating runs.",
        "",
        "| " + " | ".join(column.rstrip(">") for column in COLUMNS) + " |",
        "|" + "|".join("---:" if column.endswith(">") else "---" for column in COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in table(report["results"])),
    ]
    before, rest = page.read_text().split("<!-- table -->\n")
    _, after = rest.split("<!-- /table -->")
    page.write_text(before + "<!-- table -->\n" + "\n".join(lines) + "\n<!-- /table -->" + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmark.json and the table of benchmark.md")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--inline", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child, args.threads)))
    elif args.make:
        MAKERS[args.make](FOLDER / args.make)
    elif args.inline:
        write_inline(args.inline)
    else:
        results = {}
        for case in args.cases:
            print(f"{case} ...", file=sys.stderr, flush=True)
            results[case] = compare(case, args.runs, args.threads)
        from edge_infer.cli.console import print_table

        report = {"surroundings": surroundings(args), "results": results}
        print_table(COLUMNS, table(results))
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        if args.docs:
            write_docs(report)


if __name__ == "__main__":
    main()
