"""The kinds of board, and the folders that boards live in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab import initrd

#: Packages of Debian that bring the newest kernel of their kind. The second has 16 KiB pages, as a Raspberry Pi 5's.
KERNELS = {"4k": "linux-image-cloud-arm64", "16k": "linux-image-6.12-arm64-16k"}


@dataclass(frozen=True)
class Kind:
    """What is emulated of a board: processor, memory and page size; nothing of its timing."""

    name: str
    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    target: str


#: Processors and memory: Raspberry Pi documentation, https://www.raspberrypi.com/documentation/computers/processors.html
#: The emulator's host has few cores, so that two of a board's four are emulated.
KINDS = {
    kind.name: kind
    for kind in (
        Kind("pi-zero-2w", "cortex-a53", 2, 512 * 2**20, "4k", "raspberry-pi-zero-2w"),
        Kind("pi-4", "cortex-a72", 2, 2 * 2**30, "4k", "raspberry-pi-4"),
        Kind("pi-5", "cortex-a76", 2, 2 * 2**30, "16k", "raspberry-pi-5"),
    )
}


class Lab:
    """The folder with everything of the lab, outside the repository; ``boards`` may lie elsewhere."""

    def __init__(self, boards: Path | None = None) -> None:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(os.environ.get("EDGE_INFER_LAB") or Path(caches) / "edge-infer-lab")
        self.boards_folder = boards or self.folder / "boards"
        self.base = self.folder / "base" / "card.img"
        self.stamp = self.folder / "base" / "built_from"
        self.key = self.folder / "id_ed25519"

    def kernel(self, name: str) -> Path:
        return self.folder / "kernels" / name / "vmlinuz"

    def initrd(self, name: str) -> Path:
        return self.folder / "kernels" / name / "initrd"

    def is_built(self) -> bool:
        from lab.image import fingerprint

        return self.stamp.is_file() and self.stamp.read_text() == fingerprint()

    def boards(self) -> Iterator[Board]:
        for path in sorted(self.boards_folder.glob("*/board.json")):
            yield Board(self, path.parent.name, KINDS[json.loads(path.read_text())["kind"]])

    def board(self, name: str) -> Board:
        for board in self.boards():
            if board.name == name:
                return board
        known = ", ".join(board.name for board in self.boards()) or "none"
        raise SystemExit(f"no board {name} in {self.boards_folder}; there are: {known}")

    def new_board(self, kind: str, name: str | None = None, card: Path | None = None) -> Board:
        """A board that is off, with the first card or a copy of ``card``. SystemExit when the name is taken or none."""
        taken = {board.name for board in self.boards()}
        if name is None:
            name = next(one for one in (kind, *(f"{kind}-{n}" for n in range(2, 1000))) if one not in taken)
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", name):
            raise SystemExit(f"{name!r} is no name for a board; expected small letters, digits and hyphens")
        if name in taken:
            raise SystemExit(f"there is a board {name} already; start it, or remove it with stop --remove {name}")
        board = Board(self, name, KINDS[kind])
        board.make(card)
        return board


@dataclass(frozen=True)
class Board:
    """One board: its card, its host key, and where its emulator is spoken to."""

    lab: Lab
    name: str
    kind: Kind

    @property
    def folder(self) -> Path:
        return self.lab.boards_folder / self.name

    @property
    def card(self) -> Path:
        return self.folder / "card.qcow2"

    @property
    def host_key(self) -> Path:
        return self.folder / "ssh_host_ed25519_key"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    def make(self, card: Path | None = None) -> None:
        if not self.lab.key.is_file():
            _make_key(self.lab.key, "device lab")
        aside = self.folder.with_name(f".{self.name}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _make_key(aside / self.host_key.name, self.name)
        with (aside / "initrd").open("wb") as stream:
            stream.write(self.lab.initrd(self.kind.kernel).read_bytes())
            stream.write(
                initrd.for_board(self.name, self.lab.key.with_suffix(".pub").read_text(), aside / self.host_key.name)
            )
        if card is None:
            _make_card(self.lab.base, aside / self.card.name)
        else:
            shutil.copyfile(card, aside / self.card.name)
        (aside / "board.json").write_text(json.dumps({"kind": self.kind.name}))
        aside.rename(self.folder)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def write_known_hosts(self, port: int) -> None:
        key = self.host_key.with_suffix(".pub").read_text().split()
        self.known_hosts.write_text(f"[127.0.0.1]:{port} {key[0]} {key[1]}\n")

    def ssh_config(self, port: int, user: str = "pi") -> str:
        """The block with which OpenSSH, and edge-infer, reach the board by its name."""
        return (
            f"Host {self.name}\n"
            f"  HostName 127.0.0.1\n"
            f"  Port {port}\n"
            f"  User {user}\n"
            f"  IdentityFile {self.lab.key}\n"
            f"  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.known_hosts}\n"
        )


def _make_key(path: Path, comment: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path], check=True)


def _make_card(base: Path, card: Path) -> None:
    card.unlink(missing_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, card], check=True)
