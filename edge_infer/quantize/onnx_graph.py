"""What every ONNX artifact goes through: nodes named and sorted, debugging stripped, weights moved to a mapped file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edge_infer.errors import ConversionError

Array = np.ndarray[Any, Any]

#: Smaller tensors stay in the model: the engine folds shapes and constants while it loads.
EXTERNAL_BYTES = 1024
#: Tensors of at least a page begin on a page, smaller ones on a cache line.
LINE_BYTES = 64
CONVOLUTIONS = ("Conv", "ConvTranspose")
RECURRENT = ("LSTM", "GRU", "RNN")
#: Operators that repacking of weights speeds up by far (a factor of two for dense networks), unlike float convolutions.
#: Those in int8 take 3.7 ms without it and 2.3 with it (a MobileNet of 5 MB, x86 with VNNI).
REPACKED_OPERATORS = {
    "MatMul", "Gemm", "MatMulInteger", "MatMulNBits", "LSTM", "GRU", "RNN", "Attention", "DynamicQuantizeLSTM",
}  # fmt: skip
#: What stands between a stored weight and the operator that uses it.
DECODING_OPERATORS = {
    "DequantizeLinear",
    "Cast",
    "Mul",
    "Concat",
    "Unsqueeze",
    "Squeeze",
    "Transpose",
    "Reshape",
    "Slice",
}


def graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """A graph and those of its branches and loops."""
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            for child in inner:
                found.extend(graphs(child))
    return found


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own: the one it has, else its operator and first output, numbered where taken."""
    taken: set[str] = set()
    for graph in graphs(model.graph):
        for node in graph.node:
            wanted = node.name or f"{node.op_type}:{next((name for name in node.output if name), '')}"
            name, number = wanted, 1
            while name in taken:
                number += 1
                name = f"{wanted}:{number}"
            taken.add(name)
            node.name = name


def strip(model: onnx.ModelProto) -> None:
    """Remove what exporters leave for debugging: source lines, paths, names of intermediate values."""
    model.doc_string = ""
    del model.metadata_props[:]
    for graph in graphs(model.graph):
        graph.doc_string = ""
        del graph.metadata_props[:]
        del graph.value_info[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.doc_string = ""
            del value.metadata_props[:]


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put nodes after those they read from, which the format asks for and quantizers forget; else keep the order."""
    nodes = list(graph.node)
    maker = {output: index for index, node in enumerate(nodes) for output in node.output if output}
    waits_for = [{maker[name] for name in reads(node) if name in maker} for node in nodes]
    if all(all(other < index for other in others) for index, others in enumerate(waits_for)):
        return
    order: list[int] = []
    done: set[int] = set()
    for first in range(len(nodes)):
        stack = deque([first])
        open_nodes: set[int] = set()
        while stack:
            index = stack[-1]
            missing = sorted(waits_for[index] - done)
            if index in done or not missing:
                stack.pop()
                if index not in done:
                    done.add(index)
                    order.append(index)
                continue
            if index in open_nodes:
                raise ConversionError("the ONNX graph has a cycle; export the model again")
            open_nodes.add(index)
            stack.extend(reversed(missing))
    fresh = [onnx.NodeProto.FromString(nodes[index].SerializeToString()) for index in order]
    del graph.node[:]
    graph.node.extend(fresh)


def reads(node: onnx.NodeProto) -> set[str]:
    """Values that a node needs, those of its subgraphs included."""
    inner = [
        child
        for item in node.attribute
        for child in ([item.g] if item.type == onnx.AttributeProto.GRAPH else item.graphs)
    ]
    return set(node.input).union(*(reads(child) for graph in inner for child in graph.node))


def drop_unused_weights(graph: onnx.GraphProto) -> None:
    """Remove initializers that nothing reads any more."""
    used = {name for node in graph.node for name in reads(node)} | {output.name for output in graph.output}
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in used:
            del graph.initializer[index]


def replace_tensor(tensor: onnx.TensorProto, array: Array, name: str) -> None:
    """Put ``array`` in the place of a tensor, whose old data goes."""
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))


def externalize(model: onnx.ModelProto, path: Path, page_size: int) -> int:
    """Move the larger initializers to ``path``, aligned so that devices can map them; gives the bytes written."""
    position = 0
    with path.open("wb") as file:
        for tensor in sorted(model.graph.initializer, key=lambda tensor: tensor.name):
            if tensor.data_type == onnx.TensorProto.STRING or byte_count(tensor) < EXTERNAL_BYTES:
                continue
            # What most exporters write is written on without another copy.
            data = tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()
            alignment = page_size if len(data) >= page_size else LINE_BYTES
            position = -(-position // alignment) * alignment
            file.seek(position)
            file.write(data)
            _point(tensor, path.name, position, len(data))
            position += len(data)
    if not position:
        path.unlink()
    return position


def _point(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def worth_repacking(model: onnx.ModelProto) -> bool:
    """Whether most weight bytes feed operators that run much faster on repacked weights.

    The engine then takes private memory for them; otherwise weights are used from the mapped file as they are. Weights
    in blocks always need it: without, ONNX Runtime decodes them at every call.
    """
    if any(node.op_type == "MatMulNBits" for node in model.graph.node):
        return True
    tables = {name for node in model.graph.node if node.op_type == "Gather" for name in node.input[:1]}
    sizes = {tensor.name: byte_count(tensor) for tensor in model.graph.initializer if tensor.name not in tables}
    sources = {output: node for node in model.graph.node for output in node.output}
    repacked: set[str] = set()
    for node in model.graph.node:
        for name in node.input:
            producer = sources.get(name)
            in_int8 = producer is not None and producer.op_type == "DequantizeLinear"
            if node.op_type in REPACKED_OPERATORS or (node.op_type in CONVOLUTIONS and in_int8):
                repacked.update(item for item in _stored(name, sources) if item in sizes)
    return sum(sizes[name] for name in repacked) > sum(sizes.values()) / 2


def stored_by_layer(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """The bytes of each layer's weights as they are stored: rows of "name", "kind", "stored_bytes", as the layers run.

    A weight that two layers share counts for both.
    """
    stored = {tensor.name: byte_count(tensor) for tensor in model.graph.initializer}
    layers = []
    for node in model.graph.node:
        weights = sum(stored.get(name, 0) for name in node.input)
        if node.op_type in DECODING_OPERATORS and all(name in stored for name in node.input if name):
            stored[node.output[0]] = weights
        else:
            layers.append({"name": node.name, "kind": node.op_type, "stored_bytes": weights})
    return layers


def _stored(name: str, sources: dict[str, onnx.NodeProto]) -> Iterator[str]:
    """The values that ``name`` is decoded from, or itself."""
    producer = sources.get(name)
    if producer is None:
        yield name
    elif producer.op_type in DECODING_OPERATORS:
        yield from (found for inner in producer.input for found in _stored(inner, sources))


def byte_count(tensor: onnx.TensorProto) -> int:
    count = int(np.prod(tensor.dims)) if tensor.dims else 1
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (count + 1) // 2
    return count * max(1, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
