"""TFLite artifacts in every precision, from a float32 ``.tflite`` of any origin, by AI Edge Quantizer.

The quantizer works on the file's graph, so it does not matter which converter wrote it, and no framework is loaded.
Ranges of activations are measured here, with the built-in kernels, sample by sample.

https://github.com/google-ai-edge/ai-edge-quantizer
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from edge_infer.convert import spec_from_json, tflite_files
from edge_infer.errors import ConversionError, UsageError
from edge_infer.probe import make_feeds
from edge_infer.quantize import CALIBRATED, large_tensors, tflite_versions
from edge_infer.quantize.ranges import Ranges
from edge_infer.samples import Samples

Array = np.ndarray[Any, Any]

MODEL = "model.tflite"
TYPES = schema.TensorType
#: Smaller weights stay float32 where only weights are quantized: nothing is won. TFLite's converter has the same limit.
SMALLEST = 1024
#: The type that a precision gives weights: if no tensor has it, the precision made no difference.
WEIGHTS = {
    "float16": TYPES.FLOAT16,
    "int8-dynamic": TYPES.INT8,
    "int8-weights": TYPES.INT8,
    "int4-weights": TYPES.INT4,
    "int16x8": TYPES.INT16,
    "int8": TYPES.INT8,
    "int8-mixed": TYPES.INT8,
}
INTEGERS = {TYPES.INT8, TYPES.UINT8, TYPES.INT16, TYPES.INT4}
#: Stay float in every static precision: a quantized divisor may be 0, which kernels refuse, and numbers that are only
#: near each other become equal.
NEVER_STATIC = ("DIV", "EQUAL", "NOT_EQUAL")
#: Operators that only move values: int8 adds nothing there, so they are no layers.
MOVING = {
    *(
        "RESHAPE",
        "TRANSPOSE",
        "STRIDED_SLICE",
        "SLICE",
        "SPLIT",
        "UNPACK",
        "PACK",
        "GATHER",
        "GATHER_ND",
        "PAD",
        "PADV2",
    ),
    *("MAX_POOL_2D", "BROADCAST_TO", "SPACE_TO_DEPTH", "MIRROR_PAD", "RESIZE_NEAREST_NEIGHBOR"),
}


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Make the artifact of ``request["precision"]``.

    Raises ConversionError where the precision changes nothing, or the engine has no kernels for it; UsageError for
    layer names that the model does not have.
    """
    folder = Path(request["out"])
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tflite-") as work:
        model = _quantized(request, Path(work))
        tflite_versions.set_versions(model)
        operators = tflite_files.operators(model)
        layers = _stored_by_layer(model)
        engines = tflite_versions.oldest_engines(model)
        tflite_versions.write_min_runtime(model)
        tflite_files.write(model, folder / MODEL)
    if request["precision"] != "float32":
        _check_runs(request, folder / MODEL)
    return {
        "model": MODEL,
        "weights": None,
        "signature": request["from"]["signature"],
        "prepack": False,
        "layers": layers,
        "operators": operators,
        "requires": engines.requires(),
        "tools": {name: version(name) for name in ("ai-edge-quantizer", "ai-edge-litert")},
    }


def _quantized(request: dict[str, Any], work: Path) -> Any:
    """The model in the precision asked for; its weights may be mapped from files in ``work``."""
    model = normalized(request)
    precision = request["precision"]
    if precision == request["from"].get("precision", "float32"):
        return model
    if precision == "float16":
        _to_float16(model)
    else:
        model = _by_quantizer(request, model, work)
    if not any(tensor.type == WEIGHTS[precision] for graph in model.subgraphs for tensor in graph.tensors):
        raise ConversionError(
            f"{precision} changes nothing in this TFLite model: it has no operator whose weights can be stored so "
            f"(its operators: {', '.join(tflite_files.operators(model))}); use float32"
        )
    return model


def normalized(request: dict[str, Any]) -> Any:
    """The source with nothing in it that tells of its making, one signature, and one name a tensor.

    It is float32, unless its own precision is the one asked for.
    """
    model = tflite_files.read(Path(request["from"]["model"]))
    tflite_files.operators(model)
    own = request["from"].get("precision", "float32")
    if own not in ("float32", request["precision"]):
        raise ConversionError(
            f"the TFLite model is {own} already, which {request['precision']} cannot be made of; give the float32 "
            "model that it was made from, or leave --precision away to package it as it is"
        )
    signature = tflite_files.only_signature(model)
    model.signatureDefs = [signature]
    signature.signatureKey = request["from"]["signature"].encode()
    tflite_files.strip(model)
    tflite_files.unique_tensor_names(model)
    return model


# float16


def _to_float16(model: Any) -> None:
    """Store large float32 constants as float16, each behind one operator that gives float32 back."""
    holders: dict[int, int] = {}  # buffer of float32 values -> that of the same as float16: tied ones stay tied
    for graph in model.subgraphs:
        made = {}
        for index, tensor in enumerate(graph.tensors):
            data = model.buffers[tensor.buffer].data
            if (
                tensor.type == TYPES.FLOAT32
                and data is not None
                and len(data) >= 4 * SMALLEST
                and not tensor.isVariable
            ):
                values = np.frombuffer(data, np.float32)
                if np.abs(values).max() <= np.finfo(np.float16).max:
                    if tensor.buffer not in holders:
                        holders[tensor.buffer] = _add_buffer(model, values.astype(np.float16))
                    made[index] = holders[tensor.buffer]
        _read_through_dequantize(model, graph, made)


def _add_buffer(model: Any, values: Array) -> int:
    buffer = schema.BufferT()
    buffer.data = values.view(np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def _read_through_dequantize(model: Any, graph: Any, made: dict[int, int]) -> None:
    """Let the graph read the tensors ``made`` (index -> buffer of float16 values) through DEQUANTIZE."""
    if not made:
        return
    code = tflite_files.add_operator_code(model, schema.BuiltinOperator.DEQUANTIZE)
    operators, float32 = [], {}
    for index, buffer in made.items():
        stored, tensor = graph.tensors[index], schema.TensorT()
        tensor.name, tensor.shape, tensor.type = stored.name + b"_float32", stored.shape, TYPES.FLOAT32
        tensor.shapeSignature, tensor.hasRank, tensor.buffer = stored.shapeSignature, stored.hasRank, 0
        stored.type, stored.buffer, stored.quantization = TYPES.FLOAT16, buffer, None
        float32[index] = len(graph.tensors)
        graph.tensors.append(tensor)
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = code, [index], [float32[index]]
        operators.append(operator)
    for operator in graph.operators:
        operator.inputs = [float32.get(int(index), int(index)) for index in operator.inputs]
    graph.outputs = [float32.get(int(index), int(index)) for index in graph.outputs]
    for entry in (entry for signature in model.signatureDefs for entry in signature.outputs):
        entry.tensorIndex = float32.get(entry.tensorIndex, entry.tensorIndex)
    graph.operators = [*operators, *graph.operators]


# integers


def _by_quantizer(request: dict[str, Any], model: Any, work: Path) -> Any:
    from ai_edge_quantizer import model_modifier, params_generator, recipe_manager
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    layers = [_layer_name(graph, operator) for graph in model.subgraphs for operator in graph.operators]
    keep = request.get("keep_float") or [] if request["precision"] == "int8-mixed" else []
    unknown = sorted(set(keep) - set(layers))
    if unknown:
        raise UsageError(f"the TFLite model has no layer {unknown[0]!r} to keep in float; the report names its layers")
    large_tensors.mend()
    static = request["precision"] in CALIBRATED
    source = work / "float.tflite"
    tflite_files.write(model, source)
    recipe = recipe_manager.RecipeManager()
    recipe.load_quantization_recipe(_recipe(request, [*keep, *(_never_static(model) if static else [])]))
    ranges = _measured(request, source) if static else None
    source_model = tfl_flatbuffer_utils.read_model(source)
    try:
        parameters = params_generator.ParamsGenerator(source_model).generate_quantization_parameters(
            recipe, ranges, enable_progress_bar=False
        )
        target = work / "quantized.tflite"
        model_modifier.ModelModifier(source_model).modify_model(
            parameters, serialize_to_path=target, enable_progress_bar=False
        )
    except Exception as error:  # the quantizer has no error of its own
        words = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ConversionError(f"AI Edge Quantizer cannot make {request['precision']} of this model: {words}") from error
    return tflite_files.read(target)


def _never_static(model: Any) -> list[str]:
    """Layers of which a static quantization would be wrong."""
    # Of loops and branches only the last pass is seen, so their ranges are not known.
    inner = [_layer_name(graph, operator) for graph in model.subgraphs[1:] for operator in graph.operators]
    graph = model.subgraphs[0]
    read = {int(index) for operator in graph.operators for index in operator.inputs} | set(map(int, graph.outputs))
    # AI Edge Quantizer leaves outputs float that nothing reads, and no kernel takes an operator with some of each.
    partly = [operator for operator in graph.operators if not {int(index) for index in operator.outputs} <= read]
    return [*inner, *(_layer_name(graph, operator) for operator in partly)]


def _layer_name(graph: Any, operator: Any) -> str:
    """A layer is named by the first tensor that it makes; every tensor has a name of its own."""
    outputs = [index for index in operator.outputs if index >= 0]
    return graph.tensors[outputs[0]].name.decode("utf-8", "replace") if outputs else ""


def _recipe(request: dict[str, Any], keep: Sequence[str]) -> list[dict[str, Any]]:
    """AI Edge Quantizer's rules, the later ones first in force. Inputs and outputs stay as they are."""
    precision = request["precision"]
    weights = {"num_bits": 8, "symmetric": True, "granularity": "CHANNELWISE", "dtype": "INT"}
    config: dict[str, Any] = {"weight_tensor_config": weights, "min_weight_elements": SMALLEST}
    if precision in CALIBRATED:
        activations = {"num_bits": 8, "symmetric": False, "granularity": "TENSORWISE", "dtype": "INT"}
        if precision == "int16x8":
            activations |= {"num_bits": 16, "symmetric": True}
        config |= {"activation_tensor_config": activations, "min_weight_elements": 0}
    only_weights = precision.endswith("-weights")
    config |= {"compute_precision": "FLOAT" if only_weights else "INTEGER", "explicit_dequantize": only_weights}
    rules = [_rule(".*", "*", config)]
    if precision == "int4-weights":
        # Later rules win where they apply: what has no 4-bit form keeps the 8 bits of the first.
        rules.append(_rule(".+", "*", config | {"weight_tensor_config": weights | {"num_bits": 4}}))
    if precision == "int8-dynamic" and request["target"].get("engine") == tflite_versions.RUNTIME:
        # It knows one scale for all weights of a layer only; see tflite_versions on FULLY_CONNECTED.
        weights = weights | {"granularity": "TENSORWISE"}
        rules.append(_rule(".*", "FULLY_CONNECTED", config | {"weight_tensor_config": weights}))
    rules += [_rule(".*", name, None) for name in ("INPUT", "OUTPUT", *NEVER_STATIC)]
    if keep:
        names = "|".join(re.escape(name) for name in keep)
        rules.append(_rule(f"^(?:{names});", "*", None))
    return rules


def _rule(regex: str, operation: str, config: dict[str, Any] | None) -> dict[str, Any]:
    algorithm = "min_max_uniform_quantize" if config else "no_quantize"
    return {"regex": regex, "operation": operation, "algorithm_key": algorithm, "op_config": config or {}}


# calibration


@dataclass
class _Watched:
    """A model that runs with the built-in kernels and keeps every tensor."""

    interpreter: Any
    inputs: dict[str, int]
    #: Tensors that operators make, by name.
    details: dict[str, dict[str, Any]]

    shapes: list[tuple[int, ...]] | None = None

    def run(self, feed: dict[str, Array]) -> None:
        shapes = [feed[name].shape for name in self.inputs]
        if shapes != self.shapes:
            for name, index in self.inputs.items():
                self.interpreter.resize_tensor_input(index, feed[name].shape)
            self.interpreter.allocate_tensors()
            self.shapes = shapes
        for name, index in self.inputs.items():
            self.interpreter.set_tensor(index, feed[name])
        self.interpreter.invoke()

    def value(self, name: str) -> Array:
        """A tensor as float32, whatever it is stored as; empty where there is none of it."""
        detail = self.details[name]
        try:
            array = np.asarray(self.interpreter.get_tensor(detail["index"]))
        except ValueError:  # a dynamic tensor that nothing has made
            return np.zeros(0, np.float32)
        scales = detail["quantization_parameters"]["scales"]
        if not len(scales):
            return array.astype(np.float32)
        zero = detail["quantization_parameters"]["zero_points"][0]
        return (array.astype(np.float32) - np.float32(zero)) * np.float32(scales[0])


def _watched(path: Path, signature: str, names: Iterable[str]) -> _Watched:
    interpreter = Interpreter(
        model_path=str(path),
        num_threads=1,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    inputs = {
        name: detail["index"]
        for name, detail in interpreter.get_signature_runner(signature).get_input_details().items()
    }
    interpreter.allocate_tensors()
    wanted = set(names)
    details = {detail["name"]: detail for detail in interpreter.get_tensor_details() if detail["name"] in wanted}
    return _Watched(interpreter, inputs, details)


def _feeds(request: dict[str, Any]) -> Iterator[dict[str, Array]]:
    calibration = request["calibration"]
    if calibration is None:
        raise UsageError(f"{request['precision']} needs real samples; give them with --calibration")
    inputs = [spec_from_json(row) for row in request["inputs"]]
    return Samples(Path(calibration["samples"]), inputs).feeds(calibration["indices"])


def _measured(request: dict[str, Any], path: Path) -> dict[str, dict[str, Array]]:
    """What AI Edge Quantizer takes as the result of a calibration: least and largest value by tensor name."""
    graph = tflite_files.read(path).subgraphs[0]
    names = [graph.tensors[index].name.decode() for index in _activations(graph)]
    watched = _watched(path, request["from"]["signature"], names)
    ranges = Ranges(request["calibration"]["ranges"] if request["calibration"] else "minmax")
    for feed in _feeds(request):
        watched.run(feed)
        for name in watched.details:
            ranges.update({name: watched.value(name)})
    found = ranges.result()
    # A tensor that never had a value is given a range all the same, or the quantizer gives up on the model.
    found = {name: found.get(name, (0.0, 0.0)) for name in names}
    return {
        name: {"min": np.array([[least]], np.float32), "max": np.array([[largest]], np.float32)}
        for name, (least, largest) in found.items()
    }


def _activations(graph: Any) -> list[int]:
    """Float32 tensors of a graph that its inputs or operators make."""
    made = [*graph.inputs, *(index for operator in graph.operators for index in operator.outputs)]
    return [int(index) for index in dict.fromkeys(made) if index >= 0 and graph.tensors[index].type == TYPES.FLOAT32]


def _check_runs(request: dict[str, Any], path: Path) -> None:
    """Ask the engine one question. What it says names the operator that it has no kernel for."""
    inputs = [spec_from_json(row) for row in request["inputs"]]
    feed = next(_feeds(request)) if request["calibration"] else make_feeds(inputs, None)[0]
    fault = _fault(request, path, feed)
    if fault and not _fault(request, Path(request["from"]["model"]), feed):
        raise ConversionError(
            f"LiteRT has no kernels for this model in {request['precision']}: {fault}; use another precision"
        )


def _fault(request: dict[str, Any], path: Path, feed: dict[str, Array]) -> str | None:
    """What the engine says against running a model on ``feed``, if anything."""
    try:
        interpreter = Interpreter(model_path=str(path), num_threads=1)
        interpreter.get_signature_runner(request["from"]["signature"])(**feed)
    except (RuntimeError, ValueError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return None


# sensitivity


@dataclass
class _Layer:
    name: str
    kind: str
    #: Names of the tensors that come from other layers or from outside.
    inputs: list[str]
    #: Of its float32 weights.
    bytes: int


def sensitivity(request: dict[str, Any]) -> dict[str, Any]:
    """How much error int8 adds at each layer, in execution order; see edge_infer.quantize.

    The float32 and the int8 model run on the same samples with every tensor kept. A layer's noise is the power of
    the difference at its output over the power of the float32 output, less the largest noise at its inputs.
    """
    request = {**request, "precision": "int8", "keep_float": []}
    with tempfile.TemporaryDirectory(dir=request["out"], prefix=".tflite-") as folder:
        work = Path(folder)
        model = normalized(request)
        tflite_files.write(model, work / "source.tflite")
        quantized = _quantized(request, work)
        tflite_versions.set_versions(quantized)
        tflite_files.write(quantized, work / "int8.tflite")
        layers = _layers(model, quantized)
        noise = _noise(request, work, layers)
    rows = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "bytes": layer.bytes,
            "error": max(0.0, noise[layer.name] - max((noise.get(name, 0.0) for name in layer.inputs), default=0.0)),
        }
        for layer in layers
        if layer.kind not in MOVING
    ]
    return {"layers": rows}


def _stored_by_layer(model: Any) -> list[dict[str, Any]]:
    """The bytes of each layer's weights as they are stored: rows of "name", "kind", "stored_bytes", as the layers run.

    Weights that two layers share count for both; those that are decoded first count where they are used.
    """
    graph, layers = model.subgraphs[0], []
    contents = [model.buffers[tensor.buffer].data for tensor in graph.tensors]
    stored = [0 if data is None else len(data) for data in contents]
    for operator in graph.operators:
        weights = sum(stored[index] for index in operator.inputs if index >= 0)
        code = tflite_files.operator_code(model.operatorCodes[operator.opcodeIndex])
        if code == schema.BuiltinOperator.DEQUANTIZE and weights:
            stored[operator.outputs[0]] = weights
        else:
            name, kind = _layer_name(graph, operator), tflite_files.NAMES[code]
            layers.append({"name": name, "kind": kind, "stored_bytes": weights})
    return layers


def _layers(model: Any, quantized: Any) -> list[_Layer]:
    """The operators of the main graph whose output became int8."""
    graph = model.subgraphs[0]
    integers = {tensor.name for tensor in quantized.subgraphs[0].tensors if tensor.type == TYPES.INT8}
    layers = []
    for operator in graph.operators:
        name = _layer_name(graph, operator)
        if name.encode() not in integers:
            continue
        tensors = [graph.tensors[index] for index in operator.inputs if index >= 0]
        inputs = [tensor.name.decode() for tensor in tensors if model.buffers[tensor.buffer].data is None]
        weights = [model.buffers[tensor.buffer].data for tensor in tensors if tensor.type == TYPES.FLOAT32]
        size = sum(len(data) for data in weights if data is not None)
        kind = tflite_files.NAMES[tflite_files.operator_code(model.operatorCodes[operator.opcodeIndex])]
        layers.append(_Layer(name, kind, inputs, size))
    return layers


def _noise(request: dict[str, Any], work: Path, layers: Sequence[_Layer]) -> dict[str, float]:
    """Noise power over signal power at the output of each layer, and at the model's inputs."""
    signature = request["from"]["signature"]
    names = dict.fromkeys(name for layer in layers for name in (layer.name, *layer.inputs))
    exact = _watched(work / "source.tflite", signature, names)
    rough = _watched(work / "int8.tflite", signature, names)
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    shared = [name for name in names if name in exact.details and name in rough.details]
    for feed in _feeds(request):
        exact.run(feed)
        rough.run(feed)
        for name in shared:
            value, other = exact.value(name).astype(np.float64), rough.value(name)
            if value.shape == other.shape:
                signal[name] += float(np.square(value).sum())
                noise[name] += float(np.square(value - other).sum())
    return {name: noise[name] / signal[name] if signal[name] else 0.0 for name in names}
