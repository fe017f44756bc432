#!/usr/bin/env python3
"""What int8 costs trained networks: our bundle beside each converter's default int8; writes docs/accuracy.md.

    python scripts/accuracy.py [--docs]      some minutes; trains the networks first when they are missing

Each network was trained on scikit-learn's digits. Every figure is the share of hold-out digits that are right: samples
that neither calibration, nor the choice between candidates, nor the search for mixed precision has seen. The bundle is
the packager's int8 where that keeps 99.5 % of the source's accuracy on the search set, else its mixed precision.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edge_infer.errors import LimitError, ParityError
from edge_infer.package import Packaged, Request, package
from edge_infer.samples import halves

ROOT = Path(__file__).resolve().parent.parent
TRAINED, DIGITS = ROOT / "build" / "trained", ROOT / "build" / "models"
#: The share of float32's accuracy that a bundle must keep.
KEEP = 0.995
NETS = ("digits", "digits_mobilenet", "digits_efficientnet", "digits_wild")
SOURCES = {"keras": ("{}-keras.keras", "tflite", ""), "torch": ("{}-torch.onnx", "onnx", "_nchw")}
BASELINES = {
    "keras": ("tflite_converter_int8", "ai_edge_quantizer_static_wi8_ai8"),
    "torch": ("ort_static", "ort_static_per_channel"),
}
TITLES = {
    "tflite_converter_int8": "TFLiteConverter",
    "ai_edge_quantizer_static_wi8_ai8": "AI Edge Quantizer",
    "ort_static": "ORT per tensor",
    "ort_static_per_channel": "ORT per channel",
}
#: Runs in a child of its own: the converters are not made to share a process with anything.
BASELINE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import int8_baselines
framework, out, name = sys.argv[2:5]
find = {"keras": int8_baselines.tflite_baselines, "torch": int8_baselines.onnx_baselines}[framework]
print("BASELINES", json.dumps(find(Path(out), name, json.loads(sys.argv[5]))))
"""


def make_networks() -> None:
    """Train what is missing, and put the two plain digits networks beside the others under the same kind of names."""
    if not (DIGITS / "accuracy.json").is_file():
        subprocess.run([sys.executable, str(ROOT / "scripts" / "make_models.py")], check=True)
    if not (TRAINED / "index.json").is_file():
        command = [sys.executable, str(ROOT / "scripts" / "train_nets.py"), "--out", str(TRAINED), "--no-baselines"]
        subprocess.run(command, check=True)
    links = {"keras.keras": "keras.keras", "keras_saved_model": "keras-saved-model", "torch.onnx": "torch.onnx"}
    for source, name in links.items():
        link = TRAINED / f"digits-{name}"
        if not link.exists():
            link.symlink_to(DIGITS / source)
    if not (TRAINED / "digits-keras.tflite").is_file():
        code = (
            "import sys, pathlib, tensorflow as tf; "
            "pathlib.Path(sys.argv[2]).write_bytes(tf.lite.TFLiteConverter.from_saved_model(sys.argv[1]).convert())"
        )
        paths = [str(TRAINED / "digits-keras-saved-model"), str(TRAINED / "digits-keras.tflite")]
        subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True)


def packaged(name: str, framework: str, folder: Path) -> Packaged:
    """The int8 bundle, or the mixed one where int8 does not keep enough."""
    file, format, layout = SOURCES[framework]
    for precision in ("int8", "int8-mixed"):
        request = Request(
            TRAINED / file.format(name),
            "cpu-x86_64",
            folder / f"{name}-{framework}.edge",
            format,
            precision,
            calibration=TRAINED / f"calibration{layout}.npz",
            evaluation=TRAINED / f"evaluate{layout}.npz",
            metric="top1",
            max_drop=1 - KEEP,
        )
        try:
            return package(request, lambda step: print(f"  {step}", file=sys.stderr, flush=True))
        except (LimitError, ParityError) as error:
            if precision == "int8-mixed":
                raise
            print(f"{name} {framework}: {error}", file=sys.stderr, flush=True)
    raise AssertionError("unreachable")


def row(name: str, framework: str, folder: Path) -> dict[str, Any]:
    done = packaged(name, framework, folder)
    chosen, source = done.chosen, done.record["metric"]["source"]
    assert chosen.holdout is not None
    return {
        "network": name,
        "framework": framework,
        "precision": chosen.precision,
        "float": source["value"],
        "bundle": chosen.holdout.value,
        "low": chosen.holdout.low,
        "high": chosen.holdout.high,
        "count": chosen.holdout.count,
        "kept": chosen.holdout.value / source["value"],
        "float_weights": chosen.kept_share,
        "float_layers": list(chosen.kept_float),
        "size": chosen.size,
        **baselines(name, framework),
    }


def baselines(name: str, framework: str) -> dict[str, float]:
    """The converters' own int8 on the same hold-out samples."""
    import numpy as np

    with np.load(TRAINED / "evaluate.npz") as data:
        images, labels = data["image"], data["label"]
    _, holdout = halves(len(labels), labels, keys=[image.tobytes() for image in images])
    arguments = [str(ROOT / "scripts"), framework, str(TRAINED), name, json.dumps(list(holdout))]
    done = subprocess.run([sys.executable, "-c", BASELINE, *arguments], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("BASELINES ")]
    if not lines:
        raise SystemExit(f"the converters' int8 of {name} failed:\n{done.stderr[-3000:]}")
    found = json.loads(lines[-1].removeprefix("BASELINES "))
    return {key: found[key] for key in BASELINES[framework]}


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# What int8 costs",
        "",
        "Made by `python scripts/accuracy.py --docs`. Networks trained on scikit-learn's digits by",
        "`scripts/make_models.py` and `scripts/train_nets.py`: how many hold-out digits are right. The goal is",
        "at least 99.5 % of float32.",
        "`digits_wild` is built to break plain int8: one layer's channels have wildly different ranges.",
        "",
        "| network | from | float32 | bundle | of float32 | precision | weights in float | converters' default int8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in rows:
        others = ", ".join(f"{TITLES[key]} {item[key]:.1%}" for key in BASELINES[item["framework"]])
        missed = "" if item["kept"] >= KEEP else " (missed)"
        lines.append(
            f"| {item['network']} | {item['framework']} | {item['float']:.1%} | {item['bundle']:.1%} "
            f"({item['low']:.1%} to {item['high']:.1%}) | {item['kept']:.2%}{missed} | {item['precision']} "
            f"| {item['float_weights']:.1%} | {others} |"
        )
    count = rows[0]["count"]
    lines += ["", f"{count} hold-out digits, so one digit is {1 / count:.1%}; intervals are Wilson's, 95 %."]
    kept = [item for item in rows if item["float_layers"]]
    lines += [
        f"In float for {item['network']} ({item['framework']}): {', '.join(item['float_layers'])}." for item in kept
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="write docs/accuracy.md and docs/accuracy.json")
    args = parser.parse_args()
    make_networks()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name, framework, Path(folder)) for name in NETS for framework in SOURCES]
    text = page(rows)
    print(text)
    if args.docs:
        (ROOT / "docs" / "accuracy.md").write_text(text)
        (ROOT / "docs" / "accuracy.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
