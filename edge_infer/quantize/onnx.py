"""ONNX artifacts in every precision, with the weights in a file of their own that devices map."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from edge_infer.errors import UsageError
from edge_infer.quantize import onnx_static, onnx_weights
from edge_infer.quantize.onnx_age import lower_versions, oldest_engine
from edge_infer.quantize.onnx_graph import (
    CONVOLUTIONS,
    RECURRENT,
    externalize,
    name_nodes,
    sort_nodes,
    stored_by_layer,
    strip,
    worth_repacking,
)
from edge_infer.quantize.onnx_half import float16
from edge_infer.quantize.onnx_prepare import prepared
from edge_infer.runtime.engines.onnx import saturates

MODEL, WEIGHTS = "model.onnx", "weights.bin"


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Write the artifact; see ``QUANTIZERS`` for what each precision is. Raises ConversionError, UsageError."""
    quantizer = QUANTIZERS.get(request["precision"])
    if quantizer is None:
        raise UsageError(f"ONNX has no {request['precision']}, it has: {', '.join(QUANTIZERS)}")
    out, target = Path(request["out"]), request["target"]
    with tempfile.TemporaryDirectory() as folder:
        model = quantizer(Path(request["from"]["model"]), Path(folder), request)
    strip(model)
    name_nodes(model)
    sort_nodes(model.graph)
    weights = externalize(model, out / WEIGHTS, target["page_size_bytes"])
    lower_versions(model)
    onnx.save(model, out / MODEL)
    onnx.checker.check_model(str(out / MODEL))
    oldest = oldest_engine(model, target["architecture"])
    return {
        "model": MODEL,
        "weights": WEIGHTS if weights else None,
        "signature": None,
        "prepack": worth_repacking(model),
        "layers": stored_by_layer(model),
        "operators": sorted({node.op_type for node in model.graph.node}),
        "requires": [["onnxruntime", oldest], ["onnxruntime-gpu", oldest]],
        "tools": tools(),
    }


def sensitivity(request: dict[str, Any]) -> dict[str, Any]:
    """How much error int8 adds at each layer: {"layers": [{"name", "kind", "bytes", "error"}]}, as they run.

    ``error`` is the power of the difference to float over the power of the value, at the layer's output, without what
    arrived at its inputs. Raises ConversionError, UsageError.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = prepared(Path(request["from"]["model"]), Path(folder))
        return {"layers": onnx_static.layer_errors(path, request)}


def tools() -> dict[str, str]:
    return {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


def _float32(source: Path, folder: Path, request: dict[str, Any]) -> onnx.ModelProto:
    return onnx.load(source)


def _float16(source: Path, folder: Path, request: dict[str, Any]) -> onnx.ModelProto:
    return float16(source, folder, request["target"])


def _int8(source: Path, folder: Path, request: dict[str, Any]) -> onnx.ModelProto:
    """Weights and activations in int8, per channel, as quantize/dequantize pairs around float operators."""
    return onnx_static.quantize(prepared(source, folder), request)


def _int8_dynamic(source: Path, folder: Path, request: dict[str, Any]) -> onnx.ModelProto:
    """Weights in int8; activations of dense layers and LSTMs are quantized while running, the rest computes in float.

    Needs no calibration.
    """
    model = onnx.load(prepared(source, folder))
    target = request["target"]
    signed = not saturates(target["architecture"], target["cpu_features"])
    count = onnx_weights.make_lstm_dynamic(model, signed)
    count += onnx_weights.make_dynamic(model, signed)
    count += onnx_weights.store_tables(model)
    count += onnx_weights.store_int8(model, {*CONVOLUTIONS, *RECURRENT})
    onnx_weights.refuse_unless(
        count, model, "MatMul, Gemm, convolution, recurrent layer or table", "float32 or float16"
    )
    return model


def _int8_weights(source: Path, folder: Path, request: dict[str, Any]) -> onnx.ModelProto:
    """Dense layers in blocks of 8 bits, convolutions and recurrent layers with int8 weights, computing in float."""
    model = onnx.load(prepared(source, folder))
    count = onnx_weights.store_blocks(model, 8)
    count += onnx_weights.store_tables(model)
    count += onnx_weights.store_int8(model, {*CONVOLUTIONS, *RECURRENT})
    onnx_weights.refuse_unless(count, model, "MatMul, Gemm, convolution, recurrent layer or table", "float16")
    return model


def _int4_weights(source: Path, folder: Path, request: dict[str, Any]) -> onnx.ModelProto:
    """Dense layers in blocks of 4 bits; what has no 4-bit form with int8 weights, computing in float."""
    model = onnx.load(prepared(source, folder))
    count = onnx_weights.store_blocks(model, 4)
    onnx_weights.refuse_unless(count, model, "MatMul or Gemm", "int8-weights or int8")
    onnx_weights.store_tables(model)
    onnx_weights.store_int8(model, {*CONVOLUTIONS, *RECURRENT})
    return model


QUANTIZERS = {
    "float32": _float32,
    "float16": _float16,
    "int8-dynamic": _int8_dynamic,
    "int8-weights": _int8_weights,
    "int4-weights": _int4_weights,
    "int8": _int8,
    "int8-mixed": _int8,
}
