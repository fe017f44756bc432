"""What plots are made of: axes with readable ticks, text of a known width, and labels that keep clear of each other."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edge_infer.report.markup import Markup, element

TEXT = 12  # px, of all text in plots
LINE = 15  # px, from one line of text to the next


@dataclass(frozen=True)
class Box:
    """A rectangle in px; ``x`` and ``y`` are its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, other: Box) -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )

    def holds(self, other: Box) -> bool:
        return (
            self.x <= other.x
            and other.x + other.width <= self.x + self.width
            and self.y <= other.y
            and other.y + other.height <= self.y + self.height
        )


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` on pixels from ``start`` to ``end``; values outside lie on the border."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, wanted: int) -> list[float]:
        """About ``wanted`` round values, in order."""
        found = _log_ticks(self.low, self.high, wanted) if self.log else []
        return found if len(found) >= 2 else _linear_ticks(self.low, self.high, wanted)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """A logarithmic axis around positive values."""
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.06, 1.25)
    return Axis(low / margin, high * margin, start, end, log=True)


def linear_axis(values: Sequence[float], start: float, end: float, margin: float = 0.08) -> Axis:
    """A linear axis around the values, never of zero length."""
    low, high = min(values), max(values)
    # Not a narrower window than double precision can draw.
    room = (high - low) * margin or max(abs(high) * 0.05, 1e-9)
    return Axis(low - room, high + room, start, end)


def _linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    rough = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    # Rounded: 3 * 0.1 is to be 0.3.
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [
        [float(f"{factor}e{power}") for power in decades for factor in set_] for set_ in ((1, 2, 5), (1, 3), (1,))
    ]
    inside = [[tick for tick in ticks if low <= tick <= high] for ticks in choices]
    fitting = next((ticks for ticks in inside if len(ticks) <= wanted + 2), inside[-1])
    return fitting[:: max(1, round(len(fitting) / (wanted + 2)))]


def text_width(text: str, px: float = TEXT) -> float:
    """An upper estimate of a text's width: the page does not know the reader's font."""
    return px * sum(_em(char) for char in text)


def _em(char: str) -> float:
    if char in "iljtfrI.,:;'|!()[] \u00a0-":
        return 0.42
    if char in "mwMW%@…" or unicodedata.east_asian_width(char) in "WF":
        return 1.02
    return 0.76 if char.isupper() else 0.65


def shorten(text: str, width: float, px: float = TEXT) -> str:
    """The text with its middle left out so far that it fits; both ends of a layer's name tell most."""
    if text_width(text, px) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = f"{text[: kept // 3]}…{text[len(text) - (kept - kept // 3) :]}"
        if text_width(short, px) <= width:
            return short
    return "…"


@dataclass(frozen=True)
class Label:
    """A text beside its point; ``leader`` when it lies so far away that a line has to lead there."""

    text: str
    box: Box
    point: tuple[float, float]
    leader: bool


_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1), (1, -2), (-1, -2), (1, 2), (-1, 2))

_NEAR = (9, 14)
_ANYWHERE = (9, 14, 20, 26, 34, 44, 60)


def place_labels(
    wanted: Sequence[tuple[float, float, str]], hard: Sequence[Box], soft: Sequence[Box], bounds: Box
) -> list[Label | None]:
    """A place for each text near its point, the first ones first, or None where there is none.

    Labels stay inside ``bounds`` and touch neither each other nor a ``hard`` box, nor a ``soft`` one if there is room.
    """
    taken = list(hard)
    labels: list[Label | None] = []
    for x, y, text in wanted:
        label = _place(x, y, text, [*taken, *soft], bounds, _NEAR) or _place(x, y, text, taken, bounds, _ANYWHERE)
        labels.append(label)
        if label:
            taken.append(label.box)
    return labels


def _place(x: float, y: float, text: str, taken: Sequence[Box], bounds: Box, distances: Sequence[int]) -> Label | None:
    width = text_width(text)
    for distance in distances:
        for right, down in _DIRECTIONS:
            left = x + right * distance - (width / 2 if right == 0 else width if right < 0 else 0)
            box = Box(left, y + down * distance - LINE / 2, width, LINE)
            if bounds.holds(box) and not any(box.meets(other) for other in taken):
                return Label(text, box, (x, y), distance > 14)
    return None


def draw_label(label: Label, cls: str = "") -> Markup:
    box, (x, y) = label.box, label.point
    near_x = min(max(x, box.x), box.x + box.width)
    near_y = min(max(y, box.y + 2), box.y + box.height - 2)
    # The text is as wide as the reader's font has it: it starts, ends or is centred where its point is.
    anchor, at = ("start", box.x) if near_x > x else ("end", box.x + box.width) if near_x < x else ("middle", x)
    if anchor == "middle":
        at = box.x + box.width / 2
    leader = element("line", x1=x, y1=y, x2=near_x, y2=near_y, cls="leader") if label.leader else None
    return element("g", leader, text(at, box.y + LINE - 4, label.text, anchor, f"label {cls}".strip()))


def text(x: float, y: float, words: str, anchor: str = "start", cls: str | None = None) -> Markup:
    return element("text", words, x=float(x), y=float(y), text_anchor=None if anchor == "start" else anchor, cls=cls)


def line(x1: float, y1: float, x2: float, y2: float, cls: str) -> Markup:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), cls=cls)


def rect(x: float, y: float, width: float, height: float, cls: str) -> Markup:
    return element("rect", x=float(x), y=float(y), width=float(max(width, 0)), height=float(max(height, 0)), cls=cls)


def x_axis(axis: Axis, y: float, top: float, name: Callable[[float], str], wanted: int) -> list[Markup]:
    """Grid lines from ``top`` to ``y`` and the ticks' names below, those left out that would touch another."""
    parts: list[Markup] = []
    free_from = -math.inf
    for tick in axis.ticks(wanted):
        at, width = axis.at(tick), text_width(name(tick))
        parts.append(line(at, top, at, y, "grid"))
        if at - width / 2 > free_from:
            parts.append(text(at, y + LINE + 4, name(tick), "middle", "tick"))
            free_from = at + width / 2 + 4
    return parts


def y_axis(axis: Axis, x: float, right: float, name: Callable[[float], str], wanted: int) -> list[Markup]:
    """Grid lines from ``x`` to ``right`` and the ticks' names to the left."""
    parts: list[Markup] = []
    for tick in axis.ticks(wanted):
        at = axis.at(tick)
        parts += [line(x, at, right, at, "grid"), text(x - 6, at + 4, name(tick), "end", "tick")]
    return parts


def marked(tip: str, *parts: Any, cls: str = "mark") -> Markup:
    """Parts of a plot with what the pointer is told over them."""
    return element("g", element("title", tip), *parts, cls=cls)


def picture(name: str, title: str, description: str, width: float, height: float, *parts: Any) -> Markup:
    """An SVG image that says what it shows. ``name`` is its id and unique on the page."""
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        *parts,
        id=name,
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        height=f"{height:g}",
        role="img",
        aria_labelledby=f"{name}-title",
        aria_describedby=f"{name}-desc",
    )
