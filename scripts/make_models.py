#!/usr/bin/env python3
"""Train the example models on scikit-learn's handwritten digits and save them in every form a user has.

    python scripts/make_models.py [--out build/models]

One convolutional network in Keras and one of the same shape in PyTorch learn the 1,797 digits (8 x 8 pixels,
0..16 scaled to 0..1) with a fixed seed. The split is 1,097 to train, 200 to calibrate, 500 to test.

Written to the folder:

    keras.keras  keras.h5  keras_saved_model/          image float32 [batch, 8, 8, 1] -> digit float32 [batch, 10]
    torch_state.pth (factory: digits_net.py:create)    image float32 [batch, 1, 8, 8] -> digit float32 [batch, 10]
    torch_module.pth  torch_script.pt  torch_export.pt2  torch.onnx
    calibration.npz  test.npz                          for the Keras forms (image NHWC; test.npz also holds label)
    calibration_nchw.npz  test_nchw.npz                for the PyTorch and ONNX forms
    seven.png                                          the second of the test images, a picture in grey; labels.txt
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 7
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN, CALIBRATION = 1097, 200

#: The factory that a user of a ``.pth`` state dict has: the network's source beside the weights.
NETWORK_SOURCE = '''"""The example network: what `--factory digits_net.py:create` names."""

import torch


class DigitsNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
            torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.BatchNorm2d(64), torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
        )
        self.classifier = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64 * 4 * 4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10),
        )

    def forward(self, image):
        return {"digit": torch.softmax(self.classifier(self.features(image)), dim=1)}


def create():
    return DigitsNet()
'''


def split_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The digits in three disjoint parts: ``image`` float32 [n, 8, 8, 1] in 0..1 and ``label`` int64 [n]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[..., None]
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(SEED).permutation(len(labels))
    parts = np.split(order, [TRAIN, TRAIN + CALIBRATION])
    return {
        name: (images[part], labels[part]) for name, part in zip(("train", "calibration", "test"), parts, strict=True)
    }


def nchw(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def save_data(out: Path) -> None:
    parts = split_digits()
    for suffix, layout in (("", np.asarray), ("_nchw", nchw)):
        np.savez(out / f"calibration{suffix}.npz", image=layout(parts["calibration"][0]))
        np.savez(out / f"test{suffix}.npz", image=layout(parts["test"][0]), label=parts["test"][1])
    image, label = parts["test"][0][1, :, :, 0], int(parts["test"][1][1])
    Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(out / f"{NAMES[label]}.png")
    (out / "labels.txt").write_text("\n".join(NAMES) + "\n")


def train_keras(out: Path) -> float:
    """Train and save the Keras network; returns its test accuracy."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras

    keras.utils.set_random_seed(SEED)
    image = keras.Input((8, 8, 1), name="image")
    x = image
    for filters in (32, 64):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))
    x = keras.layers.Flatten()(keras.layers.MaxPooling2D()(x))
    x = keras.layers.Dense(64, activation="relu")(x)
    model = keras.Model(image, keras.layers.Dense(10, activation="softmax", name="digit")(x))
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    parts = split_digits()
    model.fit(*parts["train"], batch_size=64, epochs=20, verbose=0)
    accuracy = float(model.evaluate(*parts["test"], verbose=0)[1])
    model.save(out / "keras.keras")
    model.save(out / "keras.h5")
    shutil.rmtree(out / "keras_saved_model", ignore_errors=True)
    model.export(out / "keras_saved_model", verbose=False)
    return accuracy


def train_torch(out: Path) -> float:
    """Train and save the PyTorch network; returns its test accuracy."""
    import torch

    (out / "digits_net.py").write_text(NETWORK_SOURCE)
    sys.path.insert(0, str(out))
    import digits_net

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    net = digits_net.create()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    parts = split_digits()
    images, labels = torch.from_numpy(nchw(parts["train"][0])), torch.from_numpy(parts["train"][1])
    net.train()
    for _ in range(20):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            probability = net(images[batch])["digit"]
            torch.nn.functional.nll_loss(torch.log(probability + 1e-9), labels[batch]).backward()
            optimizer.step()
    net.eval()
    save_torch(net, out)
    with torch.no_grad():
        predicted = net(torch.from_numpy(nchw(parts["test"][0])))["digit"].argmax(1).numpy()
    return float((predicted == parts["test"][1]).mean())


def save_torch(net, out: Path) -> None:
    import torch

    example = torch.zeros(2, 1, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.save(net.state_dict(), out / "torch_state.pth")
    torch.save(net, out / "torch_module.pth")
    torch.jit.trace(net, example, strict=False).save(str(out / "torch_script.pt"))
    exported = torch.export.export(net, (example,), dynamic_shapes={"image": {0: batch}})
    torch.export.save(exported, out / "torch_export.pt2")
    torch.onnx.export(
        net,
        (example,),
        str(out / "torch.onnx"),
        input_names=["image"],
        output_names=["digit"],
        dynamic_shapes={"image": {0: batch}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def quietly(train, out: Path) -> float:
    """Run ``train`` with the frameworks' own chatter in a log file; shown when the training fails."""
    log = out / f"{train.__name__}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    streams = [os.dup(1), os.dup(2)]
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        return train(out)
    except BaseException:
        os.dup2(streams[1], 2)
        print(log.read_text(errors="replace"), file=sys.stderr)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/models"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    save_data(out)
    # Each framework in a process of its own: they do not share one happily.
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        jobs = {
            "keras": pool.apply_async(quietly, (train_keras, out)),
            "torch": pool.apply_async(quietly, (train_torch, out)),
        }
        accuracy = {name: job.get() for name, job in jobs.items()}
    for name, value in accuracy.items():
        if value < 0.97:
            raise SystemExit(f"the {name} network reached {value:.1%} on the test digits, below the 97 % promised")
        print(f"{name}: {value:.1%} of the test digits right")
    (out / "accuracy.json").write_text(json.dumps(accuracy, sort_keys=True) + "\n")
    print(f"saved to {out}")


if __name__ == "__main__":
    main()
