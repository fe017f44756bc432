"""A memory card that loses at a power cut what real ones lose: a card's file behind a volatile cache, served over NBD.

    python -m lab.card CARD FOLDER [--read-only]

A killed emulator leaves every write that its board made, in order. Of what a board has written since its last flush
a real card keeps any part: later writes without earlier ones, and some pages of a write. So this process keeps such
writes in memory and brings them to the file at a flush. When it is told of a power cut it draws by a seed what else
arrives there, and ends. FOLDER gets ``card.socket`` for the emulator, ``card.control`` for ``ask``, ``card.log``.

The file is qcow2, which qemu-nbd opens, or raw. Killed, this process is a card that kept nothing more.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import random
import select
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from lab import nbd
from lab.nbd import SECTOR

#: A card writes back on its own when it holds more.
CACHE_BYTES = 64 * 2**20
#: The longest write to the file at once.
RUN_SECTORS = 2**20 // SECTOR
#: A page is whole or not there. There are cards that tear smaller, but Linux 6.1 does not mount an ext4
#: whose last commit block is torn at sectors ("jbd2: avoid mount failed when commit block is partial submitted").
PAGE_SECTORS = 4096 // SECTOR
#: What becomes of the writes since the last flush. mix: each is kept, dropped, or torn at pages, with equal chance.
MODES = ("dropped", "kept", "mix")
#: What ``ask`` may ask for.
VERBS = ("cut_power", "wear_out", "hold", "state")


class Durable(Protocol):
    """What survives a power cut; whole sectors."""

    size: int

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class RawFile:
    """A card's image as it is."""

    def __init__(self, path: Path, read_only: bool) -> None:
        self.file = path.open("rb" if read_only else "r+b", buffering=0)
        fcntl.flock(self.file, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        self.size = self.file.seek(0, os.SEEK_END) // SECTOR * SECTOR
        self.close = self.file.close

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.file.fileno(), length, offset)

    def write(self, offset: int, data: bytes) -> None:
        while data:
            written = os.pwrite(self.file.fileno(), data, offset)
            offset, data = offset + written, data[written:]

    def flush(self) -> None:
        """This machine stays on: what it holds of its files is as good as written."""


class Qcow2:
    """A qcow2 file by way of a qemu-nbd, which ends when nobody is connected any more."""

    def __init__(self, path: Path, read_only: bool, folder: Path) -> None:
        at, pid = folder / "qcow2.socket", folder / "qcow2.pid"
        command: list[str | Path] = ["qemu-nbd", "--fork", "--pid-file", pid, "--socket", at, "--cache", "unsafe"]
        command += [*(["--read-only"] if read_only else []), "--format", "qcow2", path]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(errno.EIO, f"qemu-nbd does not open it: {done.stderr.strip()}")
        self.server = os.pidfd_open(int(pid.read_text()))
        self.client = nbd.Client(at)
        self.size, self.read = self.client.size, self.client.read
        at.unlink()

    def write(self, offset: int, data: bytes) -> None:
        self.client.write(offset, data)

    def flush(self) -> None:
        self.client.flush()

    def close(self) -> None:
        """Return when the file is complete and free for others."""
        self.client.close()
        ended = select.poll()
        ended.register(self.server, select.POLLIN)
        ended.poll()


class Card:
    """An nbd.Device: ``durable`` behind a cache."""

    def __init__(self, durable: Durable, read_only: bool = False, cache_bytes: int = CACHE_BYTES) -> None:
        self.durable = durable
        self.size = durable.size
        self.read_only = read_only
        self.cache_bytes = cache_bytes
        self.worn_out = self.ended = self.held = False
        #: The flush, counted from the start, that is not done any more.
        self.last_flush: int | None = None
        self.lock = threading.Lock()
        self.flushes = 0
        #: What is not durable yet, in the order of the writes: the first sector of each, and its sectors.
        self.pending: deque[tuple[int, list[bytes]]] = deque()
        self.pending_bytes = 0
        #: Of the same the newest by sector, which reads see.
        self.newest: dict[int, bytes] = {}

    # -- what a board does ---------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        with self.lock:
            content = bytearray(self.durable.read(offset, length))
            if self.newest:
                for start in range(0, length, SECTOR):
                    if (sector := self.newest.get((offset + start) // SECTOR)) is not None:
                        content[start : start + SECTOR] = sector
            return bytes(content)

    def write(self, offset: int, data: bytes, durable: bool) -> None:
        if durable and self.held:
            threading.Event().wait()
        with self.lock:
            self._refuse_when_worn_out()
            first, sectors = offset // SECTOR, [data[start : start + SECTOR] for start in range(0, len(data), SECTOR)]
            numbers = range(first, first + len(sectors))
            if durable:
                # An older write that is still pending must not come over this one at a power cut.
                if any(number in self.newest for number in numbers):
                    self._bring_all()
                self.durable.write(offset, data)
                self.durable.flush()
                return
            self.pending.append((first, sectors))
            self.pending_bytes += len(data)
            self.newest.update(zip(numbers, sectors))
            while self.pending_bytes > self.cache_bytes:
                self._bring_oldest()

    def trim(self, offset: int, length: int) -> None:
        """What was there may stay."""
        with self.lock:
            self._refuse_when_worn_out()

    def flush(self) -> None:
        with self.lock:
            self.flushes += 1
            if self.flushes == self.last_flush:
                self.held = True
            if not self.held:
                self._bring_all()
                self.durable.flush()
                return
        threading.Event().wait()  # as good as off: nobody is answered any more

    def _refuse_when_worn_out(self) -> None:
        if self.worn_out:
            raise OSError(errno.EIO, "worn out")

    def _bring_oldest(self) -> None:
        first, sectors = self.pending[0]
        self.durable.write(first * SECTOR, b"".join(sectors))
        self.pending.popleft()
        self.pending_bytes -= len(sectors) * SECTOR
        for number, sector in enumerate(sectors, first):
            if self.newest.get(number) is sector:
                del self.newest[number]

    def _bring_all(self) -> None:
        self._bring(self.newest)
        self.pending.clear()
        self.newest.clear()
        self.pending_bytes = 0

    def _bring(self, content: dict[int, bytes]) -> None:
        for first, data in runs(content):
            self.durable.write(first * SECTOR, data)

    # -- what is done to it --------------------------------------------------------------------------------------------

    def cut_power(self, mode: str = "dropped", seed: int = 0) -> dict[str, Any]:
        """The end of the card: what of the pending writes is durable is drawn by ``seed``; what was done, to print."""
        if mode not in MODES:
            raise ValueError(f"no mode {mode!r}; there are: {', '.join(MODES)}")
        self.lock.acquire()  # for good: nobody is answered any more
        self.ended = True
        done = {"mode": mode, "seed": seed, "flushes": self.flushes, "writes": len(self.pending)}
        draw = random.Random(seed)
        content: dict[int, bytes] = {}
        kept = torn = sectors_in_all = 0
        for first, sectors in self.pending:
            arrives = drawn(mode, draw, first, len(sectors))
            content.update((first + n, sector) for n, sector in enumerate(sectors) if arrives[n])
            sectors_in_all += len(sectors)
            kept += sum(arrives)
            torn += 0 < sum(arrives) < len(sectors)
        self._bring(content)
        self.durable.close()
        return {**done, "torn": torn, "sectors_kept": kept, "sectors_dropped": sectors_in_all - kept}

    def wear_out(self) -> dict[str, Any]:
        """From now on every write fails with EIO; what was written before can still be flushed."""
        self.worn_out = True
        return self.state()

    def hold(self, flush: int) -> dict[str, Any]:
        """The power fails at a flush, the next one being 1: that one is not done and never answered."""
        with self.lock:
            self.last_flush = self.flushes + flush
        return self.state()

    def state(self) -> dict[str, Any]:
        """``flushes`` since the start; ``writes`` and their ``bytes`` that are pending."""
        return {
            **{"pid": os.getpid(), "worn_out": self.worn_out, "held": self.held, "flushes": self.flushes},
            **{"writes": len(self.pending), "bytes": self.pending_bytes},
        }


def drawn(mode: str, draw: random.Random, first: int, count: int) -> list[bool]:
    """Which sectors of a pending write of ``count`` from ``first`` arrive."""
    how = draw.choice(("dropped", "kept", "torn")) if mode == "mix" else mode
    pages = [number // PAGE_SECTORS for number in range(first, first + count)]
    if how == "torn":
        arrives = {page: draw.random() < 0.5 for page in dict.fromkeys(pages)}
        return [arrives[page] for page in pages]
    return [how == "kept"] * count


def runs(content: dict[int, bytes]) -> Iterator[tuple[int, bytes]]:
    """Sectors by number as stretches without gaps: the first number, and what they hold."""
    run: list[int] = []
    for number in [*sorted(content), -1]:
        if run and (number != run[-1] + 1 or len(run) == RUN_SECTORS):
            yield run[0], b"".join(content[one] for one in run)
            run = []
        run.append(number)


# -- the process -------------------------------------------------------------------------------------------------------


def start(card: Path, folder: Path, read_only: bool = False) -> Path:
    """Serve ``card`` in a process that outlives this one; the socket for the emulator. SystemExit when it cannot be."""
    command = [sys.executable, "-m", "lab.card", str(card.absolute()), str(folder.absolute())]
    command += ["--read-only"] if read_only else []
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the card {card} is not served: {done.stderr.strip()}")
    return folder / "card.socket"


def ask(folder: Path, do: str, **arguments: Any) -> dict[str, Any] | None:
    """A method of the card that is served in ``folder``, of VERBS; None when there is none.

    ValueError for what the card does not understand or could not do.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.fspath(folder / "card.control"))
            connection.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as stream:
                answer = stream.readline()
        except (FileNotFoundError, ConnectionError):
            return None
    if not answer:
        return None
    done: dict[str, Any] = json.loads(answer)
    if "error" in done:
        raise ValueError(done["error"])
    return done


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.card", description=__doc__.partition("\n")[0])
    parser.add_argument("card", type=Path, metavar="CARD")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--read-only", action="store_true", help="the card's write protection")
    arguments = parser.parse_args()
    try:
        card = Card(opened(arguments.card, arguments.read_only, arguments.folder), arguments.read_only)
        sockets = [listen(arguments.folder / name) for name in ("card.socket", "card.control")]
    except OSError as error:
        raise SystemExit(str(error)) from error
    to_background(arguments.folder / "card.log")
    threading.Thread(target=serve_all, args=(sockets[0], card), daemon=True).start()
    obey(sockets[1], card)


def opened(path: Path, read_only: bool, folder: Path) -> Durable:
    with path.open("rb") as stream:
        is_qcow2 = stream.read(4) == b"QFI\xfb"
    return Qcow2(path, read_only, folder) if is_qcow2 else RawFile(path, read_only)


def listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.listen()
    return listener


def to_background(log: Path) -> None:
    """The process that was started ends well, and another one goes on; what it has to say goes to ``log``."""
    if os.fork():
        os._exit(0)
    os.setsid()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for standard in (1, 2):
        os.dup2(target, standard)


def serve_all(listener: socket.socket, card: Card) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=nbd.serve, args=(connection, card), daemon=True).start()


def obey(control: socket.socket, card: Card) -> None:
    """Do what is asked for until the power is cut."""
    while not card.ended:
        connection, _ = control.accept()
        with connection, connection.makefile("rwb") as stream:
            try:
                asked = json.loads(stream.readline())
                verb = asked.pop("do")
                answer = getattr(card, VERBS[VERBS.index(verb)])(**asked)
            except (LookupError, OSError, TypeError, ValueError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            if card.ended:
                Path(control.getsockname()).unlink()
            stream.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
