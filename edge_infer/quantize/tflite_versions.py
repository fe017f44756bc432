"""The oldest engines that run a ``.tflite``: operators have versions, and an engine has each up to some version.

Converters write versions that are too high, quantizers leave the float model's, which are too low; an engine that is
given too low a version may take a model whose meaning it does not know and answer nonsense. So every operator's
version is computed anew from what it is used for, and the file says so, also in ``min_runtime_version``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from edge_infer.convert import tflite_files
from edge_infer.errors import ConversionError
from edge_infer.quantize.tflite_releases import LITERT_FIRST, LITERT_SINCE, RELEASES, RUNTIME_LAST

RUNTIME, LITERT = "tflite-runtime", "ai-edge-litert"
MIN_RUNTIME = "min_runtime_version"

TYPES = schema.TensorType
FLOAT32, FLOAT16, INT32, UINT8 = TYPES.FLOAT32, TYPES.FLOAT16, TYPES.INT32, TYPES.UINT8
INT64, STRING, BOOL, INT16 = TYPES.INT64, TYPES.STRING, TYPES.BOOL, TYPES.INT16
INT8, UINT32, INT4 = TYPES.INT8, TYPES.UINT32, TYPES.INT4
#: With any other type the version that the file has is only ever raised: what it means there is too young to rely on.
KNOWN_TYPES = {FLOAT32, INT32, UINT8, INT64, STRING, BOOL, INT16, INT8, UINT32, INT4, TYPES.COMPLEX64, TYPES.FLOAT64}

#: Operator -> version by the type of its first input, where that alone decides; 1 for types that are not there.
#: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/tools/versioning/op_version.cc
_8 = {INT8: 2}
_8_16 = {INT8: 2, INT16: 3}
_BOTH = {INT8: 2, INT16: 2}
BY_TYPE: dict[str, dict[int, int]] = {
    **dict.fromkeys(("SPACE_TO_DEPTH", "SPLIT_V", "SUM", "LOG_SOFTMAX", "GREATER", "LESS_EQUAL"), _8),
    **dict.fromkeys(("SQUARED_DIFFERENCE", "DEPTH_TO_SPACE", "L2_NORMALIZATION"), _8),
    **dict.fromkeys(("MAX_POOL_2D", "AVERAGE_POOL_2D", "TANH", "LOGISTIC", "SOFTMAX", "PACK"), _8_16),
    **dict.fromkeys(("MEAN", "MIRROR_PAD", "REDUCE_MAX", "REDUCE_MIN", "RELU6", "RSQRT"), _8_16),
    **dict.fromkeys(("LESS", "GREATER_EQUAL", "TOPK_V2"), _8_16),
    **dict.fromkeys(("EXP", "LOG", "REDUCE_PROD", "SQRT"), _BOTH),
    "ARG_MAX": {INT8: 2, BOOL: 3},
    "ARG_MIN": {INT8: 2, BOOL: 3},
    "CONCATENATION": {INT8: 2, INT16: 3, UINT32: 4, INT4: 5},
    "EQUAL": {INT8: 2, STRING: 3, INT16: 5},
    "FLOOR_DIV": {FLOAT32: 2, INT8: 3, INT16: 3},
    "FLOOR_MOD": {INT8: 2, INT16: 2},
    "GELU": {INT8: 2, UINT8: 2},
    "LEAKY_RELU": {INT16: 2},
    "NOT_EQUAL": {INT8: 2, STRING: 3, INT16: 4},
    "PACK": {INT8: 2, INT16: 3, UINT32: 4},
    "RANGE": {INT64: 2},
    "RELU": {INT8: 2, UINT8: 2, INT16: 3},
    "REVERSE_V2": {BOOL: 2, INT8: 3},
    "SELECT_V2": {UINT32: 2},
    "SIGN": {INT32: 2},
    "SQUEEZE": {STRING: 2},
    "TILE": {STRING: 2, INT8: 3},
    "UNPACK": {INT8: 2, UINT8: 2, BOOL: 3, INT16: 4},
}


@dataclass(frozen=True)
class Node:
    """One operator with its tensors; ``None`` for an input that is left out."""

    name: str
    options: Any
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    version: int

    def type(self, index: int = 0) -> int:
        """The type of an input; -1 where there is none."""
        return self.inputs[index].type if index < len(self.inputs) and self.inputs[index] is not None else -1

    def rank(self) -> int:
        """The most dimensions that an input has."""
        return max((_rank(tensor) for tensor in self.inputs if tensor is not None), default=0)

    def broadcasts(self) -> bool:
        shapes = [list(tensor.shape) if tensor.shape is not None else [] for tensor in self.inputs[:2]]
        return len(shapes) == 2 and shapes[0] != shapes[1]

    def option(self, name: str) -> Any:
        return getattr(self.options, name, None)

    def known(self) -> bool:
        return all(tensor is None or tensor.type in KNOWN_TYPES for tensor in (*self.inputs, *self.outputs))

    def hybrid(self, weights: int = 1) -> bool:
        """Computes on float activations with int8 weights, quantizing the activations while it runs."""
        return bool(self.outputs[0].type == FLOAT32 and self.type(weights) == INT8)


def _rank(tensor: Any) -> int:
    return 0 if tensor.shape is None else len(tensor.shape)


def _channels(tensor: Any) -> int:
    """How many scales a tensor has; 0 when it is not quantized."""
    quantization = tensor.quantization
    return 0 if quantization is None or quantization.scale is None else len(quantization.scale)


def _per_channel(tensor: Any) -> bool:
    return _channels(tensor) > 1


def is_quantized(tensor: Any) -> bool:
    """Whether a tensor's numbers stand for others, by a scale."""
    return _channels(tensor) > 0


def nodes(model: Any) -> Iterator[tuple[Any, Node]]:
    """Every operator of the model with its tensors, control flow's included."""
    for graph in model.subgraphs:
        for operator in graph.operators or []:
            code = model.operatorCodes[operator.opcodeIndex]
            name = tflite_files.NAMES.get(tflite_files.operator_code(code), "")
            inputs = tuple(None if index < 0 else graph.tensors[index] for index in operator.inputs)
            outputs = tuple(graph.tensors[index] for index in operator.outputs if index >= 0)
            yield operator, Node(name, operator.builtinOptions, inputs, outputs, code.version)


def needed_version(node: Node) -> int:
    """The oldest version of the operator that means what ``node`` means."""
    special = SPECIAL.get(node.name)
    version = special(node) if special else BY_TYPE.get(node.name, {}).get(node.type(), 1)
    return version if node.known() else max(version, node.version)


def _conv(node: Node) -> int:
    weights, activations = node.inputs[1], node.type()
    versions = [1]
    if _rank(node.inputs[0]) == 4 and node.inputs[0].shape[3] != weights.shape[3]:
        versions.append(6)  # grouped: the image has several times the channels that a filter takes
    if activations == INT16:
        versions.append(8 if node.option("quantizedBiasType") else 4)
    elif weights.type == INT4:
        versions.append(7 if activations == INT8 else 8)
    elif activations == INT8:
        versions.append(3)
    elif node.hybrid():
        versions.append(5 if _per_channel(weights) else 2)
    return max(versions)


def _depthwise(node: Node) -> int:
    if node.type() == INT16:
        return 5
    if node.type(1) == INT4:
        return 7
    if node.hybrid():
        return 6 if _per_channel(node.inputs[1]) else 4
    if node.type() == INT8:
        return 3
    return 2 if (node.option("dilationWFactor"), node.option("dilationHFactor")) not in ((1, 1), (None, None)) else 1


def _fully_connected(node: Node) -> int:
    weights, activations = node.inputs[1], node.type()
    versions = [1]
    if node.option("weightsFormat"):
        versions.append(2)
    if node.option("keepNumDims"):
        versions.append(5)
    if len(node.inputs) == 2:
        versions.append(6)
    if weights.sparsity is not None:
        versions.append(8)
    if weights.type == INT4:
        versions.append(10 if activations == INT8 else 13)
    elif activations == INT16:
        versions.append(11 if node.option("quantizedBiasType") else 7)
    elif activations == INT8:
        versions.append(4)
    elif node.hybrid() and _per_channel(weights):
        versions.append(12)  # an engine without it takes version 3, knows of no scale a channel, and answers nonsense
    elif node.hybrid():
        versions.append(9 if node.option("asymmetricQuantizeInputs") else 3)
    return max(versions)


def _transpose_conv(node: Node) -> int:
    if node.type(2) == INT16 and node.option("quantizedBiasType"):
        return 5
    if node.option("fusedActivationFunction"):
        return 4
    if node.type(2) == INT16 or node.type(3) != -1:
        return 3
    return 2 if node.type(1) == INT8 else 1


def _embedding(node: Node) -> int:
    table = node.inputs[1]
    if table.type == INT4 or _per_channel(table):
        return 4
    return 3 if table.type == INT8 else 1


def _mul(node: Node) -> int:
    scales = [tensor.quantization.scale[0] for tensor in (*node.inputs, *node.outputs) if _channels(tensor)]
    kind = node.type()
    if kind == UINT32 or (kind == INT16 and not scales):
        return 7
    if kind in (TYPES.COMPLEX64, INT64, INT16):
        return {TYPES.COMPLEX64: 6, INT64: 5, INT16: 4}[kind]
    if len(scales) == 3 and scales[0] * scales[1] / scales[2] >= 1.0:
        return 3
    return 2 if kind == INT8 else 1


def _add(node: Node) -> int:
    if node.type() == INT16:
        return 3 if _channels(node.inputs[0]) else 5
    return {INT64: 4, INT8: 2}.get(node.type(), 1)


def _sub(node: Node) -> int:
    if node.type() == INT16:
        return 5
    if node.type() == INT64:
        return 4
    if node.broadcasts() and node.rank() > 4:
        return 3
    return 2 if node.type() == INT8 else 1


def _maximum(node: Node) -> int:
    if node.type() == INT16:
        return 4
    if node.broadcasts() and node.rank() > 4:
        return 3
    return 2 if node.type() == INT8 else 1


def _abs(node: Node) -> int:
    if node.type() == INT16:
        return 3 if _channels(node.inputs[0]) else 4
    return {INT32: 5, INT8: 2, UINT8: 2}.get(node.type(), 1)


def _transpose(node: Node) -> int:
    rank = _rank(node.inputs[0])
    by_rank = 8 if rank > 6 else 6 if rank > 5 else 4 if rank > 4 else 1
    return max(by_rank, {INT4: 7, INT16: 5, BOOL: 3, INT8: 2}.get(node.type(), 1))


def _slice(node: Node) -> int:
    by_rank = 5 if _rank(node.inputs[0]) > 4 else 1
    return max(by_rank, {INT4: 7, UINT32: 6, INT16: 4, STRING: 3, INT8: 2}.get(node.type(), 1))


def _strided_slice(node: Node) -> int:
    if node.option("offset"):
        return 8
    if node.type() == UINT32:
        return 7
    if node.option("ellipsisMask") or node.option("newAxisMask"):
        return 6
    by_rank = 4 if _rank(node.inputs[0]) > 4 else 1
    return max(by_rank, {STRING: 5, BOOL: 3, INT8: 2}.get(node.type(), 1))


def _pad(node: Node) -> int:
    by_rank = 4 if _rank(node.inputs[0]) > 4 else 1
    return max(by_rank, {BOOL: 5, INT16: 3, INT8: 2}.get(node.type(), 1))


def _space_to_batch(node: Node) -> int:
    by_rank = 1 if _rank(node.inputs[0]) == 4 else 3
    return max(by_rank, {INT16: 4, INT8: 2}.get(node.type(), 1))


def _gather(node: Node) -> int:
    if node.type() == INT4:
        return 7
    if node.type(1) == INT16:
        return 6
    if node.option("batchDims"):
        return 5
    return {INT16: 4, BOOL: 3, INT8: 2}.get(node.type(), 1)


def _gather_nd(node: Node) -> int:
    if node.type(1) == INT16:
        return 4
    return {BOOL: 5, INT16: 3, STRING: 2}.get(node.type(), 1)


def _resize(node: Node) -> int:
    if node.type() == INT16:
        return 4
    if node.option("halfPixelCenters") or (node.name == "RESIZE_NEAREST_NEIGHBOR" and node.option("alignCorners")):
        return 3
    return 2 if node.type() == INT8 else 1


def _batch_matmul(node: Node) -> int:
    if node.type() in (INT8, INT16):
        return {INT8: 2, INT16: 3}[node.type()]
    return 4 if node.hybrid() and node.option("asymmetricQuantizeInputs") else 1


def _dequantize(node: Node) -> int:
    if node.type() == INT8 and _per_channel(node.inputs[0]):
        return 5
    return {INT8: 2, INT16: 3, FLOAT16: 3, INT4: 6}.get(node.type(), 1)


def _quantize(node: Node) -> int:
    output = node.outputs[0]
    if INT4 in (node.type(), output.type):
        return 4
    if _per_channel(output):
        return 3
    return 2 if output.type == INT16 else 1


def _cast(node: Node) -> int:
    steps = {INT4: 6, TYPES.FLOAT64: 5, FLOAT16: 5, TYPES.UINT16: 4, INT8: 3, UINT32: 2}
    return max(steps.get(kind, 1) for kind in (node.type(), node.outputs[0].type))


def _fill(node: Node) -> int:
    return {FLOAT16: 4, INT8: 3, INT16: 3, BOOL: 2, STRING: 2}.get(node.type(1), 1)


def _lstm(node: Node) -> int:
    if node.hybrid(2):
        return 4 if node.option("asymmetricQuantizeInputs") else 3
    return 2 if node.option("kernelType") else 1


def _sequence_lstm(node: Node) -> int:
    if node.option("diagonalRecurrentTensors"):
        return 4
    return _hybrid_recurrent(node, 2)


def _hybrid_recurrent(node: Node, weights: int = 1) -> int:
    if not node.hybrid(weights):
        return 1
    return 3 if node.option("asymmetricQuantizeInputs") else 2


def _svdf(node: Node) -> int:
    if node.type() == INT8:
        return 3
    if node.hybrid():
        return 4 if node.option("asymmetricQuantizeInputs") else 2
    return 1


def _select(node: Node) -> int:
    by_rank = 3 if node.rank() == 5 else 1
    return max(by_rank, {UINT32: 4, INT8: 2}.get(node.type(1), 1))


SPECIAL: dict[str, Callable[[Node], int]] = {
    "ABS": _abs,
    "ADD": _add,
    "BATCH_MATMUL": _batch_matmul,
    "BATCH_TO_SPACE_ND": _space_to_batch,
    "BIDIRECTIONAL_SEQUENCE_LSTM": _hybrid_recurrent,
    "BIDIRECTIONAL_SEQUENCE_RNN": _hybrid_recurrent,
    "BROADCAST_TO": lambda node: 3 if node.type() in (INT8, INT16) else 2,
    "CAST": _cast,
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "DEQUANTIZE": _dequantize,
    "DIV": lambda node: 2 if node.broadcasts() and node.rank() > 4 else 1,
    "DYNAMIC_UPDATE_SLICE": lambda node: {INT4: 5, INT16: 4}.get(node.type(), 2 if node.type(2) == INT64 else 1),
    "EMBEDDING_LOOKUP": _embedding,
    "FAKE_QUANT": lambda node: 2 if node.option("narrowRange") else 1,
    "FILL": _fill,
    "FULLY_CONNECTED": _fully_connected,
    "GATHER": _gather,
    "GATHER_ND": _gather_nd,
    "LSTM": _lstm,
    "MAXIMUM": _maximum,
    "MINIMUM": _maximum,
    "MUL": _mul,
    "PAD": _pad,
    "PADV2": _pad,
    "QUANTIZE": _quantize,
    "RESIZE_BILINEAR": _resize,
    "RESIZE_NEAREST_NEIGHBOR": _resize,
    "RNN": _hybrid_recurrent,
    "SELECT": _select,
    "SLICE": _slice,
    "SPACE_TO_BATCH_ND": _space_to_batch,
    "SPARSE_TO_DENSE": lambda node: {INT64: 2, INT8: 3, UINT8: 3}.get(node.type(2), 1),
    "SPLIT": lambda node: {INT8: 2, INT32: 3, INT16: 4}.get(node.type(1), 1),
    "STRIDED_SLICE": _strided_slice,
    "SUB": _sub,
    "SVDF": _svdf,
    "TRANSPOSE": _transpose,
    "TRANSPOSE_CONV": _transpose_conv,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _sequence_lstm,
    "UNIDIRECTIONAL_SEQUENCE_RNN": _hybrid_recurrent,
    "WHERE": lambda node: 1 if node.type() == BOOL else 2,
}


def needed_releases(node: Node) -> tuple[str, str]:
    """The LiteRT and the TensorFlow Lite release that ``node`` needs, by its version and by what no version tells."""
    litert, release = _litert_release(node.name, node.version), _release(node.name, node.version)
    for applies, since_litert, since in UNTOLD:
        if applies(node):
            litert, release = _later(litert, since_litert), _later(release, since)
    return litert, release


def _is_deep_int16_dense(node: Node) -> bool:
    return (
        node.name == "FULLY_CONNECTED"
        and node.type() == INT16
        and _per_channel(node.inputs[1])
        and node.type(2) != -1
        and _rank(node.outputs[0]) > 2
    )


#: What an operator is used for -> since which LiteRT and which TensorFlow Lite release it is right, although no version
#: tells. Found by asking tflite-runtime 2.14.0 and LiteRT 1.4.0, 2.0.2, 2.1.0, 2.1.6, 2.2.0 and 2.3.0 the
#: same questions: models of one operator in every precision. "2.15" is any release after tflite-runtime.
UNTOLD: tuple[tuple[Callable[[Node], bool], str, str], ...] = (
    # A scale for each output on integer activations: right in 2.14, not tried before.
    (lambda node: node.name == "FULLY_CONNECTED" and _per_channel(node.inputs[1]), LITERT_FIRST, "2.14"),
    # 2.14 answers nonsense with a bias and more than two dimensions.
    (_is_deep_int16_dense, LITERT_FIRST, "2.15"),
    # No kernels.
    (lambda node: node.name == "TRANSPOSE_CONV" and node.type(2) == FLOAT32 and node.hybrid(), LITERT_FIRST, "2.15"),
    (lambda node: node.name in ("SUM", "GELU") and node.type() == INT16, LITERT_FIRST, "2.15"),
    # LiteRT 2.0.2 and 2.1.0 answer wrongly where both factors are computed; right before and in 2.1.6.
    (lambda node: node.name == "BATCH_MATMUL" and node.type() == INT8, "2.1.6", "1.5"),
)


def set_versions(model: Any) -> None:
    """Give every operator the oldest version that means the same, and drop operator codes that nothing uses."""
    needed: dict[int, int] = {}
    for operator, node in nodes(model):
        needed[operator.opcodeIndex] = max(needed.get(operator.opcodeIndex, 1), needed_version(node))
    kept = sorted(needed)
    for index in kept:
        model.operatorCodes[index].version = needed[index]
    model.operatorCodes = [model.operatorCodes[index] for index in kept]
    for operator, _ in list(_operators(model)):
        operator.opcodeIndex = kept.index(operator.opcodeIndex)


def _operators(model: Any) -> Iterator[tuple[Any, Any]]:
    return ((operator, graph) for graph in model.subgraphs for operator in graph.operators or [])


def used_versions(model: Any) -> set[tuple[str, int]]:
    """(operator, version) of all that the model's file names."""
    return {
        (tflite_files.NAMES[tflite_files.operator_code(code)], int(code.version)) for code in model.operatorCodes or []
    }


@dataclass(frozen=True)
class Engines:
    """The oldest releases that run a model; ``runtime`` is None when no tflite-runtime does, and ``why`` says why."""

    litert: str
    runtime: str | None
    why: str | None

    def requires(self) -> list[list[str]]:
        return [[LITERT, self.litert]] + ([[RUNTIME, self.runtime]] if self.runtime else [])


def oldest_engines(model: Any) -> Engines:
    """What runs the model, from the versions in it. Raises ConversionError for an operator that no engine has."""
    litert = LITERT_FIRST
    for _, node in nodes(model):
        litert = _later(litert, needed_releases(node)[0])
    release, node = _youngest(model)
    if _at_most(release, RUNTIME_LAST):
        return Engines(litert, _three(release), None)
    why = (
        f"the last tflite-runtime, {RUNTIME_LAST}, does not run {node.name} in version {node.version} as the model "
        f"uses it; run it with ai-edge-litert {litert} or later, or package another precision"
    )
    return Engines(litert, None, why)


def _youngest(model: Any) -> tuple[str, Node]:
    """The TensorFlow Lite release that the model needs, and an operator that needs it."""
    needs = [(needed_releases(node)[1], node) for _, node in nodes(model)]
    return max(needs, key=lambda need: _numbers(need[0]), default=("1.5", Node("", None, (), (), 1)))


def _litert_release(name: str, version: int) -> str:
    since = LITERT_SINCE.get((name, version), LITERT_FIRST)
    newest = max((row[1] for row in LITERT_SINCE if row[0] == name), default=len(RELEASES.get(name, ())) or 1)
    if version > max(newest, len(RELEASES.get(name, ()))):
        raise ConversionError(
            f"the TFLite model has {name} in version {version}, which no engine known here runs; convert it again "
            "with an older TensorFlow"
        )
    return since


def _release(name: str, version: int) -> str:
    """The TensorFlow Lite release that first had it."""
    known = RELEASES.get(name, (RUNTIME_LAST,))
    return known[version - 1] if version <= len(known) else "2.23"


def _numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return (*parts, *[0] * (3 - len(parts)))


def _later(one: str, other: str) -> str:
    return max(one, other, key=_numbers)


def _at_most(version: str, limit: str) -> bool:
    return _numbers(version) <= _numbers(limit)


def _three(version: str) -> str:
    return ".".join(map(str, _numbers(version)))


def write_min_runtime(model: Any) -> None:
    """The TensorFlow Lite release that the model needs, as the converters note it: 16 bytes of text."""
    tflite_files.add_metadata(model, MIN_RUNTIME, _three(_youngest(model)[0]).encode().ljust(16, b"\0"))
