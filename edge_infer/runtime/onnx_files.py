"""Which files an ONNX model refers to, read straight from its protobuf bytes.

ONNX keeps the path of external data as text inside each tensor (``TensorProto.external_data``, key ``location``),
at any depth: initializers, attributes, subgraphs, functions. A device has no onnx package, so this walks the wire
format itself. It follows only the fields that can hold a tensor; numbers are those of onnx.proto.
https://protobuf.dev/programming-guides/encoding/ and https://github.com/onnx/onnx/blob/main/onnx/onnx.proto

A node of type EPContext is refused: it holds what an accelerator's compiler made, or names a file with it.
https://onnxruntime.ai/docs/execution-providers/EP-Context-Design.html
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator
from pathlib import Path

from edge_infer.errors import BundleError

MAX_DEPTH = 64

#: message -> field number -> message of that field
CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}

#: NodeProto.op_type
OP_TYPE = 4


def locations_of(path: Path) -> set[str]:
    """``external_locations`` of a file, which is mapped: most of it may be weights, and those are passed over."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        return external_locations(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")


def external_locations(model: bytes | mmap.mmap) -> set[str]:
    """The ``location`` of every external tensor in a serialized ONNX ModelProto.

    Raises BundleError for what is no such message, and for a model with a node that was compiled already.
    """
    found: set[str] = set()
    _walk(memoryview(model), "Model", found, 0)
    return found


def _walk(data: memoryview, message: str, found: set[str], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise BundleError(f"the ONNX model nests deeper than {MAX_DEPTH} messages; refused")
    for number, value in _fields(data):
        child = CHILDREN[message].get(number)
        if message == "Node" and number == OP_TYPE and bytes(value) == b"EPContext":
            raise BundleError(
                "the ONNX model holds what was compiled for one accelerator already (an EPContext node), which may "
                "name any file and which nothing can check; refused; package the model that it was made from"
            )
        if child == "Entry":
            entry = dict(_fields(value))
            if bytes(entry.get(1, b"")) == b"location":
                found.add(bytes(entry.get(2, b"")).decode("utf-8", "backslashreplace"))
        elif child:
            _walk(value, child, found, depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of one message; the other wire types are passed over."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag >> 32:
            # Some protobuf readers drop these bits and would then see another field than this one.
            raise BundleError(f"the ONNX model has the field number {tag >> 3}; it is damaged or no ONNX model")
        wire = tag & 7
        if wire == 0:
            _, position = _varint(data, position)
        elif wire == 1:
            position += 8
        elif wire == 5:
            position += 4
        elif wire == 2:
            length, position = _varint(data, position)
            if length > len(data) - position:
                raise BundleError("the ONNX model ends in the middle of a field; it is cut off or no ONNX model")
            yield tag >> 3, data[position : position + length]
            position += length
        else:
            raise BundleError(f"the ONNX model has a field of wire type {wire}; it is damaged or no ONNX model")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise BundleError("the ONNX model ends in the middle of a number; it is cut off or no ONNX model")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise BundleError("the ONNX model has a number of more than 10 bytes; it is damaged or no ONNX model")
