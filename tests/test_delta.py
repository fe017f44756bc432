"""What a device makes of a delta: the right file or a refusal, in bounded memory, and nothing else on its disk."""

from __future__ import annotations

import hashlib
import io
import lzma
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_infer import delta
from edge_infer.delta import BLOCK, DIFFERENCES, STREAM, Header
from edge_infer.deploy.difference import digits
from edge_infer.errors import BundleError
from edge_infer.manifest import FileEntry

OLD = bytes(range(256)) * 4


def entry(data: bytes) -> FileEntry:
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def stored(data: bytes) -> bytes:
    return STREAM.pack(delta.STORED, len(data)) + data


def packed(codec: int, data: bytes) -> bytes:
    if codec == delta.LZMA2:
        return lzma.compress(data, lzma.FORMAT_RAW, filters=delta.lzma_filters())
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def stream(codec: int, data: bytes) -> bytes:
    made = packed(codec, data)
    return STREAM.pack(codec, len(made)) + made


def recipe(*pieces: tuple[int, int, int]) -> bytes:
    """Of kind, length and distance of each piece."""
    kinds, lengths, distances = zip(*pieces)
    return stored(struct.pack(f"<{len(pieces)}B{len(pieces)}I{len(pieces)}q", *kinds, *lengths, *distances))


def block(*pieces: tuple[int, int, int], streams: bytes = b"") -> bytes:
    return BLOCK.pack(sum(size for _, size, _ in pieces), len(pieces)) + recipe(*pieces) + streams


Apply = Callable[..., bytes]


@pytest.fixture
def apply(tmp_path: Path) -> Apply:
    """``apply(blocks, new)``: what comes out; afterwards nothing but the base and the result lies there."""

    def run(blocks: bytes, new: bytes, old: bytes = OLD, header: bytes | None = None) -> bytes:
        folder = tmp_path / "device"
        folder.mkdir(exist_ok=True)
        (folder / "base").write_bytes(old)
        (folder / "out").unlink(missing_ok=True)
        data = (Header(entry(old), entry(new)).to_bytes() if header is None else header) + blocks
        try:
            delta.apply(folder / "base", entry(old), io.BytesIO(data), folder / "out", entry(new))
        except BaseException:
            assert [path.name for path in folder.iterdir()] == ["base"]
            raise
        assert sorted(path.name for path in folder.iterdir()) == ["base", "out"]
        return (folder / "out").read_bytes()

    return run


# -- the format, as bytes ------------------------------------------------------------------------------------------


def test_the_format_byte_by_byte(apply: Apply) -> None:
    """Written out by hand: a newer version that reads this otherwise must have another magic."""
    old, new = b"\x00\x01\x02\x03\x04\x05\x06\x07", b"NEW\x02\x03\x05\x04\x08\x05\x0a\x07"
    data = bytes.fromhex(
        # two blocks: 5 bytes in 2 pieces
        "05000000 02000000"
        # the recipe, stored, 26 bytes: kinds; lengths; distances
        "01 1a000000  00 01  03000000 02000000  0000000000000000 0200000000000000"
        # kind 0: stored, 3 bytes
        "01 03000000 4e4557"
        # 6 bytes in 2 pieces
        "06000000 02000000"
        # kind 5 (2-byte numbers) from 4, kind 2 (bytes) from 6 on
        "01 1a000000  02 05  02000000 04000000  0400000000000000 feffffffffffffff"
        # kind 2: 04->05 is +1 (2), 05->04 is -1 (1)
        "01 02000000 0201"
        # kind 5: 0504->0508 is +4 (8, 0), 0706->070a is +4; low digits, then high ones, which are zeros
        "01 02000000 0808  00 00000000"
    )
    assert data[: delta.BLOCK.size] == delta.BLOCK.pack(5, 2)
    old_entry = entry(old)
    header = b"EIdelta1" + struct.pack("<Q", 8) + hashlib.sha256(old).digest() + struct.pack("<Q", len(new))
    header += hashlib.sha256(new).digest()
    assert Header(old_entry, entry(new)).to_bytes() == header
    assert apply(data, new, old, header) == new


@pytest.mark.parametrize(("kind", "width", "bits"), [(kind, *form) for kind, form in DIFFERENCES.items()])
def test_differences_of_every_kind_and_length(kind: int, width: int, bits: int, apply: Apply) -> None:
    rng = np.random.default_rng(kind)
    for count in (1, 2, 3, 5, 64, 1000, delta.SLICE_BYTES // width + 1, 3 * delta.SLICE_BYTES // width):
        old = rng.integers(0, 256, count * width, np.uint8)
        new = rng.integers(0, 256, count * width, np.uint8)
        moved = (new.view(f"<u{width}") - old.view(f"<u{width}")).view(f"<i{width}")
        folded = np.where(moved >= 0, 2 * moved, -2 * (moved + 1) + 1).astype(f"<i{width}").view(np.uint8)
        streams = b"".join(map(stored, digits(folded, width, bits)))
        pieces = [(kind, count * width, 0)]
        assert apply(block(*pieces, streams=streams), new.tobytes(), old.tobytes()) == new.tobytes()


def test_every_codec(apply: Apply) -> None:
    text = b"tensor " * 100
    for codec in (delta.DEFLATE, delta.LZMA2):
        assert apply(block((delta.NEW, len(text), 0), streams=stream(codec, text)), text) == text
    zeros = bytes(700)
    assert apply(block((delta.NEW, 700, 0), streams=STREAM.pack(delta.ZEROS, 0)), zeros) == zeros


def test_a_file_of_many_blocks_and_an_empty_one(apply: Apply) -> None:
    new = OLD[512:] * 3
    assert apply(block((delta.SAME, 512, 512)) * 3, new) == new
    assert apply(b"", b"") == b""


def test_a_path_is_read_as_a_stream_is(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(OLD)
    (tmp_path / "delta").write_bytes(Header(entry(OLD), entry(OLD)).to_bytes() + block((delta.SAME, len(OLD), 0)))
    delta.apply(tmp_path / "base", entry(OLD), tmp_path / "delta", tmp_path / "out", entry(OLD))
    assert (tmp_path / "out").read_bytes() == OLD


# -- hostile ---------------------------------------------------------------------------------------------------------


SOUND = block((delta.SAME, 300, 0), (2, 100, 0), (delta.NEW, 4, 0), streams=stored(b"tail") + stored(bytes(100)))
MADE = OLD[:400] + b"tail"


def bomb(codec: int, size: int) -> bytes:
    """A stream that unpacks to so many zeros."""
    return stream(codec, bytes(size))


def cut(codec: int) -> bytes:
    """A stream of 404 bytes that lacks the mark of its end, and no more."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = (
        packer.compress(MADE) + packer.flush(zlib.Z_SYNC_FLUSH) if codec == delta.DEFLATE else packed(codec, MADE)[:-1]
    )
    return STREAM.pack(codec, len(data)) + data


def head(base: FileEntry, result: FileEntry) -> bytes:
    return Header(base, result).to_bytes()


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ends too early"),
    "more behind the end": (SOUND + b"x", "goes on after its last block"),
    "empty block": (BLOCK.pack(0, 1), "a block of 0 bytes"),
    "block of no pieces": (BLOCK.pack(404, 0), "in 0 pieces"),
    "block of too many pieces": (BLOCK.pack(404, 2**32 - 1), "in 4294967295 pieces"),
    "block beyond the result": (BLOCK.pack(405, 1), "a block of 405 bytes"),
    "largest block": (BLOCK.pack(2**32 - 1, 1), "a block of 4294967295 bytes"),
    "pieces too long": (BLOCK.pack(404, 1) + recipe((delta.SAME, 405, 0)), "add up to 405"),
    "pieces too short": (BLOCK.pack(404, 1) + recipe((delta.SAME, 403, 0)), "add up to 403"),
    "empty piece": (BLOCK.pack(404, 2) + recipe((1, 404, 0), (1, 0, 0)), "none of them empty"),
    "unknown kind": (BLOCK.pack(404, 1) + recipe((7, 404, 0)), "of known kinds"),
    "new with a base": (block((0, 4, 1), (1, 400, 0)), "new bytes that have a base"),
    "before the base": (block((delta.SAME, 404, -1)), "refers to bytes -1 to 403"),
    "behind the base": (block((delta.SAME, 404, len(OLD) - 403)), "refers to bytes 621 to 1025"),
    "far behind the base": (block((delta.SAME, 404, 2**63 - 1)), "refers to bytes 9223372036854775807"),
    "far and back": (block((1, 400, 2**63 - 1), (1, 4, -(2**63))), "refers to bytes 9223372036854775807"),
    "half a number": (block((6, 402, 0), (1, 2, 0)), "ends within a number"),
    "unknown codec": (block((0, 404, 0), streams=STREAM.pack(9, 0)), "the codec 9"),
    "stream too short": (block((0, 404, 0), streams=stored(bytes(403))), "a stream of 403 bytes, expected 404"),
    "stream too long": (block((0, 404, 0), streams=stored(bytes(405))), "405 bytes where at most 404"),
    "stream of 4 GiB": (block((0, 404, 0), streams=STREAM.pack(2, 2**32 - 1)), "at most 1428 are expected"),
    "zeros with bytes": (block((0, 404, 0), streams=STREAM.pack(0, 1) + b"x"), "1 bytes where at most 0"),
    "no deflate": (block((0, 404, 0), streams=STREAM.pack(2, 9) + b"\xff" * 9), "cannot be unpacked"),
    "no LZMA": (block((0, 404, 0), streams=STREAM.pack(3, 9) + b"\xff" * 9), "cannot be unpacked"),
    "deflate bomb": (block((0, 404, 0), streams=bomb(delta.DEFLATE, 1_000_000)), "a stream of 405 bytes"),
    "LZMA bomb": (block((0, 404, 0), streams=bomb(delta.LZMA2, 1_000_000)), "a stream of 405 bytes"),
    "deflate of nothing": (block((0, 404, 0), streams=STREAM.pack(2, 0)), "a stream of 0 bytes"),
    "LZMA of nothing": (block((0, 404, 0), streams=STREAM.pack(3, 0)), "a stream of 0 bytes"),
    "deflate without end": (block((0, 404, 0), streams=cut(delta.DEFLATE)), "does not end where it should"),
    "LZMA without end": (block((0, 404, 0), streams=cut(delta.LZMA2)), "does not end where it should"),
    "other result": (block((delta.SAME, 404, 0)), "the delta is damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_right_is_refused(name: str, apply: Apply) -> None:
    blocks, words = REFUSED[name]
    with pytest.raises(BundleError, match=r"push again|same edge-infer") as caught:
        apply(blocks, MADE)
    assert words in str(caught.value)


def test_the_delta_that_those_are_like_is_right(apply: Apply) -> None:
    assert apply(SOUND, MADE) == MADE


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"EIdelta2" + head(entry(OLD), entry(MADE))[8:], "begins with b'EIdelta2'"),
        (head(entry(OLD[1:]), entry(MADE)), "the delta's base is"),
        (head(entry(OLD[::-1]), entry(MADE)), "the delta's base is"),
        (head(entry(OLD), entry(MADE[::-1])), "the delta's result is"),
        (head(entry(OLD), FileEntry(2**63, entry(MADE).sha256)), "the delta's result is"),
        (head(FileEntry(2**63, entry(OLD).sha256), entry(MADE)), "the delta's base is"),
    ],
)
def test_a_delta_between_other_files_is_refused(header: bytes, words: str, apply: Apply) -> None:
    with pytest.raises(BundleError) as caught:
        apply(SOUND, MADE, header=header)
    assert words in str(caught.value)


def sound_delta() -> bytes:
    """Every kind and codec in two blocks."""
    rng = random.Random(1)
    noise = bytes(rng.choice((0, 1, 2, 3)) for _ in range(96))
    first = block(
        (delta.NEW, 48, 0),
        (3, 96, 4),
        (2, 96, 8),
        streams=stream(delta.DEFLATE, noise[:48])
        + stream(delta.LZMA2, noise)
        + stored(noise[:48])
        + STREAM.pack(delta.ZEROS, 0),
    )
    second = block((6, 8, 0), (delta.SAME, 5, 0), (5, 2, 3), streams=stored(b"c") * 2 + stored(b"ab") * 4)
    return first + second


def reference() -> bytes:
    """The same computed one number at a time."""
    rng = random.Random(1)
    noise = bytes(rng.choice((0, 1, 2, 3)) for _ in range(96))

    def unfold(value: int) -> int:
        return -(value + 1) // 2 if value % 2 else value // 2

    low = [digit for byte in noise[:48] for digit in (byte & 15, byte >> 4)]
    out = noise[:48]
    out += bytes((OLD[4 + i] + unfold(low[i])) % 256 for i in range(96))
    out += bytes((OLD[108 + i] + unfold(noise[i])) % 256 for i in range(96))
    for start, value in ((0, 0x61616161), (4, 0x62626262)):
        number = int.from_bytes(OLD[start : start + 4], "little")
        out += ((number + unfold(value)) % 2**32).to_bytes(4, "little")
    out += OLD[8:13]
    number = int.from_bytes(OLD[16:18], "little")
    return out + ((number + unfold(0x6363)) % 2**16).to_bytes(2, "little")


REFERENCE = reference()


def test_all_kinds_and_codecs_in_one_delta(apply: Apply) -> None:
    assert apply(sound_delta(), REFERENCE) == REFERENCE


def test_every_truncation_is_refused(apply: Apply) -> None:
    whole = head(entry(OLD), entry(REFERENCE)) + sound_delta()
    for length in range(len(whole)):
        with pytest.raises(BundleError):
            apply(b"", REFERENCE, header=whole[:length])


def test_every_flipped_bit_is_refused_or_makes_no_difference(apply: Apply) -> None:
    whole = head(entry(OLD), entry(REFERENCE)) + sound_delta()
    refused = 0
    for position in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[position // 8] ^= 1 << position % 8
        try:
            assert apply(b"", REFERENCE, header=bytes(changed)) == REFERENCE
        except BundleError:
            refused += 1
    assert refused > 0.99 * 8 * len(whole)


def test_random_bytes_behind_the_header_are_refused(apply: Apply) -> None:
    rng = random.Random(3)
    for _ in range(500):
        pieces = rng.choice((b"", BLOCK.pack(rng.randint(1, 404), rng.randint(1, 8)), SOUND[: rng.randint(0, 60)]))
        with pytest.raises(BundleError):
            apply(pieces + rng.randbytes(rng.randint(0, 300)), MADE)


def test_a_base_that_is_damaged_is_told_from_a_damaged_delta(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(OLD[:10] + b"x" + OLD[11:])
    data = head(entry(OLD), entry(MADE)) + SOUND
    with pytest.raises(BundleError, match="base, which it starts from, is damaged"):
        delta.apply(tmp_path / "base", entry(OLD), io.BytesIO(data), tmp_path / "out", entry(MADE))
    (tmp_path / "base").write_bytes(OLD[1:])
    with pytest.raises(BundleError, match="has 1023 bytes, expected a plain file of 1024"):
        delta.apply(tmp_path / "base", entry(OLD), io.BytesIO(data), tmp_path / "out", entry(MADE))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_links_and_pipes_are_not_followed_and_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(OLD)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    data = head(entry(OLD), entry(MADE)) + SOUND
    with pytest.raises(BundleError, match="cannot be read"):
        delta.apply(tmp_path / "link", entry(OLD), io.BytesIO(data), tmp_path / "out", entry(MADE))
    with pytest.raises(BundleError, match="cannot be read"):
        delta.apply(tmp_path / "absent", entry(OLD), io.BytesIO(data), tmp_path / "out", entry(MADE))
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "out").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        delta.apply(tmp_path / "real", entry(OLD), io.BytesIO(data), tmp_path / "out", entry(MADE))
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("module", ["zlib", "lzma"])
def test_a_python_without_a_codec_says_so(module: str, apply: Apply, monkeypatch: pytest.MonkeyPatch) -> None:
    assert delta.codecs() == ["zlib", "lzma"]
    monkeypatch.setitem(sys.modules, module, None)
    assert module not in delta.codecs()
    codec = {name: number for number, name in delta.MODULES.items()}[module]
    with pytest.raises(BundleError, match=f"needs the module {module}, which this Python lacks"):
        apply(block((0, 404, 0), streams=STREAM.pack(codec, 1) + b"x"), MADE)


# -- memory ----------------------------------------------------------------------------------------------------------

#: A child that may have so much data besides what its imports took.
CHILD = """
import io, json, resource, sys
from pathlib import Path
from edge_infer import delta
from edge_infer.errors import BundleError
from edge_infer.manifest import FileEntry
import lzma, zlib
base, patch, out, old, new, spare = *map(Path, sys.argv[1:4]), *map(json.loads, sys.argv[4:7])
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + spare, used + spare))
try:
    delta.apply(base, FileEntry(*old), patch, out, FileEntry(*new))
    print("done")
except BundleError as error:
    print(error)
"""


def child(tmp_path: Path, old: FileEntry, new: FileEntry, spare_bytes: int) -> str:
    command: list[Any] = [sys.executable, "-c", CHILD, tmp_path / "base", tmp_path / "delta", tmp_path / "out"]
    command += [[old.size, old.sha256], [new.size, new.sha256], spare_bytes]
    run = subprocess.run(
        [str(item).replace("'", '"') for item in command], check=False, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


SPARE_BYTES = 24_000_000


def test_a_large_file_is_made_in_little_memory(tmp_path: Path) -> None:
    """32 MiB, every number of which changed, in blocks as large as they may be."""
    blocks, size = 32, delta.BLOCK_BYTES
    rng = np.random.default_rng(5)
    old = rng.integers(0, 256, size, np.uint8)
    change = rng.integers(0, 4, size, np.uint8)
    streams = b"".join(stream(delta.LZMA2, plane) for plane in digits(change, 4, 8))
    folded = change.view("<u4")
    moved = (folded >> 1) ^ (0 - (folded & 1)).astype(np.uint32)
    new = (old.view("<u4") + moved).tobytes()
    (tmp_path / "base").write_bytes(old.tobytes() * blocks)
    whole = [entry(old.tobytes() * blocks), entry(new * blocks)]
    with (tmp_path / "delta").open("wb") as file:
        file.write(Header(whole[0], whole[1]).to_bytes())
        for number in range(blocks):
            file.write(block((6, size, number * size), streams=streams))
    assert child(tmp_path, whole[0], whole[1], SPARE_BYTES) == "done"
    assert entry((tmp_path / "out").read_bytes()) == whole[1]


@pytest.mark.parametrize("codec", [delta.DEFLATE, delta.LZMA2])
def test_a_bomb_takes_no_more(codec: int, tmp_path: Path) -> None:
    size = delta.BLOCK_BYTES
    (tmp_path / "base").write_bytes(OLD)
    result = FileEntry(2**40, "0" * 64)
    streams = bomb(codec, 100_000_000)
    (tmp_path / "delta").write_bytes(Header(entry(OLD), result).to_bytes() + block((0, size, 0), streams=streams))
    assert len(streams) < size  # it is not its own length that gives it away
    assert "a stream of 1048577 bytes, expected 1048576" in child(tmp_path, entry(OLD), result, SPARE_BYTES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]
