"""The bundles whose answers scripts/device_answers.py compares: trained networks in all engines and precisions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import answer_nets
import numpy as np
from make_models import nchw, split_digits

from edge_infer import convert
from edge_infer.bundle import write_bundle
from edge_infer.convert import ReadOptions
from edge_infer.convert.source import read_source
from edge_infer.errors import EdgeInferError
from edge_infer.manifest import TensorSpec
from edge_infer.request import Request
from edge_infer.sets import choose_sets
from edge_infer.steps import Steps, cache_root
from edge_infer.target import read_target
from edge_infer.workshop import Workshop

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "build" / "models"
#: The networks of train_nets.py that int8 does not break.
TRAINED = ("digits_mobilenet", "digits_efficientnet")
NETWORKS = ("digits", *TRAINED, *answer_nets.NETS)
IMAGE = TensorSpec("image", "float32", (None, 1, 8, 8))
#: For each engine's format: the form of the network that is packaged, and the layout of its images.
FORMS = {"tflite": ("keras", ""), "onnx": ("onnx", "_nchw"), "torchscript": ("script", "_nchw")}
#: The target that bundles are packaged for. Those of the others are the same,
TARGET = "raspberry-pi-4"
#: but that float16 is computed as such where the processor can.
HALF, HALF_TARGET = ("onnx", "float16"), "raspberry-pi-5"
#: Written in place of a target's own, so that a bundle says the largest value of each output, and what is measured
#: does not depend on what is set.
WHOLE = "golden_tolerance = { %s }"


@dataclass(frozen=True)
class Case:
    network: str
    format: str
    precision: str
    target: str

    @property
    def file(self) -> str:
        return f"{self.network}-{self.format}-{self.precision}-{self.target}.edge"


def cases() -> Iterator[Case]:
    for network in NETWORKS:
        for format in FORMS:
            for precision in read_target(TARGET).engine(format).precisions:
                yield Case(network, format, precision, TARGET)
                if (format, precision) == HALF:
                    yield Case(network, format, precision, HALF_TARGET)


def asked_of(case: Case, target: str) -> bool:
    """Whether a bundle is what somebody with ``target`` would get."""
    half = (case.format, case.precision) == HALF
    return case.target == (HALF_TARGET if half and target == HALF_TARGET else TARGET)


def make_networks(work: Path) -> None:
    """Train what is missing."""
    if not (MODELS / "accuracy.json").is_file():
        subprocess.run([sys.executable, str(ROOT / "scripts" / "make_models.py"), "--out", str(MODELS)], check=True)
    for name in TRAINED:
        if not all((work / "trained" / f"{name}-{end}").exists() for end in ("keras.keras", "torch.onnx")):
            command = [sys.executable, str(ROOT / "scripts" / "train_nets.py"), "--out", str(work / "trained")]
            subprocess.run([*command, "--no-baselines", "--only", name], check=True)
    answer_nets.make(work / "nets")


def source(work: Path, network: str, form: str) -> Path:
    if network == "digits":
        return MODELS / {"keras": "keras.keras", "onnx": "torch.onnx", "script": "torch_script.pt"}[form]
    if network in TRAINED:
        names = {"keras": "keras.keras", "onnx": "torch.onnx", "script": "torch-script.pt"}
        return work / "trained" / f"{network}-{names[form]}"
    names = {"keras": "keras.keras", "onnx": "torch.onnx", "script": "torch.pt"}
    return work / "nets" / f"{network}-{names[form]}"


def make_bundles(work: Path) -> dict[str, str]:
    """Package what is missing into ``work/bundles``, with the questions; gives what the packager refused, and why."""
    folder = work / "bundles"
    folder.mkdir(parents=True, exist_ok=True)
    images = split_digits()["test"][0]
    np.savez(folder / "images.npz", nhwc=images, nchw=nchw(images))
    told = work / "refused.json"
    refused: dict[str, str] = json.loads(told.read_text()) if told.is_file() else {}
    for case in cases():
        if case.file not in refused and not (folder / case.file).exists():
            print(f"  packaging {case.file}", file=sys.stderr, flush=True)
            try:
                make_bundle(work, case)
            except EdgeInferError as error:
                refused[case.file] = str(error)
                told.write_text(json.dumps(refused, indent=1, sort_keys=True) + "\n")
    return refused


def make_bundle(work: Path, case: Case) -> None:
    """As the packager makes it, without measuring it and without a report."""
    form, layout = FORMS[case.format]
    calibration = MODELS / f"calibration{layout}.npz"
    inputs = (IMAGE,) if form == "script" else ()
    target = read_target(str(target_file(work, case.target)))
    path, output = source(work, case.network, form), work / "bundles" / case.file
    request = Request(path, case.target, output, calibration=calibration, inputs=inputs, name=case.network)
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=root) as scratch:
        steps = Steps(root, Path(scratch) / "log.txt", lambda step: None)
        options = ReadOptions(inputs=inputs, calibration=str(calibration))
        model = convert.read(read_source(path), options, steps)
        sets = choose_sets(model.samples("calibration"), None, model.made.answer["samples"])
        shop = Workshop(request, target, model, sets, steps, Path(scratch))
        draft = shop.draft(shop.artifact(target.engine(case.format), case.precision))
        write_bundle(draft.manifest, draft.path, output)


def target_file(work: Path, name: str) -> Path:
    """The target with a golden tolerance of the whole largest value everywhere."""
    text = (ROOT / "targets" / f"{name}.toml").read_text()
    text = re.sub(r"(?m)^golden_tolerance = .*\n", "", text)

    def whole(found: re.Match[str]) -> str:
        precisions = re.findall(r'"([^"]+)"', found.group())
        return found.group() + "\n" + WHOLE % ", ".join(f'"{precision}" = 1.0' for precision in precisions)

    text = re.sub(r"(?m)^precisions = .*$", whole, text)
    path = work / "targets" / f"{name}.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path
