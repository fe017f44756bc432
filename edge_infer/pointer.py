"""What ``current/<name>`` in a store says: which release of a model is in use, and what to go back to.

    DIGEST [pending BOOT SECONDS]     the release in use
    DIGEST                            what to go back to, newest first

A pending release is in use until the device's clock since boot shows SECONDS in the boot BOOT; unless it is confirmed
by then, and in any later boot, the one after it is in use. The clock counts from the boot, since a board without a
battery does not know the time of day. Standard library only, Python >= 3.8: a push sends this file along.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple

from edge_infer.errors import BundleError, DeviceError
from edge_infer.manifest import SHA256
from edge_infer.records import Record

#: One for every start of the machine: https://www.kernel.org/doc/html/latest/admin-guide/sysctl/kernel.html#random
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(eq=False, repr=False)
class Pending(Record):
    """Until when a release waits to be confirmed: whole seconds since the boot named."""

    boot: str
    until_s: int

    def left_s(self) -> float:
        """Seconds that are left; 0 when the time is over, or the device was started anew."""
        return max(0.0, self.until_s - _since_boot_s()) if self.boot == _boot() else 0.0


@dataclass(eq=False, repr=False)
class Pointer(Record):
    """``digests``: the release in use first. ``pending``: it is in use on trial."""

    digests: Tuple[str, ...]
    pending: Optional[Pending] = None

    def settled(self) -> Pointer:
        """What holds now: without a release whose time to be confirmed is over."""
        return Pointer(self.digests[1:]) if self.pending and not self.pending.left_s() else self

    def to_bytes(self) -> bytes:
        lines: List[str] = list(self.digests)
        if self.pending:
            lines[0] += f" pending {self.pending.boot} {self.pending.until_s}"
        return ("\n".join(lines) + "\n").encode("ascii")


def parse_pointer(data: bytes, where: Path) -> Pointer:
    """The pointer that ``where`` holds. Raises BundleError when it is none."""
    try:
        rows = [line.split() for line in data.decode("ascii").splitlines()]
        digests = tuple(row[0] for row in rows)
        pending = _parse_pending(rows[0][1:])
        if any(len(row) > 1 for row in rows[1:]) or not all(SHA256.match(digest) for digest in digests):
            raise ValueError("no digests")
    except (ValueError, IndexError):
        raise BundleError(f"{where} holds no digests; push the model again") from None
    return Pointer(digests, pending)


def _parse_pending(words: List[str]) -> Optional[Pending]:
    if not words:
        return None
    word, boot, until = words
    if word != "pending" or not until.isdecimal():
        raise ValueError(word)
    return Pending(boot, int(until))


def pending_for(seconds: float) -> Pending:
    """A trial that starts now. Raises DeviceError where the system does not tell one boot from another."""
    boot = _boot()
    if not boot:
        raise DeviceError(f"{BOOT_ID} cannot be read, so no deadline can be kept on this device; push without one")
    return Pending(boot, int(_since_boot_s() + seconds + 0.999))


def _boot() -> str:
    try:
        return BOOT_ID.read_text("ascii").strip()
    except OSError:
        return ""


def _since_boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
