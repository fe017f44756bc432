#!/usr/bin/env python3
"""Train small versions of mobile networks, and one that plain int8 breaks, on scikit-learn's digits.

    python scripts/train_nets.py [--out build/trained] [--only NET]... [--framework keras|torch]... [--no-baselines]

    digits_mobilenet      inverted residuals with ReLU6, as MobileNetV2 has them
    digits_efficientnet   MBConv blocks with squeeze-excitation and swish, as EfficientNet has them
    digits_wild           plain convolutions, one of which gives some channels thousands of times the others' range

Each is trained in Keras and in PyTorch and takes 8 x 8 pixels. Plain int8 costs the first two next to nothing on so
easy a task; they are there for their operators. The wild network is trained as any other; then WILD_SCALES multiply
the output channels of its second convolution (through the normalisation behind it, before the ReLU) and the third
convolution divides by them. They are powers of two, so the float function stays what it was. But one scale for the
tensor between the two, which is what int8 has for activations, rounds all channels but the scaled ones to zero, however
finely the weights are scaled. Either convolution alone in float does not help: the other still rounds that tensor.

Written to the folder: every form of each network with an ``index.json`` as zoo_models.py has, and

    calibration.npz  evaluate.npz              image [n, 8, 8, 1] float32 in 0..1, label [n] int64: for the Keras forms
    calibration_nchw.npz  evaluate_nchw.npz    the same with image [n, 1, 8, 8]: for the PyTorch and ONNX forms
    report.json                                accuracies, training times, and what plain int8 makes of each network

Training (with shifts by a pixel), calibration and evaluation samples are disjoint.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from make_models import SEED, nchw, split_digits
from zoo_forms import Alive, Input, check_alive, run_child, write_keras, write_torch

NETS = ("digits_mobilenet", "digits_efficientnet", "digits_wild")
FRAMEWORKS = ("keras", "torch")
EPOCHS, BATCH, RATE = 40, 64, 3e-3
#: What the networks must reach on the evaluation digits, in float.
ACCURACY = 0.97
CALIBRATION = {"keras": "calibration.npz", "torch": "calibration_nchw.npz"}
#: By channel of the second convolution; the channels after these keep their range.
WILD_SCALES = (2.0**13, 2.0**13, 2.0**10, 2.0**10)

Data = tuple[np.ndarray, np.ndarray]


def save_data(out: Path) -> None:
    parts = split_digits()
    for name, part in (("calibration", parts["calibration"]), ("evaluate", parts["test"])):
        np.savez(out / f"{name}.npz", image=part[0], label=part[1])
        np.savez(out / f"{name}_nchw.npz", image=nchw(part[0]), label=part[1])


def epochs() -> list[Data]:
    """The training digits once an epoch, shuffled and each shifted by up to a pixel; the same for both frameworks."""
    images, labels = split_digits()["train"]
    rng = np.random.default_rng(SEED)
    return [_shifted(images[order], labels[order], rng) for order in _orders(len(labels), rng)]


def _orders(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.permutation(count) for _ in range(EPOCHS)]


def _shifted(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Data:
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = rng.integers(0, 3, (len(labels), 2))
    moved = [image[row : row + 8, column : column + 8] for image, (row, column) in zip(padded, corners, strict=True)]
    return np.stack(moved), labels


def one_of_each() -> np.ndarray:
    """The first calibration sample of each digit: a living network tells any two of them apart."""
    images, labels = split_digits()["calibration"]
    return images[[int(np.argmax(labels == digit)) for digit in range(10)]]


def train_torch(name: str, out: Path) -> dict[str, Any]:
    import torch
    import zoo_torch
    from zoo_models import copy_factories

    copy_factories(out)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    net = getattr(zoo_torch, name)()
    started = time.perf_counter()
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    data = epochs()
    steps = sum(len(labels) // BATCH for _, labels in data)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for images, labels in data:
        batches = zip(torch.from_numpy(nchw(images)).split(BATCH), torch.from_numpy(labels).split(BATCH), strict=True)
        for image, label in batches:
            if len(label) < BATCH:  # statistics of a few samples would be poor
                continue
            optimizer.zero_grad()
            torch.nn.functional.nll_loss(torch.log(net(image)["digit"] + 1e-9), label).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    seconds = time.perf_counter() - started

    def ask(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            answer: np.ndarray = net(torch.from_numpy(nchw(images)))["digit"].numpy()
        return answer

    if name == "digits_wild":
        _unchanged(ask, lambda: _make_wild_torch(net))
    write_torch(out, net, _alive(name, "torch", ask))
    return _result(ask, seconds, [parameter.numel() for parameter in net.parameters()])


def train_keras(name: str, out: Path) -> dict[str, Any]:
    import keras
    import tensorflow as tf
    import zoo_keras

    keras.utils.set_random_seed(SEED)
    tf.config.experimental.enable_op_determinism()
    tf.config.threading.set_intra_op_parallelism_threads(2)
    model = getattr(zoo_keras, name)()
    started = time.perf_counter()
    data = epochs()
    steps = sum(len(labels) // BATCH for _, labels in data)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(RATE, steps)), "sparse_categorical_crossentropy"
    )
    for images, labels in data:
        full = len(labels) // BATCH * BATCH  # statistics of a few samples would be poor
        model.fit(images[:full], labels[:full], batch_size=BATCH, shuffle=False, verbose=0)
    seconds = time.perf_counter() - started

    def ask(images: np.ndarray) -> np.ndarray:
        answer: np.ndarray = model(images, training=False).numpy()
        return answer

    if name == "digits_wild":
        _unchanged(ask, lambda: _make_wild_keras(model))
    write_keras(out, model, _alive(name, "keras", ask))
    return _result(ask, seconds, [int(np.prod(variable.shape)) for variable in model.trainable_variables])


def _scales(channels: int) -> np.ndarray:
    return np.array(WILD_SCALES + (1.0,) * (channels - len(WILD_SCALES)), np.float32)


def _make_wild_torch(net: Any) -> None:
    import torch

    convolutions = [module for module in net.modules() if isinstance(module, torch.nn.Conv2d)]
    norm = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)][1]
    scales = torch.from_numpy(_scales(norm.num_features))
    with torch.no_grad():
        norm.weight *= scales
        norm.bias *= scales
        convolutions[2].weight /= scales[:, None, None]


def _make_wild_keras(model: Any) -> None:
    import keras

    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    norm = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)][1]
    scales = _scales(norm.gamma.shape[0])
    norm.gamma.assign(norm.gamma * scales)
    norm.beta.assign(norm.beta * scales)
    convolutions[2].kernel.assign(convolutions[2].kernel / scales[:, None])


def _unchanged(ask: Any, change: Any) -> None:
    """Apply ``change`` and make sure that the float function stayed what it was."""
    images = split_digits()["test"][0]
    before = ask(images)
    change()
    error = float(np.abs(ask(images) - before).max())
    if not error <= 1e-5:
        raise SystemExit(f"scaling changed the float answers by up to {error:.2g}, expected at most 1e-5")


def _alive(name: str, framework: str, ask: Any) -> Alive:
    images = one_of_each()
    answers = {"digit": ask(images)}
    found = check_alive(f"{name} in {framework}", answers)
    samples = {"image": images if framework == "keras" else nchw(images)}
    return Alive(name, (Input("image", (8, 8, 1)),), samples, answers, found, calibration=CALIBRATION)


def _result(ask: Any, seconds: float, parameters: list[int]) -> dict[str, Any]:
    images, labels = split_digits()["test"]
    accuracy = float((ask(images).argmax(1) == labels).mean())
    return {"float": accuracy, "parameters": sum(parameters), "seconds": round(seconds, 1)}


def record(out: Path, key: str, facts: dict[str, Any]) -> None:
    """Add to the report's row ``key``."""
    path = out / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report[key] = {**report.get(key, {}), **facts}
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    os.replace(aside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/trained"))
    parser.add_argument("--only", action="append", choices=NETS, help="train this one alone; repeat for more")
    parser.add_argument("--framework", action="append", choices=FRAMEWORKS, help="in this framework alone")
    parser.add_argument("--no-baselines", action="store_true", help="do not try plain int8 on what was trained")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    save_data(args.out)
    for name in args.only or NETS:
        for framework in args.framework or FRAMEWORKS:
            key = f"{name}-{framework}"
            if args.here:
                facts = {"keras": train_keras, "torch": train_torch}[framework](name, args.out)
                record(args.out, key, facts)
                if facts["float"] < ACCURACY:
                    raise SystemExit(f"{key} reached {facts['float']:.1%}, below the {ACCURACY:.0%} promised")
                continue
            # Each in a process of its own: the frameworks do not share one happily.
            chosen = ["--here", "--only", name, "--framework", framework, "--out", str(args.out)]
            run_child([__file__, *chosen], args.out / f"{key}.log")
            if not args.no_baselines:
                script = str(Path(__file__).with_name("int8_baselines.py"))
                run_child([script, str(args.out), name, framework], args.out / f"{key}-int8.log")
            row = json.loads((args.out / "report.json").read_text())[key]
            print(key, *(f"{word} {value}" for word, value in row.items()), sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
