"""A TorchScript module made lean: one module, its submodules inlined, batch normalisation in the layers before it.

``torch.jit.freeze`` inlines, leaves dropout out and decides what evaluation mode decides; it turns weights into
constants of the graph, which cannot be mapped. They are made attributes again here, each under the name that it had.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edge_infer.quantize.torchscript_archive import reloaded

#: Smaller tensors stay in the graph: positions, sizes, factors.
LEAST_BYTES = 64
TENSOR = torch._C.TensorType.get()
#: Weights may grow by that much, by results that freezing computed from them.
MOST_GROWTH = 1.01
#: Of the largest value: what folding may change by rounding. A layer folded wrongly is off by far more.
TOLERANCE = 1e-3

#: Layers that take a normalisation in: operator -> names of its weight and of its bias.
CONVOLUTIONS = {
    f"aten::{name}": ("weight", "bias")
    for name in (
        *("_convolution", "convolution", "conv1d", "conv2d", "conv3d"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    )
}
DENSE = {"aten::linear": ("weight", "bias"), "aten::addmm": ("mat2", "self")}
#: Operator -> its names of what it normalises with: scale, shift, mean, variance.
NORMS = {
    "aten::batch_norm": ("weight", "bias", "running_mean", "running_var"),
    "aten::native_batch_norm": ("weight", "bias", "running_mean", "running_var"),
    "aten::_native_batch_norm_legit_no_training": ("weight", "bias", "running_mean", "running_var"),
}
#: They read of a tensor what no folding changes.
SHAPE_READERS = {"aten::dim", "aten::size", "aten::len", "prim::dtype", "prim::device"}


def lean(module: Any, feeds: Sequence[tuple[torch.Tensor, ...]]) -> Any:
    """The module as one flat module with normalisation folded, as far as it answers ``feeds`` as before.

    A dense layer over more than two dimensions may not be folded, which its graph does not tell; nor is a module
    changed that cannot be frozen, or whose weights would grow. What is given back may be ``module`` itself.
    """
    wanted = [_answer(module, feed) for feed in feeds]
    for layers in (CONVOLUTIONS | DENSE, CONVOLUTIONS, {}):
        try:
            made = _flat(module, layers)
            same = all(_close(want, _answer(made, feed)) for want, feed in zip(wanted, feeds, strict=True))
        except (RuntimeError, ValueError):  # what cannot be frozen, and what it computes differently, is left alone
            continue
        if same and _weight_bytes(made) <= MOST_GROWTH * _weight_bytes(module) + LEAST_BYTES:
            return made
    return module


def _flat(module: Any, layers: dict[str, tuple[str, str]]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen = torch.jit.freeze(module, optimize_numerics=False)
    names = _Names(module)
    for norm in [node for node in nodes(frozen.graph) if node.kind() in NORMS]:
        _fold(frozen.graph, norm, layers, names)
    torch._C._jit_pass_dce(frozen.graph)
    return _declare_buffers(frozen, _take_out(frozen, names))


def with_buffers(module: Any) -> Any:
    """The module with buffers in place of its graph's constant tensors, as a quantizer leaves weights in float."""
    try:
        return _declare_buffers(module, _take_out(module, _Names(module)))
    except ValueError:
        return module


def nodes(block: Any) -> Iterator[Any]:
    """All nodes of a graph, those in branches and loops among them."""
    for node in block.nodes():
        yield node
        for child in node.blocks():
            yield from nodes(child)


class _Names:
    """What tensors are called in the module, by where they lie in memory."""

    def __init__(self, module: Any) -> None:
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        self._known: dict[int, str] = {}
        for name, tensor in tensors:
            self._known.setdefault(tensor.data_ptr(), name)
        self._taken: set[str] = set()

    def known(self, tensor: torch.Tensor) -> str:
        return self._known.get(tensor.data_ptr(), "")

    def name(self, tensor: torch.Tensor, name: str) -> None:
        self._known[tensor.data_ptr()] = name

    def fresh(self, tensor: torch.Tensor) -> str:
        """A name that no other attribute has."""
        wanted = unique = self.known(tensor) or "constant"
        number = 0
        while unique in self._taken:
            number += 1
            unique = f"{wanted}_{number}"
        self._taken.add(unique)
        return unique


# -- folding ----------------------------------------------------------------------------------------------------------


@dataclass
class _Norm:
    """What a channel is multiplied by, and what is added then; of one dimension, in float64."""

    factor: torch.Tensor
    addend: torch.Tensor


def _fold(graph: Any, norm: Any, layers: dict[str, tuple[str, str]], names: _Names) -> None:
    """Let the layer before ``norm`` compute what comes after it, where nothing else reads that layer's answer.

    A weight that another layer uses too stays as it is: folded, there would be two of them.
    """
    layer = _input(norm, "input").node()
    if layer.kind() not in layers or _readers(layer.output()) != [norm] or any(map(_readers, list(norm.outputs())[1:])):
        return
    weight_name, bias_name = layers[layer.kind()]
    weight, bias = _input(layer, weight_name), _input(layer, bias_name)
    scales = _scales(norm)
    if scales is None or not _alone(weight) or not _is_known(bias) or not _plain(layer):
        return
    old, shift = weight.toIValue(), bias.toIValue()
    factors = _over(layer, old, scales.factor)
    if factors is None or (shift is not None and shift.numel() != scales.factor.numel()):
        return
    new = (old.double() * factors).to(old.dtype)
    before = 0.0 if shift is None else shift.double()
    moved = (before * scales.factor + scales.addend).to(old.dtype)
    path = names.known(old)
    names.name(new, path)
    names.name(moved, f"{path.rpartition('.')[0]}.bias" if "." in path else "bias")
    graph.setInsertPoint(layer)
    layer.replaceInput(_place(layer, weight_name), graph.insertConstant(new))
    layer.replaceInput(_place(layer, bias_name), graph.insertConstant(moved))
    norm.outputsAt(0).replaceAllUsesWith(layer.output())
    norm.destroy()


def _scales(norm: Any) -> _Norm | None:
    """None where a normalisation takes the statistics of what it is given, or its numbers are not known here."""
    values = [_input(norm, name) for name in NORMS[norm.kind()]]
    if not all(map(_is_known, values)) or _known_input(norm, "training", False) is not False:
        return None
    scale, shift, mean, variance = (value.toIValue() for value in values)
    epsilon = _known_input(norm, "eps", None)
    if mean is None or variance is None or epsilon is None:
        return None
    factor = (variance.double() + epsilon).rsqrt()
    if scale is not None:
        factor = factor * scale.double()
    addend = -mean.double() * factor
    return _Norm(factor, addend if shift is None else addend + shift.double())


def _over(layer: Any, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor | None:
    """``factor`` in the shape that multiplies each output channel's weights; None where it does not fit."""
    groups = _known_input(layer, "groups", 1)
    transposed = "transpose" in layer.kind() or _known_input(layer, "transposed", False)
    if layer.kind() == "aten::addmm":
        shape: tuple[int, ...] = (1, -1)
    elif transposed and groups == 1:
        shape = (1, -1, *[1] * (weight.dim() - 2))
    elif transposed:
        if weight.shape[0] % groups or factor.numel() != groups * weight.shape[1]:
            return None
        # Rows of the weight are input channels, those of a group after one another.
        rows = factor.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
        return rows.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2))
    else:
        shape = (-1, *[1] * (weight.dim() - 1))
    return factor.reshape(shape) if weight.shape[shape.index(-1)] == factor.numel() else None


def _plain(layer: Any) -> bool:
    """Whether a product is not scaled besides."""
    return all(_known_input(layer, name, 1) == 1 for name in ("alpha", "beta"))


def _alone(value: Any) -> bool:
    return _is_known(value) and isinstance(value.toIValue(), torch.Tensor) and len(value.uses()) == 1


def _is_known(value: Any) -> bool:
    return bool(value.node().kind() == "prim::Constant")


def _readers(value: Any) -> list[Any]:
    """The nodes that look at more of a tensor than its shape and kind."""
    return [use.user for use in value.uses() if use.user.kind() not in SHAPE_READERS]


def _input(node: Any, name: str) -> Any:
    return node.inputsAt(_place(node, name))


def _known_input(node: Any, name: str, default: Any) -> Any:
    """The value of a constant input, ``default`` where the operator has no such input, None where it is computed."""
    if name not in _arguments(node):
        return default
    value = _input(node, name)
    return value.toIValue() if _is_known(value) else None


def _place(node: Any, name: str) -> int:
    return _arguments(node).index(name)


def _arguments(node: Any) -> list[str]:
    return [argument.name for argument in torch._C.parse_schema(node.schema()).arguments]


# -- weights out of the graph -----------------------------------------------------------------------------------------


def _take_out(frozen: Any, names: _Names) -> dict[str, torch.Tensor]:
    """Let the graph read its tensors from attributes, which are empty; gives the tensors by the attributes' names.

    Raises ValueError for a constant that holds several values, tensors perhaps.
    """
    graph = frozen.graph
    taken: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, torch.Tensor] = {}

    def read(tensor: torch.Tensor, before: Any) -> Any:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in taken:
            name = taken[key] = names.fresh(tensor)
            tensors[name] = tensor.detach()
            frozen._c._register_attribute(name, TENSOR, torch.empty(0, dtype=tensor.dtype))
        value = _insert(graph, before, "prim::GetAttr", [next(iter(graph.inputs()))], TENSOR)
        value.node().s_("name", taken[key])
        return value

    constants = [(node, node.output().toIValue()) for node in nodes(graph) if node.kind() == "prim::Constant"]
    if any(isinstance(value, (tuple, dict)) for _, value in constants):
        raise ValueError("a constant of the graph holds several values")
    for node, value in constants:
        if isinstance(value, torch.Tensor) and _is_weight(value):
            node.output().replaceAllUsesWith(read(value, node))
            node.destroy()
        elif isinstance(value, list) and any(isinstance(item, torch.Tensor) for item in value):
            parts = [read(item, node) for item in value]
            joined = _insert(graph, node, "prim::ListConstruct", parts, torch._C.ListType(TENSOR))
            node.output().replaceAllUsesWith(joined)
            node.destroy()
    return tensors


def _insert(graph: Any, before: Any, kind: str, inputs: Sequence[Any], type: Any) -> Any:
    node = graph.create(kind, inputs, 1)
    node.output().setType(type)
    node.insertBefore(before)
    return node.output()


def _is_weight(tensor: torch.Tensor) -> bool:
    """A small view of a large tensor would be saved with all of it."""
    return tensor.untyped_storage().nbytes() >= LEAST_BYTES


def _declare_buffers(frozen: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The module with its attributes declared as buffers, which PyTorch offers only when a class is made; filled."""
    path, _, name = frozen._c._type().qualified_name().rpartition(".")
    head = re.compile(rf"(class {name}\(Module\):\n  __parameters__ = \[.*\]\n  __buffers__ = \[)(.*\]\n)".encode())
    declared = "".join(f"{json.dumps(name)}, " for name in tensors).encode()

    def declare(code: bytes) -> bytes:
        made, count = head.subn(lambda found: found[1] + declared + found[2], code)
        if count != 1:
            raise ValueError(f"the code does not hold the class {name}")
        return made

    module = reloaded(frozen, f"code/{path.replace('.', '/')}.py", declare) if tensors else frozen
    buffers = dict(module.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        buffers[name].data = tensor
    return module.eval()


# -- comparing --------------------------------------------------------------------------------------------------------


def _weight_bytes(module: Any) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _answer(module: Any, feed: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [tensor.clone() for tensor in module(*(tensor.clone() for tensor in feed))]


def _close(wanted: Sequence[torch.Tensor], observed: Sequence[torch.Tensor]) -> bool:
    return all(_close_tensors(want.numpy(), have.numpy()) for want, have in zip(wanted, observed, strict=True))


def _close_tensors(wanted: Any, observed: Any) -> bool:
    if wanted.shape != observed.shape or wanted.dtype != observed.dtype:
        return False
    if wanted.dtype.kind != "f":  # an index may change where two scores are all but equal; the gate judges that
        return True
    finite = wanted[np.isfinite(wanted)]
    scale = float(np.abs(finite).max()) if finite.size else 0.0
    return bool(np.allclose(wanted, observed, rtol=0, atol=TOLERANCE * max(scale, 1e-30), equal_nan=True))
