"""Sizes in a TFLite model that are computed while it runs, though they are known.

TensorFlow's converter writes the shape that a RESHAPE gives as operators that take the input's sizes apart and put
them together, wherever the batch may be of any size. An engine then learns the sizes of all that follows only when it
has run: XNNPACK leaves that part to slower kernels, and LiteRT's compiled models cannot give it buffers. One open size
needs no operators, since the number of elements tells it.
"""

from __future__ import annotations

from typing import Any

from ai_edge_litert import schema_py_generated as schema

from edge_infer.convert import tflite_files

RESHAPE = schema.BuiltinOperator.RESHAPE


def simplify(model: Any) -> None:
    """Give each RESHAPE its shape as a constant where only one size is open, and drop what computed it."""
    for graph in model.subgraphs:
        produced = {index for operator in graph.operators for index in operator.outputs}
        for operator in graph.operators:
            if _code(model, operator) == RESHAPE and len(operator.inputs) > 1 and operator.inputs[1] in produced:
                shape = _known(graph.tensors[operator.outputs[0]])
                if shape is not None:
                    graph.tensors.append(tflite_files.constant(model, b"shape", shape))
                    operator.inputs = [operator.inputs[0], len(graph.tensors) - 1]
                    operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.NONE, None
        _drop_unused(graph)


def _code(model: Any, operator: Any) -> int:
    return tflite_files.operator_code(model.operatorCodes[operator.opcodeIndex])


def _known(tensor: Any) -> list[int] | None:
    """A shape with one open size, as RESHAPE takes it; None for any other, and where the converter did not say."""
    shape = [] if tensor.shapeSignature is None else [int(size) for size in tensor.shapeSignature]
    return shape if shape.count(-1) == 1 and 0 not in shape else None


def _drop_unused(graph: Any) -> None:
    """Operators whose answers nobody takes, as those that computed a shape."""
    needed = set(graph.outputs)
    kept = []
    for operator in reversed(graph.operators):
        if needed.intersection(operator.outputs) or not len(operator.outputs):
            needed.update(operator.inputs)
            kept.append(operator)
    graph.operators = kept[::-1]
