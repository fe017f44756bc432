"""How the golden tolerances of the targets with ARM processors follow from docs/device-answers.json.

The largest share seen on the processor of a target, over all networks, MARGIN times, rounded up to 1, 2 or 5 times a
power of ten; at least LEAST, since other networks and other builds of an engine round elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Any

#: Row of the report: one network in one engine and precision on one machine.
Row = dict[str, Any]

MARGIN = 2
#: One step of an int8 output, 1/255, may fall to the other side; float32 is added up in another order.
LEAST = {"int8": 0.01, "int8-mixed": 0.01, "int8-dynamic": 0.01, "float32": 1e-4}
LEAST_OF_OTHERS = 1e-3
#: Boards by the targets that have their processor.
BOARDS = {
    "raspberry-pi-zero-2w": ("pi-zero-2w",),
    "raspberry-pi-3b-plus": ("pi-zero-2w",),
    "raspberry-pi-4": ("pi-4",),
    "raspberry-pi-5": ("pi-5",),
    "cpu-aarch64": ("pi-zero-2w", "pi-4", "pi-5"),
}


def largest(rows: Iterable[Row], format: str, precision: str, places: Iterable[str]) -> float | None:
    """The largest share seen there; None where nothing was measured."""
    allowed = set(places)
    found = [
        float(row["largest"])
        for row in rows
        if (row["format"], row["precision"]) == (format, precision) and row["place"] in allowed
    ]
    return max(found, default=None)


def measured(rows: Iterable[Row]) -> dict[str, tuple[str, ...]]:
    """The targets all of whose processors were asked, with the boards that have those."""
    asked = {row["place"] for row in rows}
    return {target: places for target, places in BOARDS.items() if asked.issuperset(places)}


def figure(seen: float, precision: str) -> float:
    """The tolerance that follows from the largest share ``seen``, at most the whole value."""
    return min(1.0, max(round_up(MARGIN * seen), LEAST.get(precision, LEAST_OF_OTHERS)))


def round_up(value: float) -> float:
    """To 1, 2 or 5 times a power of ten; 0 stays."""
    if value <= 0:
        return 0.0
    exact = Decimal(repr(value))
    power = Decimal(10) ** exact.adjusted()
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= exact))
