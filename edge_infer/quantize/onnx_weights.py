"""Weights stored in fewer bits, and computing on them: in float, in 4- or 8-bit blocks, or with dynamic int8.

Three ways to store a weight:

* *decoded while loading*: an int8 or float16 tensor with ``Cast`` (and ``Mul`` by a scale a channel) in front of the
  operator. ONNX Runtime folds constants while it loads, so the model runs at float speed; memory is that of float.
  ``DequantizeLinear`` would not be folded: it runs at every call and keeps convolutions from their fast layout (a
  MobileNet of 5 MB: 3.7 ms in float, 3.7 folded, 10 with DequantizeLinear, 15 with ConvInteger; x86 with VNNI).
* *in blocks*: ``MatMulNBits``, which reads the packed weights while it multiplies.
* *dynamic*: ``MatMulInteger`` on activations quantized while running.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.capi import _pybind_state as kernels

from edge_infer.errors import ConversionError
from edge_infer.quantize.onnx_graph import RECURRENT, attribute, drop_unused_weights, replace_tensor, sort_nodes

Array = np.ndarray[Any, Any]

#: Smaller weights stay as they are: their bytes do not count, and a quantized activation costs more than they save.
SMALLEST = 1024
#: Weights in a block that share a scale. Measured on 1024 x 1024 layers of normal weights, one thread, x86 with VNNI:
#: 4 bits in blocks of 16 / 32 / 64 / 128 give an error of 0.177 / 0.206 / 0.231 / 0.254 of the output's deviation at
#: 4.9 / 4.0 / 3.6 / 3.4 MB; 8 bits 0.015 / 0.017 / 0.018 / 0.020. Times differ little below 64 rows.
BLOCK = {4: 32, 8: 128}
#: Sizes that there are, and what a block's scale and zero point take.
BLOCKS, SCALE_BYTES = (128, 64, 32, 16), 5
#: Activations are rounded to int8 in blocks too. It adds 0.0003 to the error of 4 bits and 0.004 to that of 8, and is 4
#: times as fast at one row; without it ONNX Runtime decodes all 8-bit weights at every call (22 ms against 0.1).
ACCURACY_LEVEL = 4
CONTRIB = "com.microsoft"
INT8_LIMIT = 127
#: Larger values have no float16.
FLOAT16_LIMIT = float(np.finfo(np.float16).max)


def store_float16(model: onnx.ModelProto) -> None:
    """All larger float weights in float16, decoded while loading; computing stays in float."""
    nodes = []
    for tensor in model.graph.initializer:
        if _size(tensor) < SMALLEST or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        array = numpy_helper.to_array(tensor)
        if np.abs(array).max() > FLOAT16_LIMIT:
            continue
        name = tensor.name
        replace_tensor(tensor, array.astype(np.float16), f"{name}#float16")
        nodes.append(_cast(f"{name}#float16", name))
    model.graph.node.extend(nodes)
    sort_nodes(model.graph)


def store_int8(model: onnx.ModelProto, operators: set[str]) -> int:
    """The weights of ``operators`` in int8, a scale a channel, decoded while loading; gives how many there were."""
    axes = {name: axis for node in model.graph.node for name, axis in _weights(node, operators)}
    nodes, scales = [], []
    for tensor in model.graph.initializer:
        if tensor.name not in axes or not _is_weight(tensor):
            continue
        name = tensor.name
        codes, scale = int8_codes(numpy_helper.to_array(tensor), axes[name])
        replace_tensor(tensor, codes, f"{name}#int8")
        scales.append(numpy_helper.from_array(scale, f"{name}#scale"))
        nodes.append(_cast(f"{name}#int8", f"{name}#codes"))
        nodes.append(_node("Mul", [f"{name}#codes", f"{name}#scale"], name))
    model.graph.initializer.extend(scales)
    model.graph.node.extend(nodes)
    sort_nodes(model.graph)
    return len(scales)


def store_tables(model: onnx.ModelProto) -> int:
    """Tables that rows are looked up in (embeddings) in int8, a scale a row, decoded row by row; gives how many."""
    tables = {tensor.name: tensor for tensor in model.graph.initializer if _is_weight(tensor) and len(tensor.dims) == 2}
    coded: dict[str, list[onnx.TensorProto]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "Gather" or node.input[0] not in tables or attribute(node, "axis", 0):
            nodes.append(node)
            continue
        table, output = node.input[0], node.output[0]
        if table not in coded:
            parts = zip(
                ("rows_int8", "rows_scale"), int8_codes(numpy_helper.to_array(tables[table]), (0,)), strict=True
            )
            coded[table] = [numpy_helper.from_array(part, f"{table}#{key}") for key, part in parts]
        nodes.append(_node("Gather", [coded[table][0].name, node.input[1]], f"{output}#rows_int8"))
        nodes.append(_cast(f"{output}#rows_int8", f"{output}#rows_codes"))
        nodes.append(_node("Gather", [coded[table][1].name, node.input[1]], f"{output}#rows_scale"))
        nodes.append(_node("Mul", [f"{output}#rows_codes", f"{output}#rows_scale"], output))
    if coded:
        _replace_nodes(model, nodes, [tensor for group in coded.values() for tensor in group])
    return len(coded)


def int8_codes(array: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Symmetric codes of -127..127 and the scale, one for each index of ``axes``, shaped to multiply with them."""
    others = tuple(index for index in range(array.ndim) if index not in axes)
    reach = np.maximum(array.max(axis=others, keepdims=True), -array.min(axis=others, keepdims=True))
    scale = (np.where(reach > 0, reach, 1) / INT8_LIMIT).astype(np.float32)
    codes = array / scale
    np.rint(codes, out=codes)
    np.clip(codes, -INT8_LIMIT, INT8_LIMIT, out=codes)
    return codes.astype(np.int8), scale


def store_blocks(model: onnx.ModelProto, bits: int) -> int:
    """The weights of MatMul and Gemm in blocks of 4 or 8 bits; gives how many layers there were."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    packed: dict[tuple[str, bool], list[onnx.TensorProto]] = {}
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        if not _is_dense(node, weights) or _size(weights[node.input[1]]) < SMALLEST:
            nodes.append(node)
            continue
        count += 1
        turned = bool(attribute(node, "transB", 0))
        key = (node.input[1], turned)
        if key not in packed:
            packed[key] = _packed(weights[node.input[1]], turned, bits)
        rows, columns = reversed(weights[node.input[1]].dims) if turned else weights[node.input[1]].dims
        product, rest = _bias(node)
        options = {
            "K": rows,
            "N": columns,
            "bits": bits,
            "block_size": _block(rows, bits),
            "accuracy_level": ACCURACY_LEVEL,
        }
        inputs = [node.input[0], *(tensor.name for tensor in packed[key])]
        nodes.append(helper.make_node("MatMulNBits", inputs, [product], node.name, domain=CONTRIB, **options))
        nodes.extend(rest)
    _replace_nodes(model, nodes, [tensor for group in packed.values() for tensor in group])
    if count:
        _import_contrib(model)
    return count


def make_dynamic(model: onnx.ModelProto, signed: bool) -> int:
    """MatMul and Gemm on int8, a scale a column, activations quantized while running; gives how many layers there were.

    ``signed``: int8 weights, which x86 multiplies faster from VNNI on and less exactly before it; else the same codes
    shifted into uint8.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    coded: dict[tuple[str, bool], list[onnx.TensorProto]] = {}
    quantized: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        if not _is_dense(node, weights) or _size(weights[node.input[1]]) < SMALLEST:
            nodes.append(node)
            continue
        count += 1
        source, key = node.input[0], (node.input[1], bool(attribute(node, "transB", 0)))
        if key not in coded:
            coded[key] = _coded(weights[node.input[1]], key[1], signed)
        if source not in quantized:
            quantized.add(source)
            outputs = [f"{source}#quantized", f"{source}#scale", f"{source}#zero_point"]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [source], outputs, f"{source}#QuantizeLinear"))
        nodes.extend(_integer_product(node, [tensor.name for tensor in coded[key]]))
    _replace_nodes(model, nodes, [tensor for group in coded.values() for tensor in group])
    return count


def make_lstm_dynamic(model: onnx.ModelProto, signed: bool) -> int:
    """LSTM on int8, a scale a gate's row, activations quantized while running; gives how many layers there were.

    ``signed``: as in ``make_dynamic``.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer if _is_weight(tensor)}
    tensors: dict[str, list[onnx.TensorProto]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "LSTM" or not {*node.input[1:3]} <= {*weights} or attribute(node, "layout", 0):
            nodes.append(node)
            continue
        for name in node.input[1:3]:
            tensors[name] = tensors.get(name) or _coded_gates(weights[name], signed)
        matrices, parameters = zip(*((tensors[name][0], tensors[name][1:]) for name in node.input[1:3]), strict=True)
        others = [*node.input[3:8], *[""] * (8 - max(3, len(node.input)))]
        names = [tensor.name for tensor in matrices], [tensor.name for pair in parameters for tensor in pair]
        inputs = [node.input[0], *names[0], *others, *names[1]]
        made = helper.make_node("DynamicQuantizeLSTM", inputs, list(node.output), node.name, domain=CONTRIB)
        made.attribute.extend(item for item in node.attribute if item.name != "layout")
        nodes.append(made)
    count = sum(node.op_type == "DynamicQuantizeLSTM" for node in nodes)
    if count:
        _replace_nodes(model, nodes, [tensor for group in tensors.values() for tensor in group])
        _import_contrib(model)
    return count


def _coded_gates(tensor: onnx.TensorProto, signed: bool) -> list[onnx.TensorProto]:
    """Codes [directions, inputs, gates], scales and zero points [directions, gates] of [directions, gates, inputs]."""
    codes, scale = int8_codes(numpy_helper.to_array(tensor), (0, 1))
    scale = scale[..., 0]
    codes, zeros = _shifted(codes, scale, signed)
    parts = {"int8": np.ascontiguousarray(codes.transpose(0, 2, 1)), "scale": scale, "zero_point": zeros}
    return [numpy_helper.from_array(part, f"{tensor.name}#{key}") for key, part in parts.items()]


def _integer_product(node: onnx.NodeProto, weight: list[str]) -> list[onnx.NodeProto]:
    """As ONNX Runtime's own quantizer writes it, which the engine fuses into one operator."""
    source, name = node.input[0], node.name
    product, rest = _bias(node)
    codes, scale, zero = weight
    return [
        helper.make_node(
            "MatMulInteger",
            [f"{source}#quantized", codes, f"{source}#zero_point", zero],
            [f"{product}#integer"],
            f"{name}#quant",
        ),
        _cast(f"{product}#integer", f"{product}#unscaled"),
        _node("Mul", [f"{source}#scale", scale], f"{product}#scale"),
        _node("Mul", [f"{product}#unscaled", f"{product}#scale"], product),
        *rest,
    ]


def _bias(node: onnx.NodeProto) -> tuple[str, list[onnx.NodeProto]]:
    """Where the product goes, and the addition behind it for a Gemm that has one."""
    if len(node.input) < 3 or not node.input[2]:
        return node.output[0], []
    product = f"{node.output[0]}#product"
    return product, [_node("Add", [product, node.input[2]], node.output[0])]


def _is_dense(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    """Whether a node multiplies by a constant float matrix, adding at most a bias."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain or node.input[1] not in weights:
        return False
    weight = weights[node.input[1]]
    plain = (
        attribute(node, "transA", 0) == 0
        and attribute(node, "alpha", 1.0) == 1.0
        and attribute(node, "beta", 1.0) == 1.0
    )
    return plain and len(weight.dims) == 2 and weight.data_type == onnx.TensorProto.FLOAT


def _block(rows: int, bits: int) -> int:
    """The block size: BLOCK, or a smaller one where filling the last block up would cost more than more scales do."""
    sizes = [size for size in BLOCKS if size <= BLOCK[bits]]
    return min(sizes, key=lambda size: -(-rows // size) * (size * bits / 8 + SCALE_BYTES))


def _packed(tensor: onnx.TensorProto, turned: bool, bits: int) -> list[onnx.TensorProto]:
    """Codes [columns, blocks, bytes], scales and zero points of a matrix, as ``MatMulNBits`` reads them."""
    array = _matrix(tensor, turned)
    rows, columns = array.shape
    block = _block(rows, bits)
    blocks = -(-rows // block)
    array = np.pad(array, ((0, blocks * block - rows), (0, 0)))
    codes = np.zeros((columns, blocks, block * bits // 8), np.uint8)
    scales = np.zeros((columns, blocks), np.float32)
    zeros = np.zeros((columns, -(-blocks * bits // 8)), np.uint8)
    pack = {4: kernels.quantize_matmul_4bits, 8: kernels.quantize_matmul_8bits}[bits]
    pack(codes, array, scales, zeros, block, columns, rows, False)
    name = f"{tensor.name}#turned" if turned else tensor.name
    parts = {f"{name}#int{bits}": codes, f"{name}#scales": scales, f"{name}#zero_points": zeros}
    return [numpy_helper.from_array(part, key) for key, part in parts.items()]


def _coded(tensor: onnx.TensorProto, turned: bool, signed: bool) -> list[onnx.TensorProto]:
    """Codes, scales and zero points of a matrix, one a column."""
    codes, scale = int8_codes(_matrix(tensor, turned), (1,))
    codes, zeros = _shifted(codes, scale.reshape(-1), signed)
    name = f"{tensor.name}#turned" if turned else tensor.name
    parts = {f"{name}#int8": codes, f"{name}#scale": scale.reshape(-1), f"{name}#zero_point": zeros}
    return [numpy_helper.from_array(part, key) for key, part in parts.items()]


def _shifted(codes: Array, scale: Array, signed: bool) -> tuple[Array, Array]:
    """Codes as int8 or uint8, and the zero point of each scale."""
    if not signed:
        codes = (codes.astype(np.int16) + 128).astype(np.uint8)
    return codes, np.full(scale.shape, 0 if signed else 128, codes.dtype)


def _matrix(tensor: onnx.TensorProto, turned: bool) -> Array:
    array = numpy_helper.to_array(tensor)
    return np.ascontiguousarray(array.T) if turned else array


def _weights(node: onnx.NodeProto, operators: set[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The weights of a node and the axes of their output channels; none where several channels share a row."""
    if node.op_type not in operators or node.domain or len(node.input) < 2:
        return
    if node.op_type in RECURRENT:
        yield from ((name, (0, 1)) for name in node.input[1:3])
    elif node.op_type == "ConvTranspose":
        yield node.input[1], (1,) if attribute(node, "group", 1) == 1 else ()
    else:
        yield node.input[1], (0,)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) >= 2 and _size(tensor) >= SMALLEST


def _size(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims))


def _cast(source: str, output: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [output], f"{output}#Cast", to=onnx.TensorProto.FLOAT)


def _node(operator: str, inputs: list[str], output: str) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], f"{output}#{operator}")


def _replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto]) -> None:
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    drop_unused_weights(model.graph)
    model.graph.initializer.extend(tensors)


def _import_contrib(model: onnx.ModelProto) -> None:
    if CONTRIB not in {item.domain for item in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def refuse_unless(count: int, model: onnx.ModelProto, served: str, instead: str) -> None:
    """Raise ConversionError in one sentence when nothing of the model could be stored as asked."""
    if not count:
        operators = ", ".join(sorted({node.op_type for node in model.graph.node})[:8])
        raise ConversionError(
            f"the model has no {served} with {SMALLEST} or more constant float weights (it has {operators}), "
            f"so there is nothing to store in fewer bits; choose {instead}"
        )
