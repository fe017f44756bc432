"""Operators for onnx2fx whose shapes stay free when the result is traced, and dense layers that quantizers know.

onnx2fx's own take shapes as Python numbers, which a trace keeps as constants. While tracing, PyTorch takes tensors of
one element wherever it takes sizes, and records where they came from. Recurrent layers become PyTorch's own, of any
length and batch, instead of one copy for each step of the example. What is not handled here is left to onnx2fx.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx2fx
import torch
from onnx2fx.op_registry import get_handler
from torch import Tensor

Builder = Any  # onnx2fx.graph_builder.GraphBuilder
Node = Any  # torch.fx.Node
Handler = Callable[[Builder, onnx.NodeProto], Node]
Size = int | Tensor

#: The order of ONNX's gates, in PyTorch's order: https://onnx.ai/onnx/operators/onnx__LSTM.html (iofc, zrh) and
#: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html (ifgo), torch.nn.GRU.html (rzn).
LSTM_GATES, GRU_GATES = (0, 2, 3, 1), (1, 0, 2)
#: From here on axes and sizes are inputs and no attributes.
OLDEST_OPSET = 13

_registered: set[int] = set()


def register(opset: int) -> None:
    """Put the operators below in the place of onnx2fx's, for models of this opset."""
    if opset < OLDEST_OPSET or opset in _registered:
        return
    _registered.add(opset)
    for name, make in HANDLERS.items():
        onnx2fx.register_op(name, make(get_handler(name, "", opset)), since_version=opset)


def constant(builder: Builder, name: str) -> Tensor | None:
    """The value of a weight or a constant, None for what is computed."""
    if name in builder.initializer_map:
        value: Tensor = builder.initializer_map[name]
        return value
    for node in builder.model.graph.node:
        if node.op_type == "Constant" and node.output[0] == name and node.attribute[0].name == "value":
            loaded: Tensor = builder.load_tensor(node.attribute[0].t)
            return loaded
    return None


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def given(node: onnx.NodeProto, number: int) -> bool:
    return len(node.input) > number and bool(node.input[number])


def add_weight(builder: Builder, name: str, value: Tensor) -> Node:
    """Keep a rearranged weight under a name of its own; the same one again for the same name."""
    builder._constants.setdefault(name, value.contiguous())
    return builder.graph.get_attr(name)


def _tracing() -> bool:
    return bool(torch._C._get_tracing_state())


def _sizes(shape: Tensor) -> list[Size]:
    """A shape as PyTorch takes it: tensors of one element while tracing, numbers otherwise."""
    return list(shape.unbind(0)) if _tracing() else list(shape.tolist())


def _shape_argument(builder: Builder, name: str) -> Node | list[int]:
    known = constant(builder, name)
    return builder.get_value(name) if known is None else [int(size) for size in known.tolist()]


# -- shapes -----------------------------------------------------------------------------------------------------------


def _shape_of(x: Tensor, start: int, end: int | None) -> Tensor:
    return torch._shape_as_tensor(x)[start:end]


def shape(before: Handler) -> Handler:
    def handle(builder: Builder, node: onnx.NodeProto) -> Node:
        args = (builder.get_value(node.input[0]), attribute(node, "start", 0), attribute(node, "end", None))
        return builder.call_function(_shape_of, args=args)

    return handle


def _reshape(x: Tensor, shape: Tensor | Sequence[int], keep_zero: bool) -> Tensor:
    sizes = _sizes(shape) if isinstance(shape, Tensor) else list(shape)
    if not keep_zero:
        sizes = [x.shape[axis] if int(size) == 0 else size for axis, size in enumerate(sizes)]
    return torch.reshape(x, sizes)  # type: ignore[arg-type]


def reshape(before: Handler) -> Handler:
    def handle(builder: Builder, node: onnx.NodeProto) -> Node:
        sizes = _shape_argument(builder, node.input[1])
        args = (builder.get_value(node.input[0]), sizes, bool(attribute(node, "allowzero", 0)))
        return builder.call_function(_reshape, args=args)

    return handle


def _expand(x: Tensor, shape: Tensor | Sequence[int]) -> Tensor:
    sizes = _sizes(shape) if isinstance(shape, Tensor) else list(shape)
    # Both sides may be the one that is stretched.
    stretched: Tensor = torch.broadcast_tensors(x, torch.zeros(sizes, dtype=torch.bool))[0]  # type: ignore[arg-type]
    return stretched


def expand(before: Handler) -> Handler:
    def handle(builder: Builder, node: onnx.NodeProto) -> Node:
        return builder.call_function(
            _expand, args=(builder.get_value(node.input[0]), _shape_argument(builder, node.input[1]))
        )

    return handle


def _filled(shape: Tensor | Sequence[int], value: float, dtype: torch.dtype) -> Tensor:
    sizes = _sizes(shape) if isinstance(shape, Tensor) else list(shape)
    return torch.full(sizes, value, dtype=dtype)  # type: ignore[arg-type]


def constant_of_shape(before: Handler) -> Handler:
    def handle(builder: Builder, node: onnx.NodeProto) -> Node:
        sample = attribute(node, "value", None)
        value = torch.zeros(1) if sample is None else builder.load_tensor(sample)
        args = (_shape_argument(builder, node.input[0]), value.reshape(-1)[0].item(), value.dtype)
        return builder.call_function(_filled, args=args)

    return handle


def _slice(x: Tensor, starts: Any, ends: Any, axes: list[int], steps: list[int]) -> Tensor:
    first = _sizes(starts) if isinstance(starts, Tensor) else starts
    last = _sizes(ends) if isinstance(ends, Tensor) else ends
    index = [slice(None)] * x.dim()
    for start, end, axis, step in zip(first, last, axes, steps, strict=True):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def slice_(before: Handler) -> Handler:
    def handle(builder: Builder, node: onnx.NodeProto) -> Node:
        starts, ends = _shape_argument(builder, node.input[1]), _shape_argument(builder, node.input[2])
        count = next((len(known) for known in (starts, ends) if isinstance(known, list)), None)
        axes = constant(builder, node.input[3]) if given(node, 3) else None
        steps = constant(builder, node.input[4]) if given(node, 4) else None
        if given(node, 3) and axes is not None:
            count = len(axes)
        unknown = (given(node, 3) and axes is None) or (given(node, 4) and steps is None) or count is None
        if unknown or (steps is not None and bool((steps < 0).any())):
            return before(builder, node)
        over = list(range(count or 0)) if axes is None else axes.tolist()
        by = [1] * len(over) if steps is None else steps.tolist()
        return builder.call_function(_slice, args=(builder.get_value(node.input[0]), starts, ends, over, by))

    return handle


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    if _tracing():
        return torch.arange(start, limit, delta, dtype=start.dtype)  # type: ignore[call-overload, no-any-return]
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def range_(before: Handler) -> Handler:
    def handle(builder: Builder, node: onnx.NodeProto) -> Node:
        return builder.call_function(_range, args=tuple(builder.get_value(name) for name in node.input))

    return handle


def _tile(x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(_sizes(repeats))  # type: ignore[arg-type]


def tile(before: Handler) -> Handler:
    def handle(builder: Builder, node: onnx.NodeProto) -> Node:
        return builder.call_function(_tile, args=tuple(builder.get_value(name) for name in node.input))

    return handle


def gather(before: Handler) -> Handler:
    """One element along an axis; it may be counted from the end."""

    def handle(builder: Builder, node: onnx.NodeProto) -> Node:
        index = constant(builder, node.input[1])
        if index is None or index.dim():
            return before(builder, node)
        args = (builder.get_value(node.input[0]), attribute(node, "axis", 0), int(index))
        return builder.call_function(torch.select, args=args)

    return handle


def _scaled(x: Tensor, scales: list[float], mode: str, align_corners: bool | None) -> Tensor:
    return torch.nn.functional.interpolate(x, scale_factor=scales, mode=mode, align_corners=align_corners)


def resize(before: Handler) -> Handler:
    """Scales that are known keep their output's size free; only what PyTorch computes the same way."""

    def handle(builder: Builder, node: onnx.NodeProto) -> Node:
        scales = constant(builder, node.input[2]) if given(node, 2) else None
        mode = attribute(node, "mode", b"nearest").decode()
        where = attribute(node, "coordinate_transformation_mode", b"half_pixel").decode()
        plain = not any(attribute(node, name, None) for name in ("antialias", "axes", "exclude_outside"))
        if scales is None or len(scales) != 4 or bool((scales[:2] != 1).any()) or not plain:
            return before(builder, node)
        whole = bool((scales == scales.round()).all()) and bool((scales >= 1).all())
        floor = attribute(node, "nearest_mode", b"round_prefer_floor") == b"floor"
        args: tuple[Any, ...] = (builder.get_value(node.input[0]), scales[2:].tolist())
        if mode == "nearest" and ((where == "asymmetric" and floor) or (where == "half_pixel" and whole)):
            return builder.call_function(_scaled, args=(*args, "nearest", None))
        if mode == "linear" and where in ("half_pixel", "pytorch_half_pixel", "align_corners"):
            return builder.call_function(_scaled, args=(*args, "bilinear", where == "align_corners"))
        return before(builder, node)

    return handle


# -- dense layers -----------------------------------------------------------------------------------------------------


def matmul(before: Handler) -> Handler:
    """By a weight: PyTorch's linear, which quantizers find."""

    def handle(builder: Builder, node: onnx.NodeProto) -> Node:
        weight = constant(builder, node.input[1])
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            return before(builder, node)
        name = f"{_safe(node.input[1])}_transposed"
        args = (builder.get_value(node.input[0]), add_weight(builder, name, weight.t()), None)
        return builder.call_function(torch.nn.functional.linear, args=args)

    return handle


def gemm(before: Handler) -> Handler:
    def handle(builder: Builder, node: onnx.NodeProto) -> Node:
        weight = constant(builder, node.input[1])
        bias = constant(builder, node.input[2]) if given(node, 2) else None
        scaled = attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0
        computed = given(node, 2) and (bias is None or bias.dim() != 1)
        if weight is None or scaled or computed or attribute(node, "transA", 0):
            return before(builder, node)
        if attribute(node, "transB", 0):
            kept = builder.get_value(node.input[1])
        else:
            kept = add_weight(builder, f"{_safe(node.input[1])}_transposed", weight.t())
        added = builder.get_value(node.input[2]) if bias is not None else None
        return builder.call_function(torch.nn.functional.linear, args=(builder.get_value(node.input[0]), kept, added))

    return handle


def clip(before: Handler) -> Handler:
    """Between numbers: the activation that quantizers find, relu6 among them."""

    def handle(builder: Builder, node: onnx.NodeProto) -> Node:
        bounds = [constant(builder, node.input[number]) if given(node, number) else None for number in (1, 2)]
        if any(bound is None or bound.numel() != 1 or not bound.is_floating_point() for bound in bounds):
            return before(builder, node)
        low, high = (float(bound) for bound in bounds if bound is not None)
        x = builder.get_value(node.input[0])
        if (low, high) == (0.0, 6.0):
            return builder.call_function(torch.nn.functional.relu6, args=(x,))
        return builder.call_function(torch.nn.functional.hardtanh, args=(x, low, high))

    return handle


def _safe(name: str) -> str:
    from onnx2fx.utils.names import sanitize_name

    return str(sanitize_name(name))


# -- recurrent layers -------------------------------------------------------------------------------------------------


def _recurrent(kind: str, gates: tuple[int, ...]) -> Callable[[Handler], Handler]:
    def make(before: Handler) -> Handler:
        def handle(builder: Builder, node: onnx.NodeProto) -> Node:
            return _native(builder, node, kind, gates) if _is_plain(builder, node, kind) else before(builder, node)

        return handle

    return make


def _is_plain(builder: Builder, node: onnx.NodeProto, kind: str) -> bool:
    """Whether the layer is one of PyTorch's: its activations, forward or both ways, no clipping, no masks."""
    extras = [attribute(node, name, None) for name in ("clip", "activation_alpha", "activation_beta", "layout")]
    usual = {"LSTM": [b"Sigmoid", b"Tanh", b"Tanh"], "GRU": [b"Sigmoid", b"Tanh"]}[kind]
    both = attribute(node, "direction", b"forward") == b"bidirectional"
    activations = list(attribute(node, "activations", usual * (1 + both)))
    known = all(constant(builder, node.input[number]) is not None for number in (1, 2, 3) if given(node, number))
    return (
        known
        and not any(extras)
        and activations == usual * (1 + both)
        and attribute(node, "direction", b"forward") != b"reverse"
        and not given(node, 4)
        and not given(node, 7)
        and not attribute(node, "input_forget", 0)
        and (kind == "LSTM" or attribute(node, "linear_before_reset", 0) == 1)
    )


def _native(builder: Builder, node: onnx.NodeProto, kind: str, gates: tuple[int, ...]) -> Node:
    weights = []
    stem = _safe(node.name or node.output[0])
    weight, recurrence = constant(builder, node.input[1]), constant(builder, node.input[2])
    assert weight is not None and recurrence is not None
    bias = constant(builder, node.input[3]) if given(node, 3) else None
    for way in range(weight.shape[0]):
        parts = {"weight_ih": weight[way], "weight_hh": recurrence[way]}
        if bias is not None:
            parts["bias_ih"], parts["bias_hh"] = bias[way].chunk(2)
        for name, part in parts.items():
            ordered = torch.cat([part.chunk(len(gates))[gate] for gate in gates])
            weights.append(add_weight(builder, f"{stem}_{name}_{way}", ordered))
    states = [builder.get_value(node.input[number]) if given(node, number) else None for number in (5, 6)]
    args = (builder.get_value(node.input[0]), weights, bias is not None, recurrence.shape[2], weight.shape[0] == 2)
    made = builder.call_function(*((_lstm, (*args, *states)) if kind == "LSTM" else (_gru, (*args, states[0]))))
    # A node that names one output is that output, not a tuple of one.
    return builder.call_function(operator.getitem, (made, 0)) if len(node.output) == 1 else made


def _zeros(x: Tensor, hidden: int, both: bool) -> Tensor:
    return torch.zeros(1 + both, x.shape[1], hidden, dtype=x.dtype)


def _by_direction(y: Tensor, both: bool) -> Tensor:
    """[length, batch, directions * hidden] as ONNX has it: [length, directions, batch, hidden]."""
    split: Tensor = y.unflatten(-1, (1 + both, -1))
    return split.transpose(1, 2)


def _lstm(
    x: Tensor, weights: list[Tensor], biased: bool, hidden: int, both: bool, h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    state = [_zeros(x, hidden, both) if given is None else given for given in (h, c)]
    y, last, cell = torch.lstm(x, state, weights, biased, 1, 0.0, False, both, False)
    return _by_direction(y, both), last, cell


def _gru(
    x: Tensor, weights: list[Tensor], biased: bool, hidden: int, both: bool, h: Tensor | None
) -> tuple[Tensor, Tensor]:
    state = _zeros(x, hidden, both) if h is None else h
    y, last = torch.gru(x, state, weights, biased, 1, 0.0, False, both, False)
    return _by_direction(y, both), last


HANDLERS: dict[str, Callable[[Handler], Handler]] = {
    "Clip": clip,
    "ConstantOfShape": constant_of_shape,
    "Expand": expand,
    "Gather": gather,
    "GRU": _recurrent("GRU", GRU_GATES),
    "Gemm": gemm,
    "LSTM": _recurrent("LSTM", LSTM_GATES),
    "MatMul": matmul,
    "Range": range_,
    "Reshape": reshape,
    "Resize": resize,
    "Shape": shape,
    "Slice": slice_,
    "Tile": tile,
}
