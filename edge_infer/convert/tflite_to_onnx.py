"""TFLite to ONNX by tf2onnx, for float models; inputs keep the layout of the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorflow as tf
from ai_edge_litert.schema_py_generated import TensorType

from edge_infer.convert import onnx_graphs, spec_from_json, tflite_files
from edge_infer.convert.onnx_graphs import OPSET
from edge_infer.convert.set_aside import LARGE_BYTES, SMALLEST_BYTES, put_back
from edge_infer.convert.tf2onnx_graphs import canonical, explain, refuse_leftovers, tf2onnx
from edge_infer.convert.tflite_precision import precision_of
from edge_infer.errors import ConversionError, EdgeInferError


def _gelu(context: Any, node: Any, name: str, arguments: Any) -> None:
    """GELU in operators that ONNX has in this opset; tf2onnx does not know TFLite's own."""
    dtype = tf2onnx.utils.map_onnx_to_numpy_type(context.get_dtype(node.input[0]))

    def constant(value: float) -> str:
        made: str = context.make_const(tf2onnx.utils.make_name(name), np.array(value, dtype)).output[0]
        return made

    def operator(kind: str, *inputs: str) -> str:
        made: str = context.make_node(kind, list(inputs), name=tf2onnx.utils.make_name(name)).output[0]
        return made

    x = node.input[0]
    if node.get_attr_value("approximate", False):
        cube = operator("Mul", operator("Mul", x, x), operator("Mul", x, constant(0.044715)))
        gate = operator("Tanh", operator("Mul", operator("Add", x, cube), constant(np.sqrt(2 / np.pi))))
    else:
        gate = operator("Erf", operator("Mul", x, constant(np.sqrt(0.5))))
    half = operator("Mul", x, constant(0.5))
    node.type = "Mul"
    context.replace_inputs(node, [half, operator("Add", gate, constant(1))])


#: Operator -> the inputs that can be weights which tf2onnx does not look into.
TAKES = {"FULLY_CONNECTED": (1,), "BATCH_MATMUL": (1,), "GATHER": (0,)}
#: TFLite operators that tf2onnx lacks.
HANDLERS: dict[str, Any] = {"TFL_GELU": (_gelu, [])}


def convert(request: dict[str, Any]) -> dict[str, Any]:
    source = request["from"]
    inputs = [spec_from_json(row) for row in request["inputs"]]
    outputs = [spec_from_json(row) for row in request["outputs"]]
    work = Path(request["out"])
    model = tflite_files.read(Path(source["model"]))
    if precision_of(model) not in ("float32", "float16"):
        raise ConversionError(
            "the TFLite model is quantized already, and ONNX would compute it otherwise, rounded in other places; "
            "use --format tflite, or package the float model it was made from"
        )
    tflite_files.operators(model)
    raw = work / "raw.tflite"
    _plainly_named(model)
    weights = _set_aside(model) if Path(source["model"]).stat().st_size > LARGE_BYTES else {}
    tflite_files.write(model, raw)
    try:
        made, _ = tf2onnx.convert.from_tflite(str(raw), opset=OPSET, custom_op_handlers=HANDLERS)
    except EdgeInferError:
        raise
    except Exception as error:  # tf2onnx raises what its handlers trip over
        raise explain(error) from error
    raw.unlink()
    put_back(made, weights)
    refuse_leftovers(made, "TFL_")
    canonical(made)
    _rename(made, model)
    del made.graph.value_info[:]  # shapes of the file, where dynamic sizes are those of one conversion
    onnx_graphs.fix_shapes(made, inputs, outputs)
    path = onnx_graphs.finish(made, work / "model.onnx", inputs, outputs)
    tools = {"tensorflow": tf.__version__, "tf2onnx": tf2onnx.__version__, "onnx": onnx.__version__}
    return {"details": {"model": str(path)}, "tools": tools}


def _set_aside(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Make inputs of large weights that tf2onnx does not look into; gives what they hold by their names."""
    graph = model.subgraphs[0]
    uses: dict[int, list[bool]] = {}
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        places = TAKES.get(tflite_files.NAMES[tflite_files.operator_code(code)], ())
        for place, index in enumerate(operator.inputs):
            uses.setdefault(index, []).append(place in places)
    weights = {}
    for index, tensor in enumerate(graph.tensors):
        data = model.buffers[tensor.buffer].data
        if (
            data is not None
            and len(data) > SMALLEST_BYTES
            and tensor.type == TensorType.FLOAT32
            and all(uses.get(index, [False]))
        ):
            weights[tensor.name.decode()] = np.frombuffer(data, "<f4").reshape(tensor.shape)
            tensor.buffer = 0  # the one that is empty
            graph.inputs = [*graph.inputs, index]
    return weights


def _plainly_named(model: Any) -> None:
    """tf2onnx tells tensors by name: each gets its own, inputs and outputs those that ``_rename`` looks for."""
    signature = tflite_files.only_signature(model)
    if signature.subgraphIndex:
        raise ConversionError(
            "the TFLite model's signature is not its first graph, which tf2onnx converts; use --format tflite"
        )
    tflite_files.unique_tensor_names(model)
    tensors = model.subgraphs[0].tensors
    for prefix, entries in (("output", signature.outputs), ("input", signature.inputs)):
        for index, entry in enumerate(entries):
            tensors[entry.tensorIndex].name = f"edge_infer_{prefix}_{index}".encode()


def _rename(made: onnx.ModelProto, model: Any) -> None:
    signature = tflite_files.only_signature(model)
    names: dict[str, str] = {}
    for prefix, entries in (("output", signature.outputs), ("input", signature.inputs)):
        names |= {f"edge_infer_{prefix}_{index}": entry.name.decode() for index, entry in enumerate(entries)}
    onnx_graphs.rename(made, names)
