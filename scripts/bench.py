#!/usr/bin/env python3
"""edge_infer beside the plain engine API: import, load, first inference, latency, memory.

    python scripts/bench.py [--runs 5] [--threads 2] [--cases conv17-tflite-int8 ...] [--json FILE] [--docs]

Networks of 17 and 100 MB of float32 weights, convolutions (conv) or dense layers (dense), random, scaled so that
signals stay alive; and the digits network, which is tiny. Each in float32 and int8, for each engine. Each figure is the
median over runs. Every run is a fresh child process, and the two ways take turns, so that a machine that slows down
slows both. The page cache is warm and the bundle was opened before (second and later opens). Both ways run the same
artifact with the same number of threads.

private   anonymous memory added over the imported engine after all runs
peak      the largest resident size of the whole process
shared    what each of four processes with the model open adds to the machine's memory: their proportional set size
          over that of one that only imported the engine

The plain way is what the engine's documentation shows: `Interpreter(model_path=)`, `InferenceSession` on one
inline `.onnx`, `torch.jit.load` on a whole TorchScript archive.
"""

from __future__ import annotations

import argparse
import itertools
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
FIGURES = ("import_ms", "load_ms", "first_ms", "p50_ms", "private_bytes", "peak_bytes", "shared_bytes")
FORMATS = ("tflite", "onnx", "torchscript")
PRECISIONS = ("float32", "int8")
#: Network -> megabytes of float32 weights. The first is trained on digits, for what a call costs.
NETWORKS = {"digits": 0.4, "conv17": 17, "conv100": 100, "dense17": 17, "dense100": 100}
CASES = [f"{net}-{format}-{precision}" for net in NETWORKS for format in FORMATS for precision in PRECISIONS]
#: Processes that open the same model.
PROCESSES = 4


# -- making what is compared -------------------------------------------------------------------------------------------


def dense_widths(megabytes: float) -> list[int]:
    """Twelve square layers."""
    return [round((megabytes * 1e6 / 4 / 12) ** 0.5)] * 12


def conv_widths(megabytes: float) -> list[int]:
    """Channels of ten 3x3 convolutions; the picture is halved after every second one."""
    shape = [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]
    unit = sum(9 * a * b for a, b in itertools.pairwise(shape))
    scale = (megabytes * 1e6 / 4 / unit) ** 0.5
    return [round(scale * width) for width in shape]


SIDE = 64


def make_torch(net: str, path: Path) -> None:
    import torch

    torch.manual_seed(1)
    layers: list[torch.nn.Module] = []
    if net.startswith("dense"):
        widths = dense_widths(NETWORKS[net])
        example = torch.zeros(1, widths[0])
        for width in widths:
            layers += [torch.nn.Linear(widths[0], width), torch.nn.ReLU()]
    else:
        widths = conv_widths(NETWORKS[net])
        example = torch.zeros(1, 3, SIDE, SIDE)
        for index, (before, width) in enumerate(zip([3, *widths], widths, strict=False)):
            layers += [torch.nn.Conv2d(before, width, 3, padding=1), torch.nn.ReLU()]
            layers += [torch.nn.MaxPool2d(2)] if index % 2 else []
        layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    for layer in layers:
        if hasattr(layer, "weight"):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.export.save(torch.export.export(torch.nn.Sequential(*layers).eval(), (example,)), path)


def make_keras(net: str, path: Path) -> None:
    import keras

    keras.utils.set_random_seed(1)
    options = {"activation": "relu", "kernel_initializer": "he_normal"}
    if net.startswith("dense"):
        widths = dense_widths(NETWORKS[net])
        layers = [
            keras.Input((widths[0],), batch_size=1, name="input"),
            *(keras.layers.Dense(width, **options) for width in widths),
        ]
    else:
        layers = [keras.Input((SIDE, SIDE, 3), batch_size=1, name="input")]
        for index, width in enumerate(conv_widths(NETWORKS[net])):
            layers.append(keras.layers.Conv2D(width, 3, padding="same", **options))
            layers += [keras.layers.MaxPool2D()] if index % 2 else []
        layers.append(keras.layers.GlobalAveragePooling2D())
    keras.Sequential(layers).save(path)


def make_samples(net: str, framework: str, path: Path) -> None:
    """Noise to calibrate with, under the name of the network's input."""
    import numpy as np

    shape = (SIDE, SIDE, 3) if framework == "keras" else (3, SIDE, SIDE)
    shape = (dense_widths(NETWORKS[net])[0],) if net.startswith("dense") else shape
    np.savez(path, input=np.random.default_rng(1).standard_normal((8, *shape)).astype(np.float32))


def source_of(net: str, format: str) -> tuple[Path, Path]:
    """Model and samples, made where they are missing."""
    if net == "digits":
        source, samples = {
            "tflite": ("keras.keras", "calibration.npz"),
            "onnx": ("torch.onnx", "calibration_nchw.npz"),
            "torchscript": ("torch_export.pt2", "calibration_nchw.npz"),
        }[format]
        if not (MODELS / source).exists():
            subprocess.run([sys.executable, str(ROOT / "scripts/make_models.py")], check=True)
        return MODELS / source, MODELS / samples
    framework, suffix = ("keras", "keras") if format == "tflite" else ("torch", "pt2")
    model, samples_file = FOLDER / f"{net}.{suffix}", FOLDER / f"{net}-{framework}.npz"
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        subprocess.run([sys.executable, __file__, "--make", net, framework, str(model)], check=True)
    if not samples_file.exists():
        make_samples(net, framework, samples_file)
    return model, samples_file


def bundle_of(case: str) -> Path:
    """The case's bundle, packaged when it is not there."""
    net, format, precision = case.split("-")
    path = FOLDER / f"{case}.edge"
    if path.exists():
        return path
    model, samples = source_of(net, format)
    subprocess.run(
        [sys.executable, "-m", "edge_infer.cli", "package", str(model), "--target", "cpu-x86_64", "--format", format,
         "--precision", precision, "--calibration", str(samples), "--max-accuracy-drop", "99%", "-o", str(path)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return path


def plain_model_of(case: str, bundle: Path) -> Path:
    """The same artifact as the plain engine takes it: one file with everything in it."""
    format = case.split("-")[1]
    if format == "tflite":
        return bundle / "model.tflite"
    path = FOLDER / f"{case}.{'onnx' if format == 'onnx' else 'pt'}"
    if not path.exists():
        subprocess.run([sys.executable, __file__, "--inline", case], check=True)
    return path


def write_inline(case: str) -> None:
    from edge_infer.bundle import open_bundle

    bundle = open_bundle(bundle_of(case))
    if case.split("-")[1] == "onnx":
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
    from edge_infer import load
    from edge_infer.bundle import open_bundle
    from edge_infer.runtime.engines import engine_module

    opened = open_bundle(bundle)
    engine_module(opened).import_engine(opened)
    return lambda: load(bundle, threads=threads), lambda session: session


def opened(way: str, case: str, threads: int) -> tuple[Callable[[], Any], Callable[[Any], Callable[[Any], Any]]]:
    """The engine is imported; gives what opens the model, and what makes a callable of it."""
    bundle = FOLDER / f"{case}.edge"
    if way == "plain":
        return PLAIN[case.split("-")[1]](plain_model_of(case, bundle), threads)
    return ours(bundle, threads)


def question(case: str) -> tuple[Any, Any]:
    """The first golden case."""
    import numpy as np

    with np.load(FOLDER / f"{case}.edge" / "golden.npz") as golden:
        return golden["in.0.0"], golden["out.0.0"]


def child(way: str, case: str, threads: int) -> dict[str, float]:
    """One run of one way; gives its figures."""
    import numpy as np

    array, expected = question(case)
    started = time.perf_counter()
    load, caller = opened(way, case, threads)
    imported = time.perf_counter()
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
    while len(latencies) < 300 and time.perf_counter() - answered < 2:
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


def fit(interpreter: Any, array: Any) -> None:
    """Let an interpreter take the question's batch."""
    details = interpreter.get_input_details()[0]
    if list(details["shape"]) != list(array.shape):
        interpreter.resize_tensor_input(details["index"], array.shape)
        interpreter.allocate_tensors()


def hold(way: str, case: str, threads: int) -> None:
    """Import, tell the memory, open and run, tell it again; at a word from standard input each."""
    array, _ = question(case)
    load, caller = opened(way, case, threads)
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


# -- comparing ---------------------------------------------------------------------------------------------------------


def compare(case: str, runs: int, threads: int) -> dict[str, dict[str, float]]:
    """Medians of both ways over alternating children, one of each first that does not count."""
    plain_model_of(case, bundle_of(case))
    figures: dict[str, list[dict[str, float]]] = {"plain": [], "edge_infer": []}
    for number in range(runs + 1):
        for way, rows in figures.items():
            output = subprocess.run(
                [*CHILD, "--child", way, case, "--threads", str(threads)],
                check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT,
            ).stdout  # fmt: skip
            if number:
                rows.append(json.loads(output.splitlines()[-1]))
    medians = {
        way: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for way, rows in figures.items()
    }
    for way, figure in medians.items():
        figure["shared_bytes"] = shared(way, case, threads)
    return medians


CHILD = [sys.executable, __file__]
ENVIRONMENT = {**os.environ, "EDGE_INFER_HOME": str(FOLDER / "store")}


def shared(way: str, case: str, threads: int) -> float:
    """What a process adds to the machine's memory by opening the model when ``PROCESSES`` do."""
    children = [
        subprocess.Popen(
            [*CHILD, "--hold", way, case, "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT,
        )
        for _ in range(PROCESSES)
    ]  # fmt: skip
    sizes: dict[str, list[int]] = {}
    for step in ("imported", "open"):
        for process in children:
            while _line(process) != step:
                pass
        for process in children:  # all are waiting now
            _tell(process)
            sizes.setdefault(step, []).append(int(_line(process)))
        for process in children:
            _tell(process)
    for process in children:
        process.wait()
    return statistics.median(sizes["open"]) - statistics.median(sizes["imported"])


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args} ended early")
    return line.strip()


def _tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


COLUMNS = ["case", "way", "import ms>", "load ms>", "first ms>", "p50 ms>", "private>", "peak>", "shared by 4>"]


def table(results: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """Rows for COLUMNS: both ways and their ratio, case by case."""
    from edge_infer.cli.console import size

    rows = []
    for case, ways in results.items():
        for way, figures in ways.items():
            times = [f"{figures[name]:.3g}" for name in ("import_ms", "load_ms", "first_ms", "p50_ms")]
            memory = [size(figures[name]) for name in ("private_bytes", "peak_bytes", "shared_bytes")]
            rows.append([case if way == "plain" else "", way, *times, *memory])
        ratios = [f"{ways['plain'][name] / max(ways['edge_infer'][name], 1e-9):.2f}x" for name in FIGURES]
        rows.append(["", "plain / edge_infer", *ratios])
    return rows


#: How many times faster than the plain way a model opens: by format, and ONNX by whether its weights are repacked.
FASTER = {"tflite": 15.0, "torchscript": 5.0, "onnx repacked": 2.0, "onnx": 10.0}
#: Private memory in bytes, and as a share of the weights beside it; latency beside the plain way's.
PRIVATE_BYTES, PRIVATE_SHARE, LATENCY = 5e6, 0.05, 1.02
GOAL_COLUMNS = ["case", "opens faster", "goal>", "private>", "goal>", "latency", "goal>"]


def facts(case: str) -> dict[str, Any]:
    """What the goals of a case depend on."""
    from edge_infer.bundle import open_bundle

    bundle = open_bundle(FOLDER / f"{case}.edge")
    return {"size": bundle.manifest.size, "prepack": bundle.manifest.artifact.prepack}


def goals(report: dict[str, Any]) -> list[list[str]]:
    """Rows for GOAL_COLUMNS, without the tiny network; what misses its goal is marked."""
    from edge_infer.cli.console import size

    rows = []
    for case, ways in report["results"].items():
        net, format, _ = case.split("-")
        if net == "digits":
            continue
        bundle, plain, ours = report["bundles"][case], ways["plain"], ways["edge_infer"]
        faster = plain["load_ms"] / ours["load_ms"]
        wanted = FASTER["onnx repacked" if format == "onnx" and bundle["prepack"] else format]
        allowed = PRIVATE_BYTES + PRIVATE_SHARE * bundle["size"]
        slower = ours["p50_ms"] / plain["p50_ms"]
        rows.append(
            [
                case,
                f"{faster:.1f}x{'' if faster >= wanted else ' (missed)'}",
                f"{wanted:g}x",
                f"{size(ours['private_bytes'])}{'' if ours['private_bytes'] <= allowed else ' (missed)'}",
                size(allowed),
                f"{slower:.2f}{'' if slower <= LATENCY else ' (missed)'}",
                f"{LATENCY:g}",
            ]
        )
    return rows


def markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(column.rstrip(">") for column in columns) + " |",
        "|" + "|".join("---:" if column.endswith(">") else "---" for column in columns) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


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
        *markdown(COLUMNS, table(report["results"])),
    ]
    text = _between(page.read_text(), "table", lines)
    page.write_text(_between(text, "goals", markdown(GOAL_COLUMNS, goals(report))))


def _between(text: str, name: str, lines: list[str]) -> str:
    before, rest = text.split(f"<!-- {name} -->\n")
    _, after = rest.split(f"<!-- /{name} -->")
    return before + f"<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- /{name} -->" + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmark.json and the table of benchmark.md")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--hold", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--inline", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child, args.threads)))
    elif args.hold:
        hold(*args.hold, args.threads)
    elif args.make:
        net, framework, path = args.make
        (make_keras if framework == "keras" else make_torch)(net, Path(path))
    elif args.inline:
        write_inline(args.inline)
    else:
        results = {}
        for case in args.cases:
            print(f"{case} ...", file=sys.stderr, flush=True)
            results[case] = compare(case, args.runs, args.threads)
        from edge_infer.cli.console import print_table

        bundles = {case: facts(case) for case in results}
        report = {"surroundings": surroundings(args), "bundles": bundles, "results": results}
        print_table(COLUMNS, table(results))
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        if args.docs:
            write_docs(report)


if __name__ == "__main__":
    main()
