#!/usr/bin/env python3
"""edge_infer beside the plain engine API: load, first inference, latency, memory, what a call and an import cost.

    python scripts/bench.py [--runs 5] [--cases conv17-tflite-int8 ...] [--json FILE] [--docs]

Networks of 17 and 100 MB of float32 weights, convolutions (conv) or dense layers (dense), random, scaled so that
signals stay alive, each in float32 and int8, for each engine; the digits network, which is tiny; and dense networks of
other sizes, for the plots. Each figure is the median over runs. Every run is a fresh child process, and the ways take
turns, so that a machine that slows down slows all. The page cache is warm and the bundle was opened before (second and
later opens). All run the same artifact, edge_infer as `edge-infer tune --by p50` found best; the plain way with as many
threads as there are cores, and for the latency also with the other settings that the engine's documentation names.

private   anonymous memory added over the imported engine after all runs
peak      the largest resident size of the whole process
shared    what each of four processes with the model open adds to the machine's memory: their proportional set size
          over that of one that only imported the engine
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
from pathlib import Path
from typing import Any

import bench_docs
from bench_cases import CASES, ENVIRONMENT, FOLDER, bundle_of, plain_model_of
from bench_ways import Setting, plain_settings

CORES = len(os.sched_getaffinity(0))
#: Processes that open the same model.
PROCESSES = 4
#: Runs of each of the plain settings that are compared for their latency alone.
SETTING_RUNS = 2
CHILD = [sys.executable, str(Path(__file__).with_name("bench_ways.py"))]
#: What is imported, by row: the engine alone, and with what opens bundles.
ENGINE_IMPORTS = {
    "tflite": ("ai_edge_litert.interpreter", "edge_infer.runtime.engines.tflite"),
    "onnx": ("onnxruntime", "edge_infer.runtime.engines.onnx"),
    "torchscript": ("torch", "edge_infer.runtime.engines.torchscript"),
}


def child(*arguments: str) -> dict[str, float]:
    output = subprocess.run(
        [*CHILD, *arguments], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    ).stdout
    return json.loads(output.splitlines()[-1])


def tuned(bundle: Path) -> str:
    """The setting that edge_infer chose for this machine, measured now."""
    command = [sys.executable, "-m", "edge_infer", "tune", str(bundle), "--by", "p50", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    return str(json.loads(done.stdout)["chosen"])


def compare(case: str, runs: int) -> dict[str, Any]:
    """Medians of both ways over alternating children, one of each first that does not count."""
    bundle = bundle_of(case)
    plain_model_of(case, bundle)
    chosen = tuned(bundle)
    settings = plain_settings(case.split("-")[1], CORES)
    ways: dict[str, Setting] = {"plain": settings[0], "edge_infer": {}}
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(runs + 1):
        for way, rows in figures.items():
            row = child("run", way, case, json.dumps(ways[way]))
            if number:
                rows.append(row)
    medians: dict[str, Any] = {
        way: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for way, rows in figures.items()
    }
    for way, figure in medians.items():
        figure["shared_bytes"] = shared(way, case, ways[way])
    latencies = {
        json.dumps(setting): min(
            child("run", "plain", case, json.dumps(setting))["p50_ms"] for _ in range(SETTING_RUNS)
        )
        for setting in settings[1:]
    }
    latencies[json.dumps(settings[0])] = medians["plain"]["p50_ms"]
    best = min(latencies, key=lambda setting: latencies[setting])
    medians["plain"] |= {"best_p50_ms": latencies[best], "best_setting": best}
    medians["edge_infer"]["setting"] = chosen
    return medians


def shared(way: str, case: str, setting: Setting) -> float:
    """What a process adds to the machine's memory by opening the model when ``PROCESSES`` do."""
    children = [
        subprocess.Popen(
            [*CHILD, "hold", way, case, json.dumps(setting)],
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


# -- imports -----------------------------------------------------------------------------------------------------------


def imports(runs: int) -> dict[str, float]:
    """Milliseconds of a Python process that imports something and ends, the rows taking turns."""
    programs = {"bare": "pass", "edge_infer": "import edge_infer"}
    for format, (engine, with_ours) in ENGINE_IMPORTS.items():
        programs |= {format: f"import {engine}", f"{format} and edge_infer": f"import {engine}, {with_ours}"}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(runs + 1):
        for name, program in programs.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, env=ENVIRONMENT)
            if number:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(rows) for name, rows in times.items()}


def facts(case: str) -> dict[str, Any]:
    """What the goals of a case depend on."""
    from edge_infer.bundle import open_bundle

    bundle = open_bundle(FOLDER / f"{case}.edge")
    return {"size": bundle.manifest.size, "prepack": bundle.manifest.artifact.prepack}


def processor() -> str:
    """This machine's, by name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def surroundings(runs: int) -> dict[str, Any]:
    """What the figures depend on: machine, versions, how they were taken."""
    from importlib.metadata import version

    packages = ("ai-edge-litert", "onnxruntime", "torch", "numpy")
    return {
        "processor": processor(),
        "cores": CORES,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--docs", action="store_true", help="write docs/benchmark.json, the tables of benchmark.md, plots"
    )
    args = parser.parse_args()
    results = {}
    for case in args.cases:
        print(f"{case} ...", file=sys.stderr, flush=True)
        results[case] = compare(case, args.runs)
    calls = {}
    for case in args.cases:
        if case.startswith("digits-"):
            print(f"calls of {case} ...", file=sys.stderr, flush=True)
            calls[case] = child("calls", case)
    print("imports ...", file=sys.stderr, flush=True)
    report = {
        "surroundings": surroundings(args.runs),
        "bundles": {case: facts(case) for case in results},
        "results": results,
        "calls": calls,
        "imports": imports(2 * args.runs + 1),
    }
    bench_docs.show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.docs:
        bench_docs.write(report)


if __name__ == "__main__":
    main()
