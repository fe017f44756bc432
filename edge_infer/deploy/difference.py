"""Make a delta: what a file of a new release has that the same file of an older one has not.

When a network is trained on a little, each weight moves a little, so a compressor finds nothing to repeat, and neither
does a tool that looks for equal blocks. What is small is the difference of each number to the same number before.
Tensors move about in a file when it is written anew, so they are found by name in both. How the differences are
written is in ``edge_infer.delta``; what was tried and what it saves, in docs/delta.md and docs/decisions/0025.
"""

from __future__ import annotations

import lzma
import mmap
import os
import tempfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edge_infer import delta
from edge_infer.bundle import Bundle
from edge_infer.deploy.tensor_places import Place, places

#: A delta is sent only when it has less than this share of the file: putting it together takes the device time too.
WORTHWHILE = 0.6
#: Bytes whose entropy is above this share of a byte are stored: no codec gains what trying costs.
RANDOM = 0.99
#: Kinds of differences of single bytes, by digit: which is smallest depends on how far the numbers moved.
BYTE_KINDS = [kind for kind, (width, _) in delta.DIFFERENCES.items() if width == 1]
WIDE_KINDS = {width: kind for kind, (width, _) in delta.DIFFERENCES.items() if width > 1}

#: What lies between tensors is compared in so many steps, of which so many at once, to keep memory flat.
CELLS, CELLS_AT_ONCE = 2**20, 2**14

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Difference:
    """A delta on disk: of the bundle file ``name``, from the release ``base`` (its digest); sizes in bytes."""

    path: Path
    name: str
    base: str
    size: int
    full_size: int


@dataclass(frozen=True)
class _Piece:
    """Bytes of the new file and what they are compared with: an offset in the old file, or nothing.

    ``kind`` is decided block by block; ``tensor`` tells numbers from what lies between them.
    """

    start: int
    size: int
    base: int | None
    width: int = 1
    tensor: bool = False
    kind: int = delta.NEW


def make(base: Bundle, new: Bundle, name: str, codecs: Collection[str], out: Path) -> Difference | None:
    """Write the delta of the file ``name`` to ``out``; None, and no file, when it is not worth it.

    ``codecs`` are those that the device has (``edge_infer.delta.codecs``). Worth it is less than ``WORTHWHILE`` of the
    file. The same bundles and codecs give the same bytes with the same zlib and lzma. The delta was applied once before
    it is given. Raises OSError; BundleError when a bundle is damaged.
    """
    entry, old_entry = new.manifest.files[name], base.manifest.files.get(name)
    if old_entry is None or not entry.size or not old_entry.size:
        return None
    limit = int(WORTHWHILE * entry.size)
    old_bytes, new_bytes = _mapped(base.file(name)), _mapped(new.file(name))
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        aside = Path(folder) / "delta"
        with aside.open("wb") as file:
            file.write(delta.Header(old_entry, entry).to_bytes())
            if not write_blocks(old_bytes, new_bytes, places(base, name), places(new, name), codecs, file, limit):
                return None
        delta.apply(base.file(name), old_entry, aside, Path(folder) / "tried", entry)
        size = aside.stat().st_size
        os.replace(aside, out)
    return Difference(out, name, base.digest, size, entry.size)


def write_blocks(
    old: Bytes,
    new: Bytes,
    old_places: Sequence[Place],
    new_places: Sequence[Place],
    codecs: Collection[str],
    file: BinaryIO,
    limit: int,
) -> bool:
    """Write what follows a delta's header; False as soon as the file reaches ``limit`` bytes."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for block in _blocks(_pieces(old, new, old_places, new_places)):
            file.write(_Packer(codecs, pool).block(old, new, block))
            if file.tell() >= limit:
                return False
    return True


def _mapped(path: Path) -> Bytes:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


# -- what is compared with what --------------------------------------------------------------------------------------


def _pieces(old: Bytes, new: Bytes, old_places: Sequence[Place], new_places: Sequence[Place]) -> Iterator[_Piece]:
    """The whole new file in order."""
    pairs = _pairs(old_places, new_places)
    end = old_end = 0
    for before, after in pairs:
        yield from _gap(old, new, (end, after.start), old_end, before.start)
        whole = after.size - after.size % after.width
        yield _Piece(after.start, whole, before.start, after.width, True)
        if whole < after.size:
            yield _Piece(after.start + whole, after.size - whole, before.start + whole)
        end, old_end = after.start + after.size, before.start + before.size
    yield from _gap(old, new, (end, len(new)), old_end, len(old))


def _pairs(old_places: Sequence[Place], new_places: Sequence[Place]) -> list[tuple[Place, Place]]:
    """Old and new places of the same tensors, in the order of the new: by name, and what is left by form and order."""
    unpaired = list(old_places)
    found: dict[int, Place] = {}
    for named in (True, False):
        waiting: dict[tuple[Any, ...], list[Place]] = {}
        for place in unpaired:
            waiting.setdefault(_key(place, named), []).append(place)
        for number, place in enumerate(new_places):
            same = waiting.get(_key(place, named))
            if number not in found and same:
                found[number] = same.pop(0)
        unpaired = [place for group in waiting.values() for place in group]
    return [(found[number], place) for number, place in enumerate(new_places) if number in found]


def _key(place: Place, named: bool) -> tuple[Any, ...]:
    return (place.size, place.width, place.name if named else "")


def _gap(old: Bytes, new: Bytes, span: tuple[int, int], old_start: int, old_end: int) -> Iterator[_Piece]:
    """What lies between two tensors: its first part goes on from the one before, its second leads up to the one after.

    So one thing that became longer or shorter between them is found, and nothing else is looked for.
    """
    start, end = span
    size = end - start
    if not size:
        return
    after = max(0, min(size, len(old) - old_start))
    before = max(0, min(size, old_end))
    split = _split(new[start:end], old, old_start, old_end - size)
    # Where there is no more to compare with, bytes are new.
    parts = ((start, min(split, after), old_start), (end - min(size - split, before), min(size - split, before), 0))
    position = start
    for number, (begin, length, offset) in enumerate(parts):
        if begin > position:
            yield _Piece(position, begin - position, None)
        if length:
            yield _Piece(begin, length, old_end - length if number else offset)
        position = max(position, begin + length)


def _split(new: Bytes, old: Bytes, forward: int, backward: int) -> int:
    """Where in ``new`` to turn from comparing with ``old`` at the offset ``forward`` to ``backward``, for most equal
    bytes; of long ones to a millionth."""
    step = -(-len(new) // CELLS)
    gained = _equal(new, old, forward, step) - _equal(new, old, backward, step)
    return min(len(new), step * int(np.argmax(np.concatenate([[0], np.cumsum(gained)]))))


def _equal(new: Bytes, old: Bytes, offset: int, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How many bytes in each ``step`` of ``new`` are those of ``old`` at the same place behind ``offset``."""
    found = []
    for begin in range(0, len(new), step * CELLS_AT_ONCE):
        equal = np.zeros(min(step * CELLS_AT_ONCE, len(new) - begin), np.bool_)
        first = min(len(equal), max(0, -offset - begin))
        last = max(first, min(len(equal), len(old) - offset - begin))
        there = old[offset + begin + first : offset + begin + last]
        equal[first:last] = new[begin + first : begin + last] == there
        found.append(np.add.reduceat(equal, np.arange(0, len(equal), step), dtype=np.int64))
    return np.concatenate(found)


def _blocks(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """The pieces, cut so that they fill blocks; a block is never cut within a number."""
    block: list[_Piece] = []
    free = delta.BLOCK_BYTES
    for whole in pieces:
        piece = whole
        while piece.size:
            size = min(piece.size, free - free % piece.width)
            if not size or len(block) == delta.MAX_PIECES:
                yield block
                block, free = [], delta.BLOCK_BYTES
                continue
            block.append(replace(piece, size=size))
            free -= size
            moved = None if piece.base is None else piece.base + size
            piece = replace(piece, start=piece.start + size, size=piece.size - size, base=moved)
    if block:
        yield block


# -- how it is written -----------------------------------------------------------------------------------------------


class _Packer:
    """Writes blocks for a device that has these codecs; ``pool`` tries several at once."""

    def __init__(self, codecs: Collection[str], pool: Executor) -> None:
        self._codecs, self._pool = codecs, pool

    def block(self, old: Bytes, new: Bytes, cut: Sequence[_Piece]) -> bytes:
        pieces = [_decided(piece, old, new) for piece in cut]
        numbers = [piece for piece in pieces if _is_byte_tensor(piece)]
        if numbers:
            differences = _differences(numbers, old, new)
            chosen = min(BYTE_KINDS, key=lambda kind: self._estimate(kind, differences))
            pieces = [replace(piece, kind=chosen) if _is_byte_tensor(piece) else piece for piece in pieces]
        pieces = _merged(pieces)
        streams = [_recipe(pieces)]
        for kind in sorted({piece.kind for piece in pieces} - {delta.SAME}):
            parts = [piece for piece in pieces if piece.kind == kind]
            if kind == delta.NEW:
                streams.append(b"".join(new[piece.start : piece.start + piece.size].tobytes() for piece in parts))
            else:
                streams += digits(_differences(parts, old, new), *delta.DIFFERENCES[kind])
        packed = self._pool.map(self.stream, streams)
        return delta.BLOCK.pack(sum(piece.size for piece in pieces), len(pieces)) + b"".join(packed)

    def _estimate(self, kind: int, differences: Bytes) -> float:
        """Roughly the bytes that the differences take in this kind."""
        streams = digits(differences, *delta.DIFFERENCES[kind])
        if "zlib" in self._codecs:
            return sum(len(_deflate(stream, zlib.Z_RLE)) for stream in streams)
        return sum(len(stream) * _entropy(stream) for stream in streams)

    def stream(self, data: bytes) -> bytes:
        """The stream in the codec that makes it smallest."""
        codec, packed = delta.STORED, data
        if not data.strip(b"\0"):
            codec, packed = delta.ZEROS, b""
        elif _entropy(data) < RANDOM or len(data) < 1024:
            for other, made in self._tried(data):
                if len(made) < len(packed):
                    codec, packed = other, made
        return delta.STREAM.pack(codec, len(packed)) + packed

    def _tried(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        if "zlib" in self._codecs:
            for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_RLE, zlib.Z_HUFFMAN_ONLY):
                yield delta.DEFLATE, _deflate(data, strategy)
        if "lzma" in self._codecs:
            yield delta.LZMA2, lzma.compress(data, lzma.FORMAT_RAW, filters=delta.lzma_filters())


def _is_byte_tensor(piece: _Piece) -> bool:
    return piece.tensor and piece.kind in BYTE_KINDS


def _deflate(data: bytes, strategy: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return packer.compress(data) + packer.flush()


def _entropy(data: bytes | Bytes) -> float:
    """Bits a byte by how often each occurs, as a share of 8."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    shares = counts[counts > 0] / len(data)
    return float(-(shares * np.log2(shares)).sum()) / 8


def _decided(piece: _Piece, old: Bytes, new: Bytes) -> _Piece:
    """The piece with its kind; where a difference would be larger than the bytes themselves it is new."""
    if piece.base is None:
        return piece
    content = new[piece.start : piece.start + piece.size]
    if np.array_equal(content, old[piece.base : piece.base + piece.size]):
        return replace(piece, kind=delta.SAME)
    kind = WIDE_KINDS.get(piece.width, BYTE_KINDS[0])
    planes = digits(_differences([piece], old, new), piece.width, 8)
    if sum(map(_entropy, planes)) / piece.width > _entropy(content):
        return replace(piece, base=None)
    return replace(piece, kind=kind)


def _merged(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Fewer pieces where one goes on from another."""
    made: list[_Piece] = []
    for piece in pieces:
        last = made[-1] if made else None
        if last is not None and last.kind == piece.kind and _goes_on(last, piece):
            made[-1] = replace(last, size=last.size + piece.size)
        else:
            made.append(piece)
    return made


def _goes_on(last: _Piece, piece: _Piece) -> bool:
    return piece.base is None if last.base is None else piece.base == last.base + last.size


def _recipe(pieces: Sequence[_Piece]) -> bytes:
    distances, position = [], 0
    for piece in pieces:
        distances.append(0 if piece.base is None else piece.base - position)
        position = position if piece.base is None else piece.base + piece.size
    columns = (
        ("u1", [piece.kind for piece in pieces]),
        ("<u4", [piece.size for piece in pieces]),
        ("<i8", distances),
    )
    return b"".join(np.array(values, kind).tobytes() for kind, values in columns)


def _differences(pieces: Sequence[_Piece], old: Bytes, new: Bytes) -> Bytes:
    """The differences of pieces of one width, folded so that small ones of either sign are small, as bytes."""
    width = pieces[0].width if pieces[0].tensor else 1
    found = []
    for piece in pieces:
        assert piece.base is not None
        before = old[piece.base : piece.base + piece.size].tobytes()
        after = new[piece.start : piece.start + piece.size].tobytes()
        moved = (np.frombuffer(after, f"<u{width}") - np.frombuffer(before, f"<u{width}")).view(f"<i{width}")
        found.append(((moved << 1) ^ (moved >> (8 * width - 1))).view(np.uint8))
    return np.concatenate(found)


def digits(differences: Bytes, width: int, bits: int) -> list[bytes]:
    """The streams of all digits of the differences, lowest first; see ``edge_infer.delta``."""
    if bits == 8:
        return [differences[number::width].tobytes() for number in range(width)]
    places_ = 8 // bits
    padded = np.pad(differences, (0, -len(differences) % places_)).reshape(-1, places_)
    shifts = np.arange(places_, dtype=np.uint8) * bits
    planes = [(padded >> bits * number) & ((1 << bits) - 1) for number in range(places_)]
    return [np.bitwise_or.reduce(plane << shifts, axis=1).astype(np.uint8).tobytes() for plane in planes]


def refusal(base: Bundle | None, codecs: Collection[str], sent_bytes: int, full_bytes: int) -> str | None:
    """Why ``--delta-only`` refuses a push, as one sentence; None when it does not.

    ``sent_bytes`` are what the deltas and the files sent whole have together, ``full_bytes`` what all would have.
    """
    if base is None:
        return (
            "--delta-only: none of the device's releases of this model is kept on this machine; name the bundle of "
            "one with --base, or push without --delta-only"
        )
    if sent_bytes < WORTHWHILE * full_bytes or not full_bytes:
        return None
    lacking = "" if codecs else " (the device's Python has neither zlib nor lzma)"
    return (
        f"--delta-only: what changed since {base.digest[:12]} takes {sent_bytes:,} of {full_bytes:,} bytes to "
        f"send{lacking}, expected less than {WORTHWHILE:.0%}; push without --delta-only"
    )
