"""What precision a ``.tflite`` is in, and float inputs and outputs for one whose own are integers with a scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from edge_infer.convert import tflite_files

TYPES = schema.TensorType
BYTES = frozenset((TYPES.INT8, TYPES.UINT8))
INTEGERS = BYTES | {TYPES.INT16, TYPES.INT4} | ({TYPES.INT2} if hasattr(TYPES, "INT2") else set())
QUANTIZE, DEQUANTIZE = schema.BuiltinOperator.QUANTIZE, schema.BuiltinOperator.DEQUANTIZE


def precision_of(model: Any) -> str:
    """One of the manifest's precisions, by the types of activations first and of weights then."""
    activations = {tensor.type for tensor in _tensors(model) if not _is_constant(model, tensor) and _is_scaled(tensor)}
    weights = {tensor.type for tensor in _tensors(model) if _is_constant(model, tensor) and _is_scaled(tensor)}
    if TYPES.INT16 in activations:
        return "int16x8"
    if activations & BYTES:
        return "int8-mixed" if any(_weighs_in_float(model)) else "int8"
    if TYPES.INT4 in weights:
        return "int4-weights"
    if weights & INTEGERS:
        return "int8-dynamic" if any(_read_as_integers(model)) else "int8-weights"
    halves = any(tensor.type == TYPES.FLOAT16 and _is_constant(model, tensor) for tensor in _tensors(model))
    return "float16" if halves else "float32"


def _tensors(model: Any) -> Iterator[Any]:
    return (tensor for graph in model.subgraphs for tensor in graph.tensors)


def _is_scaled(tensor: Any) -> bool:
    """Whether its integers stand for other numbers."""
    scale = tensor.quantization.scale if tensor.quantization is not None else None
    return tensor.type in INTEGERS and scale is not None and len(scale) > 0


def _is_constant(model: Any, tensor: Any) -> bool:
    data = model.buffers[tensor.buffer].data
    return data is not None and len(data) > 0


def _constants_read(model: Any) -> Iterator[tuple[int, Any]]:
    """Every constant with the operator that reads it."""
    for graph in model.subgraphs:
        for operator in graph.operators or []:
            code = tflite_files.operator_code(model.operatorCodes[operator.opcodeIndex])
            for index in operator.inputs:
                if index >= 0 and _is_constant(model, graph.tensors[index]):
                    yield code, graph.tensors[index]


def _weighs_in_float(model: Any) -> Iterator[bool]:
    """Of each constant that is a matrix or more: whether an operator computes with it in float32."""
    return (
        tensor.type == TYPES.FLOAT32 and tensor.shape is not None and len(tensor.shape) > 1
        for _, tensor in _constants_read(model)
    )


def _read_as_integers(model: Any) -> Iterator[bool]:
    """Of each constant with a scale: whether an operator computes with its integers, not with what they stand for."""
    return (code != DEQUANTIZE for code, tensor in _constants_read(model) if _is_scaled(tensor))


def with_float_ends(model: Any, signature: Any) -> None:
    """Let the signature take and give float32 where its tensors are integers with a scale.

    The model itself converts, so a scale and a zero point are nobody's business outside; what it computes stays.
    """
    graph = model.subgraphs[signature.subgraphIndex]
    inputs = {int(entry.tensorIndex) for entry in signature.inputs if _is_scaled(graph.tensors[entry.tensorIndex])}
    outputs = {int(entry.tensorIndex) for entry in signature.outputs if _is_scaled(graph.tensors[entry.tensorIndex])}
    inside = {index: _float_twin(graph, index) for index in sorted(inputs)}
    outside = {index: _float_twin(graph, index) for index in sorted(outputs)}
    before = [_operator(model, QUANTIZE, twin, index) for index, twin in inside.items()]
    after = [_operator(model, DEQUANTIZE, index, twin) for index, twin in outside.items()]
    graph.operators = [*before, *(graph.operators or []), *after]
    graph.inputs = [inside.get(int(index), int(index)) for index in graph.inputs]
    graph.outputs = [outside.get(int(index), int(index)) for index in graph.outputs]
    for entries, twins in ((signature.inputs, inside), (signature.outputs, outside)):
        for entry in entries:
            entry.tensorIndex = twins.get(int(entry.tensorIndex), int(entry.tensorIndex))


def _float_twin(graph: Any, index: int) -> int:
    """A float32 tensor of the same shape; gives its number."""
    tensor, twin = graph.tensors[index], schema.TensorT()
    twin.name, twin.shape, twin.type, twin.buffer = tensor.name + b"_float32", tensor.shape, TYPES.FLOAT32, 0
    twin.shapeSignature, twin.hasRank = tensor.shapeSignature, tensor.hasRank
    graph.tensors.append(twin)
    return len(graph.tensors) - 1


def _operator(model: Any, builtin: int, source: int, target: int) -> Any:
    operator = schema.OperatorT()
    operator.opcodeIndex = tflite_files.add_operator_code(model, builtin)
    operator.inputs, operator.outputs = [source], [target]
    return operator
