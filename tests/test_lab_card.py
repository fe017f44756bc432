"""The lab's memory card: what is flushed survives a power cut, and of the rest any part may, sector by sector."""

from __future__ import annotations

import errno
import importlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SECTOR = 512
SIZE = 4 * 2**20
OLD, A, B = (bytes([value]) * SECTOR for value in (0xEE, 0xAA, 0xBB))


@pytest.fixture(scope="module")
def lab() -> Iterator[Any]:
    """The modules of the card, with the names ``card`` and ``nbd``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        importlib.import_module("lab.card")
        yield importlib.import_module("lab")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "card.img"
    path.write_bytes(OLD * (SIZE // SECTOR))
    return path


@pytest.fixture
def serve(lab: Any, image: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``serve(**how)``: a Card of the image, served in this process at ``card.socket``."""
    listeners: list[socket.socket] = []

    def answer(listener: socket.socket, card: Any) -> None:
        try:
            lab.card.serve_all(listener, card)
        except OSError:
            listener.close()

    def start(read_only: bool = False, **how: Any) -> Any:
        card = lab.card.Card(lab.card.RawFile(image, read_only), read_only, **how)
        listeners.append(lab.card.listen(tmp_path / "card.socket"))
        threading.Thread(target=answer, args=(listeners[-1], card), daemon=True).start()
        return card

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def client(lab: Any, serve: Any, tmp_path: Path) -> Iterator[Any]:
    """A client of a card; ``client.card`` is the card."""
    card = serve()
    client = lab.nbd.Client(tmp_path / "card.socket")
    client.card = card
    yield client
    client.wire.close()


@pytest.fixture
def start(lab: Any, tmp_path: Path) -> Iterator[Callable[[Path], Any]]:
    """``start(path)``: a client of a card in a process of its own."""
    yield lambda path: lab.nbd.Client(lab.card.start(path, tmp_path))
    lab.card.ask(tmp_path, "cut_power")


def raw(tmp_path: Path, lab: Any, flags: int = 3) -> Any:
    """A connection behind the greeting."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(tmp_path / "card.socket"))
    wire = lab.nbd.Wire(connection)
    assert wire.take(18) == b"NBDMAGICIHAVEOPT\0\3"
    wire.give(struct.pack(">I", flags))
    return wire


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def request(command: int, offset: int, length: int, magic: int = 0x25609513) -> bytes:
    return struct.pack(">IHHQQI", magic, 0, command, 7, offset, length)


def sectors(image: Path, first: int, count: int) -> list[bytes]:
    content = image.read_bytes()[first * SECTOR : (first + count) * SECTOR]
    return [content[start : start + SECTOR] for start in range(0, len(content), SECTOR)]


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "arrived"), [("dropped", OLD), ("kept", B)])
def test_what_was_flushed_is_there_and_the_rest_as_the_mode_says(
    client: Any, image: Path, mode: str, arrived: bytes
) -> None:
    client.write(0, A)
    client.flush()
    client.write(SECTOR, B + B)
    assert sectors(image, 0, 3) == [A, OLD, OLD]
    done = client.card.cut_power(mode)
    assert sectors(image, 0, 4) == [A, arrived, arrived, OLD]
    assert (done["flushes"], done["writes"], done["torn"]) == (1, 1, 0)
    assert (done["sectors_kept"], done["sectors_dropped"]) == ((2, 0) if mode == "kept" else (0, 2))


def test_a_write_with_fua_is_durable_by_itself(client: Any, image: Path) -> None:
    client.write(0, A)
    client.write(SECTOR, B, durable=True)
    client.card.cut_power("dropped")
    assert sectors(image, 0, 2) == [OLD, B]


def test_an_older_pending_write_does_not_come_over_a_durable_one(client: Any, image: Path) -> None:
    client.write(0, A + A)
    client.write(SECTOR, B, durable=True)
    client.card.cut_power("kept")
    assert sectors(image, 0, 2) == [A, B]


def test_reads_see_the_newest_of_overlapping_pending_writes(client: Any, image: Path) -> None:
    client.write(0, A * 4)
    client.write(SECTOR, B * 2)
    client.write(2 * SECTOR, A)
    expected = A + B + A + A + OLD
    assert client.read(0, 5 * SECTOR) == expected
    assert sectors(image, 0, 4) == [OLD] * 4
    client.flush()
    assert client.read(0, 5 * SECTOR) == b"".join(sectors(image, 0, 5)) == expected


def test_zeroes_are_written_and_lost_like_other_writes(client: Any, lab: Any, image: Path) -> None:
    client.request(lab.nbd.Command.WRITE_ZEROES, 0, SECTOR)
    client.flush()
    client.request(lab.nbd.Command.WRITE_ZEROES, SECTOR, SECTOR, flags=lab.nbd.With.NO_HOLE)
    assert client.read(0, 3 * SECTOR) == bytes(2 * SECTOR) + OLD
    client.card.cut_power("dropped")
    assert sectors(image, 0, 2) == [bytes(SECTOR), OLD]


def test_what_is_trimmed_may_stay(client: Any, lab: Any, image: Path) -> None:
    client.request(lab.nbd.Command.TRIM, 0, SIZE)
    client.flush()
    assert set(sectors(image, 0, SIZE // SECTOR)) == {OLD}


def test_the_oldest_writes_become_durable_when_the_cache_is_full(serve: Any, image: Path) -> None:
    card = serve(cache_bytes=4 * SECTOR)
    card.write(0, A * 2, False)
    card.write(SECTOR, B * 2, False)
    assert sectors(image, 0, 3) == [OLD] * 3
    card.write(8 * SECTOR, A, False)
    assert sectors(image, 0, 3) == [A, A, OLD]
    assert card.read(0, 3 * SECTOR) == A + B + B
    card.write(16 * SECTOR, A * 6, False)  # more than the cache holds
    assert card.pending_bytes == 0
    card.cut_power("dropped")
    assert sectors(image, 0, 3) == [A, B, B]


#: Writes of four pages each, one after the other.
WRITES, PAGE, WRITE = 40, 8, 4 * 8


def after_a_cut(lab: Any, image: Path, seed: int) -> tuple[list[bytes], dict[str, Any]]:
    """The writes, each with its own content, and a cut."""
    image.write_bytes(OLD * (2 * WRITES * WRITE))
    card = lab.card.Card(lab.card.RawFile(image, False))
    for number in range(WRITES):
        card.write(WRITE * number * SECTOR, bytes([number]) * WRITE * SECTOR, False)
    return sectors(image, 0, WRITES * WRITE), card.cut_power("mix", seed)


def test_the_same_seed_gives_the_same_mix(lab: Any, image: Path) -> None:
    _, first = after_a_cut(lab, image, 7)
    content = image.read_bytes()
    assert after_a_cut(lab, image, 7)[1] == first
    assert image.read_bytes() == content
    after_a_cut(lab, image, 8)
    assert image.read_bytes() != content


def test_a_mix_keeps_drops_and_tears_writes_at_pages(lab: Any, image: Path) -> None:
    _, done = after_a_cut(lab, image, 7)
    after = sectors(image, 0, WRITES * WRITE)
    kept = [sector == bytes([number // WRITE]) * SECTOR for number, sector in enumerate(after)]
    assert {sector for sector, is_kept in zip(after, kept, strict=True) if not is_kept} == {OLD}, (
        "as before or as written"
    )
    assert set(sectors(image, WRITES * WRITE, WRITES * WRITE)) == {OLD}
    assert {sum(kept[start : start + PAGE]) for start in range(0, len(kept), PAGE)} == {0, PAGE}
    writes = [sum(kept[start : start + WRITE]) for start in range(0, len(kept), WRITE)]
    torn = [count for count in writes if 0 < count < WRITE]
    assert done == {
        **{"mode": "mix", "seed": 7, "flushes": 0, "writes": WRITES, "torn": len(torn)},
        **{"sectors_kept": sum(kept), "sectors_dropped": len(kept) - sum(kept)},
    }
    assert torn and WRITE in writes and 0 in writes
    assert writes.index(0) < WRITES - 1 - writes[::-1].index(WRITE), "a later write without an earlier one"


def test_a_mix_of_overlapping_writes_may_keep_the_older_one(lab: Any, image: Path) -> None:
    seen = set()
    for seed in range(40):
        image.write_bytes(OLD * (SIZE // SECTOR))
        card = lab.card.Card(lab.card.RawFile(image, False))
        card.write(0, A, False)
        card.write(0, B, False)
        card.cut_power("mix", seed)
        seen.update(sectors(image, 0, 1))
    assert seen == {OLD, A, B}


def test_a_card_is_what_a_plain_array_would_be_whatever_is_written_and_flushed(client: Any, image: Path) -> None:
    draw = random.Random(1)
    expected = bytearray(image.read_bytes())
    client.card.cache_bytes = 100 * SECTOR
    for _ in range(400):
        first, count = draw.randrange(200), draw.randrange(1, 20)
        start, end = first * SECTOR, (first + count) * SECTOR
        if draw.random() < 0.6:
            expected[start:end] = data = draw.randbytes(count * SECTOR)
            client.write(start, data, durable=draw.random() < 0.1)
        elif draw.random() < 0.2:
            client.flush()
            assert image.read_bytes() == expected
        assert client.read(start, end - start) == expected[start:end]
    client.card.cut_power("kept")
    assert image.read_bytes() == expected


# -- the protocol ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "error"),
    [
        (0, SIZE, SECTOR, 0, errno.EINVAL),
        (0, 2**64 - SECTOR, SECTOR, 0, errno.EINVAL),
        (1, SIZE - SECTOR, 2 * SECTOR, 0, errno.ENOSPC),
        (4, SIZE, SECTOR, 0, errno.ENOSPC),
        (6, SIZE, SECTOR, 0, errno.ENOSPC),
        (0, 1, SECTOR, 0, errno.EINVAL),
        (1, 0, SECTOR - 1, 0, errno.EINVAL),
        (0, 0, 2**26, 0, errno.EINVAL),
        (6, 0, 2**26, 0, errno.EINVAL),
        (5, 0, SECTOR, 0, errno.EINVAL),
        (99, 0, 0, 0, errno.EINVAL),
        (1, 0, SECTOR, 4, errno.EINVAL),
        (1, 0, SECTOR, 2, errno.EINVAL),
    ],
)
def test_a_request_that_no_card_could_do_is_refused_and_the_next_is_answered(
    client: Any, command: int, offset: int, length: int, flags: int, error: int
) -> None:
    with pytest.raises(OSError) as refused:
        client.request(command, offset, length, bytes(length) if command == 1 else b"", flags)
    assert refused.value.errno == error
    assert client.read(SIZE - SECTOR, SECTOR) == OLD
    assert not client.card.pending


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">QII", 0x49484156454F5054, 7, 2**31),
        option(1, b"another"),
        option(2),
        option(7, bytes(6)) + request(0, 0, SECTOR, magic=0x25609514),
        option(7, bytes(6)) + request(1, 0, 2**31),
        option(7, bytes(6)) + request(2, 0, 0),
    ],
)
def test_who_cannot_be_understood_or_leaves_is_hung_up_on_and_the_next_is_served(
    client: Any, lab: Any, tmp_path: Path, said: bytes
) -> None:
    wire = raw(tmp_path, lab)
    wire.give(said)
    wire.connection.settimeout(60)
    try:
        while wire.reader.read(1):
            pass
    except ConnectionResetError:
        pass  # it did not read all of it
    wire.close()
    other = lab.nbd.Client(tmp_path / "card.socket")
    assert other.read(0, SECTOR) == OLD
    other.close()
    assert not client.card.pending


def test_a_handshake_with_unknown_flags_is_hung_up_on(client: Any, lab: Any, tmp_path: Path) -> None:
    wire = raw(tmp_path, lab, flags=4)
    wire.connection.settimeout(60)
    assert wire.reader.read() == b""
    wire.close()


def test_a_write_that_arrives_by_half_is_none_and_what_came_before_stays_pending(
    client: Any, lab: Any, image: Path, tmp_path: Path
) -> None:
    other = lab.nbd.Client(tmp_path / "card.socket")
    other.write(0, A)
    other.wire.give(request(1, SECTOR, 2 * SECTOR) + B)
    other.wire.connection.shutdown(socket.SHUT_WR)
    assert other.wire.reader.read() == b"", "the card hangs up"
    other.wire.close()
    assert client.read(0, 3 * SECTOR) == A + OLD + OLD
    assert client.card.cut_power("kept")["writes"] == 1
    assert sectors(image, 0, 3) == [A, OLD, OLD]


def test_options_are_answered_as_the_protocol_says(client: Any, lab: Any, tmp_path: Path) -> None:
    wire = raw(tmp_path, lab)
    # As the client does it, on a connection that has not taken the export yet.
    fresh = lab.nbd.Client.__new__(lab.nbd.Client)
    fresh.wire = wire
    export = (3, struct.pack(">HQH", 0, SIZE, 1 | 4 | 8 | 32 | 64))
    sizes = (3, struct.pack(">HIII", 3, 512, 4096, 2**25))
    refused = {"unsupported": 2**31 + 1, "invalid": 2**31 + 3, "unknown": 2**31 + 6}
    assert fresh.option(3, b"") == [(2, bytes(4)), (1, b"")]
    assert fresh.option(3, b"x") == [(refused["invalid"], b"")]
    assert fresh.option(5, b"") == [(refused["unsupported"], b"")], "STARTTLS"
    assert fresh.option(8, b"") == [(refused["unsupported"], b"")], "structured replies"
    assert fresh.option(6, bytes(6)) == [export, sizes, (1, b"")]
    assert fresh.option(7, b"\0\0\0\7another\0\0") == [(refused["unknown"], b"")]
    for malformed in (b"", bytes(5), bytes(7), b"\xff" * 12, b"\0\0\0\0\0\2\0\3"):
        assert fresh.option(7, malformed) == [(refused["invalid"], b"")]
    assert fresh.option(7, bytes(6))[-1] == (1, b"")
    assert fresh.read(0, SECTOR) == OLD
    fresh.close()


@pytest.mark.parametrize(("flags", "padding"), [(3, 0), (1, 124)])
def test_the_old_way_to_take_the_export_works(client: Any, lab: Any, tmp_path: Path, flags: int, padding: int) -> None:
    wire = raw(tmp_path, lab, flags)
    wire.give(option(1) + request(0, 0, SECTOR))
    assert wire.take(10 + padding) == struct.pack(">QH", SIZE, 1 | 4 | 8 | 32 | 64) + bytes(padding)
    assert wire.take(16 + SECTOR) == struct.pack(">IIQ", 0x67446698, 0, 7) + OLD
    wire.close()


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_write_protected_card_says_so_and_takes_nothing(lab: Any, serve: Any, image: Path, tmp_path: Path) -> None:
    image.chmod(0o400)
    serve(read_only=True)
    client = lab.nbd.Client(tmp_path / "card.socket")
    assert client.flags & 2
    for command in (1, 4, 6):
        with pytest.raises(PermissionError):
            client.request(command, 0, SECTOR, A if command == 1 else b"")
    client.flush()
    assert client.read(0, SECTOR) == OLD
    client.close()


def test_a_worn_out_card_fails_every_write_and_still_flushes_what_it_had(client: Any, image: Path) -> None:
    client.write(0, A)
    client.card.wear_out()
    for command in (1, 4, 6):
        with pytest.raises(OSError) as failed:
            client.request(command, SECTOR, SECTOR, B if command == 1 else b"")
        assert failed.value.errno == errno.EIO
    assert client.read(0, 2 * SECTOR) == A + OLD
    client.flush()
    client.card.cut_power("dropped")
    assert sectors(image, 0, 2) == [A, OLD]


def test_a_file_that_fails_is_an_error_to_the_client_and_nothing_is_forgotten(
    client: Any, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(offset: int, data: bytes) -> None:
        raise OSError(errno.EDQUOT, "the machine's disk is full")

    client.write(0, A)
    with monkeypatch.context() as patch:
        patch.setattr(client.card.durable, "write", fail)
        with pytest.raises(OSError) as failed:
            client.flush()
        assert failed.value.errno == errno.EIO
    client.flush()
    assert sectors(image, 0, 1) == [A]


# -- the process -------------------------------------------------------------------------------------------------------


def test_a_card_in_a_process_of_its_own_ends_with_its_power(lab: Any, start: Any, image: Path, tmp_path: Path) -> None:
    client = start(image)
    client.write(0, A)
    client.flush()
    client.write(SECTOR, B)
    with pytest.raises(SystemExit, match=r"card\.img is not served: .*unavailable"):
        lab.card.start(image, tmp_path / "..")
    for wrong in ({"mode": "lost"}, {"modus": "kept"}):
        with pytest.raises(ValueError, match="mod"):
            lab.card.ask(tmp_path, "cut_power", **wrong)
    worn_out = lab.card.ask(tmp_path, "wear_out")
    assert (worn_out["worn_out"], worn_out["flushes"], worn_out["writes"], worn_out["bytes"]) == (True, 1, 1, SECTOR)
    with pytest.raises(OSError, match="Input/output error"):
        client.write(SECTOR, B)
    done = lab.card.ask(tmp_path, "cut_power", mode="kept", seed=3)
    assert done == {
        **{"mode": "kept", "seed": 3, "flushes": 1, "writes": 1},
        **{"torn": 0, "sectors_kept": 1, "sectors_dropped": 0},
    }
    assert client.wire.reader.read() == b"", "the card is gone"
    client.wire.close()
    assert lab.card.ask(tmp_path, "cut_power") is None
    assert sectors(image, 0, 2) == [A, B]
    assert (tmp_path / "card.log").read_text() == ""


def test_a_killed_card_keeps_what_was_flushed_and_can_be_served_again(
    lab: Any, start: Any, image: Path, tmp_path: Path
) -> None:
    client = start(image)
    client.write(0, A)
    client.flush()
    client.write(SECTOR, B)
    os.kill(lab.card.ask(tmp_path, "state")["pid"], signal.SIGKILL)
    assert client.wire.reader.read() == b""
    client.wire.close()
    assert lab.card.ask(tmp_path, "cut_power") is None
    again = start(image)
    assert again.read(0, 2 * SECTOR) == A + OLD
    again.close()
    assert lab.card.ask(tmp_path, "cut_power")["writes"] == 0


def test_a_card_that_is_held_does_not_answer_the_flush_and_keeps_nothing_of_it(
    lab: Any, start: Any, image: Path, tmp_path: Path
) -> None:
    client = start(image)
    client.flush()
    assert lab.card.ask(tmp_path, "hold", flush=2)["held"] is False
    client.write(0, A)
    client.flush()
    client.write(0, B)
    client.wire.connection.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.flush()
    state = lab.card.ask(tmp_path, "state")
    assert state["held"] is True and state["writes"] == 1
    assert lab.card.ask(tmp_path, "cut_power", mode="dropped")["sectors_dropped"] == 1
    assert sectors(image, 0, 1) == [A]


@pytest.mark.skipif(not shutil.which("qemu-nbd"), reason="qemu-nbd is not installed")
def test_a_qcow2_card_over_a_base_takes_the_writes_and_the_base_stays(
    lab: Any, start: Any, image: Path, tmp_path: Path
) -> None:
    card = tmp_path / "card.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image, card], check=True)
    client = start(card)
    assert client.size == SIZE
    client.write(0, A * 4000)
    client.write(SECTOR, B, durable=True)
    client.write(2 * SECTOR, B)
    assert lab.card.ask(tmp_path, "cut_power", mode="dropped")["writes"] == 1
    client.wire.close()
    subprocess.run(["qemu-img", "check", "-q", card], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", card, tmp_path / "seen.img"], check=True)
    assert sectors(tmp_path / "seen.img", 0, 4001) == [A, B] + [A] * 3998 + [OLD]
    assert set(sectors(image, 0, 4001)) == {OLD}
