#!/usr/bin/env python3
"""Write the zoo: models of many architectures in every form a user has, with random weights that are alive.

    python scripts/zoo_models.py [--out build/zoo] [--only ARCH]... [--framework keras|torch]... [--small]

Keras gives the forms keras (``.keras``), saved-model and tflite; PyTorch gives torch-state, torch-module, torchscript,
torch-export and onnx (opset 18). The folder's ``index.json`` has a row for each, written as soon as the file is:

    architecture, framework, form, file    files are relative to the folder
    inputs       as the packager's --input takes them: NAME=DTYPE:D0,D1, ? for a dynamic dimension
    outputs      names of the answers that the network itself gives
    factory      FILE.py:callable for a torch-state, else null
    trust_pickle true for a torch-module
    calibration  an .npz of samples for the packager
    spread       for each output how much the answers to two different inputs differ at the least, over their size
    parameters, small, note (what is particular about this form, or null)

A random network easily shrinks every input to the same answer, and then any two engines agree on it. So weights have
He's size, normalisations take the statistics of noise, and a network whose ``spread`` is below MIN_SPREAD is refused.
Every TorchScript, exported, ONNX, SavedModel and TFLite form is run once and must answer as its network.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from zoo_forms import Alive, Feed, Input, check_alive, run_child, write_keras, write_torch

SEED = 11
#: Samples of noise; a normalisation's statistics are taken over all of them at once.
SAMPLES = 12
#: What a dynamic length is in the samples.
LENGTH = 32
FRAMEWORKS = ("keras", "torch")
SMALL, FULL = 96, 224


@dataclass(frozen=True)
class Architecture:
    """``inputs(image size)``; ``sized`` tells whether the size matters.

    ``control`` marks one whose way depends on the values of the whole batch. ``tflite_batch`` is set where TFLite has
    built-in operators for a fixed number of samples only: a recurrent loop over any number of them needs Flex.
    """

    name: str
    inputs: Callable[[int], tuple[Input, ...]]
    sized: bool = False
    control: bool = False
    tflite_batch: int | None = None


def _photo(size: int) -> tuple[Input, ...]:
    return (Input("image", (size, size, 3)),)


def _sequence(length: int | None) -> Callable[[int], tuple[Input, ...]]:
    return lambda size: (Input("sequence", (length, 8)),)


ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("mlp", lambda size: (Input("x", (32,)),)),
        Architecture("lenet", lambda size: (Input("image", (28, 28, 1)),)),
        Architecture("mobilenet_v2", _photo, sized=True),
        Architecture("resnet50", _photo, sized=True),
        Architecture("efficientnet_b0", _photo, sized=True),
        Architecture("transformer", lambda size: (Input("tokens", (16,), high=64),)),
        Architecture("lstm", _sequence(20), tflite_batch=1),
        Architecture("gru", _sequence(20), tflite_batch=1),
        Architecture("two_in_two_out", lambda size: (Input("image", (16, 16, 3)), Input("features", (6,)))),
        Architecture("control", lambda size: (Input("x", (8,)),), control=True),
        Architecture("any_length", _sequence(None)),
    )
}


def noise(inputs: Sequence[Input], framework: str, count: int = SAMPLES) -> Feed:
    """``count`` samples of each input, no two alike: white noise of the usual ranges, then patches of one value.

    White images alone would not do: a network that averages over an image cannot tell two of the same kind apart.
    """
    rng = np.random.default_rng(SEED)
    drawn = {row.name: np.stack([_draw(row, case, rng) for case in range(count)]) for row in inputs}
    return {name: _for_torch(array) for name, array in drawn.items()} if framework == "torch" else drawn


def _draw(row: Input, case: int, rng: np.random.Generator) -> np.ndarray:
    shape = tuple(LENGTH if size is None else size for size in row.dims)
    if row.high is not None:  # the packager's own integers are 0 or 1
        return rng.integers(0, 2 if case % 2 else row.high, shape).astype(np.int32)
    kinds = (rng.standard_normal(shape), rng.random(shape), 3 * rng.standard_normal(shape), 2 * rng.random(shape) - 1)
    if case < len(kinds):
        return kinds[case].astype(np.float32)
    # Of all sizes: were all of them large, white noise alone would set the statistics of an edge filter.
    parts = (4, 8, 16, 32)[case % 4]
    steps = [max(1, size // parts) if size >= 16 else 1 for size in shape]
    values = rng.standard_normal([-(-size // step) for size, step in zip(shape, steps, strict=True)])
    for axis, (size, step) in enumerate(zip(shape, steps, strict=True)):
        values = values.repeat(step, axis).take(range(size), axis)
    return ((1 + 2 * rng.random()) * values + 0.3 * kinds[0]).astype(np.float32)


def _for_torch(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "i":
        return array.astype(np.int64)
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2)) if array.ndim == 4 else array


def build_torch(architecture: Architecture, out: Path, size: int) -> None:
    """Every PyTorch form of one architecture."""
    import torch
    import zoo_torch

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    copy_factories(out)
    inputs = architecture.inputs(size)
    samples = noise(inputs, "torch")
    net = getattr(zoo_torch, architecture.name)()
    zoo_torch.randomize(net)
    zoo_torch.calibrate(net, [torch.from_numpy(samples[row.name]) for row in inputs])
    with torch.no_grad():
        parts = [
            net(*(torch.from_numpy(samples[row.name][index : index + 1]) for row in inputs)) for index in range(SAMPLES)
        ]
    answers = {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}
    exportable = None
    if architecture.control:
        exportable = zoo_torch.ExportableControl().eval()
        exportable.load_state_dict(net.state_dict())
    write_torch(out, net, _alive(architecture, "PyTorch", size, samples, answers), exportable)


def copy_factories(out: Path) -> None:
    """What a user of the PyTorch files has beside them: the networks' code."""
    for name in ("zoo_rows.py", "zoo_torch.py"):
        shutil.copy(Path(__file__).with_name(name), out)


def build_keras(architecture: Architecture, out: Path, size: int) -> None:
    """Every Keras form of one architecture."""
    import keras
    import zoo_keras

    keras.utils.set_random_seed(SEED)
    samples = noise(architecture.inputs(size), "keras")
    model = getattr(zoo_keras, architecture.name)(size)
    if isinstance(model, keras.Model):
        zoo_keras.randomize(model, SEED)
        zoo_keras.calibrate(model, samples)
    parts = [
        zoo_keras.ask(model, {name: array[index : index + 1] for name, array in samples.items()})
        for index in range(SAMPLES)
    ]
    answers = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    write_keras(out, model, _alive(architecture, "Keras", size, samples, answers), architecture.tflite_batch)


def _alive(architecture: Architecture, framework: str, size: int, samples: Feed, answers: Feed) -> Alive:
    name = architecture.name
    found = check_alive(f"{name} in {framework}", answers)
    small = architecture.sized and size != FULL
    return Alive(name, architecture.inputs(size), samples, answers, found, small, architecture.control)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/zoo"))
    parser.add_argument("--only", action="append", choices=ARCHITECTURES, help="build this one alone; repeat for more")
    parser.add_argument("--framework", action="append", choices=FRAMEWORKS, help="its forms of this framework alone")
    parser.add_argument("--small", action="store_true", help=f"images of {SMALL} x {SMALL} instead of {FULL} x {FULL}")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only or ARCHITECTURES:
        for framework in args.framework or FRAMEWORKS:
            if args.here:
                build = {"keras": build_keras, "torch": build_torch}[framework]
                build(ARCHITECTURES[name], args.out, SMALL if args.small else FULL)
                continue
            # Each in a process of its own: the frameworks do not share one happily.
            chosen = ["--here", "--only", name, "--framework", framework, "--out", str(args.out)]
            chosen += ["--small"] if args.small else []
            run_child([__file__, *chosen], args.out / f"{name}-{framework}.log")
            print(f"{name}: {framework} forms saved to {args.out}", flush=True)


if __name__ == "__main__":
    main()
