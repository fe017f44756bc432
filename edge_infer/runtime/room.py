"""Whether a model may take the memory that it takes: what is known before it is opened, and what it took."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

from edge_infer.errors import OutOfMemory
from edge_infer.runtime import memory

if TYPE_CHECKING:
    from edge_infer.bundle import Bundle

#: Nobody is killed for less, and asking the system takes a tenth of a millisecond.
NOTABLE_BYTES = 4 * 2**20
REMEDY = "or package a smaller precision"
#: Formats whose engine maps files so that it may write to its own copy of a page. The system counts these mappings as
#: data, though nothing is written. ONNX Runtime has maps of the weights as they were and as it laid them out.
COUNTED_MAPS = {"onnx": 2, "torchscript": 1}


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


def limit(bundle: Bundle, max_memory: int) -> None:
    """Let the system give this process no more than ``max_memory`` bytes of private memory, and room for its maps.

    RLIMIT_AS would count all maps. https://man7.org/linux/man-pages/man2/getrlimit.2.html
    """
    most = max_memory + COUNTED_MAPS.get(bundle.manifest.artifact.format, 0) * bundle.manifest.size
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def require_within(bundle: Bundle, max_memory: int) -> None:
    """Raise OutOfMemory when this process has more than ``max_memory`` bytes of private memory."""
    has = memory.private_bytes()
    if has > max_memory:
        raise OutOfMemory(
            f"with {bundle.manifest.name} open the process has {has:,} bytes of private memory, allowed are "
            f"{max_memory:,} (max_memory); allow more, {REMEDY}"
        )
