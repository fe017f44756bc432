"""TensorFlow functions as graphs in which variables are constants, but for large weights, which are set aside."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import convert_to_constants

from edge_infer.convert.set_aside import SMALLEST_BYTES

#: Operator -> the inputs that can be weights which no converter looks into.
TAKES = {"MatMul": (1,), "BatchMatMulV2": (1,), "GatherV2": (0,)}


@dataclass(frozen=True)
class Frozen:
    """``weights``: by the name of the placeholder that stands for each."""

    graph: tf.compat.v1.GraphDef
    weights: dict[str, np.ndarray[Any, Any]]


def freeze(function: Any) -> Frozen:
    """A concrete function as one graph; ``weights`` share the memory of its variables."""
    variables = _variables(function)
    # Without the values, which follow below: only how the variables are used.
    inlined = _Uses(convert_to_constants._run_inline_graph_optimization(function, False, True))
    reads = {name: inlined.reads(name) for name in variables}
    reads = {name: nodes for name, nodes in reads.items() if nodes}
    data = convert_to_constants._FunctionConverterDataInEager(
        func=function, lower_control_flow=False, aggressive_inlining=True, variable_names_denylist=set(reads)
    )
    graph, _ = convert_to_constants._replace_variables_by_constants(data)
    nodes = {node.name: node for node in graph.node}
    weights = {}
    for name, (first, *others) in reads.items():
        weights[first] = variables[name].read_value()._numpy()  # numpy() would copy
        _make_placeholder(nodes[first], variables[name])
        for other in others:
            _make_identity(nodes[other], first, variables[name])
    _remove(graph, _Uses(graph).passed_on(reads))  # the handles, which nothing reads any more
    return Frozen(graph, weights)


def _variables(function: Any) -> dict[str, Any]:
    """The large variables that a function uses, by the name of the placeholder for each."""
    captured = [(handle, inside.name.split(":")[0]) for handle, inside in function.graph.captures]
    known = {name: item for item in function.graph.variables for handle, name in captured if handle is item.handle}
    return {name: item for name, item in known.items() if _bytes(item) > SMALLEST_BYTES}


def _bytes(variable: Any) -> int:
    return (variable.shape.num_elements() or 0) * int(variable.dtype.size)


class _Uses:
    """Who uses a value, and as its which input, also through Identity nodes, which functions leave when inlined."""

    def __init__(self, graph: tf.compat.v1.GraphDef) -> None:
        self._users: dict[str, list[tuple[Any, int]]] = defaultdict(list)
        for node in graph.node:
            for place, name in enumerate(node.input):
                if not name.startswith("^"):  # what only comes after it
                    self._users[name.split(":")[0]].append((node, place))

    def of(self, name: str) -> list[tuple[Any, int]]:
        found = []
        for node, place in self._users[name]:
            found += self.of(node.name) if node.op == "Identity" else [(node, place)]
        return found

    def reads(self, name: str) -> list[str]:
        """The nodes that read a variable; none if more is done with what they read than ``TAKES`` has."""
        nodes = [node for node, _ in self.of(name)]
        uses = [use for node in nodes for use in self.of(node.name)]
        only = all(node.op == "ReadVariableOp" for node in nodes)
        return [node.name for node in nodes] if only and all(at in TAKES.get(node.op, ()) for node, at in uses) else []

    def passed_on(self, names: Iterable[str]) -> set[str]:
        """Nodes and the Identity nodes that hand on what they give."""
        found = set(names)
        for name in list(found):
            found |= self.passed_on(node.name for node, _ in self._users[name] if node.op == "Identity")
        return found


def _remove(graph: tf.compat.v1.GraphDef, names: set[str]) -> None:
    for node in [node for node in graph.node if node.name in names]:
        graph.node.remove(node)
    orders = {f"^{name}" for name in names}
    for node in graph.node:
        if orders.intersection(node.input):
            node.input[:] = [name for name in node.input if name not in orders]


def _make_placeholder(node: Any, variable: Any) -> None:
    del node.input[:]
    node.attr.clear()
    node.op = "Placeholder"
    node.attr["dtype"].type = variable.dtype.as_datatype_enum
    node.attr["shape"].shape.CopyFrom(variable.shape.as_proto())


def _make_identity(node: Any, of: str, variable: Any) -> None:
    node.input[:] = [of]
    node.attr.clear()
    node.op = "Identity"
    node.attr["T"].type = variable.dtype.as_datatype_enum
