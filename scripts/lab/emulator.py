"""A board's emulator: started, asked whether it answers, cut off, stopped."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from typing import Any

from lab import card
from lab.boards import Board
from lab.network import PLAIN_PORT, Link

#: sshd answers 5 s after the start on an idle machine; a busy one takes its time.
BOOT_S = 600
STOP_S = 60


class Emulator:
    """``board`` switched on or off. The process outlives this one; its number and port lie in the board's folder."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.state = board.folder / "running.json"
        self.console = board.folder / "console"
        self.monitor = board.folder / "monitor"

    # -- state ---------------------------------------------------------------------------------------------------------

    def pid(self) -> int | None:
        """The emulator's process, None when the board is off.

        It locks the file with its number as long as it lives: one that was killed and is not gone yet is seen, and
        another process that got the number is not.
        """
        try:
            with (self.board.folder / "pid").open("r+") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(file.read())
        except FileNotFoundError:
            pass
        return None

    def port(self) -> int:
        if self.pid() is None:
            raise SystemExit(f"{self.board.name} is off; start it with: start {self.board.name}")
        return int(json.loads(self.state.read_text())["port"])

    # -- switching -----------------------------------------------------------------------------------------------------

    def start(
        self,
        *,
        clock: str | None = None,
        read_only: bool = False,
        volatile: bool = False,
        port: int | None = None,
    ) -> int:
        """Switch the board on and return its port, before it answers.

        ``clock``: what its clock shows at the start, as 2016-01-01T00:00:00; None: the time.
        ``read_only``: the card's write protection. ``volatile``: the card has a cache that a power cut empties, see
        lab/card.py; otherwise it keeps every write at once.
        """
        if self.pid() is not None:
            raise SystemExit(f"{self.board.name} is on, at port {self.port()}")
        port = port or free_port()
        kind, folder = self.board.kind, self.board.folder
        self.board.write_known_hosts(port)
        self._cut_card()  # of a board that went off by itself
        file, format = str(self.board.card), "qcow2"
        if volatile:
            file, format = f"nbd+unix:///?socket={card.start(self.board.card, folder, read_only)}", "raw"
        drive = f"if=none,id=card,file={file},format={format},readonly={'on' if read_only else 'off'}"
        command = [
            *("qemu-system-aarch64", "-M", "virt", "-cpu", kind.cpu, "-smp", str(kind.cores)),
            *("-m", f"{kind.memory_bytes // 2**20}", "-accel", "tcg,thread=multi,tb-size=128", "-nodefaults"),
            *("-display", "none", "-daemonize", "-pidfile", str(folder / "pid"), "-name", self.board.name),
            *(
                "-qmp",
                f"unix:{self.monitor},server=on,wait=off",
                "-serial",
                f"file:{self.console}",
                "-rtc",
                f"base={clock or 'utc'}",
            ),
            *("-kernel", str(self.board.lab.kernel(kind.kernel)), "-initrd", str(folder / "initrd")),
            *("-append", "console=ttyAMA0 quiet panic=5 mitigations=off kpti=off", "-device", "virtio-rng-device"),
            *("-drive", drive, "-device", "virtio-blk-device,drive=card"),
            # Nothing but its SSH port: a board reaches neither this machine nor any other.
            *("-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{PLAIN_PORT}"),
            *("-device", "virtio-net-device,netdev=net"),
        ]
        self.state.write_text(json.dumps({"port": port}))
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            self._cut_card()
            raise SystemExit(f"the emulator of {self.board.name} did not start: {done.stderr.strip()}")
        return port

    def wait(self, limit_s: float = BOOT_S) -> None:
        """Return when the board answers on its SSH port."""
        deadline = time.monotonic() + limit_s
        port = self.port()
        while time.monotonic() < deadline:
            if self.pid() is None:
                raise SystemExit(f"{self.board.name} went off while starting; see {self.console}")
            if _answers(port):
                return
            time.sleep(0.2)
        raise SystemExit(
            f"{self.board.name} does not answer after {limit_s:.0f} s; see {self.board.folder / 'console'}"
        )

    def cut_power(self, mode: str = "dropped", seed: int = 0) -> dict[str, Any] | None:
        """The emulator is gone at once: what the board had not brought to its card is lost.

        ``mode``, one of card.MODES, and ``seed`` say what a volatile card keeps of the writes since its last flush.
        What became of them; None for another card.
        """
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            while self.pid() is not None:
                time.sleep(0.01)
        return self._cut_card(mode, seed)

    def _cut_card(self, mode: str = "dropped", seed: int = 0) -> dict[str, Any] | None:
        return card.ask(self.board.folder, "cut_power", mode=mode, seed=seed)

    def wear_out(self) -> None:
        """From now on all writes to the volatile card fail."""
        if card.ask(self.board.folder, "wear_out") is None:
            raise SystemExit(f"the card of {self.board.name} is not volatile; start the board with volatile=True")

    def link(self, link: Link) -> None:
        """Make the board's link such for connections that begin from now on, until it is switched off."""
        done = subprocess.run(
            self.ssh("root", "sh"), input=link.commands(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"the link of {self.board.name} did not change: {done.stderr.strip()}")
        here = f"tcp:127.0.0.1:{self.port()}"
        said = self._ask(f"hostfwd_remove net {here}", f"hostfwd_add net {here}-:{link.port}")
        if not ("removed" in said[0] and said[1] == ""):
            raise SystemExit(f"the emulator of {self.board.name} did not change its port: {' '.join(said).strip()}")

    def _ask(self, *commands: str) -> list[str]:
        """What the emulator's monitor says to commands; https://www.qemu.org/docs/master/interop/qmp-spec.html"""
        asked = [{"execute": "human-monitor-command", "arguments": {"command-line": one}} for one in commands]
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.fspath(self.monitor))
            with connection.makefile("rw") as stream:
                stream.readline()  # a greeting
                answers = []
                for one in ({"execute": "qmp_capabilities"}, *asked):
                    stream.write(json.dumps(one) + "\n")
                    stream.flush()
                    answers.append(str(json.loads(stream.readline())["return"]))
        return answers[1:]

    def stop(self) -> None:
        """Shut the board down, or cut its power when it does not within a minute."""
        if self.pid() is None:
            return
        subprocess.run(
            self.ssh("root", "busybox", "poweroff"), stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        deadline = time.monotonic() + STOP_S
        while self.pid() is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        self.cut_power()

    # -- a shell -------------------------------------------------------------------------------------------------------

    def ssh(self, user: str, *words: str) -> list[str]:
        """The OpenSSH command that runs ``words`` on the board."""
        return [
            *("ssh", "-F", "/dev/null", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30", "-o", "IdentitiesOnly=yes"),
            *("-o", f"UserKnownHostsFile={self.board.known_hosts}", "-i", str(self.board.lab.key)),
            *("-p", str(self.port()), f"{user}@127.0.0.1", *words),
        ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    """Whether an SSH server introduces itself; the emulator takes the connection before there is one."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
