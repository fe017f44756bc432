"""ONNX to TFLite by onnx2tf, which lives in an environment of its own; its result is brought back to the contract.

onnx2tf keeps the layout of inputs when asked to, that of outputs where nothing saves a transpose: it is put back here.
Both engines are asked the same probe inputs for that, which also shows what onnx2tf did not understand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from edge_infer import probe
from edge_infer.convert import environments, onnx_graphs, spec_from_json, tflite_files
from edge_infer.errors import ConversionError
from edge_infer.manifest import TensorSpec

CONVERTER = "onnx2tf"
MAIN = Path(environments.__file__).parent / "onnx2tf_main.py"
#: Names onnx2tf cannot mistake for others; it rewrites what is no identifier.
INPUT, OUTPUT = "edge_infer_input_{}", "edge_infer_output_{}"
#: From the channels-last form of a tensor of that many dimensions to the one in which channels follow the batch.
CHANNELS_FIRST = {3: (0, 2, 1), 4: (0, 3, 1, 2), 5: (0, 4, 1, 2, 3)}
#: An output farther off than that, as a share of its largest value, is another function and no rounding.
FAR_OFF = 0.05
OTHER_WAYS = "or package it with --format onnx"


def convert(request: dict[str, Any]) -> dict[str, Any]:
    work = Path(request["out"])
    inputs = [spec_from_json(row) for row in request["inputs"]]
    outputs = [spec_from_json(row) for row in request["outputs"]]
    source = Path(request["from"]["model"])
    # To speak of its layers; its weights are let go once they are written, the converter takes memory enough.
    model = onnx.load(str(source), load_external_data=False)
    ask = {INPUT.format(number): spec for number, spec in enumerate(inputs)}
    tell = {OUTPUT.format(number): spec for number, spec in enumerate(outputs)}
    feeds = probe.load_feeds(Path(request["feeds"]))
    prepared = work / "prepared.onnx"
    _save(_with_plain_names(onnx.load(str(source)), ask, tell), prepared)
    job = {"model": str(prepared), "out": str(work / CONVERTER), "inputs": list(ask)}
    answer = _run(model, inputs, feeds[0], job)
    made = tflite_files.read(Path(answer["model"]))
    _refuse_custom(made, model)
    axes = _compare(source, Path(answer["model"]), ask, tell, feeds)
    for name, permutation in axes.items():
        _transpose_output(made, name, permutation)
    tflite_files.rename(
        made, {name: spec.name for name, spec in ask.items()}, {name: spec.name for name, spec in tell.items()}
    )
    tflite_files.strip(made)
    path = work / "model.tflite"
    tflite_files.write(made, path)
    return {"details": {"model": str(path), "signature": tflite_files.SIGNATURE}, "tools": answer["tools"]}


# -- before -----------------------------------------------------------------------------------------------------------


def _with_plain_names(
    model: onnx.ModelProto, inputs: dict[str, TensorSpec], outputs: dict[str, TensorSpec]
) -> onnx.ModelProto:
    """The model, its inputs and outputs under names that onnx2tf leaves alone, and with the contract's shapes."""
    graph = model.graph
    _take_apart_by_gather(graph)
    given = {spec.name: name for name, spec in inputs.items()}
    _rename(graph, given)
    made = {name for node in graph.node for name in node.output if node.op_type != "Identity"}
    new: dict[str, str] = {}
    for name, spec in outputs.items():
        if spec.name in made and spec.name not in new:
            new[spec.name] = name
        else:
            before = _origin(graph, given.get(spec.name, new.get(spec.name, spec.name)))
            graph.node.append(_same(before, name, spec))
    _rename(graph, new)
    del graph.input[:], graph.output[:]
    graph.input.extend(_value(name, spec) for name, spec in inputs.items())
    graph.output.extend(_value(name, spec) for name, spec in outputs.items())
    return model


def _origin(graph: onnx.GraphProto, name: str) -> str:
    """What a value is a mere copy of."""
    copies = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    while name in copies:
        name = copies[name]
    return name


def _same(before: str, name: str, spec: TensorSpec) -> onnx.NodeProto:
    """A node that hands a value through: an input, a weight, or an output that is there twice.

    Not Identity, which onnx2tf writes as a RESHAPE to one fixed size.
    """
    return onnx.helper.make_node("Or" if spec.dtype == "bool" else "Max", [before, before], [name], name=name)


def _rename(graph: onnx.GraphProto, new: dict[str, str]) -> None:
    """Rename values wherever they are made or used, in branches and loops too."""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                # Names of its own hide those of the graph around it.
                own = {item.name for item in (*attribute.g.input, *attribute.g.initializer)}
                _rename(attribute.g, {old: name for old, name in new.items() if old not in own})
                for item in attribute.g.output:
                    item.name = new.get(item.name, item.name) if item.name not in own else item.name


def _take_apart_by_gather(graph: onnx.GraphProto) -> None:
    """Write a Split into slices of one, each then squeezed, as one Gather a slice, which it is.

    Of slices with a dynamic dimension onnx2tf loses the shape, and the model then runs in one size only.
    """
    numbers = (item for item in graph.initializer if item.data_type == onnx.TensorProto.INT64)
    known = {item.name: onnx.numpy_helper.to_array(item) for item in numbers}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in onnx_graphs.nodes(graph):
        for name in node.input:
            users.setdefault(name, []).append(node)
    kept = {item.name for item in graph.output}
    instead: dict[str, list[onnx.NodeProto]] = {}
    gone: set[str] = set()
    for node in graph.node:
        if node.op_type != "Split" or len(node.input) < 2 or not np.all(known.get(node.input[1], 0) == 1):
            continue
        axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
        squeezes = [users.get(name, []) for name in node.output]
        plain = all(
            len(users_of) == 1
            and users_of[0].op_type == "Squeeze"
            and len(users_of[0].input) == 2
            and np.array_equal(known.get(users_of[0].input[1], 0), [axis])
            for users_of in squeezes
        )
        if plain and not kept & set(node.output):
            instead[node.output[0]] = [_gather(graph, node, axis, at, use[0]) for at, use in enumerate(squeezes)]
            gone |= {use[0].output[0] for use in squeezes}
    nodes = [
        new
        for node in graph.node
        if node.output[0] not in gone
        for new in (instead.get(node.output[0], [node]) if node.op_type == "Split" else [node])
    ]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _gather(
    graph: onnx.GraphProto, split: onnx.NodeProto, axis: int, at: int, squeeze: onnx.NodeProto
) -> onnx.NodeProto:
    index = f"{split.output[0]} taken {at}"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(at, np.int64), index))
    return onnx.helper.make_node("Gather", [split.input[0], index], list(squeeze.output), axis=axis, name=squeeze.name)


def _value(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    shape = [f"{name}_{axis}" if size is None else size for axis, size in enumerate(spec.shape)]
    return onnx.helper.make_tensor_value_info(name, dtype, shape)


def _save(model: onnx.ModelProto, path: Path) -> None:
    """In one file where it can be: of a model with weights beside it onnx2tf infers fewer shapes."""
    if model.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF:
        onnx.save_model(model, str(path))
    else:
        onnx_graphs.save(model, path)


def _run(model: onnx.ModelProto, inputs: list[TensorSpec], feed: probe.Feed, request: dict[str, Any]) -> dict[str, Any]:
    log = Path(request["out"]).with_suffix(".log")
    try:
        return environments.run(CONVERTER, MAIN, request, log)
    except ConversionError as error:
        explained = _explained(error, inputs, feed)
        if explained is None:
            raise
        raise explained from error
    finally:
        if log.is_file():
            print(log.read_text("utf-8", "replace"), file=sys.stderr)


def _explained(error: ConversionError, inputs: list[TensorSpec], feed: probe.Feed) -> ConversionError | None:
    """onnx2tf's report on one operator as a sentence; None for anything else."""
    operator = re.search(r"op=(\w+) node=(.*?) reason_code=\w+ message=(.*)", str(error))
    if operator:
        name, layer, reason = operator.groups()
        return ConversionError(
            f"onnx2tf cannot express the operator {name} in layer {layer}: {reason[:300]}; {_advice(inputs, feed)}"
        )
    if "enable_rnn_unroll" in str(error):
        return ConversionError(
            f"onnx2tf writes recurrent layers step by step, for one length and one batch; {_advice(inputs, feed)}"
        )
    return None


def _advice(inputs: Sequence[TensorSpec], feed: probe.Feed) -> str:
    """What to try: dynamic dimensions are what onnx2tf understands least."""
    fixed = onnx_graphs.fix_dimensions(inputs, feed)
    return f"{f'give dynamic dimensions one size with {fixed}' if fixed else 'replace it in the model'}, {OTHER_WAYS}"


# -- after ------------------------------------------------------------------------------------------------------------


def _refuse_custom(made: Any, model: onnx.ModelProto) -> None:
    """onnx2tf turns what it cannot express into a custom operator, ONNX_ and its name, with a mere warning."""
    custom = [code.customCode.decode() for code in made.operatorCodes if code.customCode]
    for name in sorted(custom):
        operator = name.removeprefix("ONNX_")
        found = [node for node in onnx_graphs.nodes(model.graph) if node.op_type.upper() == operator.upper()]
        what = f"{found[0].op_type} in layer {onnx_graphs.layer(found[0])}" if found else operator
        raise ConversionError(
            f"onnx2tf expresses the operator {what} only as the custom operator {name}, which plain TFLite engines "
            f"lack; replace it in the model, {OTHER_WAYS}"
        )
    tflite_files.operators(made)


def _compare(
    source: Path, made: Path, ask: dict[str, TensorSpec], tell: dict[str, TensorSpec], feeds: list[probe.Feed]
) -> dict[str, tuple[int, ...]]:
    """Ask both models; gives how each output's axes have to be permuted, for those that need it.

    Raises ConversionError when the TFLite model fails, or answers in another shape, dtype or altogether differently.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    interpreter = Interpreter(model_path=str(made), num_threads=1)
    inputs = list(ask.values())
    names = [spec.name for spec in tell.values()]
    axes: dict[str, tuple[int, ...]] = {}
    for feed in _different(feeds):
        wanted = session.run(names, feed)
        try:
            answers = interpreter.get_signature_runner()(**{name: feed[spec.name] for name, spec in ask.items()})
            reasons = [
                _difference(spec, np.asarray(want), np.asarray(answers[name]), axes, name)
                for (name, spec), want in zip(tell.items(), wanted, strict=True)
            ]
        except (RuntimeError, ValueError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reasons = [f"fails ({lines[0][:200]})"]
        for reason in filter(None, reasons):
            sizes = onnx_graphs.shapes(feed)
            raise ConversionError(f"the model that onnx2tf made {reason} on {sizes}; {_advice(inputs, feeds[0])}")
    return {name: permutation for name, permutation in axes.items() if permutation != tuple(range(len(permutation)))}


def _different(feeds: list[probe.Feed]) -> list[probe.Feed]:
    """Two feeds, one of each other set of shapes, and the first again: sizes must be free to go up and down.

    The same question must also get the same answer after others: some recurrent operators of TFLite keep their state.
    """
    return [feeds[0], *feeds[1:2], *onnx_graphs.of_each_shape(feeds)[1:], feeds[0]]


def _difference(
    spec: TensorSpec, want: probe.Array, have: probe.Array, axes: dict[str, tuple[int, ...]], name: str
) -> str:
    """What is wrong with an answer, empty when nothing is; ``axes`` learns the output's permutation at first sight."""
    if have.dtype != want.dtype:
        return f"answers with output {spec.name!r} in {have.dtype} instead of {want.dtype}"
    known = axes.get(name)
    possible = [
        permutation
        for permutation in ([known] if known else _permutations(have.ndim))
        if have.transpose(permutation).shape == want.shape
    ]
    if not possible:
        return f"answers with output {spec.name!r} in the shape {list(have.shape)} instead of {list(want.shape)}"
    distances = [_distance(want, have.transpose(permutation)) for permutation in possible]
    best = int(np.argmin(distances))
    if distances[best] > FAR_OFF:
        return f"answers with output {spec.name!r} off by {distances[best]:.0%} of its largest value"
    axes[name] = possible[best]
    return ""


def _permutations(rank: int) -> list[tuple[int, ...]]:
    return [tuple(range(rank)), *([CHANNELS_FIRST[rank]] if rank in CHANNELS_FIRST else [])]


def _distance(want: probe.Array, have: probe.Array) -> float:
    """Mean difference as a share of the largest value; a single integer or element on the edge counts little."""
    if not want.size:
        return 0.0
    wide, other = want.astype(np.float64), have.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where(wide == other, 0.0, np.abs(wide - other))  # equal infinities
    largest = float(np.max(np.abs(wide[np.isfinite(wide)]), initial=0.0)) or 1.0
    return float(np.mean(np.nan_to_num(difference, nan=0.0, posinf=largest))) / largest


def _transpose_output(model: Any, name: str, permutation: tuple[int, ...]) -> None:
    """Let an output of the signature go through a TRANSPOSE at the end of the graph."""
    graph = model.subgraphs[0]
    entry = next(entry for entry in model.signatureDefs[0].outputs if entry.name.decode() == name)
    old = graph.tensors[entry.tensorIndex]
    graph.tensors += [
        _permuted(old, permutation),
        tflite_files.constant(model, b"permutation of " + old.name, permutation),
    ]
    new, axes = len(graph.tensors) - 2, len(graph.tensors) - 1
    operator = schema.OperatorT()
    operator.opcodeIndex = _code(model, schema.BuiltinOperator.TRANSPOSE, 1 if len(permutation) < 5 else 4)
    operator.inputs, operator.outputs = [entry.tensorIndex, axes], [new]
    operator.builtinOptionsType = schema.BuiltinOptions.TransposeOptions
    operator.builtinOptions = schema.TransposeOptionsT()
    graph.operators.append(operator)
    graph.outputs = [new if index == entry.tensorIndex else index for index in graph.outputs]
    entry.tensorIndex = new


def _permuted(old: Any, permutation: tuple[int, ...]) -> Any:
    tensor = schema.TensorT()
    tensor.name, tensor.type, tensor.buffer = old.name + b" channels first", old.type, 0
    tensor.shape = [int(old.shape[axis]) for axis in permutation]
    if old.shapeSignature is not None and len(old.shapeSignature):
        tensor.shapeSignature = [int(old.shapeSignature[axis]) for axis in permutation]
    return tensor


def _code(model: Any, operator: int, version: int) -> int:
    for index, code in enumerate(model.operatorCodes):
        if tflite_files.operator_code(code) == operator and code.version >= version:
            return index
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = operator, min(operator, 127), version
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1
