#!/usr/bin/env python3
"""How much memory packaging takes: a model of 500 MB, by every kind of source and format; writes docs/memory.md.

    python scripts/packaging_memory.py [--megabytes 500] [--only SOURCE:FORMAT]... [--docs]      20 minutes

Each row is one `edge-infer package --precision int8` with calibration and an empty cache: the source is read and asked,
converted to float32, compared, quantized, compared again, measured. "Memory" is the most that the command and all its
children had at one time (anonymous pages, looked at every tenth of a second), over the size of the float32 weights.
"With files" counts pages mapped from files as well, which the kernel drops when it needs them: the programs' own code,
450 MB of it TensorFlow's, and models that are looked at where they lie. Pages that several processes share count once
(Pss of /proc/PID/smaps_rollup).
https://www.kernel.org/doc/html/latest/filesystems/proc.html
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "memory.json"
GOAL = 4.0
POLL_S = 0.1
WIDTH = 2048
ROWS = (
    ("keras", "tflite"),
    ("keras", "onnx"),
    ("saved-model", "tflite"),
    ("saved-model", "onnx"),
    ("torch-state", "onnx"),
    ("torch-state", "tflite"),
    ("torch-state", "torchscript"),
    ("onnx", "onnx"),
    ("onnx", "tflite"),
    ("onnx", "torchscript"),
    ("tflite", "tflite"),
    ("tflite", "onnx"),
)
FILES = {"keras": "net.keras", "saved-model": "net-saved", "torch-state": "net.pth", "onnx": "net.onnx"}
FILES["tflite"] = "net.tflite"
FACTORY = '''"""A plain dense network with weights that keep the signal alive."""

import torch

WIDTH, LAYERS = {width}, {layers}


def create():
    layers = []
    for _ in range(LAYERS):
        layers += [torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()]
    net = Net(torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 10)))
    return net


class Net(torch.nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return {{"scores": self.body(x)}}
'''
MAKE_TORCH = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, dense
torch.manual_seed(5)
net = dense.create().eval()
for layer in net.body:
    if hasattr(layer, "weight"):
        torch.nn.init.kaiming_normal_(layer.weight)
torch.save(net.state_dict(), sys.argv[1] + "/net.pth")
x = torch.randn(2, dense.WIDTH)
torch.onnx.export(net, (x,), sys.argv[1] + "/net.onnx", dynamo=True, external_data=False, verbose=False,
                  input_names=["x"], output_names=["scores"], dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
"""
MAKE_KERAS = """
import sys, keras
keras.utils.set_random_seed(5)
width, layers = int(sys.argv[2]), int(sys.argv[3])
x = keras.Input((width,), name="x")
y = x
for _ in range(layers):
    y = keras.layers.Dense(width, "relu", kernel_initializer="he_normal")(y)
net = keras.Model(x, keras.layers.Dense(10, name="scores")(y))
net.save(sys.argv[1] + "/net.keras")
net.export(sys.argv[1] + "/net-saved", verbose=False)
"""
MAKE_TFLITE = """
import sys, tensorflow as tf
converter = tf.lite.TFLiteConverter.from_saved_model(sys.argv[1] + "/net-saved")
open(sys.argv[1] + "/net.tflite", "wb").write(converter.convert())
"""


def make_sources(folder: Path, megabytes: float) -> None:
    layers = max(1, round(megabytes * 1e6 / (4 * WIDTH * WIDTH)))
    (folder / "dense.py").write_text(FACTORY.format(width=WIDTH, layers=layers))
    for code in (MAKE_TORCH, MAKE_KERAS, MAKE_TFLITE):
        subprocess.run([sys.executable, "-c", code, str(folder), str(WIDTH), str(layers)], check=True)
    noise = np.random.default_rng(5).standard_normal((32, WIDTH)).astype(np.float32)
    np.savez(folder / "samples.npz", x=noise)


def size_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def package(folder: Path, source: str, format: str) -> dict[str, Any]:
    """One row. A packaging that fails is one too, with its sentence."""
    path = folder / FILES[source]
    options = ["--input", f"x=float32:?,{WIDTH}"] if source == "torch-state" else []
    options += ["--factory", f"{folder / 'dense.py'}:create"] if source == "torch-state" else []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "edge_infer.cli", "package", str(path), "--format", format]
        command += ["--target", f"cpu-{os.uname().machine}", "--calibration", str(folder / "samples.npz"), *options]
        command += [
            "--max-size",
            "100GB",
            "--max-ram",
            "100GB",
            "--max-accuracy-drop",
            "99%",
            "-o",
            f"{scratch}/net.edge",
            "--json",
        ]
        begun = time.monotonic()
        log = Path(scratch) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, "EDGE_INFER_CACHE": f"{scratch}/cache"}
            )
            most = watch(process)
        words = log.read_text("utf-8", "replace").strip().splitlines()
    weights = size_of(folder / FILES["torch-state"])
    return {
        "source": source, "format": format, "bytes": size_of(path), "weight_bytes": weights,
        "peak_bytes": most.anonymous, "with_files_bytes": most.all, "times": most.anonymous / weights, "at": most.at,
        "seconds": time.monotonic() - begun, "status": process.returncode,
        "words": "" if process.returncode == 0 else words[-1][:500],
    }  # fmt: skip


@dataclass
class Most:
    """The most memory of each kind, in bytes, and which call had most of the anonymous at that time."""

    anonymous: int = 0
    all: int = 0
    at: str = ""


def watch(process: subprocess.Popen[bytes]) -> Most:
    """The most memory of a process and its descendants until it ends."""
    most = Most()
    while process.poll() is None:
        used = {pid: memory_of(pid) for pid in family(process.pid)}
        anonymous = sum(row["Pss_Anon"] + row["Pss_Shmem"] for row in used.values())
        most.all = max(most.all, sum(row["Pss"] for row in used.values()))
        if anonymous > most.anonymous:
            most.anonymous, most.at = anonymous, call_of(max(used, key=lambda pid: used[pid]["Pss_Anon"]))
        time.sleep(POLL_S)
    return most


def family(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it ended meanwhile
            continue
    return found


def memory_of(pid: int) -> dict[str, int]:
    kinds = dict.fromkeys(("Pss", "Pss_Anon", "Pss_Shmem"), 0)
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it ended meanwhile
        return kinds
    for name, _, rest in (line.partition(":") for line in lines):
        if name in kinds:
            kinds[name] = 1024 * int(rest.split()[0])
    return kinds


def call_of(pid: int) -> str:
    """What a child of the packager runs: module:function of a step, else its program."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "edge_infer.worker" in words:
            request = json.loads(Path(words[words.index("edge_infer.worker") + 1], "request.json").read_text())
            precision = request["request"].get("precision", "")
            return f"{request['call'].removeprefix('edge_infer.')} {precision}".strip()
        if "-m" in words:
            return words[words.index("-m") + 1]
        return next((Path(word).stem for word in words if word.endswith(".py")), Path(words[0]).name)
    except (OSError, ValueError):
        return ""


def page(rows: list[dict[str, Any]]) -> str:
    weights = rows[0]["weight_bytes"] / 1e6
    lines = [
        "# Memory of packaging",
        "",
        f"Made by `python scripts/packaging_memory.py --docs`, which says what is measured: a dense network with "
        f"{weights:.0f} MB of",
        f"float32 weights becomes an int8 bundle. The goal is less than {GOAL:g} times the weights.",
        "",
        "| from | to | source | memory | times the weights | with files | most in |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        missed = "" if row["times"] < GOAL else " (missed)"
        failed = f" (status {row['status']}: {row['words']})" if row["status"] else ""
        lines.append(
            f"| {row['source']} | {row['format']} | {row['bytes'] / 1e6:.0f} MB | {row['peak_bytes'] / 1e6:.0f} MB "
            f"| {row['times']:.2f}{missed} | {row['with_files_bytes'] / 1e6:.0f} MB | `{row['at']}`{failed} |"
        )
    return "\n".join(lines) + "\n"


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` in place of those of the same source and format in the docs."""
    known = {(row["source"], row["format"]): row for row in [*json.loads(DATA.read_text()), *rows]}
    return [known[row] for row in ROWS if row in known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--only", action="append", metavar="SOURCE:FORMAT")
    parser.add_argument(
        "--docs", action="store_true", help="write docs/memory.md and .json; with --only, change those rows"
    )
    args = parser.parse_args()
    rows = []
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="memory-") as folder:
        make_sources(Path(folder), args.megabytes)
        for source, format in ROWS:
            if args.only and f"{source}:{format}" not in args.only:
                continue
            rows.append(package(Path(folder), source, format))
            print(json.dumps(rows[-1]), flush=True)
    if args.only and args.docs:
        rows = merged(rows)
    text = page(rows)
    print(text)
    if args.docs:
        (ROOT / "docs" / "memory.md").write_text(text)
        DATA.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
