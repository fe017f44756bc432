"""Which nodes of an ONNX model compute in int8, and the quantize/dequantize pairs around them.

Quantized are the operators that have most of the work, Conv, MatMul and Gemm, with what passes their 8-bit values on
unchanged. Additions, products, normalization and softmax stay in float between them: quantizing those too, as
ONNX Runtime's quantizer does by default, doubles the error and gains no time (a network of inverted residual blocks,
squeeze-and-excite and attention: error 0.018 against 0.033 of the output's deviation, both 2.3 ms). Activations are
unsigned, for which x86 has the fast kernels (2.3 ms against 3.7 signed, which is ONNX Runtime's default).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from edge_infer.errors import ConversionError, UsageError
from edge_infer.quantize.onnx_graph import RECURRENT, sort_nodes
from edge_infer.quantize.onnx_weights import store_int8, store_tables
from edge_infer.runtime.engines.onnx import saturates

#: Operators with weights or products of activations; these are the layers that may be kept in float.
LAYERS = ("Conv", "MatMul", "Gemm")
#: Operators for which ONNX Runtime has no int8 kernel on processors: weights in int8, decoded while loading.
STORED = ("ConvTranspose", *RECURRENT)
#: Says to ONNX Runtime's quantizer that types of values are known, so that it does not write and read the model again.
INFERRED = ("onnx.infer", "onnxruntime.quant")
#: Operators that pass 8-bit values on; they are quantized where what they read is.
PASSING = (
    "Relu", "Clip", "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Split", "Slice", "Pad",
    "Concat",
)  # fmt: skip


def chosen_nodes(model: onnx.ModelProto, request: dict[str, Any]) -> list[onnx.NodeProto]:
    """Nodes to quantize, in order; without those that ``keep_float`` names."""
    kept = set(request.get("keep_float") or ()) if request["precision"] == "int8-mixed" else set()
    layers = [node.name for node in model.graph.node if node.op_type in LAYERS and not node.domain]
    unknown = sorted(kept - set(layers))
    if unknown:
        raise UsageError(
            f"keep_float names {unknown[0]!r}, which is no layer of the model; take names that sensitivity gives, "
            f"such as {', '.join(layers[:3])}"
        )
    chosen = [node for node in model.graph.node if node.name not in kept and node.op_type in LAYERS and not node.domain]
    if not chosen:
        raise ConversionError(f"the model has no {', '.join(LAYERS)} left to compute in int8; choose another precision")
    return _with_passing(model, {node.name for node in chosen})


def _with_passing(model: onnx.ModelProto, layers: set[str]) -> list[onnx.NodeProto]:
    """Layers and the operators that only read what they, or such operators, give."""
    eight_bit: set[str] = set()
    nodes = []
    for node in model.graph.node:
        # The first input holds the values, but all of them those of a Concat.
        values = list(node.input) if node.op_type == "Concat" else list(node.input[:1])
        passes = node.op_type in PASSING and not node.domain and all(name in eight_bit for name in values)
        if node.name in layers or passes:
            nodes.append(node)
            eight_bit.update(node.output)
    return nodes


def insert_pairs(
    model: onnx.ModelProto,
    nodes: Iterable[onnx.NodeProto],
    found: Mapping[str, tuple[float, float]],
    request: dict[str, Any],
) -> onnx.ModelProto:
    """``model`` with quantize/dequantize pairs around ``nodes``."""
    entry = model.metadata_props.add()
    entry.key, entry.value = INFERRED
    _know_types(model, found)
    target = request["target"]
    quantizer = QDQQuantizer(
        model,
        True,  # per channel
        saturates(target["architecture"], target["cpu_features"]),
        QuantType.QInt8,
        QuantType.QUInt8,
        _tensors_data(found),
        [node.name for node in nodes],
        [],
        [*LAYERS, *PASSING],
        {},
    )
    result: onnx.ModelProto = quantizer.quantize_model()
    store_tables(result)
    store_int8(result, set(STORED))
    sort_nodes(result.graph)
    return result


def _know_types(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """What was observed is float, also where shape inference could not tell."""
    known = {value.name for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    for name in sorted(set(names) - known):
        value = model.graph.value_info.add()
        value.name = name
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def _tensors_data(found: Mapping[str, tuple[float, float]]) -> TensorsData:
    data = {
        name: TensorData(lowest=np.array(least, np.float32), highest=np.array(largest, np.float32))
        for name, (least, largest) in found.items()
    }
    return TensorsData(CalibrationMethod.MinMax, data)
