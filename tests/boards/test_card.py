"""A board's card at power cuts and when it is worn out: what was flushed is whole, of the rest any part."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from lab import card
from lab.emulator import Emulator

from boards import record
from boards.board import TestBoard

SIZE = 2**20
OLD, NEW = b"\x11", b"\x22"
#: Nothing is flushed but what asks for it.
NO_COMMITS = "mount -o remount,commit=3600 / && sync"
FILL = """
import os, mmap
piece = mmap.mmap(-1, 16384)
piece.write({byte!r} * 16384)
file = os.open("/root/direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
for start in range(0, {size}, 16384):
    os.pwrite(file, piece, start)
if {fsync}:
    os.fsync(file)
"""
#: One file after another is replaced as a careful program does it; the numbers of those that are durable.
CAREFUL = """
import hashlib, itertools, os
os.makedirs("/root/careful", exist_ok=True)
folder = os.open("/root/careful", os.O_RDONLY)
for number in itertools.count({first}):
    path = f"/root/careful/{{number % 10}}"
    body = hashlib.sha256(b"%d" % number).digest() * (1 + number * 97 % 1000)
    with open(path + ".new", "wb") as file:
        file.write(b"%d %s " % (number, hashlib.sha256(body).hexdigest().encode()) + body)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".new", path)
    os.fsync(folder)
    print(number, flush=True)
"""
FOUND = """
import hashlib, json, os
found = {}
for slot in range(10):
    path = f"/root/careful/{slot}"
    if os.path.exists(path):
        number, digest, body = open(path, "rb").read().split(b" ", 2)
        found[slot] = int(number) if hashlib.sha256(body).hexdigest().encode() == digest else "torn"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def board(new_board: Any) -> Iterator[TestBoard]:
    board = new_board("pi-zero-2w", "card", volatile=True)
    yield board
    board.emulator.cut_power()


def state(board: TestBoard) -> dict[str, Any]:
    answer = card.ask(board.board.folder, "state")
    assert answer is not None
    return answer


def cut(board: TestBoard, mode: str, seed: int = 0) -> dict[str, Any]:
    """The power is cut and comes back; what became of what was not flushed."""
    done = board.emulator.cut_power(mode, seed)
    assert done is not None
    board.start(volatile=True)
    assert board.shell("mount | grep ' / '", user="root").stdout.split()[5].startswith(b"(rw")
    errors = board.shell("dmesg | grep -i 'ext4-fs error\\|ext4-fs warning\\|I/O error'", user="root", check=False)
    assert errors.stdout == b""
    return done


def fill(board: TestBoard, byte: bytes, *, fsync: bool) -> None:
    board.shell("python3 -", given=FILL.format(size=SIZE, byte=byte, fsync=fsync).encode(), user="root")


@pytest.mark.long
def test_a_board_knows_that_its_card_has_a_cache_and_flushes_it(board: TestBoard) -> None:
    assert board.shell("cat /sys/block/vda/queue/write_cache").stdout == b"write back\n"
    board.shell(NO_COMMITS, user="root")
    before = state(board)["flushes"]
    board.shell("echo 1 > /root/one", user="root")
    assert state(board)["flushes"] == before
    board.shell("sync /root/one", user="root")
    assert state(board)["flushes"] > before


@pytest.mark.parametrize(
    ("mode", "seed", "expected"),
    [
        pytest.param("dropped", 0, OLD, marks=pytest.mark.long),
        pytest.param("kept", 0, NEW, marks=pytest.mark.long),
        ("mix", 1, OLD + NEW),
    ],
)
def test_what_was_flushed_is_whole_and_the_rest_as_the_mode_says(
    board: TestBoard, mode: str, seed: int, expected: bytes
) -> None:
    board.shell(f"{NO_COMMITS}; rm -f /root/unsynced", user="root")
    fill(board, OLD, fsync=True)
    board.shell("seq 100000 > /root/synced; sync /root/synced; seq 100000 > /root/unsynced", user="root")
    fill(board, NEW, fsync=False)
    pending = state(board)
    assert pending["bytes"] >= SIZE, "written, and not flushed"
    done = cut(board, mode, seed)
    assert done["sectors_kept"] + done["sectors_dropped"] >= pending["bytes"] // 512
    seen = board.shell("cat /root/direct", user="root").stdout
    sectors = [seen[start : start + 512] for start in range(0, len(seen), 512)]
    assert len(seen) == SIZE
    assert set(sectors) == {bytes([byte]) * 512 for byte in expected}
    assert board.shell("seq 100000 | cmp - /root/synced", user="root").returncode == 0
    assert board.shell("test -s /root/unsynced", user="root", check=False).returncode == 1, "no commit has named it"
    assert (done["torn"] > 0) == (mode == "mix")
    record.note("card", mode, **{key: done[key] for key in ("writes", "torn", "sectors_kept", "sectors_dropped")})


class Careful:
    """The careful program at work on a board, and what it says."""

    def __init__(self, emulator: Emulator, first: int) -> None:
        command = emulator.ssh("root", "python3 -u -")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdin
        self.process.stdin.write(CAREFUL.format(first=first).encode())
        self.process.stdin.close()
        self.numbers: list[int] = []
        self.enough = threading.Semaphore(0)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.endswith(b"\n"):
                self.numbers.append(int(line))
                self.enough.release()

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.enough.acquire(timeout=300)

    def end(self) -> list[int]:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        assert self.process.stdout
        self.process.stdout.close()
        return self.numbers


@pytest.mark.long
def test_what_a_careful_program_calls_durable_is_whole_after_any_mix(board: TestBoard) -> None:
    durable: dict[str, int] = {}
    lost = torn = 0
    for seed, count in enumerate((12, 25, 17, 31)):
        careful = Careful(board.emulator, max(durable.values(), default=-1) + 1)
        careful.wait_for(count)
        while state(board)["writes"] <= seed % 3:
            pass  # between two flushes
        done = board.emulator.cut_power("mix", seed)
        assert done is not None
        numbers = careful.end()
        durable.update({str(number % 10): number for number in numbers})
        board.start(volatile=True)
        found = board.python(FOUND, python="python3", user="root")
        for slot, number in durable.items():
            # The next one may have been at work.
            assert found[slot] in (number, number + 10), f"slot {slot} after cut {seed}: {found[slot]}, not {number}"
        lost, torn = lost + done["sectors_dropped"], torn + done["torn"]
    assert lost > 0, "every cut came when nothing was pending"
    record.note("card", "careful", cuts=4, replaced=max(durable.values()) + 1, sectors_dropped=lost, writes_torn=torn)


@pytest.mark.long
def test_a_worn_out_card_fails_what_writes_and_the_board_can_still_be_asked(board: TestBoard) -> None:
    fill(board, OLD, fsync=True)
    board.emulator.wear_out()
    failed = board.shell("dd if=/dev/zero of=/root/late bs=4k count=1 conv=fsync", user="root", check=False)
    assert failed.returncode == 1
    assert b"error" in failed.stderr or b"Read-only" in failed.stderr
    assert board.shell("cat /root/direct", user="root").stdout == OLD * SIZE
    board.emulator.cut_power("kept")
    board.start(volatile=True)
    assert board.shell("cat /root/direct", user="root").stdout == OLD * SIZE
