"""What the reader of ONNX leaves: slimmed as in memory, with weights that stay in their file meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxslim
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_infer.convert import read_onnx

NOISE = np.random.default_rng(3)


def model(nodes: list[Any], **weights: Any) -> onnx.ModelProto:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 200])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 300])
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [image], [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def noise(*shape: int) -> Any:
    return NOISE.standard_normal(shape).astype(np.float32)


def folded() -> onnx.ModelProto:
    """A large weight that is turned and scaled before it is used."""
    nodes = [
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        helper.make_node("Mul", ["turned", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["x", "scaled"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    return model(nodes, w=noise(300, 200), scale=noise(1, 300), bias=noise(300))


def doubled() -> onnx.ModelProto:
    """Two layers with equal weights of their own, which compute the same."""
    weight = noise(200, 300)
    nodes = [
        helper.make_node("MatMul", ["x", "one"], ["a"]),
        helper.make_node("MatMul", ["x", "other"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    return model(nodes, one=weight, other=weight.copy())


def inside_a_branch() -> onnx.ModelProto:
    """Large weights in the branches of a condition, one of them turned before it is used."""
    output = helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 300])
    plain = [helper.make_node("MatMul", ["x", "w1"], ["b"])]
    turning = [helper.make_node("Transpose", ["w2"], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["b"])]
    then = helper.make_graph(plain, "then", [], [output], [numpy_helper.from_array(noise(200, 300), "w1")])
    other = helper.make_graph(turning, "else", [], [output], [numpy_helper.from_array(noise(300, 200), "w2")])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=then, else_branch=other),
    ]
    return model(nodes, zero=np.zeros((), np.float32))


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (folded, ["Gemm"]),
        (doubled, ["MatMul", "Add"]),
        (inside_a_branch, ["ReduceSum", "Greater", "If"]),
    ],
)
def test_slimming_beside_the_weights_gives_the_same_files(make: Any, left: list[str], tmp_path: Path) -> None:
    made = make()
    in_memory = onnx.ModelProto()
    in_memory.CopyFrom(made)
    for name in ("source", "memory", "file"):
        (tmp_path / name).mkdir()
    read_onnx.save(made, tmp_path / "source" / "source.onnx")
    slimmed = read_onnx.slim(tmp_path / "source" / "source.onnx")
    assert [node.op_type for node in slimmed.graph.node] == left
    read_onnx.save(slimmed, tmp_path / "file" / "model.onnx")
    read_onnx.save(onnxslim.slim(in_memory), tmp_path / "memory" / "model.onnx")
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
