"""A file as what changed since an older one: what a push sends when the device has an older release.

The host finds which bytes of the old file each tensor of the new one is compared with
(``edge_infer.deploy.difference``); here is what a device needs to put the new file together. Version 1, all numbers
little-endian and unsigned unless said otherwise:

    magic           8 bytes, b"EIdelta1"
    base            length (8 bytes) and SHA-256 (32 bytes) of the old file
    result          length (8 bytes) and SHA-256 (32 bytes) of the new file
    blocks          until the result has its length; nothing follows the last

    block           bytes of the result that it makes (4 bytes, 1 to 1 MiB), number of pieces (4 bytes, 1 to 4096)
                    recipe, as a stream
                    streams of each kind of piece that the recipe has, by the kind's number
    recipe          kind of each piece (1 byte each), then its length (4 bytes each), then how many bytes behind the end
                    of the piece before its base begins (8 bytes each, signed; the block's first counts from 0).
                    The pieces stand in the order of the result, and their lengths add up to the block's
    stream          codec (1 byte), length (4 bytes), that many bytes. How many bytes it unpacks to is known from the
                    recipe; another number is an error
    codec           0 zeros (length 0)   1 stored   2 raw deflate   3 raw LZMA2 (lc=0, lp=0, pb=0, 1 MiB dictionary)

    kind 0          new: its bytes are in the kind's one stream; it has no base (its distance is 0)
    kind 1          same: the base's bytes; no stream
    kind 2, 3, 4    differences of bytes, in digits of 8, 4 and 2 bits
    kind 5, 6       differences of numbers of 2 and of 4 bytes, in digits of 8 bits

A difference is new minus old, modulo the number's range, and written as ``2 * d`` or, below zero, ``-2 * d - 1``, so
that small ones of either sign have high digits of zero. All differences of a kind in a block are one sequence; each of
its digits has a stream, lowest digit first, packed from a byte's low end. Floats are taken as the integers of
the same bits: what training moves a little differs in the low digits alone.

Memory stays at some 10 MiB whatever the file. Standard library only, Python >= 3.8: a push sends this file along.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, Tuple, Union

from edge_infer.bundle import hash_file
from edge_infer.errors import BundleError
from edge_infer.manifest import FileEntry
from edge_infer.records import Record

MAGIC = b"EIdelta1"
HEADER = struct.Struct("<8sQ32sQ32s")
BLOCK = struct.Struct("<II")
STREAM = struct.Struct("<BI")
#: Bytes of a piece in a recipe: kind, length, distance.
PIECE_BYTES = 1 + 4 + 8

BLOCK_BYTES = 1024 * 1024
MAX_PIECES = 4096
#: A codec may make what does not compress a little longer; one that is longer than this is refused unread.
SLACK_BYTES = 1024
#: Big integers are fastest when they stay in the processor's cache.
SLICE_BYTES = 64 * 1024

NEW, SAME = 0, 1
#: Kinds of differences: bytes of a number, bits of a digit.
DIFFERENCES: Dict[int, Tuple[int, int]] = {2: (1, 8), 3: (1, 4), 4: (1, 2), 5: (2, 8), 6: (4, 8)}

ZEROS, STORED, DEFLATE, LZMA2 = 0, 1, 2, 3
#: Codecs that a Python may have been built without, by the module that they need.
MODULES = {DEFLATE: "zlib", LZMA2: "lzma"}


def codecs() -> List[str]:
    """Which of ``zlib`` and ``lzma`` this Python has: a device's facts, from which the host chooses."""
    import importlib

    found = []
    for module in MODULES.values():
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        found.append(module)
    return found


def lzma_filters() -> List[Dict[str, int]]:
    """Fixed, so that no delta can ask for more memory."""
    import lzma

    return [{"id": lzma.FILTER_LZMA2, "dict_size": BLOCK_BYTES, "lc": 0, "lp": 0, "pb": 0}]


@dataclass(eq=False, repr=False)
class Header(Record):
    """Which file a delta starts from and which one it makes."""

    base: FileEntry
    result: FileEntry

    def to_bytes(self) -> bytes:
        base, result = bytes.fromhex(self.base.sha256), bytes.fromhex(self.result.sha256)
        return HEADER.pack(MAGIC, self.base.size, base, self.result.size, result)


def read_header(delta: BinaryIO) -> Header:
    """Raises BundleError when it is no delta of this version."""
    magic, base_size, base, size, result = HEADER.unpack(_read(delta, HEADER.size))
    if magic != MAGIC:
        raise BundleError(f"the delta begins with {magic!r}, expected {MAGIC!r}; use the same edge-infer on both ends")
    return Header(FileEntry(base_size, base.hex()), FileEntry(size, result.hex()))


def apply(base: Path, base_entry: FileEntry, delta: Union[Path, BinaryIO], out: Path, entry: FileEntry) -> None:
    """Write the file that ``delta`` makes of ``base`` to ``out``, which must not exist yet.

    ``base_entry`` and ``entry`` are what the two releases' manifests say of the files: the delta must be between just
    these, and no more than ``entry.size`` bytes are ever written. A ``delta`` that is a stream ends where the delta
    ends. Raises BundleError when anything is amiss, or the result has another hash; ``out`` is then removed. It is
    neither synced nor renamed: that is for the store.
    """
    if isinstance(delta, Path):
        with open(str(delta), "rb") as file:
            return apply(base, base_entry, file, out, entry)
    header = read_header(delta)
    for what, said, expected in (("base", header.base, base_entry), ("result", header.result, entry)):
        if (said.size, said.sha256) != (expected.size, expected.sha256):
            raise BundleError(
                f"the delta's {what} is {said.sha256[:12]} ({said.size} bytes), expected {expected.sha256[:12]} "
                f"({expected.size} bytes); push again with --no-delta"
            )
    with _Base(base, base_entry.size) as old:
        descriptor = os.open(str(out), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            with os.fdopen(descriptor, "wb") as file:
                observed = _write(old, delta, file, entry.size)
            if observed != entry.sha256:
                raise _wrong_result(base, base_entry, entry, observed)
        except BaseException:
            os.unlink(str(out))
            raise


def _write(old: _Base, delta: BinaryIO, file: BinaryIO, size: int) -> str:
    """Write all blocks; gives the result's SHA-256."""
    digest = hashlib.sha256()
    left = size
    while left:
        length, count = BLOCK.unpack(_read(delta, BLOCK.size))
        if not 1 <= length <= min(left, BLOCK_BYTES) or not 1 <= count <= MAX_PIECES:
            raise BundleError(
                f"the delta has a block of {length} bytes in {count} pieces, expected 1 to {min(left, BLOCK_BYTES)} "
                f"bytes in 1 to {MAX_PIECES}; it is damaged, push again"
            )
        block = _block(old, delta, length, count)
        digest.update(block)
        file.write(block)
        left -= length
    if delta.read(1):
        raise BundleError("the delta goes on after its last block; it is damaged, push again")
    return digest.hexdigest()


def _wrong_result(base: Path, base_entry: FileEntry, entry: FileEntry, observed: str) -> BundleError:
    """Says whose fault it is. The base is hashed only now: a wrong one cannot make a right result."""
    whole = hash_file(base) == base_entry.sha256
    damaged = "the delta" if whole else f"{base}, which it starts from,"
    return BundleError(
        f"the delta makes a file with SHA-256 {observed[:16]}..., expected {entry.sha256[:16]}...: {damaged} is "
        "damaged; push again with --no-delta"
    )


class _Base:
    """The old file, read piece by piece: mapping it would end the process were it cut off meanwhile."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        try:
            self._descriptor = os.open(str(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise BundleError(f"the delta's base {path} cannot be read: {error.strerror}") from None
        info = os.fstat(self._descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_size != size:
            os.close(self._descriptor)
            raise BundleError(
                f"the delta's base {path} has {info.st_size} bytes, expected a plain file of {size}; push again with "
                "--no-delta"
            )

    def __enter__(self) -> _Base:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``, both of which may be anything."""
        if offset < 0 or offset + size > self.size:
            raise BundleError(
                f"the delta refers to bytes {offset} to {offset + size} of its base, which has {self.size}; it is "
                "damaged, push again"
            )
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise BundleError(f"the delta's base {self.path} became shorter; push again with --no-delta")
        return data


def _block(old: _Base, delta: BinaryIO, length: int, count: int) -> bytearray:
    """The bytes of one block of the result."""
    recipe = _stream(delta, count * PIECE_BYTES)
    fields = struct.unpack(f"<{count}B{count}I{count}q", recipe)
    kinds, lengths, distances = fields[:count], fields[count : 2 * count], fields[2 * count :]
    _check_recipe(kinds, lengths, distances, length)
    parts = {kind: _part(old, delta, kind, kinds, lengths, distances) for kind in sorted(set(kinds))}
    block, taken = bytearray(), dict.fromkeys(parts, 0)
    for kind, size in zip(kinds, lengths):
        start = taken[kind]
        block += parts[kind][start : start + size]
        taken[kind] = start + size
    return block


def _check_recipe(kinds: Tuple[int, ...], lengths: Tuple[int, ...], distances: Tuple[int, ...], length: int) -> None:
    known = all(kind in (NEW, SAME) or kind in DIFFERENCES for kind in kinds)
    if not known or min(lengths) < 1 or sum(lengths) != length:
        raise BundleError(
            f"the delta's pieces add up to {sum(lengths)} bytes of the kinds {sorted(set(kinds))}, expected {length} "
            "of known kinds, none of them empty; it is damaged, push again"
        )
    if any(kind in DIFFERENCES and size % DIFFERENCES[kind][0] for kind, size in zip(kinds, lengths)):
        raise BundleError("the delta has a piece that ends within a number; it is damaged, push again")
    if any(kind == NEW and distance for kind, distance in zip(kinds, distances)):
        raise BundleError("the delta has new bytes that have a base; it is damaged, push again")


def _part(
    old: _Base,
    delta: BinaryIO,
    kind: int,
    kinds: Tuple[int, ...],
    lengths: Tuple[int, ...],
    distances: Tuple[int, ...],
) -> bytes:
    """What all pieces of a kind have, one after the other."""
    if kind == NEW:
        return _stream(delta, sum(size for other, size in zip(kinds, lengths) if other == NEW))
    base = bytearray()
    for other, offset, size in _places(kinds, lengths, distances):
        if other == kind:
            base += old.read(offset, size)
    if kind == SAME:
        return bytes(base)
    width, bits = DIFFERENCES[kind]
    return add(bytes(base), _differences(delta, len(base), width, bits), width)


def _places(
    kinds: Tuple[int, ...], lengths: Tuple[int, ...], distances: Tuple[int, ...]
) -> Iterator[Tuple[int, int, int]]:
    """Kind, offset in the base and length of each piece that has a base."""
    position = 0
    for kind, size, distance in zip(kinds, lengths, distances):
        if kind != NEW:
            yield kind, position + distance, size
            position += distance + size


def _differences(delta: BinaryIO, size: int, width: int, bits: int) -> bytes:
    """The differences of ``size`` bytes of numbers, from the streams of their digits."""
    if bits < 8:
        packed = -(-size * bits // 8)
        return join_digits([_stream(delta, packed) for _ in range(8 // bits)], size, bits)
    planes = [_stream(delta, size // width) for _ in range(width)]
    if width == 1:
        return planes[0]
    merged = bytearray(size)
    for number, plane in enumerate(planes):
        merged[number::width] = plane
    return bytes(merged)


def join_digits(planes: List[bytes], size: int, bits: int) -> bytes:
    """``size`` bytes, each from a digit of ``bits`` bits in every plane, lowest first."""
    value = 0
    for number, plane in enumerate(planes):
        spread = bytearray(len(plane) * 8 // bits)
        for place in range(8 // bits):
            spread[place :: 8 // bits] = plane.translate(_digit_table(bits, place))
        # A digit stays in its byte, so the bytes can be shifted as one number.
        value |= int.from_bytes(spread[:size], "little") << number * bits
    return value.to_bytes(size, "little")


def _digit_table(bits: int, place: int) -> bytes:
    return bytes((byte >> place * bits) & ((1 << bits) - 1) for byte in range(256))


def add(base: bytes, differences: bytes, width: int) -> bytes:
    """The numbers of ``base`` (``width`` bytes each) plus the differences, modulo their range.

    Without numpy, one number at a time would take a second a megabyte: a slice is one big integer whose lanes are
    kept from carrying into each other.
    """
    masks = _masks(min(len(base), SLICE_BYTES), width)
    made = []
    for start in range(0, len(base), SLICE_BYTES):
        old, change = base[start : start + SLICE_BYTES], differences[start : start + SLICE_BYTES]
        if len(old) != min(len(base), SLICE_BYTES):
            masks = _masks(len(old), width)
        made.append(_add_slice(old, change, width, *masks))
    return b"".join(made)


def _masks(size: int, width: int) -> Tuple[int, int, int]:
    """Of every lane: the lowest bit, the highest, all but the highest."""
    count = size // width
    lowest = int.from_bytes((b"\1" + bytes(width - 1)) * count, "little")
    highest = lowest << 8 * width - 1
    return lowest, highest, ((1 << 8 * size) - 1) ^ highest


def _add_slice(base: bytes, differences: bytes, width: int, lowest: int, highest: int, others: int) -> bytes:
    old, folded = int.from_bytes(base, "little"), int.from_bytes(differences, "little")
    negative = folded & lowest
    # An odd 2n + 1 stands for -n - 1, which is n with every bit turned.
    change = ((folded >> 1) & others) ^ ((negative << 8 * width) - negative)
    total = ((old & others) + (change & others)) ^ ((old ^ change) & highest)
    return total.to_bytes(len(base), "little")


def _stream(delta: BinaryIO, size: int) -> bytes:
    """The next stream, unpacked to ``size`` bytes."""
    codec, packed = STREAM.unpack(_read(delta, STREAM.size))
    most = {ZEROS: 0, STORED: size}.get(codec, size + SLACK_BYTES)
    if packed > most:
        raise BundleError(f"the delta has {packed} bytes where at most {most} are expected; it is damaged, push again")
    data = _read(delta, packed)
    if codec == ZEROS:
        return bytes(size)
    made = data if codec == STORED else _unpack(codec, data, size)
    if len(made) != size:
        raise BundleError(f"the delta has a stream of {len(made)} bytes, expected {size}; it is damaged, push again")
    return made


def _unpack(codec: int, data: bytes, size: int) -> bytes:
    if codec not in MODULES:
        raise BundleError(f"the delta has the codec {codec}, which is not known; use the same edge-infer on both ends")
    unpacker, failure = _unpacker(codec)
    try:
        made: bytes = unpacker.decompress(data, size + 1)  # never more than one byte too many
    except failure as error:
        raise BundleError(f"the delta cannot be unpacked ({error}); it is damaged, push again") from None
    except MemoryError:
        raise BundleError("there is too little memory to unpack the delta; push again with --no-delta") from None
    if len(made) == size and (not unpacker.eof or unpacker.unused_data):
        raise BundleError("the delta has a stream that does not end where it should; it is damaged, push again")
    return made


def _unpacker(codec: int) -> Tuple[Any, Any]:
    """An object with ``decompress(data, most)`` and what it raises. Raises BundleError when this Python has none."""
    try:
        if codec == DEFLATE:
            import zlib

            return zlib.decompressobj(-15), zlib.error
        import lzma

        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=lzma_filters()), (lzma.LZMAError, EOFError)
    except ImportError:
        raise BundleError(
            f"the delta needs the module {MODULES[codec]}, which this Python lacks; push again with --no-delta"
        ) from None


def _read(delta: BinaryIO, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = delta.read(size - len(data))
        if not more:
            raise BundleError("the delta ends too early; it is damaged, push again")
        data += more
    return bytes(data)
