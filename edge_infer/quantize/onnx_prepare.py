"""A float ONNX model made ready for quantizing: constants folded, batch norms merged, every node named.

ONNX Runtime itself optimizes it, at the level that keeps standard operators, so that what is quantized is what it runs.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.version_converter
import onnxruntime

from edge_infer.errors import ConversionError
from edge_infer.quantize.onnx_age import OLDEST_IR, lower_versions, opset
from edge_infer.quantize.onnx_graph import EXTERNAL_BYTES, LINE_BYTES, externalize, name_nodes, sort_nodes, strip

PREPARED = "prepared.onnx"
#: The first opset that has weights quantized per channel.
PER_CHANNEL_OPSET = 13


def prepared(source: Path, folder: Path) -> Path:
    """The prepared model in ``folder``, its weights in a file beside it. Raises ConversionError.

    The weights are never in memory twice: one step ends before the next one begins.
    """
    path = folder / PREPARED
    if not path.is_file():
        _name(source, folder / "named.onnx")
        _optimize(folder / "named.onnx", folder / "optimized.onnx")
        _name_again(folder / "optimized.onnx", path)
    return path


def _name(source: Path, path: Path) -> None:
    model = onnx.load(source)
    if opset(model) < PER_CHANNEL_OPSET:
        model = onnx.version_converter.convert_version(model, PER_CHANNEL_OPSET)
    # Before version 4 every weight had to be an input too.
    model.ir_version = max(model.ir_version, OLDEST_IR)
    name_nodes(model)
    externalize(model, path.with_suffix(".data"), LINE_BYTES)
    lower_versions(model)  # while all operators are known: types behind the engine's own cannot be told
    onnx.save(model, path)


def _optimize(source: Path, path: Path) -> None:
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    weights = path.with_suffix(".data").name
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(EXTERNAL_BYTES)
    )
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise ConversionError(f"ONNX Runtime cannot prepare the model for quantization: {first_line(error)}") from error


def _name_again(source: Path, path: Path) -> None:
    """Names for what the optimizer made, and the types of all values, without touching the weights."""
    model = onnx.load(source, load_external_data=False)
    name_nodes(model)
    sort_nodes(model.graph)
    strip(model)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)


def session_options() -> onnxruntime.SessionOptions:
    """For sessions of the packager's own. With one thread and exact 8-bit kernels results do not depend on the machine:
    those of x86 without VNNI saturate."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].strip()[:300]
