"""Prune the weights of a TFLite model by magnitude: in place, so that all else in the file stays as it was."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edge_infer.quantize import pruning

MODEL = "model.tflite"
OPERATORS = schema.BuiltinOperator
#: Operators with weights worth pruning, and which of their inputs those are.
#: https://github.com/tensorflow/tensorflow/tree/master/tensorflow/lite/kernels names them at the head of each file.
WEIGHT_INPUTS = {
    OPERATORS.CONV_2D: {1},
    OPERATORS.DEPTHWISE_CONV_2D: {1},
    OPERATORS.TRANSPOSE_CONV: {1},
    OPERATORS.CONV_3D: {1},
    OPERATORS.CONV_3D_TRANSPOSE: {1},
    OPERATORS.FULLY_CONNECTED: {1},
    OPERATORS.BATCH_MATMUL: {0, 1},
    OPERATORS.RNN: {1, 2},
    OPERATORS.UNIDIRECTIONAL_SEQUENCE_RNN: {1, 2},
    OPERATORS.LSTM: set(range(1, 9)),
    OPERATORS.UNIDIRECTIONAL_SEQUENCE_LSTM: set(range(1, 9)),
    OPERATORS.BIDIRECTIONAL_SEQUENCE_RNN: {1, 2, 4, 5},
    OPERATORS.BIDIRECTIONAL_SEQUENCE_LSTM: set(range(1, 9)) | set(range(18, 26)),
}
#: Operators that hand weights on in another shape or from float16.
HANDED_ON = {OPERATORS.TRANSPOSE, OPERATORS.RESHAPE, OPERATORS.SQUEEZE, OPERATORS.EXPAND_DIMS, OPERATORS.DEQUANTIZE}
FLOATS = {schema.TensorType.FLOAT32: np.float32, schema.TensorType.FLOAT16: np.float16}


def prune(request: dict[str, Any]) -> dict[str, Any]:
    """See ``pruning.masks``. Left alone are biases, and what any other operator reads too, like embeddings.

    request: "from" {"model", "signature"}, "work", "sparsity", "scope". Raises UsageError, ConversionError.
    """
    data = bytearray(Path(request["from"]["model"]).read_bytes())
    reached = pruning.prune(prunable(data), request["sparsity"], request["scope"])
    path = Path(request["out"]) / MODEL
    path.write_bytes(data)
    details = {**request["from"], "model": str(path)}
    return {"details": details, **reached, "tools": {"ai-edge-litert": version("ai-edge-litert")}}


def prunable(data: bytearray) -> dict[str, np.ndarray[Any, Any]]:
    """Weights of two or more dimensions by the name of their tensor, as writable views of ``data``.

    Tensors that share a buffer are one, under the name of the first.
    """
    model = schema.Model.GetRootAsModel(data, 0)
    names: dict[int, tuple[str, Any]] = {}
    otherwise: set[int] = set()
    for index in range(model.SubgraphsLength()):
        _visit(model, model.Subgraphs(index), names, otherwise)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for buffer, (name, dtype) in names.items():
        if buffer in otherwise:
            continue
        array = _contents(model.Buffers(buffer), data).view(dtype)
        if array.size:
            found[name if name not in found else f"{name} ({buffer})"] = array
    return found


def _visit(model: Any, graph: Any, names: dict[int, tuple[str, Any]], otherwise: set[int]) -> None:
    """Note the buffers that weights of layers lie in, and those that anything else reads."""
    source = {index: graph.Tensors(index).Buffer() for index in range(graph.TensorsLength())}
    original = {index: index for index in source}  # the tensor that each was handed on from
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        code = model.OperatorCodes(operator.OpcodeIndex())
        kind = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if kind in HANDED_ON and operator.Inputs(0) >= 0:
            original[operator.Outputs(0)] = original[operator.Inputs(0)]
            continue
        for place in range(operator.InputsLength()):
            if operator.Inputs(place) < 0:  # left away
                continue
            index = original[operator.Inputs(place)]
            if place in WEIGHT_INPUTS.get(kind, ()) and _is_weight(graph.Tensors(index)):
                names.setdefault(source[index], _label(graph.Tensors(index)))
            else:
                otherwise.add(source[index])
    otherwise.update(source[original[graph.Outputs(index)]] for index in range(graph.OutputsLength()))


def _is_weight(tensor: Any) -> bool:
    """Neither a bias nor quantized or packed already."""
    return tensor.ShapeLength() >= 2 and tensor.Type() in FLOATS and tensor.Sparsity() is None


def _label(tensor: Any) -> tuple[str, Any]:
    return tensor.Name().decode("utf-8", "replace"), FLOATS[tensor.Type()]


def _contents(buffer: Any, data: bytearray) -> np.ndarray[Any, Any]:
    """A buffer's bytes: within the flatbuffer, or behind it in files too large for one."""
    if buffer.Offset() > 1:
        return np.frombuffer(data, np.uint8, buffer.Size(), buffer.Offset())
    contents = buffer.DataAsNumpy()
    return contents if isinstance(contents, np.ndarray) else np.empty(0, np.uint8)
