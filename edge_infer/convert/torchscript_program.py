"""TorchScript as an exported program, for converters that read no TorchScript.

A trace turns every number that it computes from sizes into a tensor and back, and torch.export then takes it for one
that depends on the inputs' values. At given sizes such numbers are constants; for any size the tensors are left out
and the same is computed with numbers.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._export.converter import TS2EPConverter

from edge_infer.convert import torch_source

#: What they answer depends on sizes alone.
OF_SIZES = {"size", "sym_size", "_shape_as_tensor", "numel", "sym_numel", "dim"}
#: Larger tensors are no shapes.
MOST_ELEMENTS = 64
#: The same with numbers as with tensors of one element.
ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
#: Between a number as a tensor and the number that it is.
COPIES = ("_to_copy", "to", "detach", "clone")


def at_sizes(module: torch.jit.ScriptModule, args: tuple[torch.Tensor, ...]) -> Any:
    """The exported program of a module at the sizes of ``args``; it gives a flat tuple."""
    flat = torch_source.FlatOutputs(_convert(_AtSizes(module, args)).module(), lambda tensors: (tensors, {}))
    return torch.export.export(flat, args)


def of_any_size(module: torch.jit.ScriptModule, args: tuple[torch.Tensor, ...]) -> Any:
    """The exported program of a module in which the sizes are dynamic that can be, whatever they are in ``args``."""
    return _convert(_OfAnySize(module, args))


def _convert(converter: TS2EPConverter) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each number that became a constant is one weight that nothing uses any more
        return converter.convert()


class _AtSizes(TS2EPConverter):
    def retrace_as_exported_program(self, gm: fx.GraphModule, name_to_constant: dict[str, Any]) -> Any:
        fold_sizes(gm, self.sample_args)
        return super().retrace_as_exported_program(gm, name_to_constant)


class _OfAnySize(TS2EPConverter):
    def retrace_as_exported_program(self, gm: fx.GraphModule, name_to_constant: dict[str, Any]) -> Any:
        count_in_numbers(gm)
        return super().retrace_as_exported_program(gm, name_to_constant)


# -- at given sizes ---------------------------------------------------------------------------------------------------


def fold_sizes(module: fx.GraphModule, args: tuple[Any, ...]) -> None:
    """Put numbers and small tensors that are computed from sizes alone into the graph, as what they are with ``args``.

    A module that cannot be run node by node stays as it is.
    """
    seen = _Values(module)
    try:
        with torch.no_grad():
            seen.run(*args)
    except Exception:  # what cannot be run here may still be exported
        return
    folded = {node: seen.values[node] for node in _of_sizes(module) if node in seen.values}
    for node, value in folded.items():
        if any(user not in folded for user in node.users):
            _swap(node, _as_weight(module, node, value) if isinstance(value, torch.Tensor) else value)
    module.graph.eliminate_dead_code()
    module.recompile()


def _of_sizes(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that compute something from nothing but sizes and constants, in order."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if _constant(module, node) is not None:
            found.add(node)
        if node.op == "call_function" and (
            _name(node) in OF_SIZES or (node.all_input_nodes and found.issuperset(node.all_input_nodes))
        ):
            found.add(node)
    return [node for node in module.graph.nodes if node in found and node.op == "call_function"]


def _as_weight(module: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> fx.Node:
    name = f"{node.name}_at_these_sizes"
    module.register_buffer(name, value)
    with module.graph.inserting_before(node):
        return module.graph.get_attr(name)


class _Values(fx.Interpreter):
    """Runs a module and keeps the numbers and the small tensors that it computes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        small = isinstance(value, torch.Tensor) and value.numel() <= MOST_ELEMENTS
        if small or isinstance(value, (bool, int, float)):
            self.values[n] = value.clone() if small else value
        return value


# -- for any size -----------------------------------------------------------------------------------------------------


def count_in_numbers(module: fx.GraphModule) -> None:
    """Compute with numbers what is computed with tensors of one element that hold sizes."""
    known: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        number = _number(module, node, known)
        if number is not None:
            known[node] = number
        if _name(node) == "_local_scalar_dense" and node.args[0] in known:
            _swap(node, known[node.args[0]])
    module.graph.eliminate_dead_code()
    module.recompile()


def _number(module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The number that a tensor of one element holds, or the node that has it; None for any other node."""
    constant = _constant(module, node)
    if constant is not None:
        return int(constant) if constant.numel() == 1 else None
    if node.op != "call_function":
        return None
    if _name(node) == "scalar_tensor":
        return node.args[0]
    numbers = [known.get(item) if isinstance(item, fx.Node) else item for item in node.args[:2]]
    if _name(node) in COPIES:
        return numbers[0]
    scaled = any(factor != 1 for factor in (*node.args[2:], node.kwargs.get("alpha", 1)))
    function = None if scaled else ARITHMETIC.get(_name(node))
    if _name(node) == "div" and node.kwargs.get("rounding_mode") in ("trunc", "floor"):
        function = operator.floordiv  # sizes are not negative
    if function is None or len(numbers) < 2 or None in numbers:
        return None
    with module.graph.inserting_before(node):
        return module.graph.call_function(function, tuple(numbers))


# -- both -------------------------------------------------------------------------------------------------------------


def _constant(module: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """What a trace keeps of a number: no weight is a few integers."""
    value = getattr(module, str(node.target), None) if node.op == "get_attr" else None
    small = isinstance(value, torch.Tensor) and value.numel() <= MOST_ELEMENTS and not value.is_floating_point()
    return value if small else None


def _name(node: fx.Node) -> str:
    """Of ``aten.size.int`` the word ``size``."""
    parts = str(node.target).split(".")
    return parts[1] if parts[0] == "aten" and len(parts) > 1 else ""


def _swap(node: fx.Node, kept: Any) -> None:
    def swap(item: Any) -> Any:
        return kept if item is node else item

    for user in list(node.users):
        user.args = fx.node.map_aggregate(user.args, swap)
        user.kwargs = fx.node.map_aggregate(user.kwargs, swap)
