"""Small ONNX models for the routes that other converters take: layouts, recurrences, control flow, dynamic sizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_models import save, value, weight
from torch import Tensor, nn

Names = tuple[str, ...]


class Mobile(nn.Module):
    """Depthwise convolutions, batch normalization, ReLU6, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.thin = nn.Conv2d(16, 8, 1)
        self.scores = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        return self.scores((x + self.thin(self.deep(self.wide(x)))).mean((2, 3)))


class Masks(nn.Module):
    """Two images out, channels first, of an encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.mask = nn.Conv2d(7, 2, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        small = nn.functional.silu(self.down(image))
        large = nn.functional.interpolate(small, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.mask(torch.cat([image, self.up(small)], 1)), large


class Attention(nn.Module):
    """One transformer layer: normalization, attention over two heads, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.last = nn.Linear(16, 48), nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        mixed = self.mix(self.norm(x)).reshape(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        query, key, content = mixed.unbind(0)
        seen = torch.softmax(query @ key.transpose(-1, -2) / 8**0.5, -1) @ content
        x = x + seen.transpose(1, 2).reshape(batch, length, 16)
        return x + self.down(nn.functional.gelu(self.up(self.last(x))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], both: bool = False) -> None:
        super().__init__()
        self.layer = kind(6, 12, batch_first=True, bidirectional=both)
        self.scores = nn.Linear(12 * (1 + both), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.layer(x)[0])


class TokensAndFeatures(nn.Module):
    """Integers and floats in, floats and integers out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(16, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.mix(self.words(tokens)) + features[:, None, :]
        return scores, scores.argmax(-1)


@dataclass(frozen=True)
class Example:
    """How to make a model: module, example inputs, names, and which axes are dynamic by name."""

    make: Callable[[], nn.Module]
    args: Callable[[], tuple[Tensor, ...]]
    inputs: Names
    outputs: Names
    dynamic: dict[str, dict[int, str]]


def image() -> tuple[Tensor, ...]:
    return (torch.randn(1, 3, 16, 16),)


def steps() -> tuple[Tensor, ...]:
    return (torch.randn(1, 10, 6),)


def words() -> tuple[Tensor, ...]:
    return (torch.randn(2, 12, 16),)


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(0, 16, (2, 7)), torch.randn(2, 4))


BATCH = {0: "batch"}
BOTH = {0: "batch", 1: "length"}

EXAMPLES = {
    "mobile": Example(Mobile, image, ("image",), ("scores",), {"image": BATCH, "scores": BATCH}),
    # The names are among those that converters rewrite.
    "masks": Example(Masks, image, ("image/in.0",), ("mask.0", "large::1"), {}),
    "attention": Example(Attention, words, ("x",), ("y",), {"x": BATCH, "y": BATCH}),
    "attention_any_length": Example(Attention, words, ("x",), ("y",), {"x": BOTH, "y": BOTH}),
    "lstm": Example(lambda: Recurrent(nn.LSTM), steps, ("x",), ("y",), {}),
    "lstm_both_ways": Example(lambda: Recurrent(nn.LSTM, True), steps, ("x",), ("y",), {}),
    "gru": Example(lambda: Recurrent(nn.GRU), steps, ("x",), ("y",), {}),
    "lstm_any_length": Example(lambda: Recurrent(nn.LSTM), steps, ("x",), ("y",), {"x": {1: "t"}, "y": {1: "t"}}),
    "gru_any_batch": Example(lambda: Recurrent(nn.GRU), steps, ("x",), ("y",), {"x": BATCH, "y": BATCH}),
    "two_in_two_out": Example(
        TokensAndFeatures,
        tokens,
        ("tokens", "features"),
        ("scores", "best"),
        {"tokens": BOTH, "features": BATCH, "scores": BOTH, "best": BOTH},
    ),
}


def export(name: str, path: Path) -> Path:
    """Write the model called ``name``; the same weights each time, none of which shrinks the signal away."""
    example = EXAMPLES[name]
    torch.manual_seed(7)
    module = example.make().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example.args(),
            str(path),
            input_names=list(example.inputs),
            output_names=list(example.outputs),
            dynamic_axes=example.dynamic,
            opset_version=18,
            dynamo=False,
        )
    return path


def deciding(path: Path) -> Path:
    """An If whose branches differ."""
    left, right = weight("w left", 4, 4, seed=1), weight("w right", 4, 4, seed=2)
    branches = {}
    for side, values in (("then_branch", left), ("else_branch", right)):
        nodes = [
            helper.make_node("Constant", [], [f"{side} w"], value=values),
            helper.make_node("MatMul", ["x", f"{side} w"], [f"{side} y"]),
        ]
        branches[side] = helper.make_graph(nodes, side, [], [value(f"{side} y", TensorProto.FLOAT, [1, 4])])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], name="/choose/If", **branches),
    ]
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    x, y = value("x", TensorProto.FLOAT, [1, 4]), value("y", TensorProto.FLOAT, [1, 4])
    return save(path, nodes, [x], [y], [zero], opset=18)


def handed_through(path: Path) -> Path:
    """An output that is an input, one that is there twice, and weights whose names differ by a dot and a slash only."""
    nodes = [
        helper.make_node("MatMul", ["x", "a/w"], ["left"]),
        helper.make_node("MatMul", ["x", "a.w"], ["right"]),
        helper.make_node("Sub", ["left", "right"], ["y"]),
        helper.make_node("Identity", ["x"], ["same"]),
    ]
    outputs = [value(name, TensorProto.FLOAT, ["n", 4]) for name in ("y", "same")]
    weights = [weight("a/w", 4, 4, seed=1), weight("a.w", 4, 4, seed=2)]
    return save(path, nodes, [value("x", TensorProto.FLOAT, ["n", 4])], outputs, weights, opset=18)


def last_step(path: Path) -> Path:
    """The last of any number of steps, by an index of -1."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["each"]),
        helper.make_node("Gather", ["each", "last"], ["y"], axis=1),
    ]
    weights = [weight("w", 4, 4, seed=1), numpy_helper.from_array(np.array(-1, np.int64), "last")]
    x, y = value("x", TensorProto.FLOAT, ["n", "steps", 4]), value("y", TensorProto.FLOAT, ["n", 4])
    return save(path, nodes, [x], [y], weights, opset=18)


def without_form(path: Path) -> Path:
    """An operator that no converter knows."""
    nodes = [helper.make_node("Mystery", ["x"], ["y"], domain="example.com", name="/odd/Mystery")]
    x, y = value("x", TensorProto.FLOAT, [1, 4]), value("y", TensorProto.FLOAT, [1, 4])
    return save(path, nodes, [x], [y], [], opset=18, domains=("example.com",))


def slimmed(source: Path) -> Path:
    """As the packager hands it on: constants folded, dead nodes gone."""
    import onnxslim

    path = source.with_suffix(".slim.onnx")
    onnx.save_model(onnxslim.slim(onnx.load(str(source))), str(path))
    return path
