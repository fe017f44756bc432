"""Prune the weights of an ONNX model by magnitude."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from edge_infer.convert import onnx_graphs
from edge_infer.quantize import pruning

MODEL = "model.onnx"
#: Operators with weights worth pruning, and which of their inputs those are.
WEIGHT_INPUTS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
}
#: Operators that hand weights on in another shape.
HANDED_ON = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast"}
FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}


def prune(request: dict[str, Any]) -> dict[str, Any]:
    """See ``pruning.masks``. Left alone are biases, norms, and what any other operator reads too, like embeddings.

    request: "from" {"model"}, "work", "sparsity", "scope". Raises UsageError, ConversionError.
    """
    model = onnx.load(request["from"]["model"])
    tensors = prunable(model)
    # One tensor is read by several layers where they share it, and is there once.
    arrays = {name: numpy_helper.to_array(tensor).copy() for name, tensor in tensors.items()}
    reached = pruning.prune(arrays, request["sparsity"], request["scope"])
    for name, tensor in tensors.items():
        tensor.CopyFrom(numpy_helper.from_array(arrays.pop(name), tensor.name))
    path = Path(request["out"]) / MODEL
    onnx_graphs.save(model, path)
    return {"details": {"model": str(path)}, **reached, "tools": {"onnx": onnx.__version__}}


@dataclass
class Use:
    """A constant of the model, and whether layers with weights alone read it."""

    tensor: onnx.TensorProto
    as_weight: bool = False
    otherwise: bool = False


@dataclass
class Uses:
    found: list[Use] = field(default_factory=list)

    def add(self, tensor: onnx.TensorProto) -> Use:
        self.found.append(Use(tensor))
        return self.found[-1]


def prunable(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Weights of two or more dimensions, by name, in the order in which the model holds them."""
    uses = Uses()
    _visit(model.graph, {}, uses)
    found: dict[str, onnx.TensorProto] = {}
    for use in uses.found:
        if use.as_weight and not use.otherwise and len(use.tensor.dims) >= 2 and use.tensor.data_type in FLOATS:
            name = use.tensor.name or "constant"
            found[name if name not in found else f"{name} ({len(found)})"] = use.tensor
    return found


def _visit(graph: onnx.GraphProto, outer: dict[str, Use], uses: Uses) -> None:
    """Note how each constant is used; a subgraph sees the constants around it."""
    known = {**outer, **{tensor.name: uses.add(tensor) for tensor in graph.initializer}}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in known and node.op_type not in HANDED_ON:
                weight = node.domain in ("", "ai.onnx") and place in WEIGHT_INPUTS.get(node.op_type, ())
                known[name].as_weight |= weight
                known[name].otherwise |= not weight
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                known[node.output[0]] = uses.add(attribute.t)
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            for child in inner:
                _visit(child, known, uses)
        if node.op_type in HANDED_ON and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]]
    for value in graph.output:
        if value.name in known:
            known[value.name].otherwise = True
