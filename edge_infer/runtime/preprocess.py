"""An image becomes an input as the bundle says, the same on the host and on the device.

numpy does all of it, so that a device needs nothing more; Pillow only decodes files, where files are given.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_infer.errors import InputError, UsageError
from edge_infer.manifest import Preprocessing, TensorSpec

Array = np.ndarray[Any, Any]
Size = tuple[int, int]

#: Weights of a resize are whole numbers of this many bits: 8 bits of a pixel and a sign then fit 32.
WEIGHT_BITS = 22
#: Bytes of 32-bit sums that a resize holds at a time, so that a photo of any size fits beside a model.
BLOCK_BYTES = 4 * 1024 * 1024
#: Rec. 601 luma in 16 bits, as https://github.com/python-pillow/Pillow/blob/main/src/libImaging/Convert.c has it.
LUMA = (19595, 38470, 7471)


def preprocess(image: Array | str | os.PathLike[str], spec: TensorSpec) -> Array:
    """One image as the input ``spec`` takes it, with a batch axis of 1, in the dtype of ``spec``.

    ``image`` is an array uint8 of height x width (grey), x 1 (grey), x 3 (RGB) or x 4 (RGB and alpha, which is
    dropped), or the path of an image file, decoded as it is stored: a camera's note on rotation is not followed.

    Raises UsageError when ``spec`` has no preprocessing, or one that cannot give what the input takes; InputError
    when the image is none or does not fit.
    """
    steps = check(spec)
    pixels = _colored(image if isinstance(image, np.ndarray) else decode(image), steps.color)
    where = placement(steps, _size(pixels))
    pixels = _placed(resize(pixels, where.resized), where, steps.fill)
    _check_size(spec, _size(pixels))
    return _arranged(_scaled(pixels, steps, np.dtype(spec.dtype)), spec)


def check(spec: TensorSpec) -> Preprocessing:
    """The preprocessing of ``spec``. Raises UsageError when there is none, or it cannot give what the input takes."""
    steps = spec.preprocessing
    if steps is None:
        raise UsageError(f"the input {spec.name!r} has no preprocessing; give it as an array, or package with one")
    channels = _channels(steps)
    given = [len(steps.mean), len(steps.std)]
    if any(n not in (0, 1, channels) for n in given):
        raise UsageError(
            f"the preprocessing of {spec.name!r} has mean and std of {given[0]} and {given[1]} numbers, expected one "
            f"or {channels} for {steps.color}"
        )
    if steps.resize and steps.crop and (steps.crop[0] > steps.resize[0] or steps.crop[1] > steps.resize[1]):
        raise UsageError(
            f"the preprocessing of {spec.name!r} crops {_text(steps.crop)} out of {_text(steps.resize)}; resize to more"
        )
    if steps.mode == "letterbox" and steps.crop:
        raise UsageError(
            f"the preprocessing of {spec.name!r} crops to {_text(steps.crop)} after letterbox fitted it; leave it out"
        )
    if steps.mode != "stretch" and steps.resize is None:
        raise UsageError(f"the preprocessing of {spec.name!r} has the mode {steps.mode!r} and no resize; give both")
    _check_dtype(spec, steps)
    _check_shape(spec, steps)
    return steps


@dataclass(frozen=True)
class Placement:
    """Where an image of a size lies in the input, (height, width) in pixels: made ``resized``, then shifted by ``top``
    and ``left`` into an input of ``size``; they are below zero where it is cropped, above where it is padded."""

    image: Size
    resized: Size
    size: Size
    top: int
    left: int


def placement(steps: Preprocessing, image: Size) -> Placement:
    """Where an image of a size (height, width) goes. Raises InputError where it is too small to crop."""
    resized = _resized_size(steps, image) if steps.resize else image
    size = final_size(steps) or resized
    if steps.mode == "letterbox":
        return Placement(image, resized, size, (size[0] - resized[0]) // 2, (size[1] - resized[1]) // 2)
    if resized[0] < size[0] or resized[1] < size[1]:
        raise InputError(
            f"the image has {_text(resized)} pixels, expected at least {_text(size)} to crop; resize it too"
        )
    # Halves go to the even pixel, as torchvision.transforms.CenterCrop rounds them.
    top, left = (-round((old - new) / 2) for old, new in zip(resized, size))
    return Placement(image, resized, size, top, left)


def final_size(steps: Preprocessing) -> Size | None:
    """Height and width after all steps; ``None`` where every image keeps its own."""
    return steps.crop or steps.resize


def decode(path: str | os.PathLike[str]) -> Array:
    """An image file as uint8 height x width x 3 (RGB), or height x width where the file is grey.

    Raises InputError; UsageError when Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise UsageError("image files are read by Pillow; pip install pillow, or give images as arrays") from None
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise InputError(f"{path} has more than 8 bits a channel ({image.mode}); convert it to 8")
            return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except FileNotFoundError:
        raise InputError(f"there is no image file {path}") from None
    # Its decoders fail in many ways on what is no image, a damaged one, or one that would fill the memory.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not an image that Pillow can read ({error})") from None


def resize(image: Array, size: Size) -> Array:
    """Bilinear resize of uint8 height x width x channels to ``size``, averaging over all pixels when shrinking.

    The arithmetic of Pillow's ``Image.resize(..., Resampling.BILINEAR)``: a triangle as wide as two output pixels (or
    two input pixels, whichever is wider), weights in whole numbers, columns before rows, each rounded to 8 bits
    (https://github.com/python-pillow/Pillow/blob/main/src/libImaging/Resample.c). Equal to it, or within 1 of 255
    where Pillow 13 takes rows before columns (https://github.com/python-pillow/Pillow/pull/9549).
    """
    height, width = size
    if width != image.shape[1]:
        image = _resample_rows(image.transpose(1, 0, 2), width).transpose(1, 0, 2)
    if height != image.shape[0]:
        image = _resample_rows(image, height)
    return np.ascontiguousarray(image)


def _resample_rows(image: Array, count: int) -> Array:
    """``image`` with ``count`` rows; every row of it is a weighted sum of rows that lie beside each other."""
    first, weights = _triangles(len(image), count)
    result = np.empty((count, *image.shape[1:]), np.uint8)
    step = max(1, BLOCK_BYTES // (4 * count * image.shape[2]))
    for start in range(0, image.shape[1], step):
        block = image[:, start : start + step]
        total = np.full((count, *block.shape[1:]), 1 << (WEIGHT_BITS - 1), np.int32)  # a half, to round by
        for tap in range(weights.shape[1]):
            # Past the last row the weight is 0, whatever is read there.
            rows = block[np.minimum(first + tap, len(image) - 1)]
            total += rows * weights[:, tap, None, None]
        total >>= WEIGHT_BITS
        result[:, start : start + step] = total
    return result


def _triangles(old: int, new: int) -> tuple[Array, Array]:
    """For each of ``new`` pixels: the first of the ``old`` that it takes, and the weights from there on, int32."""
    scale = old / new
    reach = max(scale, 1.0)
    center = (np.arange(new) + 0.5) * scale
    first = np.maximum(center - reach + 0.5, 0).astype(np.int64)
    end = np.minimum((center + reach + 0.5).astype(np.int64), old)
    pixel = first[:, None] + np.arange((end - first).max())
    weights = np.maximum(1 - np.abs((pixel - center[:, None] + 0.5) * (1 / reach)), 0) * (pixel < end[:, None])
    weights *= 1 / weights.sum(axis=1, keepdims=True)
    return first, (weights * (1 << WEIGHT_BITS) + 0.5).astype(np.int32)


def _resized_size(steps: Preprocessing, have: Size) -> Size:
    assert steps.resize is not None
    height, width = steps.resize
    if steps.mode == "stretch":
        return height, width
    if steps.mode == "letterbox":
        # The side that may grow less gets its exact size, the other what the aspect ratio gives, rounded.
        if height * have[1] <= width * have[0]:
            return height, max(1, round(height * have[1] / have[0]))
        return max(1, round(width * have[0] / have[1])), width
    # The side that must grow more gets its exact size, the other what the aspect ratio gives, cut to whole pixels.
    if height * have[1] >= width * have[0]:
        return height, max(width, height * have[1] // have[0])
    return max(height, width * have[0] // have[1]), width


def _placed(pixels: Array, where: Placement, fill: int) -> Array:
    height, width = where.size
    if where.top < 0 or where.left < 0:
        return pixels[-where.top : height - where.top, -where.left : width - where.left]
    if where.size == where.resized:
        return pixels
    canvas = np.full((height, width, pixels.shape[2]), fill, np.uint8)
    canvas[where.top : where.top + where.resized[0], where.left : where.left + where.resized[1]] = pixels
    return canvas


def _colored(image: Array, color: str) -> Array:
    """uint8 height x width x channels in the order of ``color``."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise InputError(
            f"the image is {image.dtype}{list(image.shape)}, expected uint8 of height x width x 1, 3 or 4 channels"
        )
    if 0 in image.shape:
        raise InputError(f"the image has shape {list(image.shape)}, expected at least one pixel")
    if image.ndim == 2:
        image = image[:, :, None]
    if color == "L":
        return image if image.shape[2] == 1 else _luma(image)
    if image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    return image[:, :, 2::-1] if color == "BGR" else image[:, :, :3]


def _luma(image: Array) -> Array:
    total = np.full(image.shape[:2], 1 << 15, np.int32)
    for channel, weight in enumerate(LUMA):
        total += image[:, :, channel] * np.int32(weight)
    return (total >> 16).astype(np.uint8)[:, :, None]


def _scaled(pixels: Array, steps: Preprocessing, dtype: np.dtype[Any]) -> Array:
    """``(pixel * scale - mean) / std`` looked up for each of the 256 values: the same number on every processor."""
    table = _table(steps, dtype)
    return np.stack([table[channel][pixels[:, :, channel]] for channel in range(pixels.shape[2])], axis=2)


def _values(steps: Preprocessing) -> Array:
    """What each channel makes of 0 to 255, float64[channels, 256]."""
    ones = np.ones(_channels(steps))
    # As float64 at once: numpy has no whole numbers as large as JSON has.
    mean, std = ones * np.array(steps.mean or 0, np.float64), ones * np.array(steps.std or 1, np.float64)
    values: Array = (np.arange(256) * float(steps.scale) - mean[:, None]) / std[:, None]
    return values


def _table(steps: Preprocessing, dtype: np.dtype[Any]) -> Array:
    values = _values(steps)
    return values.astype(dtype) if dtype.kind == "f" else np.rint(values).astype(dtype)


def _arranged(pixels: Array, spec: TensorSpec) -> Array:
    assert spec.preprocessing is not None
    if len(spec.shape) == 3:
        pixels = pixels[:, :, 0]
    elif spec.preprocessing.layout == "NCHW":
        pixels = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels[None])


def _channels(steps: Preprocessing) -> int:
    return 1 if steps.color == "L" else 3


def _check_dtype(spec: TensorSpec, steps: Preprocessing) -> None:
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return
    if dtype.kind not in "iu":
        raise UsageError(f"the input {spec.name!r} is {spec.dtype}, expected numbers to make of an image")
    values, limits = np.rint(_values(steps)), np.iinfo(dtype)
    if values.min() < limits.min or values.max() > limits.max:
        raise UsageError(
            f"the preprocessing of {spec.name!r} gives {values.min():g} to {values.max():g}, which {spec.dtype} "
            "does not hold; change scale or mean"
        )


def _axes(spec: TensorSpec, steps: Preprocessing) -> dict[str, int]:
    """Where the input has its channels, height and width."""
    if len(spec.shape) == 3:
        return {"height": 1, "width": 2}
    return (
        {"height": 1, "width": 2, "channels": 3} if steps.layout == "NHWC" else {"channels": 1, "height": 2, "width": 3}
    )


def _check_shape(spec: TensorSpec, steps: Preprocessing) -> None:
    """A batch of images: four axes, or three where there is one channel without an axis."""
    if len(spec.shape) != 4 and not (len(spec.shape) == 3 and _channels(steps) == 1):
        raise UsageError(f"the input {spec} takes no batch of {steps.color} images, which have 4 dimensions")
    axis = _axes(spec, steps).get("channels")
    if axis is not None and spec.shape[axis] not in (None, _channels(steps)):
        raise UsageError(
            f"the preprocessing of {spec.name!r} gives {_channels(steps)} channels ({steps.color}) in layout "
            f"{steps.layout}, the input is {spec}; change color or layout"
        )
    size = final_size(steps)
    if size is not None and not _fits(spec, steps, size):
        raise UsageError(
            f"the preprocessing of {spec.name!r} gives {_text(size)} pixels in layout {steps.layout}, the input is "
            f"{spec}; change resize, crop or layout"
        )


def _fits(spec: TensorSpec, steps: Preprocessing, size: Size) -> bool:
    axes = _axes(spec, steps)
    return all(spec.shape[axes[side]] in (None, have) for side, have in zip(("height", "width"), size))


def _check_size(spec: TensorSpec, size: Size) -> None:
    assert spec.preprocessing is not None
    if not _fits(spec, spec.preprocessing, size):
        raise InputError(
            f"the image has {_text(size)} pixels after preprocessing, the input is {spec}; "
            "package with a resize, or give images of that size"
        )


def _size(pixels: Array) -> Size:
    return pixels.shape[0], pixels.shape[1]


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
