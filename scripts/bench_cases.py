#!/usr/bin/env python3
"""What scripts/bench.py compares: networks of a size, their bundles, and the same artifact for the plain engine.

A case is `NET-FORMAT-PRECISION`. All is made once, in build/bench.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "bench"
MODELS = ROOT / "build" / "models"
FORMATS = ("tflite", "onnx", "torchscript")
PRECISIONS = ("float32", "int8")
#: Network -> megabytes of float32 weights. The first is trained on digits, for what a call costs.
NETWORKS = {
    "digits": 0.4,
    "conv17": 17,
    "conv100": 100,
    "dense2": 2,
    "dense5": 5,
    "dense17": 17,
    "dense50": 50,
    "dense100": 100,
}
#: What the goals are for; of what lies between, only float32 is measured, for the plots.
JUDGED = ("conv17", "conv100", "dense17", "dense100")
CASES = [
    f"{net}-{format}-{precision}"
    for net in NETWORKS
    for format in FORMATS
    for precision in PRECISIONS
    if precision == "float32" or net in ("digits", *JUDGED)
]
#: Bytecode of imports is kept, as it is where a package is installed; the store is the benchmark's own.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    "EDGE_INFER_HOME": str(FOLDER / "store"),
}


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
        subprocess.run([sys.executable, __file__, "make", net, framework, str(model)], check=True)
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
        subprocess.run([sys.executable, __file__, "inline", case], check=True)
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


def main() -> None:
    """For the child processes that import a framework."""
    what, *arguments = sys.argv[1:]
    if what == "inline":
        write_inline(*arguments)
    else:
        net, framework, path = arguments
        (make_keras if framework == "keras" else make_torch)(net, Path(path))


if __name__ == "__main__":
    main()
