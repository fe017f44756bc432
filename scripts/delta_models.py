#!/usr/bin/env python3
"""Train networks on scikit-learn's digits and retrain them as people do, for measuring what an update takes to send.

    python scripts/delta_models.py --out build/delta

    digits         the network of make_models.py
    digits-deep    four convolutions and no dense layer but the last: 1 million weights

The first release of each learns 700 of the digits. Each retraining goes on from there with the 397 digits that came in
since beside the 700, all shifted by up to a pixel:

    tuned          every layer, a tenth of the first learning rate, 5 epochs
    tuned-gently   every layer, a hundredth of it, 2 epochs
    head           the last layer alone, a tenth of it, 5 epochs
    from-scratch   learned anew from another seed: no update at all, for comparison

Written to the folder: NETWORK-RELEASE.pth (state dicts; factories in delta_nets.py), calibration.npz, and
accuracy.json with the share of the 500 test digits that each release gets right.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from make_models import SEED, nchw, split_digits

FIRST, RATE, EPOCHS, BATCH = 700, 2e-3, 25, 64
NETWORKS = ("digits", "digits-deep")
#: Share of the first learning rate, epochs, whether only the last layer learns.
RETRAININGS = {"tuned": (0.1, 5, False), "tuned-gently": (0.01, 2, False), "head": (0.1, 5, True)}
RELEASES = ("first", *RETRAININGS, "from-scratch")
#: What the releases must reach on the test digits: an update of a network that learned nothing would prove nothing.
ACCURACY = 0.95

NETS_SOURCE = '''"""The networks: what `--factory delta_nets.py:digits` names."""

import torch


class DigitsNet(torch.nn.Sequential):
    """Convolutions, the picture halved after the second; ``units`` in a dense layer, or the mean of each channel."""

    def __init__(self, channels, units):
        layers = []
        for number, (before, after) in enumerate(zip([1, *channels], channels)):
            layers += [torch.nn.Conv2d(before, after, 3, padding=1), torch.nn.BatchNorm2d(after), torch.nn.ReLU()]
            layers += [torch.nn.MaxPool2d(2)] if number == 1 else []
        if units:
            layers += [torch.nn.Flatten(), torch.nn.Linear(16 * channels[-1], units), torch.nn.ReLU()]
        else:
            layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
        super().__init__(*layers, torch.nn.Linear(units or channels[-1], 10), torch.nn.Softmax(1))

    def forward(self, image):
        return super().forward(image)


def digits():
    return DigitsNet([32, 64], 64)


def digits_deep():
    return DigitsNet([64, 128, 256, 256], 0)
'''


def factory(network: str) -> str:
    return "delta_nets.py:" + network.replace("-", "_")


def make(out: Path) -> dict[str, float]:
    """Train what is missing in ``out``; gives the accuracy of each release by NETWORK-RELEASE."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "delta_nets.py").write_text(NETS_SOURCE)
    np.savez(out / "calibration.npz", image=nchw(split_digits()["calibration"][0]))
    figures = out / "accuracy.json"
    found: dict[str, float] = json.loads(figures.read_text()) if figures.is_file() else {}
    for network in NETWORKS:
        if not all(f"{network}-{release}" in found for release in RELEASES):
            found.update(_train_releases(out, network))
    poor = {name: value for name, value in found.items() if value < ACCURACY}
    if poor:
        raise SystemExit(f"{poor} of the test digits right, expected {ACCURACY:.0%} at least")
    figures.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return found


def _train_releases(out: Path, network: str) -> dict[str, float]:
    import torch

    sys.path.insert(0, str(out))
    import delta_nets

    torch.set_num_threads(1)
    images, labels = split_digits()["train"]
    rng = np.random.default_rng(SEED)

    def new() -> Any:
        return getattr(delta_nets, network.replace("-", "_"))()

    found = {}
    for seed, release in ((SEED, "first"), (SEED + 1, "from-scratch")):
        torch.manual_seed(seed)
        net = new()
        _learn(net, images[:FIRST], labels[:FIRST], RATE, EPOCHS, False, np.random.default_rng(seed))
        found[f"{network}-{release}"] = _save(net, out / f"{network}-{release}.pth")
    for release, (share, epochs, head) in RETRAININGS.items():
        net = new()
        net.load_state_dict(torch.load(out / f"{network}-first.pth"))
        _learn(net, images, labels, share * RATE, epochs, head, rng)
        found[f"{network}-{release}"] = _save(net, out / f"{network}-{release}.pth")
    return found


def _learn(
    net: Any, images: np.ndarray, labels: np.ndarray, rate: float, epochs: int, head: bool, rng: np.random.Generator
) -> None:
    import torch

    learning = net[-2].parameters() if head else net.parameters()
    optimizer = torch.optim.Adam(learning, lr=rate)
    net.train(not head)  # the statistics of a network whose head alone learns stay as they are
    for _ in range(epochs):
        order = rng.permutation(len(labels))
        pixels = torch.from_numpy(nchw(_shifted(images[order], rng)))
        for image, label in zip(pixels.split(BATCH), torch.from_numpy(labels[order]).split(BATCH), strict=True):
            optimizer.zero_grad()
            torch.nn.functional.nll_loss(torch.log(net(image) + 1e-9), label).backward()
            optimizer.step()
    net.eval()


def _shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = rng.integers(0, 3, (len(images), 2))
    return np.stack([image[row : row + 8, column : column + 8] for image, (row, column) in zip(padded, corners)])


def _save(net: Any, path: Path) -> float:
    """Save the state dict; gives the share of the test digits that are right."""
    import torch

    torch.save(net.state_dict(), path)
    images, labels = split_digits()["test"]
    with torch.no_grad():
        return float((net(torch.from_numpy(nchw(images))).argmax(1).numpy() == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/delta"))
    for name, value in sorted(make(parser.parse_args().out).items()):
        print(f"{name}: {value:.1%} of the test digits right")


if __name__ == "__main__":
    main()
