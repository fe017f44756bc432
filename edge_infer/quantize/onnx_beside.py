"""An int8 ONNX model's layers beside those of the float model, to compare layer by layer.

One model holds both: the float network, and beside each of its layers the same layer in int8, with the scales that the
whole network has. The int8 layers read what the float ones read, so none answers for another's error, and one run over
a sample compares them all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edge_infer.quantize.onnx_graph import CONVOLUTIONS, attribute, replace_tensor, sort_nodes
from edge_infer.quantize.onnx_pairs import LAYERS
from edge_infer.quantize.onnx_probe import Feed, Probe

Array = np.ndarray[Any, Any]

#: Marks what belongs to an int8 layer where the float network has a value of the same name.
BESIDE = "#int8"
#: The quantizer's own mark for what a quantized output of the model was before.
OUTPUT_MARK = "_QuantizeLinear_Input"


@dataclass(frozen=True)
class Pair:
    """A layer, what it computes in int8, and its output in float and int8, behind an activation merged into it."""

    node: onnx.NodeProto
    product: str
    exact: str
    rounded: str


def side_by_side(structure: onnx.ModelProto, quantized: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Pair]]:
    """The float model with the quantized one's layers beside its own, which read the float model's values."""
    model = onnx.ModelProto()
    model.CopyFrom(structure)
    _one_opset(model, quantized)
    floats = {name for node in structure.graph.node for name in node.output}
    floats |= {tensor.name for tensor in structure.graph.initializer}
    known = {tensor.name for tensor in structure.graph.initializer}
    model.graph.initializer.extend(tensor for tensor in quantized.graph.initializer if tensor.name not in known)
    originals = {node.name: node for node in structure.graph.node}
    # A quantizer's node that makes a value of the float network, its rounded twin: an output of the model or a bias.
    twins = {name for node in quantized.graph.node if _rounds(node) for name in node.output if name in floats}
    quantizing = {node.input[0]: node for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
    read = {name for node in quantized.graph.node if _rounds(node) for name in node.output}
    pairs = []
    for node in quantized.graph.node:
        if _rounds(node):
            model.graph.node.append(_renamed(node, twins, twins))
        elif node.name in originals and node.op_type in LAYERS and node.input[0] in read:
            made = node.output[0]
            beside = _renamed(node, twins, {made})
            beside.name = node.name + BESIDE
            model.graph.node.append(beside)
            rounded = made + BESIDE
            if made in quantizing:
                rounded = _round(model.graph, rounded, quantizing[made])
            pairs.append(Pair(originals[node.name], made + BESIDE, made.removesuffix(OUTPUT_MARK), rounded))
    sort_nodes(model.graph)
    order = {node.name: index for index, node in enumerate(structure.graph.node)}
    return model, sorted(pairs, key=lambda pair: order[pair.node.name])


def _rounds(node: onnx.NodeProto) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")


def _renamed(node: onnx.NodeProto, twins: set[str], made: set[str]) -> onnx.NodeProto:
    """A node of the quantized model that reads the float model's values and gives ``made`` under names of its own."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for index, name in enumerate(node.input):
        if node.op_type == "QuantizeLinear" and index == 0:
            copy.input[index] = name.removesuffix(OUTPUT_MARK)
        elif name in twins:
            copy.input[index] = name + BESIDE
    for index, name in enumerate(node.output):
        copy.output[index] = name + BESIDE if name in made else name
    return copy


def _round(graph: onnx.GraphProto, name: str, like: onnx.NodeProto) -> str:
    """Quantize and dequantize a value as ``like`` does; gives the result's name."""
    codes, result = f"{name}_codes", f"{name}_rounded"
    parameters = list(like.input[1:])
    graph.node.append(helper.make_node("QuantizeLinear", [name, *parameters], [codes], f"{name}_Quantize"))
    graph.node.append(helper.make_node("DequantizeLinear", [codes, *parameters], [result], f"{name}_Dequantize"))
    return result


def _one_opset(model: onnx.ModelProto, other: onnx.ModelProto) -> None:
    del model.opset_import[:]
    model.opset_import.extend(other.opset_import)


def errors(probe: Probe, pairs: list[Pair], samples: Iterable[Feed]) -> list[float]:
    """Power of the difference over power of the value for each layer."""
    power, signal = np.zeros(len(pairs)), np.zeros(len(pairs))
    for feed in samples:
        values = probe.run(feed)
        for index, pair in enumerate(pairs):
            exact, rounded = np.asarray(values[pair.exact], np.float64), np.asarray(values[pair.rounded], np.float64)
            finite = np.isfinite(exact) & np.isfinite(rounded)
            power[index] += float(np.square(exact[finite] - rounded[finite]).sum())
            signal[index] += float(np.square(exact[finite]).sum())
    return [float(error) for error in np.divide(power, signal, out=np.zeros_like(power), where=signal > 0)]


def shifts(probe: Probe, pairs: list[Pair], samples: Iterable[Feed]) -> dict[str, Array]:
    """By how much rounding moves the mean of each layer's channels, by the name of the layer's bias."""
    sums: dict[str, Array] = {}
    count = 0
    for feed in samples:
        values = probe.run(feed)
        count += 1
        for pair in pairs:
            moved = np.asarray(values[pair.product], np.float64) - values[pair.node.output[0]]
            channel = 1 if pair.node.op_type in CONVOLUTIONS else moved.ndim - 1
            mean = moved.mean(axis=tuple(axis for axis in range(moved.ndim) if axis != channel))
            bias = pair.node.input[2]
            sums[bias] = sums.get(bias, np.zeros_like(mean)) + mean
    return {bias: total / max(1, count) for bias, total in sums.items()}


def with_bias(pairs: Iterable[Pair], structure: onnx.ModelProto) -> list[Pair]:
    """The layers whose bias is a constant vector of their own."""
    uses: dict[str, int] = {}
    for node in structure.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    vectors = {tensor.name for tensor in structure.graph.initializer if len(tensor.dims) == 1}
    return [
        pair
        for pair in pairs
        if len(pair.node.input) > 2
        and pair.node.input[2] in vectors
        and uses[pair.node.input[2]] == 1
        and attribute(pair.node, "beta", 1.0) == 1.0
    ]


def correct(model: onnx.ModelProto, moved: dict[str, Array]) -> None:
    """Take from each bias what rounding adds. https://arxiv.org/abs/1906.04721, section 4.2"""
    for tensor in model.graph.initializer:
        change = moved.get(tensor.name)
        bias = numpy_helper.to_array(tensor) if change is not None else None
        if bias is not None and change is not None and bias.shape == change.shape and np.isfinite(change).all():
            replace_tensor(tensor, (bias - change).astype(bias.dtype), tensor.name)
