"""PyTorch networks whose contracts are harder than one image in, one vector out; each class is its own factory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class TokensAndFeatures(nn.Module):
    """Two inputs, tokens of any length among them; outputs in nested containers, one of them of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.mix = nn.Linear(8, 4)

    def forward(self, tokens: Tensor, features: Tensor) -> dict[str, object]:
        scores = self.mix(self.embedding(tokens)) + features[:, None, :]
        pooled = scores.mean(dim=1)
        return {
            "scores": scores,
            "pooled": {"mean": pooled, "pair": (pooled.sum(1), pooled.exp())},
            "best": scores.argmax(-1),
        }


class GainAndMask(nn.Module):
    """A scalar and a mask of booleans; answers in a plain tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 3)

    def forward(self, x: Tensor, gain: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        y = self.dense(torch.where(keep, x, torch.zeros_like(x))) * gain
        return y, y > 0


class Statistics(NamedTuple):
    brightness: Tensor
    edges: Tensor


class Pixels(nn.Module):
    """Raw bytes of an image; answers in a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, image: Tensor) -> Statistics:
        pixels = image.float() / 255
        return Statistics(pixels.mean((1, 2, 3)), self.filter(pixels))


class TiedWords(nn.Module):
    """The table that reads tokens also scores them: one weight of 64 KB used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(256, 64)
        self.scores = nn.Linear(64, 256, bias=False)
        self.scores.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores(self.words(tokens))


class Halving(nn.Module):
    """Halves until small: how often depends on the values, which only TorchScript's control flow can say."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x)
        while bool(y.abs().max() > 0.25):
            y = y / 2
        return y if bool(x.sum() > 0) else -y


class Lenet(nn.Module):
    """Convolutions, pooling and a flattening whose shape the batch is part of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2))
        self.scores = nn.Linear(4 * 4 * 4, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.scores(self.features(image).flatten(1))


class Encoder(nn.Module):
    """A transformer with a table of positions: any batch, and any length up to that table's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.words = nn.Embedding(16, 8)
        self.places = nn.Parameter(torch.randn(64, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.words(ids) + self.places[: ids.shape[1]])


class Recurrent(nn.Module):
    """Scores of the last step and the state, from any number of steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.scores = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, object]:
        steps, (hidden, cell) = self.lstm(x)
        return {"scores": self.scores(steps[:, -1]), "state": (hidden, cell)}


class Smooth(nn.Module):
    """Nearest neighbours of any length, whose positions a converter writes down."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=2.0) * 2


class Bessel(nn.Module):
    """An operator that neither TFLite nor ONNX has, in a layer with a name."""

    class Wave(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    def __init__(self) -> None:
        super().__init__()
        self.wave = self.Wave()

    def forward(self, x: Tensor) -> Tensor:
        return self.wave(x) + 1


class Chosen(nn.Module):
    """A branch on a value, in an operator that exporters follow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.dense = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (self.dense(x),))


class Normalised(nn.Module):
    """A normalisation after each kind of layer that can take it in, one of them after a depthwise one, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 12, 3, 2, groups=4), nn.BatchNorm2d(12, affine=False), nn.ReLU())
        self.back = nn.Sequential(nn.ConvTranspose2d(12, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5))
        self.scores = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.depth(y)
        return self.scores(self.back(self.up(y)).mean((2, 3)))


class NormalisedInBranches(nn.Module):
    """Which of two normalised convolutions answers depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.mean() > 0.5):
            return self.one(x)
        return self.other(x)


class SharedConvolution(nn.Module):
    """One convolution's weights under two normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv2d(3, 8, 3)
        self.small, self.large = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(self.filter(x)) + self.large(self.filter(x * 2))


class ReadBesides(nn.Module):
    """What is normalised is an answer too."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.filter(x)
        return y, self.norm(y)


class OwnStatistics(nn.Module):
    """Normalisations by the statistics of what they are given: one has no others, one is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        mean, variance = self.mean.clone(), self.variance.clone()
        return nn.functional.batch_norm(self.second(y), mean, variance, training=True)


class NormalisedSteps(nn.Module):
    """As many steps as channels: after a dense layer over three dimensions it is the steps that are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dense(x))


class TiedAndNormalised(nn.Module):
    """A table of 128 KB that tokens are read from and scored with, and a normalised dense layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(512, 64)
        self.mix = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
        self.scores = nn.Linear(64, 512, bias=False)
        self.scores.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores(self.mix(self.words(tokens).mean(1)))


def lively(module: nn.Module, seed: int = 6) -> nn.Module:
    """The module in evaluation mode, with statistics that no normalisation gives away."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.3, 3)
            if layer.affine:
                nn.init.uniform_(layer.weight, -2, 2)
                nn.init.normal_(layer.bias)
    return module.eval()
