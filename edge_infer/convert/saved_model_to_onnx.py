"""SavedModel to ONNX by tf2onnx; inputs keep the layout of the source, NHWC images included."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorflow as tf

from edge_infer.convert import onnx_graphs, spec_from_json
from edge_infer.convert.frozen_graphs import freeze
from edge_infer.convert.onnx_graphs import OPSET
from edge_infer.convert.set_aside import LARGE_BYTES, put_back
from edge_infer.convert.tf2onnx_graphs import canonical, explain, refuse_leftovers, tf2onnx
from edge_infer.errors import EdgeInferError
from edge_infer.manifest import TensorSpec


def _erfc(context: Any, node: Any, name: str, arguments: Any) -> None:
    """``1 - erf(x)``; Keras's exact GELU has it, and tf2onnx does not know it."""
    erf = context.make_node("Erf", node.input, name=f"{name}_erf")
    one = context.make_const(
        f"{name}_one", np.ones((), tf2onnx.utils.map_onnx_to_numpy_type(context.get_dtype(node.input[0])))
    )
    node.type = "Sub"
    context.replace_inputs(node, [one.output[0], erf.output[0]])


#: TensorFlow operators that tf2onnx lacks.
HANDLERS: dict[str, Any] = {"Erfc": (_erfc, [])}


def convert(request: dict[str, Any]) -> dict[str, Any]:
    inputs = [spec_from_json(row) for row in request["inputs"]]
    outputs = [spec_from_json(row) for row in request["outputs"]]
    path = Path(request["out"]) / "model.onnx"
    try:
        made = _converted(request["from"], inputs, outputs)
        unrolled = request["from"].get("unrolled")
        # Of an LSTM tf2onnx makes ONNX's own, which is faster; a loop that is left is slower than its steps.
        if unrolled and any(node.op_type == "Loop" for node in onnx_graphs.nodes(made.graph)):
            made = _converted({**request["from"], "saved_model": unrolled}, inputs, outputs)
    except EdgeInferError:
        raise
    except Exception as error:  # tf2onnx raises what its handlers trip over
        raise explain(error) from error
    canonical(made)
    names = {f"input_{index}": spec.name for index, spec in enumerate(inputs)}
    onnx_graphs.rename(made, names | {f"output_{index}": spec.name for index, spec in enumerate(outputs)})
    refuse_leftovers(made)
    onnx_graphs.fix_shapes(made, inputs, outputs)
    onnx_graphs.finish(made, path, inputs, outputs)
    tools = {"tensorflow": tf.__version__, "tf2onnx": tf2onnx.__version__, "onnx": onnx.__version__}
    return {"details": {"model": str(path)}, "tools": tools}


def _converted(source: dict[str, Any], inputs: list[TensorSpec], outputs: list[TensorSpec]) -> onnx.ModelProto:
    weights = sum(file.stat().st_size for file in Path(source["saved_model"], "variables").glob("*"))
    return to_onnx(_function(source, inputs, outputs), inputs, large=weights > LARGE_BYTES)


def _function(source: dict[str, Any], inputs: list[TensorSpec], outputs: list[TensorSpec]) -> Any:
    """The signature as a function of tensors by position, with names that TensorFlow leaves as they are."""
    loaded = tf.saved_model.load(source["saved_model"])
    signature = loaded.signatures[source["signature"]]

    def call(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        answer = signature(**{spec.name: tensor for spec, tensor in zip(inputs, tensors, strict=True)})
        return {f"output_{index}": tf.identity(answer[spec.name]) for index, spec in enumerate(outputs)}

    function = tf.function(call, autograph=False)
    function.source = loaded  # its variables live as long as this
    return function


def to_onnx(function: Any, inputs: list[TensorSpec], large: bool = False) -> onnx.ModelProto:
    """``large`` keeps weights out of the protobuf messages on the way, which hold at most 2 GiB."""
    specs = [tf.TensorSpec(spec.shape, spec.dtype, name=f"input_{index}") for index, spec in enumerate(inputs)]
    concrete = function.get_concrete_function(*specs)
    if large:
        made = _large(concrete)
    else:
        try:
            made, _ = tf2onnx.convert.from_function(function, specs, opset=OPSET, custom_op_handlers=HANDLERS)
        except ValueError as error:
            if not re.search("maximum protobuf size|string too long", str(error)):
                raise
            made = _large(concrete)
    _hold_constants(made, concrete)
    converted: onnx.ModelProto = made
    return converted


def _large(concrete: Any) -> onnx.ModelProto:
    """What ``tf2onnx.convert.from_function`` does, with large weights set aside."""
    frozen = freeze(concrete)
    inputs = [tensor.name for tensor in concrete.inputs if tensor.dtype != tf.resource]
    outputs = [tensor.name for tensor in concrete.outputs if tensor.dtype != tf.resource]
    with tf.device("/cpu:0"):
        made, storage = tf2onnx.convert._convert_common(
            frozen.graph,
            large_model=True,
            continue_on_error=True,
            opset=OPSET,
            custom_op_handlers=HANDLERS,
            input_names=[*inputs, *(f"{name}:0" for name in frozen.weights)],
            output_names=outputs,
            tensors_to_rename=tf2onnx.convert.tensor_names_from_structed(concrete, inputs, outputs),
        )
    for tensor in _tensors(made.graph):
        for entry in tensor.external_data:
            if entry.key == "location":
                tensor.raw_data = storage.name_to_tensor_data[entry.value]
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    put_back(made, {f"{name}:0": array for name, array in frozen.weights.items()})
    converted: onnx.ModelProto = made
    return converted


def _hold_constants(made: onnx.ModelProto, concrete: Any) -> None:
    """Tensors that a function holds beside its variables, as Keras's normalization does, are no inputs of the model."""
    held = zip(
        concrete.inputs[len(concrete.inputs) - len(concrete.captured_inputs) :], concrete.captured_inputs, strict=True
    )
    values = {inside.name: tensor for inside, tensor in held if inside.dtype != tf.resource}
    for item in [item for item in made.graph.input if item.name in values]:
        made.graph.initializer.append(onnx.numpy_helper.from_array(values[item.name].numpy(), item.name))
        made.graph.input.remove(item)


def _tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    values = [
        attribute.t for node in onnx_graphs.nodes(graph) for attribute in node.attribute if attribute.HasField("t")
    ]
    return [*graph.initializer, *values]
