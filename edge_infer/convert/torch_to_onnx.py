"""PyTorch to ONNX by the exporter on top of ``torch.export``, for modules and exported programs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

from edge_infer import probe
from edge_infer.convert import onnx_graphs, spec_from_json, torch_source
from edge_infer.convert.onnx_graphs import OPSET
from edge_infer.convert.torch_source import TorchModel, causes
from edge_infer.errors import ConversionError, EdgeInferError, NotApplicable
from edge_infer.manifest import TensorSpec

#: Larger weights the exporter writes to a file beside the model, where it would have them in memory twice more.
LARGEST_INLINE_BYTES = 2**26


Exporter = Callable[[TorchModel, list[probe.Feed], list[str], Path], list[str]]


def convert(request: dict[str, Any]) -> dict[str, Any]:
    return by(export, request)


def by(exporter: Exporter, request: dict[str, Any]) -> dict[str, Any]:
    """Convert with ``exporter(model, feeds, names of outputs, path)``, which gives notes."""
    outputs = [spec_from_json(row) for row in request["outputs"]]
    folder = Path(request["out"])
    raw = folder / "raw"  # one file, or with large weights many
    raw.mkdir()
    # When this returns, the network's memory is free again.
    inputs, notes = _export(exporter, request, [spec.name for spec in outputs], raw / "model.onnx")
    path = onnx_graphs.finish(onnx.load(raw / "model.onnx"), folder / "model.onnx", inputs, outputs)
    shutil.rmtree(raw)
    tools = {"torch": torch.__version__, "onnx": onnx.__version__}
    return {"details": {"model": str(path), **({"notes": notes} if notes else {})}, "tools": tools}


def _export(
    exporter: Exporter, request: dict[str, Any], names: list[str], path: Path
) -> tuple[list[TensorSpec], list[str]]:
    """Write ``path``; gives the model's inputs and the exporter's notes."""
    model = torch_source.load(request["from"])
    feeds = probe.load_feeds(Path(request["feeds"]))
    try:
        return model.inputs, exporter(model, feeds, names, path)
    except EdgeInferError:
        raise
    except Exception as error:
        args = torch_source.examples(model, feeds)
        raise explain(error, lambda operator: torch_source.layer(model, args, operator)) from error


def export(model: TorchModel, feeds: list[probe.Feed], names: list[str], path: Path) -> list[str]:
    if model.scripted:
        raise NotApplicable("this exporter reads no TorchScript; the older one does (torch_to_onnx_legacy)")
    labels: dict[str, Any] = {
        "input_names": [spec.name for spec in model.inputs],
        "output_names": names,
        "opset_version": OPSET,
        "dynamo": True,
        "verbose": False,
    }
    labels["external_data"] = model.weight_bytes > LARGEST_INLINE_BYTES
    if model.exported is not None:  # it knows its dynamic dimensions
        torch.onnx.export(model.exported, (), str(path), **labels)
        return []
    shapes = (torch_source.dynamic_shapes(model),)
    try:
        args = torch_source.examples(model, feeds)
        torch.onnx.export(model.tuple_module(), args, str(path), dynamic_shapes=shapes, **labels)
    except Exception as error:
        if "Failed to export the model with torch.export" in str(error):
            raise torch_source.explain_export(model, error) from error
        raise
    return []


def explain(error: BaseException, layer_of: Callable[[str], str] = lambda operator: "") -> ConversionError:
    """The exporter's report, which runs over pages, as one sentence that names operator and layer."""
    chain = causes(error)
    text = "\n".join(f"{type(item).__name__}: {item}" for item in chain)
    operator = re.search(r"No ONNX function found for .*?'([\w.:]+)'|Exporting the operator '([\w.:]+)'", text)
    if operator:
        name = operator[1] or operator[2]
        layer = layer_of(name)
        where = f" in layer {layer}" if layer else ""
        return ConversionError(
            f"the operator {name}{where} has no ONNX form; replace it in the model, or use --format torchscript"
        )
    if "DataDependent" in text:
        return ConversionError(
            "what the model computes depends on its values (an if or a loop), which torch.onnx cannot follow; "
            "use torch.where or torch.cond in the model, or package torch.jit.script(model)"
        )
    unknown = re.search(r"ONNX export of (\w+) for tensor of unknown rank(?:.*?scope: ([^\s,\]]+))?", text, re.DOTALL)
    if unknown:
        # The path of modules, each as class::name.
        names = [part.rpartition("::")[2] for part in (unknown[2] or "").split("/")][2:]
        where = f" in layer {'.'.join(names)}" if names else ""
        return ConversionError(
            f"the operator {unknown[1]}{where} has another ONNX form for each number of dimensions, and scripted "
            "code does not say how many there are; package the network itself, or use --format torchscript"
        )
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()] or ["no reason given"]
    reason = f"{type(chain[-1]).__name__}: {' '.join(lines[:2])[:400]}"
    return ConversionError(
        f"torch.onnx cannot export the model: {reason}; see all of it with -v, or try --format torchscript"
    )
