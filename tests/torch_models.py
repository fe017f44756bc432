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
