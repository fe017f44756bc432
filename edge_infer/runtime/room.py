"""Whether a model may take the memory that it takes: what is known before it is opened, and what it took."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_infer.errors import OutOfMemory
from edge_infer.runtime import memory

if TYPE_CHECKING:
    from edge_infer.bundle import Bundle

#: Nobody is killed for less, and asking the system takes a tenth of a millisecond.
NOTABLE_BYTES = 4 * 2**20
REMEDY = "or package a smaller precision"


def require(bundle: Bundle, least: int, max_memory: int | None) -> None:
    """Raise OutOfMemory unless ``least`` bytes of private memory are allowed and are there.

    ``least``: what opening the bundle takes in any case, as far as that is known.
    """
    what = f"{bundle.manifest.name} takes at least {least:,} bytes of private memory here"
    if max_memory is not None and least > max_memory:
        raise OutOfMemory(f"{what}, allowed are {max_memory:,} (max_memory); allow more, {REMEDY}")
    if least < NOTABLE_BYTES:
        return
    available = memory.available_bytes()
    if least > available:
        raise OutOfMemory(f"{what}, the system has {available:,} for it; close other programs, {REMEDY}")


def require_taken(bundle: Bundle, taken: int, max_memory: int) -> None:
    """Raise OutOfMemory when opening and running took more than was allowed."""
    if taken > max_memory:
        raise OutOfMemory(
            f"opening {bundle.manifest.name} and answering one golden question took {taken:,} bytes of private "
            f"memory, allowed are {max_memory:,} (max_memory); it is closed again; allow more, {REMEDY}"
        )
