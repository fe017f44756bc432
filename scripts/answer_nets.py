#!/usr/bin/env python3
"""Train networks on scikit-learn's digits that have the operators and kinds of answers which the others lack.

    python scripts/answer_nets.py [--out build/answers/nets]

    digits_dense       dense layers with tanh and sigmoid; answers probabilities, and the picture anew, a regression
    digits_attention   two encoder layers over the rows of the picture: layer norm, softmax between tokens, gelu, tanh
    digits_long        the 52 convolutions of MobileNetV2 one after another, narrow: where small differences add up
    digits_wide        four plain convolutions, each sum of up to 1,152 products

The last three answer scores without a softmax, which would hide what happens to all but the largest.

Written to the folder: NET-keras.keras, NET-torch.onnx and NET-torch.pt, and accuracy.json with the share of the 500
test digits that each gets right. Images and training data are those of train_nets.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from make_models import SEED, nchw, split_digits
from train_nets import BATCH, FRAMEWORKS, RATE, Data, epochs
from zoo_forms import run_child
from zoo_rows import Row, Shape

#: What must be right of the test digits, and of how many epochs of train_nets.py that takes the first.
ACCURACY, EPOCHS = 0.9, 24
#: The answers of each network; ``digit`` is what is judged.
NETS = {
    "digits_dense": ("digit", "picture"),
    "digits_attention": ("digit",),
    "digits_long": ("digit",),
    "digits_wide": ("digit",),
}
#: MobileNetV2 (see zoo_rows.py) with a quarter of its channels, halved twice.
LONG = Shape(
    stem=16,
    stem_stride=1,
    rows=(
        Row(1, 8, 1, 1),
        Row(6, 8, 2, 2),
        Row(6, 8, 3, 1),
        Row(6, 16, 4, 2),
        Row(6, 24, 3, 1),
        Row(6, 40, 3, 1),
        Row(6, 80, 1, 1),
    ),
    head=128,
    squeeze=False,
)
#: Channels of the plain convolutions; the picture is halved at the second and the fourth.
WIDE = (32, 64, 128, 192)
WIDTH, HEADS, LAYERS = 32, 4, 2


def training(name: str) -> list[Data]:
    """The training digits once an epoch. Dense layers do not learn to see shifted ones, and get them as they are."""
    if name != "digits_dense":
        return epochs()[:EPOCHS]
    images, labels = split_digits()["train"]
    rng = np.random.default_rng(SEED)
    return [(images[order], labels[order]) for order in (rng.permutation(len(labels)) for _ in range(EPOCHS))]


# -- PyTorch -----------------------------------------------------------------------------------------------------------


def torch_net(name: str) -> Any:
    import torch
    import zoo_torch
    from torch import nn

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(
                *[nn.Flatten(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 32)],
                nn.Tanh(),
            )
            self.digit = nn.Linear(32, 10)
            self.picture = nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 64), nn.Sigmoid())

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            code = self.encoder(image)
            return {"digit": torch.softmax(self.digit(code), 1), "picture": self.picture(code)}

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.joined, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = self.joined(self.norm(x)).reshape(-1, 8, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
            weights = torch.softmax(parts[0] @ parts[1].transpose(-1, -2) / (WIDTH // HEADS) ** 0.5, -1)
            return x + self.out((weights @ parts[2]).transpose(1, 2).reshape(-1, 8, WIDTH))

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                *[nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)]
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layers(x)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Linear(8, WIDTH)
            self.places = nn.Parameter(0.1 * torch.randn(8, WIDTH))
            self.layers = nn.Sequential(*(layer for _ in range(LAYERS) for layer in (Attention(), Wide())))
            self.pooled = nn.Sequential(nn.LayerNorm(WIDTH), nn.Flatten(), nn.Linear(8 * WIDTH, WIDTH), nn.Tanh())
            self.digit = nn.Linear(WIDTH, 10)

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            tokens = self.rows(image.reshape(-1, 8, 8)) + self.places
            return {"digit": self.digit(self.pooled(self.layers(tokens)))}

    if name == "digits_wide":
        stages: list[nn.Module] = []
        for number, (before, after) in enumerate(zip((1, *WIDE), WIDE, strict=False)):
            stages += [*zoo_torch.conv(before, after, 3, 1 + number % 2), nn.ReLU()]
        return zoo_torch.OfImage(nn.Sequential(*stages, nn.Flatten(), nn.Linear(4 * WIDE[-1], 10)), "digit")
    if name == "digits_long":
        return zoo_torch.OfImage(zoo_torch.inverted_residuals(LONG, 1, 10), "digit")
    return {"digits_dense": Dense, "digits_attention": Encoder}[name]()


def train_torch(name: str, out: Path) -> float:
    import torch

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    net = torch_net(name)
    data = training(name)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    steps = sum(len(labels) // BATCH for _, labels in data)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for images, labels in data:
        batches = zip(torch.from_numpy(nchw(images)).split(BATCH), torch.from_numpy(labels).split(BATCH), strict=True)
        for image, label in batches:
            if len(label) < BATCH:
                continue
            optimizer.zero_grad()
            torch_loss(net(image), image, label).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    save_torch(name, net, out)
    images, labels = split_digits()["test"]
    with torch.no_grad():
        return float((net(torch.from_numpy(nchw(images)))["digit"].argmax(1).numpy() == labels).mean())


def torch_loss(answer: dict[str, Any], image: Any, label: Any) -> Any:
    from torch.nn import functional

    if "picture" not in answer:
        return functional.cross_entropy(answer["digit"], label)
    again = functional.mse_loss(answer["picture"], image.flatten(1))
    return functional.nll_loss((answer["digit"] + 1e-9).log(), label) + again


def save_torch(name: str, net: Any, out: Path) -> None:
    import torch

    example = torch.from_numpy(nchw(split_digits()["test"][0][:2]))
    torch.jit.trace(net, example, strict=False).save(str(out / f"{name}-torch.pt"))
    torch.onnx.export(
        net,
        (example,),
        str(out / f"{name}-torch.onnx"),
        input_names=["image"],
        output_names=list(NETS[name]),
        dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=4096)}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


# -- Keras -------------------------------------------------------------------------------------------------------------


def keras_net(name: str) -> Any:
    import keras
    import zoo_keras
    from keras import layers

    if name == "digits_long":
        return zoo_keras.inverted_residuals(LONG, activation=None)
    image = keras.Input((8, 8, 1), name="image")
    if name == "digits_wide":
        x = image
        for number, filters in enumerate(WIDE):
            x = layers.ReLU()(zoo_keras.conv_norm(x, filters, 3, 1 + number % 2))
        return keras.Model(image, layers.Dense(10, name="digit")(layers.Flatten()(x)))
    if name == "digits_dense":
        x = layers.Dense(128, activation="tanh")(layers.Flatten()(image))
        x = layers.Dense(32, activation="tanh")(layers.Dense(64, activation="tanh")(x))
        picture = layers.Dense(64, activation="sigmoid", name="picture")(layers.Dense(96, activation="tanh")(x))
        return keras.Model(
            image, {"digit": layers.Dense(10, activation="softmax", name="digit")(x), "picture": picture}
        )
    x = layers.Dense(WIDTH)(layers.Reshape((8, 8))(image))
    places = layers.Embedding(8, WIDTH)(keras.ops.cumsum(keras.ops.ones_like(x[:, :, 0], dtype="int32"), axis=1) - 1)
    x = x + places
    for _ in range(LAYERS):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y)
        y = layers.Dense(2 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(WIDTH)(y)
    x = layers.Dense(WIDTH, activation="tanh")(layers.Flatten()(layers.LayerNormalization()(x)))
    return keras.Model(image, layers.Dense(10, name="digit")(x))


def train_keras(name: str, out: Path) -> float:
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(SEED)
    tf.config.experimental.enable_op_determinism()
    model = keras_net(name)
    data = training(name)
    steps = sum(len(labels) // BATCH for _, labels in data)
    again = "picture" in NETS[name]
    digit = keras.losses.SparseCategoricalCrossentropy(from_logits=not again)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(RATE, steps))
    model.compile(optimizer, {"digit": digit, "picture": "mse"} if again else digit)
    for images, labels in data:
        full = len(labels) // BATCH * BATCH
        wanted: Any = {"digit": labels[:full], "picture": images[:full].reshape(full, 64)} if again else labels[:full]
        model.fit(images[:full], wanted, batch_size=BATCH, shuffle=False, verbose=0)
    model.save(out / f"{name}-keras.keras")
    images, labels = split_digits()["test"]
    answer = model(images, training=False)
    return float((np.asarray(answer["digit"] if again else answer).argmax(1) == labels).mean())


# -- all of them -------------------------------------------------------------------------------------------------------


def make(out: Path) -> dict[str, float]:
    """Train what is missing in ``out``; gives the accuracy of each by NET-FRAMEWORK."""
    out.mkdir(parents=True, exist_ok=True)
    for name in NETS:
        for framework in FRAMEWORKS:
            if f"{name}-{framework}" not in accuracies(out):
                # Each in a process of its own: the frameworks do not share one happily.
                chosen = ["--here", "--only", name, "--framework", framework, "--out", str(out)]
                run_child([__file__, *chosen], out / f"{name}-{framework}.log")
    return accuracies(out)


def accuracies(out: Path) -> dict[str, float]:
    path = out / "accuracy.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/answers/nets"))
    parser.add_argument("--only", choices=NETS, help=argparse.SUPPRESS)
    parser.add_argument("--framework", choices=FRAMEWORKS, help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.here:
        for name, value in make(args.out).items():
            print(f"{name}: {value:.1%} of the test digits right")
        return
    value = {"keras": train_keras, "torch": train_torch}[args.framework](args.only, args.out)
    if value < ACCURACY:
        sys.exit(f"{args.only} reached {value:.1%} in {args.framework}, below the {ACCURACY:.0%} promised")
    aside = args.out / "accuracy.new"
    found = {**accuracies(args.out), f"{args.only}-{args.framework}": value}
    aside.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    os.replace(aside, args.out / "accuracy.json")


if __name__ == "__main__":
    main()
