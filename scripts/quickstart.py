#!/usr/bin/env python3
"""The main job on a real model, with the commands a user would type; `scripts/quickstart` calls this.

The networks learn scikit-learn's handwritten digits. Their bundles go to a device embedded in this machine
(`local:build/device`), where each must answer its golden questions before it serves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = Path("build/models")
DEVICE = Path("build/device")
HERE = f"cpu-{platform.machine()}"
#: An int8 bundle must keep this share of its source's accuracy.
KEEP = 0.99


@dataclass(frozen=True)
class Job:
    """One bundle: from a source to a target. ``pushed`` when the embedded device is of that kind."""

    name: str
    source: str
    target: str
    options: tuple[str, ...]
    pushed: bool = True


TORCH = ("--factory", f"{MODELS}/digits_net.py:create", "--input", "image=float32:?,1,8,8")
JOBS = (
    Job("digits-pi", "keras.keras", "raspberry-pi-4", (), pushed=False),
    Job("digits-tflite", "keras.keras", HERE, ("--format", "tflite")),
    Job("digits-onnx", "torch_state.pth", HERE, ("--format", "onnx", "--precision", "int8", *TORCH)),
    Job("digits-torchscript", "torch_state.pth", HERE, ("--format", "torchscript", *TORCH)),
)

#: Runs on the device: the model by its name from the device's store, or a bundle by its path.
ON_DEVICE = """
import json, sys
import numpy as np
import edge_infer
data = np.load(sys.argv[2])
with edge_infer.load(sys.argv[1]) as session:
    answers = session(data["image"])
print(json.dumps(float((answers.argmax(1) == data["label"]).mean())))
"""


def shell(*command: str) -> None:
    """Show and run a command of the project's; stops with its status when it fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    done = subprocess.run(command, check=False, env=ENVIRONMENT)
    if done.returncode:
        raise SystemExit(done.returncode)


def ask(*command: str) -> str:
    """What a command prints; its own and the engines' remarks are shown only when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr}")
    return done.stdout


#: `edge-infer` and `python` are those of the environment that runs this, the store is the embedded device's.
ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "EDGE_INFER_HOME": str(ROOT / DEVICE),
}


def make_models() -> dict[str, float]:
    """Train once; gives the accuracy of the sources on the test digits."""
    accuracy = MODELS / "accuracy.json"
    if not accuracy.is_file():
        shell("python", "scripts/make_models.py")
    values: dict[str, float] = json.loads(accuracy.read_text())
    return values


def make_bundle(job: Job) -> Path:
    calibration = "calibration.npz" if "keras" in job.source else "calibration_nchw.npz"
    bundle = Path("build/bundles") / f"{job.name}.edge"
    shell(
        "edge-infer", "package", f"{MODELS}/{job.source}", "--target", job.target,
        "--calibration", f"{MODELS}/{calibration}", *job.options, "-o", str(bundle),
    )  # fmt: skip
    if job.pushed:
        shell("edge-infer", "push", str(bundle), f"local:{DEVICE}")
    return bundle


def measure(job: Job, bundle: Path, source_accuracy: float) -> dict[str, object]:
    """Run the bundle as the device does: by name from its store, where it was pushed."""
    what = job.name if job.pushed else str(bundle)
    data = "test.npz" if "keras" in job.source else "test_nchw.npz"
    accuracy = json.loads(ask("python", "-c", ON_DEVICE, what, f"{MODELS}/{data}"))
    facts = json.loads(ask("python", "-m", "edge_infer", "info", what, "--json"))
    timed = json.loads(ask("python", "-m", "edge_infer", "bench", what, "--json"))
    return {
        "bundle": job.name, "source": job.source, "target": job.target, "format": facts["format"],
        "precision": facts["precision"], "size": sum(facts["files"].values()), "source_accuracy": source_accuracy,
        "accuracy": accuracy, "load_ms": timed["load_ms"], "p50_ms": timed["p50_ms"],
        "private_bytes": timed["private_bytes"],
    }  # fmt: skip


def show(rows: list[dict[str, object]]) -> None:
    from edge_infer.cli.console import print_table, size

    print()
    print_table(
        ["bundle", "from", "for", "engine", "precision", "size>", "source acc.>", "bundle acc.>", "kept>", "load>",
         "latency>", "private>"],
        [
            [
                row["bundle"], row["source"], row["target"], row["format"], row["precision"], size(row["size"]),
                f"{row['source_accuracy']:.1%}", f"{row['accuracy']:.1%}",
                f"{row['accuracy'] / row['source_accuracy']:.1%}", f"{row['load_ms']:.1f} ms",
                f"{row['p50_ms']:.3f} ms", size(row["private_bytes"]),
            ]
            for row in rows
        ],
    )  # fmt: skip
    print(
        "Times and memory are of this machine. The Pi's bundle was run here too; it is not pushed to another processor."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    args = parser.parse_args()
    os.chdir(ROOT)
    sources = make_models()
    rows = []
    for job in JOBS:
        bundle = make_bundle(job)
        rows.append(measure(job, bundle, sources["keras" if "keras" in job.source else "torch"]))
    shell("edge-infer", "status", f"local:{DEVICE}")
    show(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    worst = min(rows, key=lambda row: row["accuracy"] / row["source_accuracy"])
    if worst["accuracy"] < KEEP * worst["source_accuracy"]:
        raise SystemExit(f"{worst['bundle']} keeps less than {KEEP:.0%} of its source's accuracy")


if __name__ == "__main__":
    main()
