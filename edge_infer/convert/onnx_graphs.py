"""What converters to ONNX leave, made into the contract's own model: names, operators, and nothing of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import set_external_data

from edge_infer.errors import ConversionError
from edge_infer.manifest import TensorSpec
from edge_infer.probe import Feed

#: ONNX Runtime 1.14 and later run it, and the quantizers and every operator needed here exist in it.
OPSET = 18
#: Domains of operators that every ONNX engine has.
PLAIN_DOMAINS = frozenset(("", "ai.onnx"))
#: Tensors of fewer bytes stay in the model's own file.
SMALLEST_BESIDE = 1024


def finish(model: onnx.ModelProto, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Path:
    """Check ``model`` against the contract and write it. Raises ConversionError.

    Doc strings and metadata go: they hold source lines and paths of the machine that converted.
    """
    _keep_unused(model, inputs)
    _check_names(model, inputs, outputs)
    _check_dtypes(model, inputs, outputs)
    _check_operators(model)
    strip(model)
    _order(model.graph.input, inputs)
    _order(model.graph.output, outputs)
    save(model, path)
    return path


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model`` with its weights in one file beside it, which has the same name and ``.data`` behind.

    Afterwards the tensors in memory are empty and name that file; ``onnx.load_external_data_for_model`` fills them
    again. In one file a model could have 2 GiB at most, and would be in memory twice while it is written.
    """
    weights = path.with_name(f"{path.name}.data")
    weights.unlink(missing_ok=True)  # onnx adds to a file that is there
    # Not by options of save_model, which refuses when the folder of whoever runs this has a file of that name.
    for tensor in _initializers(model.graph):
        if len(tensor.raw_data) >= SMALLEST_BESIDE:
            set_external_data(tensor, weights.name)
    onnx.save_model(model, path)


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from _initializers(inner)


def _keep_unused(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> None:
    """Converters drop inputs that nothing depends on; the contract has them all the same."""
    have = {item.name for item in model.graph.input}
    for spec in inputs:
        if spec.name not in have:
            dims = [f"{spec.name}_{axis}" if size is None else size for axis, size in enumerate(spec.shape)]
            dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
            model.graph.input.append(onnx.helper.make_tensor_value_info(spec.name, dtype, dims))


def _check_names(model: onnx.ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    for what, made, wanted in (("inputs", model.graph.input, inputs), ("outputs", model.graph.output, outputs)):
        have, want = sorted(item.name for item in made), sorted(spec.name for spec in wanted)
        if have != want:
            raise ConversionError(
                f"the converted ONNX model has the {what} {', '.join(have) or 'none'}, expected {', '.join(want)}: one "
                "given twice is merged, so leave it out of the model"
            )


def _check_dtypes(model: onnx.ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    made = {item.name: item.type.tensor_type.elem_type for item in (*model.graph.input, *model.graph.output)}
    for spec in (*inputs, *outputs):
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(made[spec.name])) if made[spec.name] else spec.dtype
        if dtype != spec.dtype:
            raise ConversionError(f"the converted ONNX model has {spec.name!r} as {dtype}, expected {spec.dtype}")


def _check_operators(model: onnx.ModelProto) -> None:
    own = {(function.domain, function.name) for function in model.functions}
    strange = sorted(
        {
            f"{node.domain}::{node.op_type}"
            for node in nodes(model.graph)
            if node.domain not in PLAIN_DOMAINS and (node.domain, node.op_type) not in own
        }
    )
    if strange:
        raise ConversionError(
            f"the converted ONNX model needs the operators {', '.join(strange)}, which plain engines lack; replace "
            "what they come from in the model, or choose another --format"
        )


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of the graphs inside conditions and loops too."""
    for node in graph.node:
        yield node
        for inner in inner_graphs(node):
            yield from nodes(inner)


def inner_graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The branches of a condition, the body of a loop."""
    graph, graphs = onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS
    inner = [attribute.g for attribute in node.attribute if attribute.type == graph]
    return inner + [item for attribute in node.attribute if attribute.type == graphs for item in attribute.graphs]


def rename(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Give values of the graph, inputs and outputs among them, new names (old -> new)."""
    taken = {name for node in nodes(model.graph) for name in (*node.input, *node.output)} - set(names)
    clear = {name: f"{name}__" for name in taken & set(names.values())}  # names that a new one would clash with
    _rename_graph(model.graph, {**clear, **names})


def _rename_graph(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for item in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.name = names.get(item.name, item.name)
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
        for inner in inner_graphs(node):
            _rename_graph(inner, names)


def strip(model: onnx.ModelProto) -> None:
    """Drop doc strings and metadata, of nodes and values too."""
    model.doc_string = ""
    del model.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
        for node in function.node:
            _strip(node)
    _strip_graph(model.graph)


def _strip_graph(graph: onnx.GraphProto) -> None:
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        _strip(item)
    for node in graph.node:
        for inner in inner_graphs(node):
            _strip_graph(inner)


def _strip(item: Any) -> None:
    item.ClearField("doc_string")
    del item.metadata_props[:]


def _order(items: Any, specs: Sequence[TensorSpec]) -> None:
    """In the contract's order."""
    by_name = {item.name: onnx.ValueInfoProto.FromString(item.SerializeToString()) for item in items}
    del items[:]
    items.extend(by_name[spec.name] for spec in specs)


def fix_shapes(model: onnx.ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Write the contract's shapes over what the converter made of them; dynamic sizes are named NAME_AXIS."""
    specs = {spec.name: spec for spec in (*inputs, *outputs)}
    for item in (*model.graph.input, *model.graph.output):
        spec = specs[item.name]
        shape = item.type.tensor_type.shape
        del shape.dim[:]
        for axis, size in enumerate(spec.shape):
            dim = shape.dim.add()
            if size is None:
                dim.dim_param = f"{spec.name}_{axis}"
            else:
                dim.dim_value = size


def layer(node: onnx.NodeProto) -> str:
    """What a node is called; where the exporter gave no name, what it makes."""
    return node.name or node.output[0]


def shapes(feed: Feed) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())


def of_each_shape(feeds: Sequence[Feed]) -> list[Feed]:
    """The first feed of each set of shapes."""
    firsts: dict[str, Feed] = {}
    for feed in feeds:
        firsts.setdefault(shapes(feed), feed)
    return list(firsts.values())


def fix_dimensions(inputs: Sequence[TensorSpec], feed: Feed) -> str:
    """The option that gives dynamic dimensions the sizes of ``feed``; empty where there are none."""
    return " ".join(
        f"--input {spec.name}={spec.dtype}:{','.join(map(str, feed[spec.name].shape))}"
        for spec in inputs
        if None in spec.shape
    )
