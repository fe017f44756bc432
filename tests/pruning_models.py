"""Networks with weights that pruning must leave alone, or must find in odd places."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_models import save, value, weight
from torch import Tensor, nn


class Words(nn.Module):
    """Embedding tied to the last layer, two dense layers that share a weight, recurrent and attention layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.recurrent = nn.LSTM(16, 16, batch_first=True, num_layers=2)
        self.gated = nn.GRU(16, 16, bias=False)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm([5, 16])
        self.out = nn.Linear(16, 20)
        self.out.weight = self.table.weight
        self.register_buffer("turn", torch.randn(16, 16))

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.recurrent(self.table(tokens))
        x, _ = self.gated(x @ self.turn.t())
        if x.numel() > 0:  # a block of its own in a scripted module
            x = self.second(self.first(x))
        return self.out(self.norm(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def make_onnx(folder: Path) -> Path:
    """Embedding tied to the last layer by way of a transpose, a weight read twice, one in a branch, one a Constant."""
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["x0"]),
        helper.make_node("MatMul", ["x0", "shared"], ["x1"]),
        helper.make_node("MatMul", ["x1", "shared"], ["x2"]),
        helper.make_node("Constant", [], ["inline"], value=weight("inline", 8, 8, seed=2)),
        helper.make_node("Transpose", ["inline"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x2", "turned"], ["x3"]),
        helper.make_node("Greater", ["gain", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["x4"], then_branch=branch("then", 3), else_branch=branch("else", 4)),
        helper.make_node("Mul", ["x4", "grid"], ["x5"]),
        helper.make_node("Transpose", ["table"], ["scorer"], perm=[1, 0]),
        helper.make_node("MatMul", ["x5", "scorer"], ["scores"]),
    ]
    inputs = [value("tokens", TensorProto.INT64, [2]), value("gain", TensorProto.FLOAT, [])]
    outputs = [value("scores", TensorProto.FLOAT, [2, 12])]
    zero = numpy_helper.from_array(np.float32(0), "zero")
    weights = [weight("table", 12, 8), weight("shared", 8, 8), weight("grid", 2, 8), weight("outer", 8, 8), zero]
    return save(folder / "words.onnx", nodes, inputs, outputs, weights, external=True)


def branch(name: str, seed: int) -> onnx.GraphProto:
    """Has a weight of its own and one from around it."""
    nodes = [
        helper.make_node("MatMul", ["x3", f"{name} own"], [f"{name} half"]),
        helper.make_node("MatMul", [f"{name} half", "outer"], [f"{name} out"]),
    ]
    outputs = [value(f"{name} out", TensorProto.FLOAT, [2, 8])]
    return helper.make_graph(nodes, name, [], outputs, [weight(f"{name} own", 8, 8, seed=seed)])


def make_tflite(models: Path, folder: Path) -> None:
    """The digits network; and one whose embedding table is its last layer's weight, with an LSTM between."""
    import tensorflow as tf

    digits = tf.lite.TFLiteConverter.from_saved_model(str(models / "keras_saved_model"))
    (folder / "digits.tflite").write_bytes(digits.convert())
    random = tf.random.Generator.from_seed(3)
    table = tf.Variable(random.normal((24, 16)))
    cell = tf.keras.layers.LSTM(16, return_sequences=True)
    cell.build((1, 5, 16))

    @tf.function(input_signature=[tf.TensorSpec((1, 5), tf.int32, name="tokens")])
    def words(tokens: tf.Tensor) -> dict[str, tf.Tensor]:
        x = cell(tf.gather(table, tokens))
        return {"scores": tf.matmul(tf.reshape(x, (5, 16)), table, transpose_b=True)}

    module = tf.Module()
    module.parts = [table, *(variable.value for variable in cell.variables)]
    tf.saved_model.save(module, str(folder / "words"), signatures={"serving_default": words})
    (folder / "words.tflite").write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(folder / "words")).convert())


if __name__ == "__main__":
    make_tflite(Path(sys.argv[1]), Path(sys.argv[2]))
