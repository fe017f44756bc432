"""Small ONNX models written operator by operator, with the corners that real exporters leave in theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Nodes = list[onnx.NodeProto]


def value(name: str, dtype: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def weight(name: str, *shape: int, seed: int = 1) -> onnx.TensorProto:
    return numpy_helper.from_array(np.random.default_rng(seed).standard_normal(shape, np.float32), name)


def save(
    path: Path,
    nodes: Nodes,
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[onnx.TensorProto],
    opset: int = 17,
    ir_version: int = 8,
    external: bool = False,
    domains: tuple[str, ...] = (),
) -> Path:
    graph = helper.make_graph(nodes, "test", inputs, outputs, weights)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
    onnx.save_model(model, path, save_as_external_data=external, location=f"{path.stem}.weights", size_threshold=0)
    return path


def two_inputs_with_weights_beside(folder: Path) -> Path:
    """Names with slashes, dots and spaces; dynamic dimensions; weights in a file of their own."""
    nodes = [
        helper.make_node("MatMul", ["left hand/in.0", "w 0"], ["/inner/product"]),
        helper.make_node("Add", ["/inner/product", "right::in"], ["sum/out.0"]),
        helper.make_node("ReduceMax", ["sum/out.0"], ["the largest"], axes=[1], keepdims=0),
    ]
    inputs = [
        value("left hand/in.0", TensorProto.FLOAT, ["rows", 64]),
        value("right::in", TensorProto.FLOAT, ["rows", 48]),
    ]
    outputs = [value("sum/out.0", TensorProto.FLOAT, ["rows", 48]), value("the largest", TensorProto.FLOAT, ["rows"])]
    return save(folder / "two inputs.onnx", nodes, inputs, outputs, [weight("w 0", 64, 48)], external=True)


def initializers_among_inputs(folder: Path) -> Path:
    """As exporters before IR version 4 wrote it, and with -1 for a dimension they did not know."""
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
    inputs = [
        value("w", TensorProto.FLOAT, [8, 4]),
        value("x", TensorProto.FLOAT, [-1, 8]),
        value("b", TensorProto.FLOAT, [4]),
    ]
    outputs = [value("y", TensorProto.FLOAT, ["n", 4])]
    return save(folder / "old.onnx", nodes, inputs, outputs, [weight("w", 8, 4), weight("b", 4)], 9, 3)


def bytes_to_classes(folder: Path) -> Path:
    """uint8 pixels and a scalar threshold to integer classes and booleans."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["real", "w"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["class"], axis=1, keepdims=0),
        helper.make_node("Greater", ["scores", "threshold"], ["above"]),
        helper.make_node("ReduceMean", ["real"], ["brightness"], keepdims=0),
    ]
    inputs = [value("pixels", TensorProto.UINT8, ["n", 12]), value("threshold", TensorProto.FLOAT, [])]
    outputs = [
        value("class", TensorProto.INT64, ["n"]),
        value("above", TensorProto.BOOL, ["n", 5]),
        value("brightness", TensorProto.FLOAT, []),
    ]
    return save(folder / "bytes.onnx", nodes, inputs, outputs, [weight("w", 12, 5)])


def of_unknown_domain(folder: Path) -> Path:
    nodes = [helper.make_node("Sharpen", ["x"], ["y"], domain="com.example.vision", name="/lens/Sharpen")]
    io = [value("x", TensorProto.FLOAT, ["n", 4])], [value("y", TensorProto.FLOAT, ["n", 4])]
    return save(folder / "unknown.onnx", nodes, *io, [], domains=("com.example.vision",))
