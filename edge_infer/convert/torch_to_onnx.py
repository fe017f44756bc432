"""PyTorch to ONNX: ``torch.onnx``'s exporter for modules and exported programs, the older one for TorchScript."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edge_infer.convert import ask_source, torch_source
from edge_infer.errors import ConversionError

#: ONNX Runtime 1.14 and later run it, and the quantizer and every operator needed here exist in it.
OPSET = 18


def convert(request: dict[str, Any]) -> dict[str, Any]:
    model = torch_source.load(request)
    feeds, answer = ask_source(request, model.inputs, model.run)
    names = [row["name"] for row in answer["outputs"]]
    path = Path(request["work"]) / "model.onnx"
    args = torch_source.examples(model, feeds)
    try:
        export(model, args, names, path)
    except ConversionError:
        raise
    except Exception as error:
        raise explain(error, lambda operator: layer(model, args, operator)) from error
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


def explain(error: BaseException, layer_of: Callable[[str], str] = lambda operator: "") -> ConversionError:
    """The exporter's report, which runs over pages, as one sentence that names operator and layer."""
    chain = _causes(error)
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
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()] or ["no reason given"]
    reason = f"{type(chain[-1]).__name__}: {' '.join(lines[:2])[:400]}"
    return ConversionError(
        f"torch.onnx cannot export the model: {reason}; see all of it with -v, or try --format torchscript"
    )


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def layer(model: torch_source.TorchModel, args: tuple[torch.Tensor, ...], operator: str) -> str:
    """The path of the submodule that uses an operator, empty when that cannot be told."""
    if model.scripted:
        return ""
    program = model.exported or torch.export.export(model.tuple_module(), args)
    # What is prims.bessel_j0 to the exporter is aten.special_bessel_j0 in the program.
    same = re.compile(rf"[._]{re.split('[.:]+', operator)[-1]}(\.|$)")
    for node in program.run_decompositions().graph.nodes:
        if same.search(str(node.target)):
            paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            return paths[-1].removeprefix("module.") if paths else ""
    return ""
