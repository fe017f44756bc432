"""PyTorch to ONNX: ``torch.onnx``'s exporter for modules and exported programs, the older one for TorchScript."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from edge_infer.convert import ask_source, torch_source
from edge_infer.errors import ConversionError
from edge_infer.probe import Feed

#: ONNX Runtime 1.14 and later run it, and the quantizer and every operator needed here exist in it.
OPSET = 18


def convert(request: dict[str, Any]) -> dict[str, Any]:
    model = torch_source.load(request)
    names: list[str] = []

    def run(feed: Feed) -> Feed:
        answers = model.run(feed)
        names[:] = list(answers)
        return answers

    feeds, answer = ask_source(request, model.inputs, names, run)
    path = Path(request["work"]) / "model.onnx"
    try:
        export(model, torch_source.examples(model, feeds), names, path)
    except ConversionError:
        raise
    except Exception as error:
        raise explain(error) from error
    return {**answer, "details": {"model": str(path), "tools": {"torch": torch.__version__}}}


def export(model: torch_source.TorchModel, args: tuple[torch.Tensor, ...], names: list[str], path: Path) -> None:
    labels: dict[str, Any] = {
        "input_names": [spec.name for spec in model.inputs],
        "output_names": names,
        "opset_version": OPSET,
    }
    if model.scripted:
        # Only the older exporter reads TorchScript; it takes dynamic axes by name.
        axes = {
            spec.name: {axis: f"{spec.name}_{axis}" for axis, size in enumerate(spec.shape) if size is None}
            for spec in model.inputs
        }
        traced = torch.jit.trace(model.tuple_module(), args, strict=False, check_trace=False)
        torch.onnx.export(traced, args, str(path), dynamic_axes=axes, dynamo=False, **labels)
        return
    if model.exported is None:
        dynamic = tuple(
            {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if size is None}
            for spec in model.inputs
        )
        torch.onnx.export(
            model.tuple_module().eval(),
            args,
            str(path),
            dynamic_shapes=(dynamic,),
            dynamo=True,
            external_data=False,
            verbose=False,
            **labels,
        )
        return
    # An exported program knows its dynamic dimensions.
    torch.onnx.export(model.exported, (), str(path), dynamo=True, external_data=False, verbose=False, **labels)


def explain(error: BaseException) -> ConversionError:
    """The exporter's report, which runs over pages, as one sentence that names operator and layer."""
    chain: BaseException | None = error
    text = ""
    while chain is not None:
        text += f"{type(chain).__name__}: {chain}\n"
        chain = chain.__cause__ or chain.__context__
    operator = re.search(
        r"(?:No ONNX function found for .*?|[Uu]nsupported.{0,40}?operator '?)((?:aten|prims|\w+)[:.]+\w+)", text
    )
    layer = re.search(r"module: ([\w.\[\]/ :]+)|nn_module_stack.*?'([\w.]+)'", text)
    if operator:
        place = next((group for group in layer.groups() if group), "") if layer else ""
        where = f" in layer {place.strip()}" if place else ""
        return ConversionError(
            f"the operator {operator[1]}{where} has no ONNX form; replace it in the model, or use --format torchscript"
        )
    first = text.strip().splitlines()[0][:400] if text.strip() else "no reason given"
    return ConversionError(f"torch.onnx cannot export the model: {first}; try --format torchscript")
