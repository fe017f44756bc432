"""The zoo's networks in PyTorch. Each function is a factory: ``--factory zoo_torch.py:resnet50``.

Answers are dictionaries, so that every exporter sees the outputs' names. Written compactly, by the papers' tables.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo_rows import (
    DIGITS_EFFICIENTNET,
    DIGITS_MOBILENET,
    EFFICIENTNET_B0,
    MOBILENET_V2,
    SHIFT,
    WILD_BODY,
    WILD_DENSE,
    WILD_PAIR,
    WILD_STEM,
    Shape,
)

CLASSES, DIGITS = 1000, 10


class Named(nn.Module):
    """A network of one input ``image`` (or ``x``, ...) and one output with a name; softmax if asked."""

    def __init__(self, body: nn.Module, output: str, softmax: bool = False) -> None:
        super().__init__()
        self.body = body
        self.output = output
        self.softmax = softmax

    def answer(self, value: Tensor) -> dict[str, Tensor]:
        scores = self.body(value)
        return {self.output: torch.softmax(scores, 1) if self.softmax else scores}


class OfImage(Named):
    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.answer(image)


class OfVector(Named):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.answer(x)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size (over the stride), with its normalisation."""
    padding = kernel // 2
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def mlp() -> nn.Module:
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, DIGITS)]
    return OfVector(nn.Sequential(*layers), "scores")


def lenet() -> nn.Module:
    return OfImage(
        nn.Sequential(
            *[nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)],
            *[nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()],
            *[nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, DIGITS)],
        ),
        "scores",
    )


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, squeezed, 1)
        self.up = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(nn.functional.silu(self.down(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow. MBConv when ``squeeze``."""

    def __init__(self, inputs: int, outputs: int, expand: int, stride: int, kernel: int, squeeze: bool) -> None:
        super().__init__()
        wide, act = inputs * expand, nn.SiLU if squeeze else nn.ReLU6
        layers = [*conv(inputs, wide, 1), act()] if expand > 1 else []
        layers += [*conv(wide, wide, kernel, stride, groups=wide), act()]
        if squeeze:
            layers.append(SqueezeExcite(wide, max(1, inputs // 4)))
        self.layers = nn.Sequential(*layers, *conv(wide, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def inverted_residuals(shape: Shape, colors: int, classes: int) -> nn.Sequential:
    act = nn.SiLU if shape.squeeze else nn.ReLU6
    layers: list[nn.Module] = [*conv(colors, shape.stem, 3, shape.stem_stride), act()]
    channels = shape.stem
    for row in shape.rows:
        for index in range(row.repeats):
            stride = row.stride if index == 0 else 1
            layers.append(InvertedResidual(channels, row.channels, row.expand, stride, row.kernel, shape.squeeze))
            channels = row.channels
    layers += [*conv(channels, shape.head, 1), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(shape.head, classes))


def mobilenet_v2() -> nn.Module:
    return OfImage(inverted_residuals(MOBILENET_V2, 3, CLASSES), "scores")


def efficientnet_b0() -> nn.Module:
    return OfImage(inverted_residuals(EFFICIENTNET_B0, 3, CLASSES), "scores")


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        layers = [*conv(inputs, width, 1), nn.ReLU(), *conv(width, width, 3, stride), nn.ReLU()]
        self.layers = nn.Sequential(*layers, *conv(width, outputs, 1))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """https://arxiv.org/abs/1512.03385, table 1, with the stride in the 3 x 3 convolutions."""
    layers: list[nn.Module] = [*conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, repeats, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(repeats):
            layers.append(Bottleneck(channels, width, stride if index == 0 else 1))
            channels = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    return OfImage(nn.Sequential(*layers), "scores")


class Transformer(nn.Module):
    """Two encoder layers over 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 32)
        self.places = nn.Parameter(torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(32, DIGITS)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"scores": self.classifier(self.encoder(self.words(tokens) + self.places).mean(1))}


def transformer() -> nn.Module:
    return Transformer()


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.cell = cell(8, 32, batch_first=True)
        self.classifier = nn.Linear(32, DIGITS)

    def forward(self, sequence: Tensor) -> dict[str, Tensor]:
        return {"scores": self.classifier(self.cell(sequence)[0][:, -1])}


def lstm() -> nn.Module:
    return Recurrent(nn.LSTM)


def gru() -> nn.Module:
    return Recurrent(nn.GRU)


class TwoInTwoOut(nn.Module):
    """An image and measurements beside it; classes and an embedding come out."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(
            *conv(3, 16, 3, 2), nn.ReLU(), *conv(16, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.read = nn.Sequential(nn.Linear(6, 32), nn.ReLU())
        self.kind = nn.Linear(64, 5)
        self.place = nn.Linear(64, 4)

    def forward(self, image: Tensor, features: Tensor) -> dict[str, Tensor]:
        joined = torch.cat([self.look(image), self.read(features)], 1)
        return {"kind": self.kind(joined), "place": torch.tanh(self.place(joined))}


def two_in_two_out() -> nn.Module:
    return TwoInTwoOut()


class Control(nn.Module):
    """Halves until small, then one of two heads: how often and which depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 16)
        self.warm = nn.Linear(16, 4)
        self.cold = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.dense(x)
        while bool(h.abs().max() > 1.0):
            h = h * 0.5
        if bool(x.mean() > 0.0):  # noqa: SIM108 (the branch that this network is about)
            scores = self.warm(h)
        else:
            scores = self.cold(h)
        return {"scores": scores}


class ExportableControl(Control):
    """The same function in the operators that torch.export has for control flow."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        from torch._higher_order_ops import while_loop

        def large(peak: Tensor, gain: Tensor) -> Tensor:
            return peak * gain > 1.0

        def halved(peak: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
            return peak.clone(), gain * 0.5

        h = self.dense(x)
        # Only scalars go round: the exporter forgets the sizes of what comes out of a loop.
        _, gain = while_loop(large, halved, (h.abs().max(), torch.ones(())))
        return {"scores": torch.cond(x.mean() > 0.0, self.warm, self.cold, (h * gain,))}


def control() -> nn.Module:
    return Control()


class AnyLength(nn.Module):
    """Sequences of any length in any number: an answer for each step, and one pooled by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Sequential(nn.Conv1d(8, 32, 5, padding=2), nn.ReLU(), nn.Conv1d(32, 32, 3, padding=1), nn.ReLU())
        self.weight = nn.Linear(32, 1)
        self.each = nn.Linear(32, 4)
        self.pooled = nn.Linear(32, 6)

    def forward(self, sequence: Tensor) -> dict[str, Tensor]:
        steps = self.near(sequence.transpose(1, 2)).transpose(1, 2)
        attention = torch.softmax(self.weight(steps), 1)
        return {"each": self.each(steps), "pooled": self.pooled((attention * steps).sum(1))}


def any_length() -> nn.Module:
    return AnyLength()


def digits_mobilenet() -> nn.Module:
    return OfImage(inverted_residuals(DIGITS_MOBILENET, 1, DIGITS), "digit", softmax=True)


def digits_efficientnet() -> nn.Module:
    return OfImage(inverted_residuals(DIGITS_EFFICIENTNET, 1, DIGITS), "digit", softmax=True)


def digits_wild() -> nn.Module:
    """Plain convolutions; train_nets.py makes the first of the pair wild after training."""
    layers: list[nn.Module] = []
    channels = 1
    for outputs, stride in zip((WILD_STEM, *WILD_PAIR, *WILD_BODY), (1, 1, 1, 2, 1), strict=True):
        layers += [*conv(channels, outputs, 3, stride), nn.ReLU()]
        channels = outputs
    layers += [nn.Flatten(), nn.Linear(channels * 16, WILD_DENSE), nn.ReLU(), nn.Linear(WILD_DENSE, DIGITS)]
    return OfImage(nn.Sequential(*layers), "digit", softmax=True)


def randomize(net: nn.Module) -> None:
    """Weights that keep the variance of what passes: He's for filters, orthogonal ones for recurrent cells."""
    for module in net.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, SHIFT)
        elif isinstance(module, (nn.LSTM, nn.GRU)):
            for weight in (module.weight_ih_l0, module.weight_hh_l0):
                for gate in weight.data.split(module.hidden_size):
                    nn.init.orthogonal_(gate)


@torch.no_grad()
def calibrate(net: nn.Module, tensors: list[Tensor]) -> None:
    """One pass in which every normalisation takes the statistics of what arrives."""
    normalisations = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    net.eval()
    for module in normalisations:
        module.train()
        module.momentum = 1.0
    net(*tensors)
    for module in normalisations:
        module.eval()
        module.momentum = 0.1
