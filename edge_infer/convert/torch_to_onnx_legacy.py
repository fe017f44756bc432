"""PyTorch to ONNX by the older exporter, which traces: the way for TorchScript, and for recurrent layers.

It keeps control flow of scripted parts, and a recurrent layer as one operator that takes any length, where the newer
exporter unrolls it. What it is given was compared with the model first: a trace knows one way through an if.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from edge_infer import probe
from edge_infer.convert import torch_source, torch_to_onnx, torch_to_torchscript
from edge_infer.convert.onnx_graphs import OPSET
from edge_infer.convert.torch_source import TorchModel
from edge_infer.errors import NotApplicable


def convert(request: dict[str, Any]) -> dict[str, Any]:
    return torch_to_onnx.by(export, request)


def export(model: TorchModel, feeds: list[probe.Feed], names: list[str], path: Path) -> list[str]:
    if model.exported is not None:
        raise NotApplicable("the older exporter reads no exported programs; the newer one does (torch_to_onnx)")
    axes = {
        spec.name: {axis: f"{spec.name}_{axis}" for axis, size in enumerate(spec.shape) if size is None}
        for spec in model.inputs
    }
    module, notes = torch_to_torchscript.compiled(model, feeds, names)
    if not (notes or model.scripted):
        module = model.tuple_module()  # traced once more, but by the exporter, which then knows all shapes
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            torch_source.examples(model, feeds),
            str(path),
            dynamo=False,
            dynamic_axes=axes,
            input_names=[spec.name for spec in model.inputs],
            output_names=names,
            opset_version=OPSET,
        )
    return notes
