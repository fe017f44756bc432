"""``.tflite`` files as objects: read without copying the weights, write the same bytes for the same model.

A model is the ``ModelT`` of TensorFlow Lite's own schema, whose buffers are views of the mapped file. Writing does
not hold the weights in memory either: the graph is packed first, small, and each buffer is appended to the file.

https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs
"""

from __future__ import annotations

import hashlib
import io
import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edge_infer.errors import ConversionError

Array = np.ndarray[Any, Any]

IDENTIFIER = b"TFL3"
SIGNATURE = "serving_default"
#: The schema asks for it (``force_align: 16``), and kernels for 32-bit ARM rely on it.
ALIGNMENT = 16
#: Offsets in a flatbuffer are of 32 bits, and its verifier takes no more. Weights beyond lie behind the flatbuffer,
#: which TensorFlow Lite reads since 2.15 (``offset`` and ``size`` of a buffer).
LARGEST_FLATBUFFER = 2**31 - 1
#: Names of the built-in operators by number, as in the schema: "CONV_2D".
NAMES = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
CUSTOM = schema.BuiltinOperator.CUSTOM


def read(source: Path | bytes | bytearray | memoryview) -> Any:
    """The model in a file (mapped, so it must stay unchanged) or in memory. Raises ConversionError when it is none."""
    where = source if isinstance(source, Path) else "the model"
    data = _mapped(source) if isinstance(source, Path) else memoryview(source)
    if len(data) < 8 or bytes(data[4:8]) != IDENTIFIER:
        raise ConversionError(f"{where} is not a TFLite model, expected a file with {IDENTIFIER.decode()} at byte 4")
    try:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
        _resolve(model, data)
    except Exception as error:  # what a damaged file makes of the generated code is anything
        raise ConversionError(f"{where} is a damaged TFLite model ({error}); convert it again") from error
    return model


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")


def _resolve(model: Any, data: memoryview) -> None:
    """Bring what lies behind the flatbuffer into the objects."""
    for buffer in model.buffers or []:
        if buffer.offset > 1:  # 1 is a converter's mark for "not yet known"
            if buffer.offset + buffer.size > len(data):
                raise ValueError("a buffer lies beyond the end of the file")
            buffer.data = np.frombuffer(data[buffer.offset : buffer.offset + buffer.size], np.uint8)
        buffer.offset = buffer.size = 0
    for operator in (operator for graph in model.subgraphs or [] for operator in graph.operators or []):
        if operator.largeCustomOptionsOffset > 1:
            start, size = operator.largeCustomOptionsOffset, operator.largeCustomOptionsSize
            operator.customOptions = np.frombuffer(data[start : start + size], np.uint8)
        operator.largeCustomOptionsOffset = operator.largeCustomOptionsSize = 0


def write(model: Any, path: Path) -> None:
    """Write ``model``; the same model gives the same bytes. ``path`` must not be a file the model is mapped from."""
    with path.open("wb") as file:
        _write(model, file)


def to_bytes(model: Any) -> bytes:
    """The model as ``write`` writes it."""
    file = io.BytesIO()
    _write(model, file)
    return file.getvalue()


def _write(model: Any, file: BinaryIO) -> None:
    contents = _share_equal_buffers(model)
    inline = sum(len(data) + 2 * ALIGNMENT for data in contents.values()) < LARGEST_FLATBUFFER - 2**26
    graph = _packed_graph(model, contents, inline)
    file.write(graph)
    root = schema.Model.GetRootAs(graph, 0)
    end = len(graph)
    for index, data in contents.items():
        # A vector's length stands right before its first element, and that is what has to be aligned.
        start = _aligned(end + (4 if inline else 0))
        table = root.Buffers(index)._tab
        if inline:
            field = table.Pos + table.Offset(4)
            struct.pack_into("<I", graph, field, start - 4 - field)
            file.write(bytes(start - 4 - end) + struct.pack("<I", len(data)))
        else:
            struct.pack_into("<Q", graph, table.Pos + table.Offset(6), start)
            struct.pack_into("<Q", graph, table.Pos + table.Offset(8), len(data))
            file.write(bytes(start - end))
        file.write(data)
        end = start + len(data)
    file.write(bytes(_aligned(end) - end))
    file.seek(0)
    file.write(graph)


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _packed_graph(model: Any, contents: Mapping[int, memoryview], inline: bool) -> bytearray:
    """The flatbuffer with a place for the position of each buffer's data, filled in later."""
    kept = model.buffers
    empty = np.zeros(0, np.uint8)
    model.buffers = [schema.BufferT() for _ in kept]
    for index in contents:
        if inline:
            model.buffers[index].data = empty
        else:
            model.buffers[index].offset = model.buffers[index].size = 1
    try:
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
        return bytearray(builder.Output())
    finally:
        model.buffers = kept


def _share_equal_buffers(model: Any) -> dict[int, memoryview]:
    """Let tensors of equal contents share a buffer and drop unused ones; gives the bytes by buffer number.

    Tied weights are stored once, as converters mean it, but quantizers write each copy. Buffer 0 is empty by
    convention and stays.
    """
    numbers: dict[int, int] = {0: 0}
    seen: dict[tuple[int, bytes], int] = {}
    kept, contents = [schema.BufferT()], {}
    for holder in [*_tensors(model), *(model.metadata or [])]:
        old = holder.buffer
        if old not in numbers:
            data = _bytes(model.buffers[old].data)
            # An empty buffer of its own marks a tensor's buffer as the only one of a variable; keep it apart.
            key = (len(data), hashlib.sha256(data).digest()) if len(data) else (0, old.to_bytes(4, "little"))
            if key not in seen:
                seen[key] = len(kept)
                if len(data):
                    contents[len(kept)] = data
                kept.append(model.buffers[old])
            numbers[old] = seen[key]
        holder.buffer = numbers[old]
    model.buffers = kept
    model.metadataBuffer = None
    return contents


def _bytes(data: Any) -> memoryview:
    """A buffer's bytes; ``data`` is an array, a list of bytes or None."""
    if data is None:
        return memoryview(b"")
    array: Any = np.ascontiguousarray(data if isinstance(data, np.ndarray) else np.array(data, np.uint8))
    return memoryview(array.reshape(-1).view(np.uint8))


def _tensors(model: Any) -> Iterable[Any]:
    return (tensor for graph in model.subgraphs for tensor in graph.tensors)


def operator_code(code: Any) -> int:
    """The operator's number: old files have it in a field of one byte, whose largest value points to the new one."""
    return int(max(code.builtinCode, code.deprecatedBuiltinCode))


def operators(model: Any) -> list[str]:
    """Sorted names of the built-in operators. Custom and Flex ones, which plain engines lack, are refused by name."""
    used = {operator.opcodeIndex for graph in model.subgraphs for operator in graph.operators or []}
    codes = [model.operatorCodes[index] for index in sorted(used)]
    custom = sorted({_custom_name(code) for code in codes if code.customCode or operator_code(code) == CUSTOM})
    if custom:
        raise ConversionError(
            f"the TFLite model needs the custom operators {', '.join(custom)}, which plain engines lack; "
            "convert it with built-in operators only, or export the model to ONNX and package that"
        )
    return sorted({NAMES.get(operator_code(code), str(operator_code(code))) for code in codes})


def add_operator_code(model: Any, builtin: int) -> int:
    """Declare a built-in operator; gives the number by which operators refer to it."""
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), 1
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _custom_name(code: Any) -> str:
    return (code.customCode or b"without a name").decode("utf-8", "replace")


def scan(model_bytes: bytes) -> list[str]:
    """Sorted names of the built-in operators in a ``.tflite``. Raises ConversionError for custom or Flex ones."""
    return operators(read(model_bytes))


def rename_signature(
    model_bytes: bytes, inputs: Mapping[str, str], outputs: Mapping[str, str], key: str = SIGNATURE
) -> bytes:
    """The model with one signature ``key`` whose inputs and outputs have new names (old -> new, each of them).

    The old names are those of the only signature; in a file without signatures, the names of the main graph's
    tensors. Raises ConversionError when a name is not there or the file has several signatures.
    """
    model = read(model_bytes)
    rename(model, inputs, outputs, key)
    return to_bytes(model)


def rename(model: Any, inputs: Mapping[str, str], outputs: Mapping[str, str], key: str = SIGNATURE) -> None:
    """``rename_signature`` of a model read already."""
    signature = only_signature(model)
    signature.signatureKey = key.encode()
    for what, entries, names in (("input", signature.inputs, inputs), ("output", signature.outputs, outputs)):
        have = [entry.name.decode() for entry in entries]
        if sorted(have) != sorted(names) or len(set(names.values())) != len(names):
            raise ConversionError(
                f"the TFLite model's {what}s are {', '.join(sorted(have))}, "
                f"expected to rename {', '.join(sorted(names))} to different names"
            )
        for entry in entries:
            entry.name = names[entry.name.decode()].encode()
        entries.sort(key=lambda entry: entry.name)
    model.signatureDefs = [signature]


def only_signature(model: Any) -> Any:
    """The model's only signature; one made of its main graph where it has none."""
    known = model.signatureDefs or []
    if len(known) > 1:
        names = ", ".join(signature.signatureKey.decode() for signature in known)
        raise ConversionError(f"the TFLite model has the signatures {names}, expected one; convert it with one")
    if known:
        return known[0]
    graph = model.subgraphs[0]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = SIGNATURE.encode(), 0
    signature.inputs = [_entry(graph, index) for index in graph.inputs]
    signature.outputs = [_entry(graph, index) for index in graph.outputs]
    return signature


def _entry(graph: Any, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = graph.tensors[index].name, int(index)
    return entry


def strip(model: Any) -> None:
    """Drop what only tells of the machine and converter that made the file: descriptions and all metadata."""
    model.description = b"edge-infer"
    model.metadata = model.metadataBuffer = None
    for graph in model.subgraphs:
        graph.debugMetadataIndex = -1
        for operator in graph.operators or []:
            operator.debugMetadataIndex = -1


def constant(model: Any, name: bytes, values: Sequence[int]) -> Any:
    """A tensor of whole numbers (int32), its contents in the model; the caller puts it into a graph."""
    buffer, tensor = schema.BufferT(), schema.TensorT()
    buffer.data = np.frombuffer(np.array(values, "<i4").tobytes(), np.uint8)
    tensor.name, tensor.type, tensor.shape = name, schema.TensorType.INT32, [len(values)]
    tensor.buffer = len(model.buffers)
    model.buffers.append(buffer)
    return tensor


def add_metadata(model: Any, name: str, data: bytes) -> None:
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = np.frombuffer(data, np.uint8)
    entry.name, entry.buffer = name.encode(), len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]


def unique_tensor_names(model: Any) -> None:
    """Give every tensor a name of its own: quantizers tell tensors by name."""
    seen: set[bytes] = set()
    for number, tensor in enumerate(_tensors(model)):
        name = tensor.name or b"tensor"
        if name in seen:
            name = b"%s#%d" % (name, number)
        seen.add(name)
        tensor.name = name
