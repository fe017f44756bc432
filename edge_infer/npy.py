"""``.npy`` files in pieces: read from any stream and written row by row, whatever their length."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from edge_infer.errors import UsageError

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

#: Bytes of an array that are in memory at a time.
PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Header:
    """What stands before the data of an ``.npy`` file. ``fortran``: the first axis varies fastest."""

    dtype: np.dtype[Any]
    shape: Shape
    fortran: bool


def read_header(file: IO[bytes]) -> Header:
    """Raises ValueError when ``file`` is no ``.npy`` file of plain numbers or strings."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"its npy version is {version}, expected 1.0 or 2.0")
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return Header(dtype, shape, fortran)


def read_pieces(file: IO[bytes]) -> Iterator[Array]:
    """The rows of an ``.npy`` file, some at a time, in C order. Raises ValueError when it is cut or too long."""
    header = read_header(file)
    if header.fortran and len(header.shape) > 1:
        yield from _fortran_pieces(file, header)
    else:
        yield from _pieces(file, header.dtype, header.shape)
    if file.read(1):  # the end of a zip's member is also where its checksum is compared
        raise ValueError("there are more bytes in it than its header says")


def _pieces(file: IO[bytes], dtype: np.dtype[Any], shape: Shape) -> Iterator[Array]:
    row = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
    step = _step(row)
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        data = file.read(rows * row)
        if len(data) != rows * row:
            raise ValueError("it ends before its data does")
        yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])


def _fortran_pieces(file: IO[bytes], header: Header) -> Iterator[Array]:
    """The rows lie scattered, so the data goes to a file that is mapped anew for each piece: its pages can go."""
    with tempfile.TemporaryFile() as copy:
        for piece in _pieces(file, header.dtype, header.shape[::-1]):
            copy.write(piece.tobytes())
        copy.flush()
        step = _step(header.dtype.itemsize * int(np.prod(header.shape[1:], dtype=np.int64)))
        for start in range(0, header.shape[0], step):
            mapped: Array = np.memmap(copy, header.dtype, "r", shape=header.shape, order="F")
            yield np.ascontiguousarray(mapped[start : start + step])


def _step(row_bytes: int) -> int:
    return max(1, PIECE_BYTES // max(1, row_bytes))


class ArrayFile:
    """An ``.npy`` file that grows along its first axis; its length enters the header at the end."""

    def __init__(self, path: Path, dtype: np.dtype[Any], row: Shape) -> None:
        self.dtype, self.row, self.rows = dtype, row, 0
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._data_begins = self._write_header()

    @property
    def shape(self) -> Shape:
        return (self.rows, *self.row)

    def append(self, rows: Array, where: object) -> None:
        """Raises UsageError for NaN, which no range and no comparison survives; ``where`` it came from."""
        if rows.dtype.kind == "f" and np.isnan(rows).any():
            number = self.rows + int(np.argwhere(np.isnan(rows))[0][0])
            raise UsageError(f"{where}: sample {number} has NaN in it, expected numbers alone")
        data = rows.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.rows += len(rows)

    def finish(self) -> list[Any]:
        """Complete the file; gives what tells its content from another's."""
        self._file.seek(0)
        # numpy leaves room in every header for the longest first dimension there can be.
        assert self._write_header() == self._data_begins
        self._file.close()
        return [self.dtype.str, list(self.shape), self._digest.hexdigest()]

    def close(self) -> None:
        self._file.close()

    def _write_header(self) -> int:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()
