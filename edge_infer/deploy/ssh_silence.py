"""A device that falls silent: asked for a sign of life, and given up when it gives none.

paramiko sends keepalives and waits for no answer. The kernel notices a peer that acknowledges nothing; it does not
notice one whose SSH server hangs, nor a device that goes away behind a jump host that stays.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence

import edge_infer.deploy.ssh_config  # noqa: F401 - it says how to install paramiko when that is missing

import paramiko  # isort: skip

#: Seconds without any traffic after which the other side is asked for a sign of life.
KEEPALIVE_S = 15
#: Seconds without a word from the other side after which it counts as lost.
SILENCE_S = 45


class Packetizer(paramiko.Packetizer):  # type: ignore[misc]
    """paramiko's own, which also knows when the other side was last heard."""

    heard = 0.0

    def read_message(self) -> tuple[int, paramiko.Message]:
        message: tuple[int, paramiko.Message] = super().read_message()
        self.heard = time.monotonic()
        return message


def keep_alive(connection: paramiko.Transport) -> None:
    """Have ``connection`` ask for a sign of life when it has been idle; whatever is answered is one."""

    def ask() -> None:
        message = paramiko.Message()
        message.add_byte(paramiko.common.cMSG_GLOBAL_REQUEST)
        message.add_string("keepalive@openssh.com")
        message.add_boolean(True)
        connection._send_user_message(message)

    connection.packetizer.set_keepalive(KEEPALIVE_S, ask)


class Watch(threading.Thread):
    """Ends ``connections`` (the device's last, those it goes through before) when the device falls silent.

    A thread of its own, because every other may be waiting for the device: to send, to receive, to hear of an end.
    """

    def __init__(self, connections: Sequence[paramiko.Transport]) -> None:
        super().__init__(name="edge-infer-silence", daemon=True)
        self._connections = tuple(connections)
        self._stopped = threading.Event()
        self._connections[-1].packetizer.heard = time.monotonic()
        self.start()

    def run(self) -> None:
        packetizer = self._connections[-1].packetizer
        while not self._stopped.wait(max(0.01, packetizer.heard + SILENCE_S - time.monotonic())):
            if time.monotonic() - packetizer.heard < SILENCE_S:
                continue
            for connection in reversed(self._connections):
                with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                    connection.close()
            return

    def stop(self) -> None:
        """End the watch; the connections are left as they are."""
        self._stopped.set()
        if self is not threading.current_thread():
            self.join()
