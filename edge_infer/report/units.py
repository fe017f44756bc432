"""Numbers for people: three digits, a unit, and a dash for what was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTHING = "\u2013"  # an en dash
_LARGEST = 1e100
_SPACE = "\u00a0"  # a number and its unit stay on one line


def is_number(value: Any) -> bool:
    """A number that something could have measured: finite, no bool, and with room for sums and margins."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def number(value: Any) -> str:
    """Three significant digits: ``0.00123``, ``12.3``, ``1,230``, ``1.2e-07``."""
    if not is_number(value):
        return NOTHING
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.2g}"
    if abs(value) >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.3g}"


def size(value: Any) -> str:
    """Bytes, in powers of 1000."""
    return _scaled(value, 1000.0, ("B", "KB", "MB", "GB", "TB"))


def duration(value: Any) -> str:
    """Milliseconds, as µs, ms or s."""
    if is_number(value) and 0 < abs(value) < 0.1:
        return f"{value * 1000:.3g}{_SPACE}µs"
    return _scaled(value, 1000.0, ("ms", "s"))


def share(value: Any) -> str:
    """A share of one, in percent with one decimal."""
    if not is_number(value):
        return NOTHING
    if 0 < value < 0.0005:
        return "<0.1%"
    return f"{round(value * 100, 1) + 0.0:.1f}%"  # no "-0.0%"


def count(value: Any, noun: str) -> str:
    """``1 sample``, ``100 samples``."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}" if is_number(value) else NOTHING


def quantity(value: Any, unit: Any) -> str:
    """A value in a unit of the record."""
    if unit == "bytes":
        return size(value)
    if unit == "ms":
        return duration(value)
    if not unit or not is_number(value):
        return number(value)
    return f"{number(value)}{_SPACE}{unit}"


def score(value: Any, metric: Mapping[str, Any] | None) -> str:
    """Accuracy and agreement in percent, unless the metric has a unit; errors as they are."""
    metric = metric or {}
    if metric.get("unit"):
        return quantity(value, metric["unit"])
    if metric.get("kind") in ("accuracy", "agreement"):
        return share(value)
    return number(value)


def interval(answer: Mapping[str, Any] | None, metric: Mapping[str, Any] | None) -> str:
    """``95.0% to 99.0%``, or nothing when there is no interval."""
    if not answer or not is_number(answer.get("low")) or not is_number(answer.get("high")):
        return ""
    return f"{score(answer['low'], metric)} to {score(answer['high'], metric)}"


def loss(lost: Mapping[str, Any] | None) -> str:
    """``0.4% (-0.4% to 1.2%)`` of the source's score, or nothing when there is no loss to speak of."""
    if not lost or not is_number(lost.get("value")):
        return ""
    of = loss_interval(lost)
    return f"{share(lost['value'])}{f' ({of})' if of else ''}"


def loss_interval(lost: Mapping[str, Any]) -> str:
    """``-0.4% to 1.2%``, or nothing when there is no interval."""
    low, high = lost.get("low"), lost.get("high")
    return f"{share(low)} to {share(high)}" if is_number(low) and is_number(high) else ""


def _scaled(value: Any, step: float, units: tuple[str, ...]) -> str:
    if not is_number(value):
        return NOTHING
    scaled = float(value)
    for unit in units[:-1]:
        # What rounds to 1000 of a unit is 1 of the next.
        if abs(scaled) < step - 0.5:
            return f"{_three(scaled)}{_SPACE}{unit}"
        scaled /= step
    return f"{_three(scaled)}{_SPACE}{units[-1]}" if abs(scaled) < step - 0.5 else f"{scaled:,.0f}{_SPACE}{units[-1]}"


def _three(value: float) -> str:
    """Three digits; zeros at the end only where they were rounded to, so that a limit of 8 stays 8."""
    short = f"{value:.3g}"
    return short if float(short) == value else f"{value:#.3g}".rstrip(".")
