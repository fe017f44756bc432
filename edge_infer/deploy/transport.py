"""The one thing a push needs from a device: a command there with its standard streams at hand.

A transport is one file here (``local``, ``ssh``); ``open_transport`` picks it by the address.
"""

from __future__ import annotations

from typing import Protocol

#: Larger writes are cut to this size: paramiko's ``sendall`` of one large object is quadratic.
SLICE_BYTES = 256 * 1024


class Process(Protocol):
    """A running command on the device."""

    def write(self, data: bytes | memoryview) -> None:
        """Write all of ``data`` to its standard input. Raises DeviceError when the connection is gone."""

    def readline(self) -> bytes:
        """One line of its standard output with the newline, or ``b""`` at the end. Raises DeviceError."""

    def close_input(self) -> None:
        """End of its standard input."""

    def wait(self) -> int:
        """Wait for the end and return the exit status."""

    def errors(self) -> str:
        """The last 8 KiB of its standard error so far."""

    def close(self) -> None:
        """Let go of it; stops it if it still runs."""


class Transport(Protocol):
    """A way to one device."""

    address: str

    def start(self, command: list[str]) -> Process:
        """Start ``command`` (an argument vector) on the device. Raises DeviceError."""

    def close(self) -> None:
        """End the connection."""
