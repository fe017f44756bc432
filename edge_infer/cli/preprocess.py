"""The small language of ``--preprocess``."""

from __future__ import annotations

import math
import re

from edge_infer.errors import UsageError
from edge_infer.manifest import FILL, IMAGE_SIDE_MAX, RESIZE_MODES, Preprocessing

PREPROCESS_KEYS = ("resize", "mode", "fill", "crop", "color", "scale", "mean", "std", "layout")
CHOICES = {"mode": RESIZE_MODES, "color": ("RGB", "BGR", "L"), "layout": ("NHWC", "NCHW")}
PREPROCESS_FORM = "[NAME:]resize=256,crop=224,scale=1/255,mean=0.485:0.456:0.406,std=0.229:0.224:0.225,layout=NCHW"
#: A name may hold colons and equals signs, so the steps begin at the first word that is one of theirs.
_STEPS = re.compile(rf"(?:(?P<name>.+?):)??(?P<steps>(?:{'|'.join(PREPROCESS_KEYS)})=.*)\Z", re.DOTALL)


def parse_preprocess(text: str) -> tuple[str | None, Preprocessing]:
    """``[NAME:]KEY=VALUE,...``: which input (``None``: the only one) and how an image becomes it.

    ``resize=N`` scales the shorter side to N and keeps the aspect ratio; ``resize=HxW`` gives just that size;
    ``mode=stretch`` or ``mode=shortest-side`` says it otherwise, ``mode=letterbox`` fits the image into that size on
    pixels of the value ``fill`` (0 to 255, default 114). ``crop=N`` or ``crop=HxW`` keeps the middle.
    ``color`` is RGB, BGR or L. Then ``(pixel * scale - mean) / std``; ``scale`` may be a fraction, ``mean`` and
    ``std`` have one number or one a channel. ``layout`` is NHWC or NCHW. Raises UsageError.
    """
    match = _STEPS.match(text)
    if match is None:
        raise UsageError(f"--preprocess {text!r}, expected {PREPROCESS_FORM}")
    given: dict[str, str] = {}
    for item in match["steps"].split(","):
        key, equals, value = item.strip().partition("=")
        if not equals or key not in PREPROCESS_KEYS:
            raise UsageError(f"--preprocess {text!r}: {item!r}, expected KEY=VALUE with {', '.join(PREPROCESS_KEYS)}")
        if key in given:
            raise UsageError(f"--preprocess {text!r} gives {key} twice, expected it once")
        given[key] = value
    try:
        return match["name"], _preprocessing(given)
    except ValueError as error:
        raise UsageError(f"--preprocess {text!r}: {error}") from None


def _preprocessing(given: dict[str, str]) -> Preprocessing:
    for key, allowed in CHOICES.items():
        if given.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key} {given[key]!r}, expected {', '.join(allowed)}")
    if "mode" in given and "resize" not in given:
        raise ValueError("mode without resize, expected both")
    natural = "shortest-side" if given.get("resize", "x").isdecimal() else "stretch"
    return Preprocessing(
        resize=_size("resize", given["resize"]) if "resize" in given else None,
        mode=given.get("mode", natural),
        fill=_pixel("fill", given["fill"]) if "fill" in given else FILL,
        crop=_size("crop", given["crop"]) if "crop" in given else None,
        color=given.get("color", "RGB"),
        scale=_number("scale", given.get("scale", "1"), positive=True),
        mean=_numbers("mean", given["mean"]) if "mean" in given else (),
        std=_numbers("std", given["std"], positive=True) if "std" in given else (),
        layout=given.get("layout", "NHWC"),
    )


def _size(key: str, text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) > 2 or not all(
        re.fullmatch("[0-9]{1,5}", side) and 1 <= int(side) <= IMAGE_SIDE_MAX for side in sides
    ):
        raise ValueError(f"{key} {text!r}, expected N or HEIGHTxWIDTH in pixels, each 1 to {IMAGE_SIDE_MAX}")
    return int(sides[0]), int(sides[-1])


def _pixel(key: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,3}", text) or int(text) > 255:
        raise ValueError(f"{key} {text!r}, expected a whole number of 0 to 255")
    return int(text)


def _numbers(key: str, text: str, positive: bool = False) -> tuple[float, ...]:
    values = tuple(_number(key, item, positive) for item in text.split(":"))
    if len(values) not in (1, 3):
        raise ValueError(f"{key} {text!r}, expected one number, or three with colons between them")
    return values


def _number(key: str, text: str, positive: bool = False) -> float:
    """A decimal number or a fraction such as 1/255."""
    try:
        top, slash, bottom = text.partition("/")
        value = float(top) / float(bottom) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{key} {text!r}, expected a number{' above zero' if positive else ''}")
    return value
