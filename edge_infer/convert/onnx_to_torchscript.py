"""ONNX to TorchScript: onnx2fx makes a module of the graph, which is traced.

onnx2fx is a small package without native code that runs in the host's Python, with the host's torch and onnx; its one
pinned version lies in an environment of its own (``edge-infer converters install onnx2fx``) unless it is installed.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import torch

from edge_infer import probe
from edge_infer.convert import environments, onnx_graphs, spec_from_json
from edge_infer.errors import ConversionError
from edge_infer.manifest import TensorSpec

CONVERTER = "onnx2fx"
#: Which way these go is decided while running; a trace follows one.
CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")
OTHER_WAYS = "or package it with --format onnx"


def convert(request: dict[str, Any]) -> dict[str, Any]:
    inputs = [spec_from_json(row) for row in request["inputs"]]
    outputs = [spec_from_json(row) for row in request["outputs"]]
    feeds = onnx_graphs.of_each_shape(probe.load_feeds(Path(request["feeds"])))
    source = Path(request["from"]["model"])
    # The weights beside the model are mapped, where the converter would hold several copies of them.
    structure = onnx.load(source, load_external_data=False)
    module = _module(_ordered(structure, inputs, outputs), source.parent)
    # The largest: a size of 1 hides what is stretched.
    example = max(feeds, key=lambda feed: sum(array.size for array in feed.values()))
    traced = _trace(module, _tensors(inputs, example))
    for feed in feeds:
        _check(module, traced, inputs, feed, example)
    path = Path(request["out"]) / "model.pt"
    traced.save(str(path))
    tools = {CONVERTER: environments.version_of(CONVERTER), "torch": torch.__version__, "onnx": onnx.__version__}
    return {"details": {"model": str(path)}, "tools": tools}


def _ordered(model: onnx.ModelProto, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> onnx.ModelProto:
    """Inputs and outputs in the contract's order, weights under names that stay different in Python."""
    for node in onnx_graphs.nodes(model.graph):
        if node.op_type in CONTROL_FLOW and not node.domain:
            raise ConversionError(
                f"the operator {node.op_type} in layer {onnx_graphs.layer(node)} decides while running, which tracing "
                f"to TorchScript cannot follow; replace it in the model, {OTHER_WAYS}"
            )
    for items, specs in ((model.graph.input, inputs), (model.graph.output, outputs)):
        by_name = {item.name: item for item in items}
        ordered = [by_name[spec.name] for spec in specs]
        del items[:]
        items.extend(ordered)
    _rename_weights(model.graph)
    return model


def _rename_weights(graph: onnx.GraphProto) -> None:
    """onnx2fx makes one name of 'a.b' and 'a/b', and the weights of one of them would be lost."""
    taken = {item.name for item in graph.input}
    new: dict[str, str] = {}
    for weight in graph.initializer:
        name = re.sub(r"\W", "_", weight.name, flags=re.ASCII).lstrip("_") or "weight"
        name = name if not name[0].isdigit() else f"weight_{name}"
        unique, number = name, 0
        while unique in taken:
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique)
        new[weight.name] = weight.name = unique
    for node in graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
    for item in graph.output:  # a weight handed through
        item.name = new.get(item.name, item.name)


def _module(model: onnx.ModelProto, folder: Path) -> torch.fx.GraphModule:
    """The graph as a module that gives a tuple, its weights as parameters. ``folder`` holds its external data."""
    if find_spec(CONVERTER) is None:
        sys.path.append(str(environments.library_of(CONVERTER)))
    import onnx2fx
    from onnx2fx.utils import external_data

    from edge_infer.convert import onnx2fx_operators

    # It looks for a table that onnx has no more.
    numpy_types = {kind: onnx.helper.tensor_dtype_to_np_dtype(kind) for kind in external_data.DTYPE_MAP}
    external_data.onnx_mapping = SimpleNamespace(TENSOR_TYPE_TO_NP_TYPE=numpy_types)
    onnx2fx_operators.register(next((item.version for item in model.opset_import if not item.domain), 1))
    try:
        module: torch.fx.GraphModule = onnx2fx.convert(model, base_dir=str(folder), memmap_external_data=True)
    except onnx2fx.UnsupportedOpError as error:
        layers = [onnx_graphs.layer(node) for node in model.graph.node if node.op_type == error.op_type]
        raise ConversionError(
            f"onnx2fx has no operator {error.op_type} (layer {layers[0] if layers else 'unknown'}) for PyTorch; "
            f"replace it in the model, {OTHER_WAYS}"
        ) from error
    except Exception as error:  # the converter's own, whatever it is
        raise ConversionError(f"onnx2fx cannot convert the model: {_words(error)}; {OTHER_WAYS[3:]}") from error
    _answer_tuple(module)
    _keep_used(module)
    return module.eval()


def _answer_tuple(module: torch.fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "output" and not isinstance(node.args[0], tuple):
            node.args = ((node.args[0],),)
    module.graph.eliminate_dead_code()
    module.recompile()


def _keep_used(module: torch.fx.GraphModule) -> None:
    """Weights that the graph uses become parameters, as in any module; the others go."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, tensor in list(module.named_buffers(recurse=False)):
        if name not in used or tensor.is_floating_point():
            delattr(module, name)
        if name in used and tensor.is_floating_point():
            module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))


def _trace(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Each number that the trace takes as fixed is warned of; whether it may be is checked afterwards.
            warnings.simplefilter("ignore")
            return torch.jit.trace(module, args, strict=False, check_trace=False)
    except Exception as error:
        raise ConversionError(
            f"torch.jit.trace fails on onnx2fx's module: {_words(error)}; {OTHER_WAYS[3:]}"
        ) from error


def _check(
    module: torch.nn.Module, traced: Any, inputs: Sequence[TensorSpec], feed: probe.Feed, example: probe.Feed
) -> None:
    """The trace must answer as the module does in other sizes than those it was traced in."""
    args = _tensors(inputs, feed)
    with torch.no_grad():
        try:
            wanted, answers = module(*args), traced(*args)
            same = [torch.allclose(want, have, 1e-3, 1e-4, equal_nan=True) for want, have in zip(wanted, answers)]
            reason = "" if all(same) else "answers differently"
        except RuntimeError as error:
            reason = f"fails ({_words(error)})"
    if reason:
        fixed = onnx_graphs.fix_dimensions(inputs, example)
        raise ConversionError(
            f"the TorchScript traced on {onnx_graphs.shapes(example)} {reason} on {onnx_graphs.shapes(feed)}; "
            f"{f'give its dynamic dimensions one size with {fixed}, ' if fixed else ''}{OTHER_WAYS}"
        )


def _tensors(inputs: Sequence[TensorSpec], feed: probe.Feed) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(feed[spec.name].copy()) for spec in inputs)


def _words(error: BaseException) -> str:
    """The line of an error that says most: PyTorch puts a TorchScript's own reason last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    told = next((line for line in reversed(lines) if line.startswith("RuntimeError")), lines[0])
    return f"{type(error).__name__}: {told.removeprefix('RuntimeError: ')[:200]}"
