"""ONNX artifacts in every precision, with the weights in a file of their own that devices map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
    shape_inference,
)

from edge_infer.convert import spec_from_json
from edge_infer.errors import ConversionError
from edge_infer.quantize.calibration import Calibration

MODEL, WEIGHTS = "model.onnx", "weights.bin"
PER_CHANNEL_OPSET = 13
#: Smaller tensors stay in the model: the engine folds shapes and constants while it loads.
EXTERNAL_BYTES = 1024
#: Tensors of at least a page begin on a page, smaller ones on a cache line.
LINE_BYTES = 64
#: First onnxruntime that runs an opset of the default domain and an IR version.
#: https://onnxruntime.ai/docs/reference/compatibility.html#onnx-opset-support
OPSET_SINCE = {18: "1.14.0", 19: "1.16.0", 20: "1.17.0", 21: "1.19.0", 22: "1.21.0", 23: "1.23.0", 24: "1.24.0"}
IR_SINCE = {9: "1.15.0", 10: "1.18.0", 11: "1.21.0", 12: "1.23.0"}
OLDEST = "1.14.0"
#: 8 is what opset 18 came with; 4-bit integers came with 10. https://github.com/onnx/onnx/blob/main/docs/Versioning.md
OLDEST_IR, FOUR_BIT_IR = 8, 10
#: Operators that repacking of weights speeds up by far (a factor of two for dense networks), unlike convolutions.
REPACKED_OPERATORS = {"MatMul", "Gemm", "MatMulInteger", "LSTM", "GRU", "RNN", "Attention", "DynamicQuantizeLSTM"}


def build(request: dict[str, Any]) -> dict[str, Any]:
    folder, out = Path(request["work"]), Path(request["out"])
    model = QUANTIZERS[request["precision"]](Path(request["details"]["model"]), folder, request)
    strip(model)
    sort_nodes(model.graph)
    lower_ir_version(model)
    weights = externalize(model, out / WEIGHTS, request["page_size_bytes"])
    onnx.save(model, out / MODEL)
    onnx.checker.check_model(str(out / MODEL))
    oldest = oldest_engine(model)
    return {
        "model": MODEL,
        "weights": WEIGHTS if weights else None,
        "signature": None,
        "prepack": worth_repacking(model),
        "operators": sorted({node.op_type for node in model.graph.node}),
        "requires": [["onnxruntime", oldest], ["onnxruntime-gpu", oldest]],
        "tools": {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
    }


def float32(source: Path, folder: Path, request: dict[str, Any]) -> onnx.ModelProto:
    return onnx.load(source)


def float16(source: Path, folder: Path, request: dict[str, Any]) -> onnx.ModelProto:
    """Weights and arithmetic in float16, inputs and outputs as they were."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model: onnx.ModelProto = convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=False)
    return model


def int8_dynamic(source: Path, folder: Path, request: dict[str, Any]) -> onnx.ModelProto:
    """Weights in int8; activations are quantized while running. Needs no calibration."""
    result = folder / "int8-dynamic.onnx"
    # Unsigned weights: ONNX Runtime has ConvInteger for them alone.
    quantize_dynamic(prepared(source, folder), result, weight_type=QuantType.QUInt8, use_external_data_format=True)
    return onnx.load(result)


def int8(source: Path, folder: Path, request: dict[str, Any]) -> onnx.ModelProto:
    """Weights and activations in int8, per channel, as quantize/dequantize pairs around float operators."""
    inputs = [spec_from_json(row) for row in request["inputs"]]
    result = folder / "int8.onnx"
    quantize_static(
        prepared(source, folder),
        result,
        Feeds(Calibration(Path(request["calibration"]), inputs)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # Without VNNI an x86 processor adds pairs of 8-bit products in 16 bits, which saturate; 7-bit weights do not.
        # https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#when-to-use-reduce-range-and-per-channel-quantization
        reduce_range=saturates(request["architecture"], request["cpu_features"]),
        use_external_data_format=True,
    )
    return onnx.load(result)


QUANTIZERS = {"float32": float32, "float16": float16, "int8-dynamic": int8_dynamic, "int8": int8}


class Feeds(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
    """Calibration samples as ONNX Runtime's quantizer asks for them."""

    def __init__(self, calibration: Calibration) -> None:
        self._feeds = calibration.feeds()

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self._feeds, None)


def saturates(architecture: str, cpu_features: list[str]) -> bool:
    return architecture == "x86_64" and not {"avx512_vnni", "avx_vnni"} & set(cpu_features)


def prepared(source: Path, folder: Path) -> Path:
    """ONNX Runtime's pre-processing for quantizers: shapes inferred, graph optimized."""
    path = folder / "prepared.onnx"
    if not path.is_file():
        try:
            shape_inference.quant_pre_process(
                modern(source, folder),
                path,
                save_as_external_data=True,
                all_tensors_to_one_file=True,
                external_data_location="prepared.onnx.data",
            )
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ConversionError(
                f"ONNX Runtime cannot prepare the model for quantization: {lines[0][:300]}"
            ) from error
    return path


def modern(source: Path, folder: Path) -> Path:
    """The model in an opset that has weights quantized per channel."""
    model = onnx.load(source)
    if opset(model) >= PER_CHANNEL_OPSET:
        return source
    path = folder / "modern.onnx"
    onnx.save(onnx.version_converter.convert_version(model, PER_CHANNEL_OPSET), path)
    return path


def strip(model: onnx.ModelProto) -> None:
    """Remove what exporters leave for debugging: source lines, paths, names of intermediate values."""
    model.doc_string = ""
    del model.metadata_props[:]
    for graph in _graphs(model.graph):
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
    """Put nodes after those they read from, which the format asks for and the float16 converter forgets."""
    waiting = list(graph.node)
    made = {output for node in waiting for output in node.output}
    done: set[str] = set()
    ordered: list[onnx.NodeProto] = []
    while waiting:
        later = []
        for node in waiting:
            if all(name in done or name not in made for name in _reads(node)):
                ordered.append(node)
                done.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise ConversionError("the ONNX graph has a cycle; export the model again")
        waiting = later
    if list(graph.node) != ordered:
        fresh = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
        del graph.node[:]
        graph.node.extend(fresh)


def lower_ir_version(model: onnx.ModelProto) -> None:
    """Declare the oldest IR version that has what the model uses: exporters declare their own, which is newer."""
    kinds = {tensor.data_type for graph in _graphs(model.graph) for tensor in graph.initializer}
    if kinds and max(kinds) > onnx.TensorProto.INT4:
        return  # of types that came after 4-bit integers each needs its own version
    needed = FOUR_BIT_IR if kinds & {onnx.TensorProto.UINT4, onnx.TensorProto.INT4} else OLDEST_IR
    by_opset = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.ir_version = min(model.ir_version, max(needed, by_opset))


def _reads(node: onnx.NodeProto) -> set[str]:
    """Values that a node needs, those of its subgraphs included."""
    inner = [
        child
        for attribute in node.attribute
        for child in ([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs)
    ]
    return set(node.input).union(*(_reads(child) for graph in inner for child in graph.node))


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            for child in inner:
                found.extend(_graphs(child))
    return found


def externalize(model: onnx.ModelProto, path: Path, page_size: int) -> int:
    """Move the larger initializers to ``path``, aligned so that devices can map them; gives the bytes written."""
    position = 0
    with path.open("wb") as file:
        for tensor in sorted(model.graph.initializer, key=lambda tensor: tensor.name):
            data = numpy_helper.to_array(tensor).tobytes() if tensor.data_type != onnx.TensorProto.STRING else b""
            if len(data) < EXTERNAL_BYTES:
                continue
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

    The engine then takes private memory for them; otherwise weights are used from the mapped file as they are.
    """
    sizes = {tensor.name: _bytes(tensor) for tensor in model.graph.initializer}
    sources = {output: node for node in model.graph.node for output in node.output}
    dense = 0
    for node in model.graph.node:
        if node.op_type in REPACKED_OPERATORS:
            for name in node.input:
                # In a quantized model a DequantizeLinear stands between the weight and its operator.
                producer = sources.get(name)
                inner = producer.input[0] if producer is not None and producer.op_type == "DequantizeLinear" else name
                dense += sizes.get(inner, 0)
    return dense > sum(sizes.values()) / 2


def _bytes(tensor: onnx.TensorProto) -> int:
    count = int(np.prod(tensor.dims)) if tensor.dims else 1
    return count * max(1, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def opset(model: onnx.ModelProto) -> int:
    """The version of the default domain's operators."""
    return max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)


def oldest_engine(model: onnx.ModelProto) -> str:
    """The first onnxruntime release that knows the model's opset and IR version."""
    versions = [OLDEST]
    versions += [since for number, since in OPSET_SINCE.items() if number <= opset(model)]
    versions += [since for number, since in IR_SINCE.items() if number <= model.ir_version]
    if opset(model) > max(OPSET_SINCE) or model.ir_version > max(IR_SINCE):
        versions.append(onnxruntime.__version__)  # newer than the tables; the one here runs it
    return max(versions, key=lambda version: [int(part) for part in version.split(".")])
