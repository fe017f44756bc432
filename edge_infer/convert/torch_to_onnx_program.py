"""TorchScript to ONNX by the newer exporter, as an exported program: where the older one does not know a tensor's rank.

A file of TorchScript does not say how many dimensions its tensors have, and the older exporter has another form for
each number of them in operators such as transpose. The last way, as it unrolls recurrent layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edge_infer import probe
from edge_infer.convert import torch_source, torch_to_onnx, torchscript_program
from edge_infer.convert.onnx_graphs import OPSET
from edge_infer.convert.torch_source import TorchModel
from edge_infer.errors import NotApplicable


def convert(request: dict[str, Any]) -> dict[str, Any]:
    return torch_to_onnx.by(export, request)


def export(model: TorchModel, feeds: list[probe.Feed], names: list[str], path: Path) -> list[str]:
    if not model.scripted:
        raise NotApplicable("this way is for TorchScript; the newer exporter reads the model itself (torch_to_onnx)")
    program = torchscript_program.of_any_size(model.module, torch_source.examples(model, feeds))
    torch.onnx.export(
        program,
        (),
        str(path),
        dynamo=True,
        input_names=[spec.name for spec in model.inputs],
        output_names=names,
        opset_version=OPSET,
        external_data=model.weight_bytes > torch_to_onnx.LARGEST_INLINE_BYTES,
        verbose=False,
    )
    return []
