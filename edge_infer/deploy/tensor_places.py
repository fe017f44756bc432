"""Where the numbers of a bundle's files lie: each tensor's name, offset and width, read from the files themselves.

Only for finding what a tensor of a new release is best compared with, so anything unclear is left out: a file of
another kind, or a damaged one, has no places, and its bytes are compared as they come. Needs no framework: the machine
that pushes may have none.
"""

from __future__ import annotations

import ast
import io
import json
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_infer.bundle import Bundle

#: Fields of the schema's tables by position in their vtables.
#: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs
MODEL_SUBGRAPHS, MODEL_BUFFERS = 2, 4
SUBGRAPH_TENSORS = 0
TENSOR_TYPE, TENSOR_BUFFER, TENSOR_NAME, TENSOR_QUANTIZATION = 1, 2, 3, 4
QUANTIZATION_SCALE = 2
BUFFER_DATA, BUFFER_OFFSET, BUFFER_SIZE = 0, 1, 2
#: Bytes of a number by TensorType; all others are taken as bytes.
TFLITE_WIDTHS = {0: 4, 1: 2, 2: 4, 4: 4, 7: 2, 10: 4, 16: 2}
#: The same by TensorProto.DataType: float, uint16, int16, int32, int64, float16, double, uint32, uint64, bfloat16.
ONNX_WIDTHS = {1: 4, 4: 2, 5: 2, 6: 4, 7: 4, 10: 2, 11: 4, 12: 4, 13: 4, 16: 2}
#: Fields of GraphProto, TensorProto and StringStringEntryProto.
#: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_DATA_TYPE, TENSOR_NAME_ONNX, TENSOR_RAW, TENSOR_EXTERNAL = 7, 5, 2, 8, 9, 13
TORCH_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int16": 2, "float64": 4, "int64": 4}
#: What a damaged file makes of the readers below.
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError, RecursionError, SyntaxError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Bytes of a file that hold numbers of ``width`` bytes (1, 2 or 4), under a name."""

    name: str
    start: int
    size: int
    width: int


def places(bundle: Bundle, name: str) -> list[Place]:
    """The places in the bundle's file ``name``, sorted, without overlaps. Empty when it is not what it should be."""
    artifact = bundle.manifest.artifact
    try:
        if name == artifact.weights:
            found = list(INDEXES[artifact.format](bundle.file(artifact.model), name))
        elif name == artifact.model:
            found = list(MODELS[artifact.format](bundle.file(name)))
        else:
            found = list(_archive(bundle.file(name))) if name.endswith(".npz") else []
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        struct.error,
        zipfile.BadZipFile,
        RecursionError,
    ):
        return []
    return _apart(sorted(found, key=lambda place: (place.start, -place.size)), bundle.manifest.files[name].size)


def _apart(found: list[Place], size: int) -> list[Place]:
    """Without empty places, those that begin within another (shared ones among them) and those beyond the end."""
    kept, end = [], 0
    for place in found:
        if place.size > 0 and place.start >= end and place.start + place.size <= size:
            kept.append(place)
            end = place.start + place.size
    return kept


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


# -- TFLite: a flatbuffer (https://flatbuffers.dev/internals/) -------------------------------------------------------


def _tflite(path: Path) -> Iterator[Place]:
    """Of every tensor its buffer, and the scales it is quantized by."""
    data = _mapped(path)
    model = _Table(data, _number(data, "<I", 0))
    buffers = model.tables(MODEL_BUFFERS)
    for number, graph in enumerate(model.tables(MODEL_SUBGRAPHS)):
        for index, tensor in enumerate(graph.tables(SUBGRAPH_TENSORS)):
            start, size = tensor.vector(TENSOR_NAME)
            # Converters number what they make, so the name alone may not be the only one of its kind.
            name = f"{number}.{bytes(data[start : start + size]).decode('utf-8', 'replace')}"
            buffer = buffers[tensor.scalar(TENSOR_BUFFER, "<I")]
            start, size = buffer.vector(BUFFER_DATA)
            if buffer.scalar(BUFFER_OFFSET, "<Q") > 1:
                start, size = buffer.scalar(BUFFER_OFFSET, "<Q"), buffer.scalar(BUFFER_SIZE, "<Q")
            yield Place(name, start, size, TFLITE_WIDTHS.get(tensor.scalar(TENSOR_TYPE, "<b"), 1))
            quantization = tensor.table(TENSOR_QUANTIZATION)
            if quantization is not None:
                start, count = quantization.vector(QUANTIZATION_SCALE)
                yield Place(f"{name}#{index}.scale", start, 4 * count, 4)


class _Table:
    """A table of a flatbuffer: its vtable says where each field lies. Reading beyond the end raises struct.error."""

    def __init__(self, data: memoryview, position: int) -> None:
        self._data, self._position = data, position
        self._vtable = position - _number(data, "<i", position)
        self._fields = (_number(data, "<H", self._vtable) - 4) // 2

    def _field(self, slot: int) -> int:
        offset = _number(self._data, "<H", self._vtable + 4 + 2 * slot) if slot < self._fields else 0
        return self._position + offset if offset else 0

    def scalar(self, slot: int, kind: str) -> int:
        field = self._field(slot)
        return _number(self._data, kind, field) if field else 0

    def _target(self, slot: int) -> int:
        field = self._field(slot)
        return field + _number(self._data, "<I", field) if field else 0

    def vector(self, slot: int) -> tuple[int, int]:
        """Where its first element lies, and the number of elements."""
        target = self._target(slot)
        return (target + 4, _number(self._data, "<I", target)) if target else (0, 0)

    def table(self, slot: int) -> _Table | None:
        target = self._target(slot)
        return _Table(self._data, target) if target else None

    def tables(self, slot: int) -> list[_Table]:
        start, count = self.vector(slot)
        positions = range(start, start + 4 * count, 4)
        return [_Table(self._data, position + _number(self._data, "<I", position)) for position in positions]


def _number(data: memoryview, kind: str, position: int) -> int:
    if position < 0:
        raise ValueError("a position before the beginning")
    return int(struct.unpack_from(kind, data, position)[0])


# -- ONNX: protobuf (https://protobuf.dev/programming-guides/encoding/) ----------------------------------------------


@dataclass(frozen=True)
class _Field:
    """One field of a message: its number, its bytes and where they begin in the file; a varint's value is ``value``."""

    number: int
    data: memoryview
    start: int
    value: int = 0


def _fields(data: memoryview, start: int = 0) -> Iterator[_Field]:
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire, value = tag & 7, 0
        if wire == 0:
            begin = position
            value, position = _varint(data, position)
            end = position
        elif wire == 2:
            length, begin = _varint(data, position)
            end = begin + length
        elif wire in (1, 5):
            begin, end = position, position + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire}")
        if end > len(data):
            raise ValueError("a field beyond the end")
        yield _Field(tag >> 3, data[begin:end], start + begin, value)
        position = end


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than 10 bytes")


def _initializers(data: memoryview) -> Iterator[dict[int, list[_Field]]]:
    """The fields of every initializer of the main graph, by their numbers."""
    for field in _fields(data):
        for part in _fields(field.data, field.start) if field.number == MODEL_GRAPH else ():
            if part.number == GRAPH_INITIALIZER:
                found: dict[int, list[_Field]] = {}
                for item in _fields(part.data, part.start):
                    found.setdefault(item.number, []).append(item)
                yield found


def _onnx(path: Path) -> Iterator[Place]:
    """The initializers that lie in the model itself as raw bytes."""
    for tensor in _initializers(_mapped(path)):
        for raw in tensor.get(TENSOR_RAW, ()):
            yield Place(_onnx_name(tensor), raw.start, len(raw.data), _onnx_width(tensor))


def _onnx_weights(path: Path, name: str) -> Iterator[Place]:
    """Those that lie in the file ``name`` beside it."""
    for tensor in _initializers(_mapped(path)):
        entries = {}
        for entry in tensor.get(TENSOR_EXTERNAL, ()):
            pair = {item.number: bytes(item.data).decode() for item in _fields(entry.data)}
            entries[pair[1]] = pair.get(2, "")
        if entries.get("location") == name:
            yield Place(_onnx_name(tensor), int(entries["offset"]), int(entries["length"]), _onnx_width(tensor))


def _onnx_name(tensor: dict[int, list[_Field]]) -> str:
    return bytes(tensor[TENSOR_NAME_ONNX][0].data).decode()


def _onnx_width(tensor: dict[int, list[_Field]]) -> int:
    return ONNX_WIDTHS.get(tensor[TENSOR_DATA_TYPE][0].value, 1)


# -- archives: TorchScript, npz --------------------------------------------------------------------------------------


def _archive(path: Path) -> Iterator[Place]:
    """The members of a zip file that are stored as they are; of arrays (.npy) the numbers."""
    data = _mapped(path)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type == zipfile.ZIP_STORED:
                # https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7
                name, extra = struct.unpack_from("<HH", data, member.header_offset + 26)
                start = member.header_offset + 30 + name + extra
                yield from _member(member.filename, data[start : start + member.file_size], start)


def _member(name: str, data: memoryview, start: int) -> Iterator[Place]:
    if not name.endswith(".npy"):
        yield Place(name, start, len(data), 1)
        return
    # https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    kind, skip = ("<H", 10) if data[6] == 1 else ("<I", 12)
    header = skip + int(struct.unpack_from(kind, data, 8)[0])
    width = int(ast.literal_eval(bytes(data[skip:header]).decode("latin-1"))["descr"][2:])
    yield Place(name, start + header, len(data) - header, min(width, 4))


def _torchscript_weights(path: Path, name: str) -> Iterator[Place]:
    """The tensors that the skeleton's table lists, those of packed layers among them."""
    with zipfile.ZipFile(path) as archive:
        listed = next(item for item in archive.namelist() if item.endswith("/extra/tensors.json"))
        table = json.load(io.BytesIO(archive.read(listed)))
    for key, row in table.items():
        yield from _rows(key, row)


def _rows(name: str, row: Any) -> Iterator[Place]:
    if isinstance(row, dict) and "offset" in row:
        width = TORCH_WIDTHS.get(row["dtype"], 1)
        count = 1
        for length in row["shape"]:
            count *= length
        size = row.get("bytes", count * {"float64": 8, "int64": 8}.get(row["dtype"], width))
        yield Place(name, row["offset"], size, width)
    elif isinstance(row, dict):
        yield from _rows(name, row.get("state"))
    elif isinstance(row, list):
        for number, part in enumerate(row):
            yield from _rows(f"{name}.{number}", part)


#: Readers by format: of the model itself, and of the file of weights beside it.
MODELS: dict[str, Callable[[Path], Iterator[Place]]] = {"tflite": _tflite, "onnx": _onnx, "torchscript": _archive}
INDEXES: dict[str, Callable[[Path, str], Iterator[Place]]] = {
    "onnx": _onnx_weights,
    "torchscript": _torchscript_weights,
}
