"""tf2onnx, which both ways from TensorFlow's formats to ONNX use, and how it fails."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx

from edge_infer.convert import onnx_graphs
from edge_infer.errors import ConversionError

if not hasattr(np, "product"):  # numpy 2 has it no more, and tf2onnx 1.17 calls it for models over 2 GB
    np.product = np.prod  # type: ignore[attr-defined]

import tf2onnx
from tf2onnx.graph import Node

__all__ = ["canonical", "explain", "refuse_leftovers", "tf2onnx"]


_update_proto = Node.update_proto


def _update_but_constants(self: Node, external_tensor_storage: Any = None) -> None:
    """What a constant holds is taken from its attributes, never from the message that this would write anew.

    It is called after each of a dozen passes, and memory that a message gave up is not free before the message is.
    """
    if not self.is_const():
        _update_proto(self, external_tensor_storage)


def _copy_but_constants(self: Node, memo: dict[int, Any]) -> Node:
    """The graph is copied before each pass; no pass writes into the values of a constant."""
    copied: Node = Node.__new__(Node)
    memo[id(self)] = copied
    if self.is_const():
        op = self.op
        memo[id(op)] = onnx.NodeProto(name=op.name, op_type=op.op_type, domain=op.domain, output=op.output)
        memo |= {id(value): value for value in self.attr.values()}
    copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return copied


# Otherwise 500 MB of weights take 22 GB of memory (tf2onnx 1.17).
Node.update_proto, Node.__deepcopy__ = _update_but_constants, _copy_but_constants


def refuse_leftovers(model: onnx.ModelProto, prefix: str = "") -> None:
    """tf2onnx leaves what it cannot express under its own name (``prefix`` put before), with a log entry alone."""
    schemas = {schema.name for schema in onnx.defs.get_all_schemas()}
    for node in onnx_graphs.nodes(model.graph):
        if node.domain in onnx_graphs.PLAIN_DOMAINS and node.op_type not in schemas:
            layer = node.name.rpartition(";")[2].rpartition("/")[0]  # TFLite's names list all that was fused
            where = f" in layer {layer!r}" if layer else ""
            raise ConversionError(
                f"the operator {node.op_type.removeprefix(prefix)}{where} has no ONNX form; replace it in the model, "
                "or use --format tflite"
            )


def explain(error: BaseException) -> ConversionError:
    lines = str(error).strip().splitlines() or ["no reason given"]
    return ConversionError(
        f"tf2onnx cannot convert the model: {type(error).__name__}: {lines[0][:300]}; see all of it with -v, or use "
        "--format tflite"
    )


def canonical(model: onnx.ModelProto) -> None:
    """Order and name the parts by what they are: tf2onnx goes by addresses, hashes and what it did before.

    Layers keep the names of the source, without what differs from run to run; the rest is named after operators.
    """
    _Canonical(item.name for item in (*model.graph.input, *model.graph.output)).graph(model.graph)
    model.graph.name = "model"


class _Canonical:
    def __init__(self, kept: Iterable[str]) -> None:
        self.values = {name: name for name in kept}
        self.taken = set(self.values)
        self.graphs = 0

    def graph(self, graph: onnx.GraphProto) -> None:
        weights = {item.name: item for item in graph.initializer}
        for item in graph.input:
            self._name(item.name, "input")
        nodes = _in_order(graph)
        used: list[str] = []
        for node in nodes:
            if not node.domain:
                node.ClearField("domain")  # left out and empty are the same, but not the same bytes
            node.name = _unused(_layer(node, weights) or node.op_type, self.taken)
            for place, name in enumerate([*node.input, *_outer_names(node)]):
                if name in weights:
                    used.append(name)
                    self._name(name, f"{node.name}.{place}")
            for place, name in enumerate(node.output):
                self._name(name, f"{node.name}:{place}")
            for inner in onnx_graphs.inner_graphs(node):
                self.graphs += 1
                inner.name = f"{node.op_type}_{self.graphs}"
                outside = dict(self.values)
                _copies_last(inner)
                self.graph(inner)
                self.values = outside  # graphs side by side may use the same names
            for names in (node.input, node.output):
                names[:] = [self.values.get(name, name) for name in names]
        used += [item.name for item in graph.output if item.name in weights]
        _keep(graph, list(dict.fromkeys(used)))
        for item in (*graph.input, *graph.output, *graph.initializer):
            item.name = self.values.get(item.name, item.name)
            if isinstance(item, onnx.ValueInfoProto):
                for dim in item.type.tensor_type.shape.dim:
                    dim.ClearField("dim_param")
        rows = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:], graph.value_info[:]
        graph.node.extend(rows)

    def _name(self, old: str, new: str) -> None:
        if old and old not in self.values:
            self.values[old] = _unused(new, self.taken)


def _keep(graph: onnx.GraphProto, names: list[str]) -> None:
    """The weights of these names, in this order; in place, since each copy would be all of them once more."""
    order = {name: place for place, name in enumerate(names)}
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name not in order:
            del graph.initializer[place]
    graph.initializer.sort(key=lambda item: order[item.name])


def _copies_last(graph: onnx.GraphProto) -> None:
    """Of two outputs that are the same value, of which tf2onnx copies either, let the first be the value itself."""
    copied = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    places = {item.name: index for index, item in enumerate(graph.output)}
    for same, value in copied.items():
        if same in places and value in places and places[same] < places[value]:
            graph.output[places[same]].name, graph.output[places[value]].name = value, same


def _layer(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> str:
    """The source's name of a node with weights of its own; tf2onnx merges others that are equal, and keeps any name."""
    if not any(len(weights[name].dims) > 1 for name in node.input if name in weights):
        return ""
    name = re.sub(r"__\d+|\d{5,}|(Stateful)?PartitionedCall/", "", node.name)
    return name.removeprefix("edge_infer_")


def _unused(name: str, taken: set[str]) -> str:
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free


def _outer_names(node: onnx.NodeProto) -> list[str]:
    """What the graphs inside a condition or a loop use, of their own and from around them."""
    inner = onnx_graphs.inner_graphs(node)
    names = [name for graph in inner for item in onnx_graphs.nodes(graph) for name in item.input]
    return [*names, *(item.name for graph in inner for item in graph.output)]


def _in_order(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that the outputs need, each after those that it needs, told by the order of outputs and inputs."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    done: dict[int, onnx.NodeProto] = {}
    waiting = [(makers[item.name], False) for item in reversed(graph.output) if item.name in makers]
    while waiting:
        index, ready = waiting.pop()
        node = graph.node[index]
        if ready:
            done.setdefault(index, node)
        elif index not in done:
            waiting.append((index, True))
            needs = [makers[name] for name in (*node.input, *_outer_names(node)) if name in makers]
            waiting += [(need, False) for need in reversed(needs) if need not in done]
    return list(done.values())
