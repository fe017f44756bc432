"""Which wheels fit a device: a pure function of a few facts about one Python there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from edge_infer.errors import DeviceError, UsageError

try:
    from packaging import tags, utils
except ImportError as missing:
    raise UsageError(
        f"choosing wheels needs packaging ({missing}); install it with python3 -m pip install 'edge-infer[ssh]'"
    ) from missing

#: What a 32-bit Python is on a 64-bit kernel: Raspberry Pi OS for 32 bits runs one.
NARROW = {"aarch64": "armv7l", "armv8l": "armv7l", "x86_64": "i686"}
#: The oldest glibc that wheels are tagged for, 2.N. PEP 600 and PEP 599.
OLDEST_GLIBC = {"x86_64": 5, "i686": 5}
OLDEST_GLIBC_ELSEWHERE = 17
#: The older names of some tags. PEP 600.
ALIASES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}


@dataclass(frozen=True)
class Platform:
    """One Python on a device, as the device's own facts give it.

    ``python`` is a full version, ``abi`` such as ``cp311``, ``machine`` what the kernel says, ``bits`` the size of a
    pointer; ``libc`` is glibc or musl, with its version. ``features`` are those of the processor in the kernel's words
    (``asimd``, ``atomics``), none where they are not known.
    """

    python: str
    implementation: str
    abi: str
    machine: str
    bits: int
    libc: str
    libc_version: str
    features: tuple[str, ...] = ()

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Platform:
        """Raises DeviceError for a Python that wheels are not made for."""
        known = {item.name: facts[item.name] for item in fields(cls) if item.name != "features"}
        platform = cls(**known, features=tuple(facts.get("features", ())))
        if platform.implementation != "cpython":
            raise DeviceError(
                f"the device's Python is {platform.implementation}, which engines have no wheels for; "
                "name a CPython there with --python"
            )
        if platform.libc not in ("glibc", "musl"):
            raise DeviceError("the device's C library is neither glibc nor musl, which all wheels are made for")
        return platform

    def __str__(self) -> str:
        return f"CPython {self.python} on {self.architecture} with {self.libc} {self.libc_version}"

    @property
    def key(self) -> str:
        """A file name's worth of it."""
        return f"{self.abi}-{self.architecture}-{self.libc}{self.libc_version}"

    @property
    def architecture(self) -> str:
        """As wheels name it: that of the Python, which may be narrower than the kernel."""
        return NARROW.get(self.machine, self.machine) if self.bits == 32 else self.machine

    @property
    def version(self) -> tuple[int, int]:
        major, minor = self.python.split(".")[:2]
        return int(major), int(minor)

    @cached_property
    def platform_tags(self) -> tuple[str, ...]:
        """The platforms of wheels that run there, the newest first. PEP 600, PEP 656."""
        major, minor = (int(part) for part in self.libc_version.split(".")[:2])
        arch = self.architecture
        if self.libc == "musl":
            found = [f"musllinux_{major}_{number}_{arch}" for number in range(minor, -1, -1)]
        else:
            found = []
            for number in range(minor, OLDEST_GLIBC.get(arch, OLDEST_GLIBC_ELSEWHERE) - 1, -1):
                found.append(f"manylinux_{major}_{number}_{arch}")
                found += [f"{ALIASES[number]}_{arch}"] if number in ALIASES else []
        return (*found, f"linux_{arch}")

    @cached_property
    def tags(self) -> frozenset[tags.Tag]:
        """Every tag of a wheel that can be installed there."""
        numbers, interpreter = self.version, "cp{}{}".format(*self.version)
        own = tags.cpython_tags(numbers, [self.abi], list(self.platform_tags))
        return frozenset((*own, *tags.compatible_tags(numbers, interpreter, list(self.platform_tags))))

    def takes(self, wheel: str) -> bool:
        """Whether the wheel of that file name can be installed there."""
        try:
            return not self.tags.isdisjoint(utils.parse_wheel_filename(wheel)[3])
        except utils.InvalidWheelFilename:
            return False

    def pip_arguments(self) -> list[str]:
        """What lets pip choose as if it ran there. It still judges markers for this machine: give --no-deps."""
        return [
            "--only-binary=:all:",
            f"--python-version={self.python}",
            "--implementation=cp",
            f"--abi={self.abi}",
            *(f"--platform={tag}" for tag in self.platform_tags),
        ]

    def markers(self) -> dict[str, str]:
        """The environment in which markers of requirements are judged. PEP 508."""
        return {
            "implementation_name": "cpython",
            "implementation_version": self.python,
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": self.python,
            "python_version": "{}.{}".format(*self.version),
            "sys_platform": "linux",
        }
