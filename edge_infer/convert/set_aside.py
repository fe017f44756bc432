"""Weights that a converter does not see.

A converter has every weight in memory several times over, and for a large model that is more than a machine has.
Weights that no converter looks into, those of matrix products and embeddings, can be inputs of the model while it is
converted; ``put_back`` then makes them weights of the ONNX model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from edge_infer.convert import onnx_graphs

#: Models with less weights than that are converted whole.
LARGE_BYTES = 2**27
#: Smaller weights go through the converter, which may fold them into others.
SMALLEST_BYTES = 2**20

Weights = Mapping[str, np.ndarray[Any, Any]]


def put_back(model: onnx.ModelProto, weights: Weights) -> None:
    """Make inputs of ``model`` into weights of the same names; what only transposes one becomes a weight itself."""
    graph = model.graph
    found = [item for item in graph.input if item.name in weights]
    for item in found:
        graph.input.remove(item)
        array = weights[item.name]
        for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] == item.name]:
            axes = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
            _add(graph, node.output[0], array.transpose(axes))
            graph.node.remove(node)
        if any(item.name in node.input for node in onnx_graphs.nodes(graph)):
            _add(graph, item.name, array)


def _add(graph: onnx.GraphProto, name: str, array: np.ndarray[Any, Any]) -> None:
    tensor = graph.initializer.add(name=name, dims=array.shape)
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.raw_data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
