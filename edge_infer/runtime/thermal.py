"""Whether the processor was slowed down, for heat or for lack of power, while something was timed.

Sources: the kernel's thermal sysfs (temperatures in millidegrees Celsius; a cooling device of the CPU's frequency
is at work when its state is not 0), the throttle counters of x86 cores, and the firmware's word on a Raspberry Pi
(``get_throttled``: bit 0 under-voltage, 1 frequency capped, 2 throttled, 3 soft temperature limit).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ZONES = "sys/class/thermal/thermal_zone*/temp"
COOLERS = "sys/class/thermal/cooling_device*/type"
COUNTERS = "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"
FIRMWARE = "sys/devices/platform/soc*/*firmware*/get_throttled"
#: Kernels before 5.12 name them thermal-cpufreq-N, later ones cpufreq-cpuN; ACPI's are named Processor.
SLOWING = ("cpufreq", "Processor")
FIRMWARE_NOW = 0b1111


@dataclass(frozen=True)
class Reading:
    """One look. ``slowed``: something holds the processor back now. ``count``: how often cores were held back so far.

    Each is None where the machine does not say.
    """

    temperature_c: float | None
    slowed: bool | None
    count: int | None


def read(root: Path = Path("/")) -> Reading:
    """Look at the machine; with ``root``, at a copy of its ``/sys``."""
    temperatures = [_number(path) for path in root.glob(ZONES)]
    counts = [_number(path) for path in root.glob(COUNTERS)]
    states = [_number(path.with_name("cur_state")) for path in root.glob(COOLERS) if _slows(path)]
    flags = [_number(path, 16) for path in root.glob(FIRMWARE)]
    hottest = max((value for value in temperatures if value is not None), default=None)
    signs = [value != 0 for value in states if value is not None]
    signs += [bool(value & FIRMWARE_NOW) for value in flags if value is not None]
    known = [value for value in counts if value is not None]
    return Reading(
        temperature_c=None if hottest is None else hottest / 1000,
        slowed=any(signs) if signs else None,
        count=sum(known) if known else None,
    )


def throttled(before: Reading, after: Reading) -> bool | None:
    """Whether it was held back between two looks, or at either; None where the machine does not say."""
    signs = [reading.slowed for reading in (before, after) if reading.slowed is not None]
    if before.count is not None and after.count is not None:
        signs.append(after.count > before.count)
    return any(signs) if signs else None


def between(before: Reading, after: Reading) -> dict[str, Any]:
    """``throttled`` and the temperature at the end, as a benchmark reports them."""
    return {"throttled": throttled(before, after), "temperature_c": after.temperature_c}


def _slows(kind: Path) -> bool:
    """Whether a cooling device works by slowing the processor; a fan does not."""
    return any(word in _text(kind) for word in SLOWING)


def _number(path: Path, base: int = 10) -> int | None:
    try:
        return int(_text(path), base)
    except ValueError:
        return None


def _text(path: Path) -> str:
    """A sysfs file's content; empty when it cannot be read, as for a sensor that is switched off."""
    try:
        return path.read_text("ascii", "replace").strip()
    except OSError:
        return ""
