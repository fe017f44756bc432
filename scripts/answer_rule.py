"""How the golden tolerances of the targets with ARM processors follow from docs/device-answers.json.

The largest share seen over all networks, MARGIN times, rounded up to one digit; at least LEAST, since other networks
and other builds of an engine round elsewhere. In float16, in which not every processor computes, what was seen on the
processor of the target counts; otherwise what was seen on any board: the kernels of the machine that packages differ
more than those of ARM processors, and not every board was asked from every such machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import ROUND_CEILING, Decimal
from typing import Any

#: Row of the report: one network in one engine and precision on one machine.
Row = dict[str, Any]

MARGIN = 2
#: One step of an int8 output, 1/255, may fall to the other side; float32 is added up in another order.
LEAST = {"int8": 0.01, "int8-mixed": 0.01, "int8-dynamic": 0.01, "float32": 1e-4}
LEAST_OF_OTHERS = 1e-3
ANY = "cpu-aarch64"
#: Boards by the targets that have their processor.
BOARDS = {
    "raspberry-pi-zero-2w": ("pi-zero-2w",),
    "raspberry-pi-3b-plus": ("pi-zero-2w",),
    "raspberry-pi-4": ("pi-4",),
    "raspberry-pi-5": ("pi-5",),
    ANY: ("pi-zero-2w", "pi-4", "pi-5"),
}


def largest(rows: Iterable[Row], format: str, precision: str, target: str) -> float | None:
    """The largest share that counts for a target; None where nothing was measured."""
    places = BOARDS[target if precision == "float16" else ANY]
    found = [
        float(row["largest"])
        for row in rows
        if (row["format"], row["precision"]) == (format, precision) and row["place"] in places
    ]
    return max(found, default=None)


def measured(rows: Iterable[Row]) -> list[str]:
    """The targets all of whose processors were asked."""
    asked = {row["place"] for row in rows}
    return [target for target, places in BOARDS.items() if asked.issuperset(places)]


def figure(seen: float, precision: str) -> float:
    """The tolerance that follows from the largest share ``seen``, at most the whole value."""
    return min(1.0, max(round_up(MARGIN * seen), LEAST.get(precision, LEAST_OF_OTHERS)))


def round_up(value: float) -> float:
    """To one digit; 0 stays."""
    exact = Decimal(repr(value))
    return float(exact.quantize(Decimal(10) ** exact.adjusted(), ROUND_CEILING)) if exact else 0.0
