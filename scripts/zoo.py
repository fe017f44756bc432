#!/usr/bin/env python3
"""What converts: every model of the zoo to every format, run by the device's own runtime; writes docs/zoo.md.

    python scripts/zoo.py                    everything, an hour or so the first time; then only what changed
    python scripts/zoo.py --only lstm --small
    python scripts/zoo.py --only lstm --docs these rows anew, the others as they stand in docs/zoo.json

Each cell is a float32 artifact's largest difference from the source model (over the largest value of that output),
or the sentence with which the packager refuses. No cell is written by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zoo_models import ARCHITECTURES

from edge_infer import convert, steps
from edge_infer.cli.options import parse_input
from edge_infer.convert import ReadOptions
from edge_infer.convert.source import read_source
from edge_infer.errors import EdgeInferError
from edge_infer.manifest import FORMATS
from edge_infer.request import Request
from edge_infer.sets import Sets
from edge_infer.steps import TOOLS, Steps
from edge_infer.target import TargetProfile, read_target
from edge_infer.workshop import Workshop

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "build" / "zoo"


def make_models(folder: Path, architectures: list[str], small: bool) -> None:
    """Make those that are missing, or were made by other code or in another size."""
    folder.mkdir(parents=True, exist_ok=True)
    code = b"".join(path.read_bytes() for path in sorted((ROOT / "scripts").glob("zoo_*.py")))
    stamp = hashlib.sha256(code + bytes([small])).hexdigest()
    path = folder / "made.json"
    made = json.loads(path.read_text()) if path.exists() else {}
    for name in architectures:
        if made.get(name) != stamp:
            command = [sys.executable, str(ROOT / "scripts" / "zoo_models.py"), "--out", str(folder), "--only", name]
            subprocess.run([*command, *(["--small"] if small else [])], check=True)
            made[name] = stamp
            path.write_text(json.dumps(made))


def cells(models: Path, rows: list[dict[str, Any]], target: TargetProfile, log: Path) -> Iterator[dict[str, Any]]:
    """One row a model: its cell for each format."""
    root = steps.cache_root()
    for row in rows:
        print(f"{row['architecture']} {row['form']}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=root) as scratch:
            run = Steps(root, log, lambda step: print(f"  {step}", file=sys.stderr, flush=True))
            try:
                shop = workshop(models, row, target, run, Path(scratch))
            except EdgeInferError as error:
                yield {**row, "cells": {name: _refused(error, models) for name in FORMATS}}
                continue
            yield {**row, "cells": {name: cell(shop, target, name) for name in FORMATS}}


def workshop(models: Path, row: dict[str, Any], target: TargetProfile, run: Steps, scratch: Path) -> Workshop:
    path = models / row["file"]
    inputs = tuple(parse_input(text) for text in row["inputs"])
    factory = f"{models / row['factory']}" if row["factory"] else None
    trusted = row["form"] == "torch-module"
    options = ReadOptions(inputs=inputs, factory=factory, trust_pickle=trusted)
    request = Request(path, target.name, scratch / "model.edge", inputs=inputs, factory=factory, trust_pickle=trusted)
    model = convert.read(read_source(path), options, run)
    return Workshop(request, target, model, Sets(), run, scratch)


def cell(shop: Workshop, target: TargetProfile, format: str) -> dict[str, Any]:
    try:
        built = shop.float_model(target.engine(format))
    except EdgeInferError as error:
        return _refused(error, shop.request.source.parent)
    worst = max(built.checks, key=lambda check: check.observed)
    return {"way": list(built.converted.way), "error": worst.observed, "unit": worst.unit}


def _refused(error: EdgeInferError, models: Path) -> dict[str, Any]:
    """Without the folder, which differs from one machine to the next."""
    sentence = str(error).replace(f"{models}/", "")
    print(f"  refused: {sentence}", file=sys.stderr, flush=True)
    return {"refused": sentence}


def page(results: list[dict[str, Any]], made: dict[str, Any]) -> str:
    """The table, refusals as numbered notes below it."""
    notes: list[str] = []
    lines = [
        "# What converts",
        "",
        "Made by `python scripts/zoo.py --docs`; no cell is written by hand. A number is the largest difference of the",
        "float32 artifact's answers from the source model's, over the largest value of that output, with the artifact",
        "run by the device's own runtime; at most 1e-4 passes. Ways of several steps are named. A note",
        "is the sentence with which the packager refuses.",
        "",
        f"{made['passed']} of {made['cells']} cells pass. Python {made['python']}, "
        + ", ".join(f"{name} {number}" for name, number in made["versions"].items())
        + ".",
        "",
        "| architecture | from | to TFLite | to ONNX | to TorchScript |",
        "|---|---|---|---|---|",
    ]
    for row in results:
        shown = " | ".join(_shown(row["cells"][name], notes) for name in FORMATS)
        lines.append(f"| {row['architecture']} | {row['form']} | {shown} |")
    if notes:
        lines += ["", "## Refused", ""]
        lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def _shown(cell: dict[str, Any], notes: list[str]) -> str:
    if "refused" in cell:
        note = cell["refused"].replace("\n", " ")
        if note not in notes:
            notes.append(note)
        return f"refused ({notes.index(note) + 1})"
    through = cell["way"][1:-1]
    return f"{cell['error']:.1e}" + (f" through {', '.join(through)}" if through else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS, help="made there when missing (default: build/zoo)")
    parser.add_argument("--only", action="append", default=[], metavar="ARCHITECTURE")
    parser.add_argument("--small", action="store_true", help="small inputs, for a quick look")
    parser.add_argument("--docs", action="store_true", help="write docs/zoo.md and docs/zoo.json")
    args = parser.parse_args()
    make_models(args.models, args.only or list(ARCHITECTURES), args.small)
    rows = json.loads((args.models / "index.json").read_text())
    rows = [row for row in rows if not args.only or row["architecture"] in args.only]
    steps.cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        target = read_target(f"cpu-{platform.machine()}")
        results = list(cells(args.models, rows, target, Path(log.name)))
    if args.docs and args.only:
        kept = json.loads((ROOT / "docs" / "zoo.json").read_text())["rows"]
        results += [row for row in kept if row["architecture"] not in args.only]
        results.sort(key=lambda row: (row["architecture"], row["framework"]))
    every = [item for row in results for item in row["cells"].values()]
    made = {
        "cells": len(every),
        "passed": sum("error" in item for item in every),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "versions": {name: version(name) for name in TOOLS},
    }
    text = page(results, made)
    print(text)
    if args.docs:
        (ROOT / "docs" / "zoo.md").write_text(text)
        (ROOT / "docs" / "zoo.json").write_text(json.dumps({**made, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
