"""The shapes of the mobile networks, framework-free: what the Keras and the PyTorch builders both read.

The rows are the tables of the papers: https://arxiv.org/abs/1801.04381 (MobileNetV2, table 2) and
https://arxiv.org/abs/1905.11946 (EfficientNet, table 1).
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """``repeats`` blocks of ``channels`` outputs; the first one has the stride."""

    expand: int
    channels: int
    repeats: int
    stride: int
    kernel: int = 3


class Shape(NamedTuple):
    """A network of inverted residuals; ``squeeze`` makes them MBConv blocks with swish instead of ReLU6."""

    stem: int
    stem_stride: int
    rows: tuple[Row, ...]
    head: int
    squeeze: bool


MOBILENET_V2 = Shape(
    stem=32,
    stem_stride=2,
    rows=(
        Row(1, 16, 1, 1),
        Row(6, 24, 2, 2),
        Row(6, 32, 3, 2),
        Row(6, 64, 4, 2),
        Row(6, 96, 3, 1),
        Row(6, 160, 3, 2),
        Row(6, 320, 1, 1),
    ),
    head=1280,
    squeeze=False,
)
EFFICIENTNET_B0 = Shape(
    stem=32,
    stem_stride=2,
    rows=(
        Row(1, 16, 1, 1),
        Row(6, 24, 2, 2),
        Row(6, 40, 2, 2, 5),
        Row(6, 80, 3, 2),
        Row(6, 112, 3, 1, 5),
        Row(6, 192, 4, 2, 5),
        Row(6, 320, 1, 1),
    ),
    head=1280,
    squeeze=True,
)

#: The same blocks for 8 x 8 pixels: narrower, shallower, and halved twice instead of five times.
DIGITS_MOBILENET = Shape(
    stem=16,
    stem_stride=1,
    rows=(Row(1, 8, 1, 1), Row(6, 16, 2, 2), Row(6, 24, 2, 2), Row(6, 40, 2, 1)),
    head=128,
    squeeze=False,
)
DIGITS_EFFICIENTNET = Shape(
    stem=16,
    stem_stride=1,
    rows=(Row(1, 8, 1, 1), Row(6, 16, 2, 2), Row(6, 24, 2, 2, 5), Row(6, 40, 2, 1, 5)),
    head=128,
    squeeze=True,
)
#: Channels of the plain convolutions of the wild network; the first of these pairs is the wild one.
WILD_STEM, WILD_PAIR, WILD_BODY, WILD_DENSE = 16, (16, 16), (48, 64), 64

#: The zoo's shift behind each normalisation. Swish and squeeze-excitation grow faster than their input around 0:
#: without a shift, over EfficientNet's depth, the loudest sample sets the statistics and the others look all alike.
SHIFT = 0.5
