"""Values of options that several commands take."""

from __future__ import annotations

import re

from edge_infer.errors import UsageError
from edge_infer.manifest import DTYPES, TensorSpec

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str) -> int:
    """``1500000``, ``1.5MB`` or ``2MiB``. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B|)", text.strip(), re.IGNORECASE)
    if not found:
        raise UsageError(f"{text!r} is no size, expected a number of bytes, or such as 500KB, 1.5MB, 2GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def share(text: str) -> float:
    """``0.01`` or ``1%``. Raises UsageError."""
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        raise UsageError(f"{text!r} is no share, expected such as 0.01 or 1%") from None


def milliseconds(text: str) -> float:
    """``12``, ``12ms`` or ``0.5s``. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|)", text.strip())
    if not found:
        raise UsageError(f"{text!r} is no time, expected milliseconds, or such as 20ms, 0.5s")
    return float(found[1]) * (1000 if found[2] == "s" else 1)


def parse_input(text: str) -> TensorSpec:
    """``NAME=DTYPE:D0,D1,...``; no dimensions for a scalar, ``?`` for a dynamic one. Raises UsageError."""
    name, equals, rest = text.rpartition("=")
    dtype, _, dims = rest.partition(":")
    if not equals or not name or dtype not in DTYPES:
        raise UsageError(f"--input {text!r}, expected NAME=DTYPE:D0,D1,... with a dtype of {', '.join(DTYPES)}")
    shape: list[int | None] = []
    for size in dims.split(",") if dims else []:
        if size.strip() == "?":
            shape.append(None)
        elif size.strip().isdecimal() and int(size) > 0:
            shape.append(int(size))
        else:
            raise UsageError(f"--input {text!r}: dimension {size!r}, expected a whole number of at least 1 or ?")
    return TensorSpec(name, dtype, tuple(shape))
