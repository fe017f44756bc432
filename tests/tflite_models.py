"""Small ``.tflite`` models made by hand, so that a test says exactly what is in them. No framework takes part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edge_infer.convert import tflite_files

TYPES = schema.TensorType
DTYPES = {"float32": TYPES.FLOAT32, "int32": TYPES.INT32, "int8": TYPES.INT8}
OPERATORS = schema.BuiltinOperator


class Net:
    """A graph put together tensor by tensor; ``None`` in a shape is a dynamic dimension."""

    def __init__(self) -> None:
        self.graph = schema.SubGraphT()
        self.graph.name, self.graph.tensors, self.graph.operators = b"main", [], []
        self.graph.inputs, self.graph.outputs = [], []
        self.model = schema.ModelT()
        self.model.version, self.model.description = 3, b"by hand"
        self.model.operatorCodes, self.model.subgraphs = [], [self.graph]
        self.model.buffers = [schema.BufferT()]

    def tensor(self, name: str, shape: tuple[int | None, ...], dtype: str = "float32") -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.buffer, tensor.hasRank = name.encode(), DTYPES[dtype], 0, True
        tensor.shape = [size or 1 for size in shape]
        tensor.shapeSignature = [-1 if size is None else size for size in shape]
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def input(self, name: str, shape: tuple[int | None, ...], dtype: str = "float32") -> int:
        self.graph.inputs.append(self.tensor(name, shape, dtype))
        return int(self.graph.inputs[-1])

    def constant(self, name: str, values: np.ndarray) -> int:
        index = self.tensor(name, values.shape, str(values.dtype))
        self.graph.tensors[index].shapeSignature = None
        buffer = schema.BufferT()
        buffer.data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.model.buffers.append(buffer)
        self.graph.tensors[index].buffer = len(self.model.buffers) - 1
        return index

    def call(self, name: str, inputs: list[int], outputs: list[int], options: Any = None, version: int = 1) -> int:
        """Add an operator; gives its first output."""
        code = schema.OperatorCodeT()
        if hasattr(OPERATORS, name):
            number = getattr(OPERATORS, name)
        else:
            number, code.customCode = OPERATORS.CUSTOM, name.encode()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), version
        self.model.operatorCodes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self.model.operatorCodes) - 1
        operator.inputs, operator.outputs = inputs, outputs
        if options is not None:
            operator.builtinOptions = options
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self.graph.operators.append(operator)
        return outputs[0]

    def dense(self, x: int, name: str, weights: int | np.ndarray, relu: bool = False) -> int:
        """A fully connected layer named ``name``; ``weights`` of shape (outputs, inputs), or a tensor to share."""
        kernel = self.constant(f"{name}/weights", weights) if isinstance(weights, np.ndarray) else weights
        width = self.graph.tensors[kernel].shape[0]
        bias = self.constant(f"{name}/bias", np.zeros(width, np.float32))
        lead = self.graph.tensors[x].shapeSignature[:-1]
        y = self.tensor(name, (*[None if size == -1 else size for size in lead], width))
        options = schema.FullyConnectedOptionsT()
        options.keepNumDims, options.fusedActivationFunction = len(lead) > 1, int(relu)
        return self.call("FULLY_CONNECTED", [x, kernel, bias], [y], options, version=5 if len(lead) > 1 else 1)

    def finish(self, path: Path, inputs: dict[str, int], outputs: dict[str, int]) -> Path:
        self.graph.outputs = list(outputs.values())
        signature = tflite_files.only_signature(self.model)
        for entries, names in ((signature.inputs, inputs), (signature.outputs, outputs)):
            for entry, (name, index) in zip(entries, names.items(), strict=True):
                entry.name, entry.tensorIndex = name.encode(), index
        self.model.signatureDefs = [signature]
        tflite_files.write(self.model, path)
        return path


def weights(seed: int, *shape: int) -> np.ndarray:
    """Random weights that keep a signal's power."""
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def lookup(path: Path) -> Path:
    """Token numbers of any length and features of any batch; two outputs, whose weights are tied."""
    net = Net()
    ids, features = net.input("ids_0", (None, None), "int32"), net.input("features_0", (None, 48))
    table = net.constant("table", weights(1, 64, 48))
    embedded = net.call("GATHER", [table, ids], [net.tensor("embedded", (None, None, 48))], schema.GatherOptionsT())
    hidden = net.dense(embedded, "hidden", weights(2, 48, 48), relu=True)
    each = net.dense(hidden, "each", table)
    score = net.dense(net.dense(features, "mix", weights(3, 48, 48), relu=True), "score", table)
    return net.finish(path, {"ids": ids, "features": features}, {"each": each, "score": score})


def stack(path: Path, *, spread: float = 1.0) -> Path:
    """Four layers one after the other; the columns of ``third``'s input differ ``spread`` times in size."""
    net = Net()
    x = net.input("x", (None, 32))
    first = net.dense(x, "first", weights(1, 64, 32), relu=True)
    scale = np.ones((64, 1), np.float32)
    scale[0] = spread
    second = net.dense(first, "second", weights(2, 64, 64) * scale, relu=True)
    third = net.dense(second, "third", weights(3, 64, 64) / scale.T, relu=True)
    return net.finish(path, {"x": x}, {"y": net.dense(third, "fourth", weights(4, 16, 64))})


def one_operator(name: str, version: int) -> bytes:
    """A model that names an operator in a version and does not use it: engines look for it all the same."""
    net = Net()
    net.call(name, [], [net.tensor("x", (1,))], version=version)
    net.graph.operators = []
    net.graph.inputs = net.graph.outputs = [0]
    return tflite_files.to_bytes(net.model)
