"""The oldest ONNX Runtime for a model, and the model made to ask for no newer one than its operators need."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
from onnx import defs

from edge_infer.quantize.onnx_graph import attribute, graphs

#: First onnxruntime that runs an opset of the default domain and an IR version.
#: https://onnxruntime.ai/docs/reference/compatibility.html#onnx-opset-support
OPSET_SINCE = {18: "1.14.0", 19: "1.16.0", 20: "1.17.0", 21: "1.19.0", 22: "1.21.0", 23: "1.23.0", 24: "1.24.0"}
IR_SINCE = {9: "1.15.0", 10: "1.18.0", 11: "1.21.0", 12: "1.23.0"}
OLDEST, OLDEST_OPSET = "1.14.0", 18
#: 8 is what opset 18 came with; 4-bit integers came with 10. https://github.com/onnx/onnx/blob/main/docs/Versioning.md
OLDEST_IR, FOUR_BIT_IR = 8, 10
#: Operators of ONNX Runtime's own that quantization here writes; the others are older than OLDEST.
#: 4 bits, with accuracy_level: opened and run by 1.17.3, refused by 1.16.3, the last before
#: https://github.com/microsoft/onnxruntime/pull/17890. 8 bits: by 1.22.1 on x86, "bits" refused by 1.21.1, the last
#: before https://github.com/microsoft/onnxruntime/pull/24384; on Arm its kernels came with 1.23.0,
#: https://github.com/microsoft/onnxruntime/pull/25110.
FOUR_BIT_SINCE, EIGHT_BIT_SINCE, EIGHT_BIT_ARM_SINCE = "1.17.0", "1.22.0", "1.23.0"
#: Arithmetic in float16: 1.16.3 refuses LayerNormalization in it, 1.17.3 runs it.
FLOAT16_SINCE = "1.17.0"
#: Operators of which a newer version means something else by the same signature, or added values for an attribute.
#: https://github.com/onnx/onnx/blob/main/docs/Changelog.md
CHANGED = {"GroupNormalization", "GridSample", "DFT", "Resize", "Pad"}

Types = dict[str, str]


def lower_versions(model: onnx.ModelProto) -> None:
    """Declare the oldest opset and IR version that mean the same: exporters declare their own, which are newer.

    Never raises them. Expects the larger weights outside the model, so that types are inferred cheaply.
    """
    used = {_domain(node.domain) for graph in graphs(model.graph) for node in graph.node} | {""}
    used |= {_domain(item.domain) for function in model.functions for item in function.opset_import}
    for index in reversed(range(len(model.opset_import))):
        if _domain(model.opset_import[index].domain) not in used:
            del model.opset_import[index]  # ONNX Runtime lists every domain it knows
    if not model.functions:
        _lower_opset(model)
    _lower_ir_version(model)


def opset(model: onnx.ModelProto) -> int:
    """The version of the default domain's operators."""
    return max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)


def oldest_engine(model: onnx.ModelProto, architecture: str) -> str:
    """The first onnxruntime release that knows the model's opset, IR version and operators."""
    versions = [OLDEST]
    versions += [since for number, since in OPSET_SINCE.items() if number <= opset(model)]
    versions += [since for number, since in IR_SINCE.items() if number <= model.ir_version]
    if opset(model) > max(OPSET_SINCE) or model.ir_version > max(IR_SINCE):
        versions.append(onnxruntime.__version__)  # newer than the tables; the one here runs it
    bits = {attribute(node, "bits", 4) for node in model.graph.node if node.op_type == "MatMulNBits"}
    versions += [FOUR_BIT_SINCE] if bits else []
    versions += [EIGHT_BIT_SINCE if architecture == "x86_64" else EIGHT_BIT_ARM_SINCE] if 8 in bits else []
    versions += [FLOAT16_SINCE] if _computes_in_float16(model) else []
    return max(versions, key=lambda version: [int(part) for part in version.split(".")])


def _computes_in_float16(model: onnx.ModelProto) -> bool:
    """Whether anything but the decoding of stored weights touches float16."""
    half = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    casts = {attribute(node, "to", 0) for node in model.graph.node if node.op_type == "Cast"}
    computing = (node for node in model.graph.node if node.op_type != "Cast")
    return onnx.TensorProto.FLOAT16 in casts or any(name in half for node in computing for name in node.input)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _lower_opset(model: onnx.ModelProto) -> None:
    current = opset(model)
    if current <= OLDEST_OPSET:
        return
    types = _types(model)
    nodes = [node for graph in graphs(model.graph) for node in graph.node if node.domain in ("", "ai.onnx")]
    needed = max([OLDEST_OPSET, *(_since(node, current, types) for node in nodes)])
    for item in model.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = min(item.version, needed)


def _since(node: onnx.NodeProto, current: int, types: Types) -> int:
    """The oldest opset, down to OLDEST_OPSET, in which the node means what it does in ``current``."""
    schema = _schema(node, current)
    if schema is None:
        return current
    while schema.since_version > OLDEST_OPSET:
        older = _schema(node, schema.since_version - 1)
        if older is None or not _same(node, older, schema, types):
            break
        schema = older
    return int(schema.since_version)


def _schema(node: onnx.NodeProto, version: int) -> Any | None:
    """What an opset says about the node's operator; ``None`` where it has none."""
    return defs.get_schema(node.op_type, version, "") if defs.has(node.op_type, version, "") else None


def _same(node: onnx.NodeProto, older: Any, newer: Any, types: Types) -> bool:
    """Whether two versions differ in nothing that the node uses: types that it does not have, attributes left out."""
    if node.op_type in CHANGED or _arguments(older) != _arguments(newer):
        return False
    given = {item.name for item in node.attribute}
    for name, item in newer.attributes.items():
        known = older.attributes.get(name)
        if known is None and name in given:
            return False
        if known is not None and str(known.default_value) != str(item.default_value):
            return False
    if any(name not in newer.attributes for name in older.attributes):
        return False
    allowed = {item.type_param_str: set(item.allowed_type_strs) for item in older.type_constraints}
    return all(
        _admits(older.inputs, index, name, allowed, types) for index, name in enumerate(node.input) if name
    ) and all(_admits(older.outputs, index, name, allowed, types) for index, name in enumerate(node.output) if name)


def _arguments(schema: Any) -> list[tuple[str, Any]]:
    return [(item.name, item.option) for item in (*schema.inputs, *schema.outputs)]


def _admits(formal: Any, index: int, name: str, allowed: dict[str, set[str]], types: Types) -> bool:
    # The last formal argument may stand for many.
    wanted = formal[min(index, len(formal) - 1)].type_str
    return name in types and types[name] in allowed.get(wanted, {wanted})


def _types(model: onnx.ModelProto) -> Types:
    """Types of the values whose type can be told, as schemas spell them: tensor(float)."""
    inferred = onnx.shape_inference.infer_shapes(model)
    found: Types = {}
    for graph in graphs(inferred.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.HasField("tensor_type"):
                found[value.name] = _spelled(value.type.tensor_type.elem_type)
        found.update({tensor.name: _spelled(tensor.data_type) for tensor in graph.initializer})
    return found


def _spelled(element: int) -> str:
    return f"tensor({onnx.TensorProto.DataType.Name(element).lower()})"


def _lower_ir_version(model: onnx.ModelProto) -> None:
    kinds = {tensor.data_type for graph in graphs(model.graph) for tensor in graph.initializer}
    if kinds and max(kinds) > onnx.TensorProto.INT4:
        return  # of types that came after 4-bit integers each needs its own version
    needed = FOUR_BIT_IR if kinds & {onnx.TensorProto.UINT4, onnx.TensorProto.INT4} else OLDEST_IR
    by_opset = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.ir_version = min(model.ir_version, max(needed, by_opset))
