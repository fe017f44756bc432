"""float16: weights stored in float16, and arithmetic in float16 where the processor has it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from edge_infer import worker
from edge_infer.convert import onnx_graphs
from edge_infer.errors import ConversionError
from edge_infer.quantize.onnx_graph import sort_nodes
from edge_infer.quantize.onnx_weights import store_float16

#: Arm's names for float16 arithmetic, of one value and of vectors: https://docs.kernel.org/arch/arm64/elf_hwcaps.html
FLOAT16_FEATURES = {"fphp", "asimdhp"}


def float16(source: Path, folder: Path, target: dict[str, Any]) -> onnx.ModelProto:
    """Inputs and outputs as they were, weights in float16.

    Arithmetic is in float16 where the processor has it and ONNX Runtime can open the result: its 1.32 crashes while it
    changes the layout of some models (a transformer encoder that normalizes first), whatever operators are left in
    float32. Elsewhere the weights alone are in float16: the engine would convert at every operator, which is slower
    than float32 (293 us against 208 for a small convolutional network on x86).
    """
    if set(target["cpu_features"]) >= FLOAT16_FEATURES:
        model = _in_float16(source)
        if _opens(model, folder):
            return model
    model = onnx.load(source)
    store_float16(model)
    return model


def _in_float16(source: Path) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model: onnx.ModelProto = convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=False)
    sort_nodes(model.graph)
    return model


def _opens(model: onnx.ModelProto, folder: Path) -> bool:
    """Whether the engine opens a model as the device does; asked in a child, which may crash."""
    path = folder / "float16.onnx"
    onnx_graphs.save(model, path)
    onnx.load_external_data_for_model(model, str(folder))
    try:
        with tempfile.TemporaryDirectory() as logs:
            worker.run("edge_infer.quantize.onnx_half:open_once", {"model": str(path)}, Path(logs) / "log")
    except ConversionError:
        return False
    return True


def open_once(request: dict[str, Any]) -> dict[str, Any]:
    onnxruntime.InferenceSession(request["model"], providers=["CPUExecutionProvider"])
    return {}
