"""Whether a machine slowed its processor, from copies of what /sys shows on a Pi, a PC and an ARM board."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_infer.runtime.thermal import between, read

FIRMWARE = "devices/platform/soc/soc:firmware/get_throttled"
COUNTER = "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"


def sys(folder: Path, **files: str) -> Path:
    """A root whose /sys holds these files; ``__`` in a name stands for a slash."""
    for name, text in files.items():
        path = folder / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def cooler(number: int, kind: str, state: int) -> dict[str, str]:
    folder = f"class/thermal/cooling_device{number}"
    return {f"{folder}/type": kind, f"{folder}/cur_state": str(state)}


def test_a_machine_that_says_nothing_is_not_called_cool(tmp_path: Path) -> None:
    assert between(read(tmp_path), read(tmp_path)) == {"throttled": None, "temperature_c": None}


def test_the_hottest_zone_counts(tmp_path: Path) -> None:
    zones = {f"class/thermal/thermal_zone{n}/temp": text for n, text in enumerate(("41200", "68500", "", "N/A"))}
    assert read(sys(tmp_path, **zones)).temperature_c == 68.5


@pytest.mark.parametrize(
    ("bits", "slowed"), [("0", False), ("50000", False), ("50005", True), ("1", True), ("8", True), ("2", True)]
)
def test_a_raspberry_pi_tells_now_from_since_it_started(tmp_path: Path, bits: str, slowed: bool) -> None:
    reading = read(sys(tmp_path, **{FIRMWARE: bits}))
    assert between(reading, reading)["throttled"] is slowed


@pytest.mark.parametrize(
    ("coolers", "slowed"),
    [
        ([("cpufreq-cpu0", 0), ("pwm-fan", 3)], False),
        ([("cpufreq-cpu0", 2), ("pwm-fan", 0)], True),
        ([("thermal-cpufreq-1", 1)], True),
        ([("Processor", 0), ("Processor", 1)], True),
        ([("pwm-fan", 3)], None),
    ],
)
def test_a_fan_cools_without_slowing(tmp_path: Path, coolers: list[tuple[str, int]], slowed: bool | None) -> None:
    for number, (kind, state) in enumerate(coolers):
        sys(tmp_path, **cooler(number, kind, state))
    assert between(read(tmp_path), read(tmp_path))["throttled"] is slowed


def test_counters_of_cores_are_compared(tmp_path: Path) -> None:
    before = read(sys(tmp_path, **{COUNTER: "7"}))
    assert between(before, read(tmp_path))["throttled"] is False
    assert between(before, read(sys(tmp_path, **{COUNTER: "9"})))["throttled"] is True
