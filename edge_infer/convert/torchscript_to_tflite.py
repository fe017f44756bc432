"""TorchScript to TFLite with litert-torch: the second way for ONNX, and for PyTorch models that only a trace follows.

onnx2tf, the first way for ONNX, understands little of dynamic dimensions; this one converts at several sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_infer.convert import spec_from_json, torch_source, torch_to_tflite
from edge_infer.convert.torch_source import TorchModel


def convert(request: dict[str, Any]) -> dict[str, Any]:
    module = torch_source.load_script(Path(request["from"]["model"])).eval()
    inputs = [spec_from_json(row) for row in request["inputs"]]
    # In the contract's order; its names are not always the trace's.
    model = TorchModel(module, inputs, lambda tensors: (tensors, {}), scripted=True)
    return torch_to_tflite.convert_model(model, request)
