"""TorchScript as an exported program of given sizes, which converters that read no TorchScript take.

PyTorch's own converter turns every number that a trace computes from sizes into a tensor and back, and torch.export
then takes it for one that depends on the inputs' values. At given sizes these numbers are constants.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx
from torch._export.converter import TS2EPConverter

from edge_infer.convert import torch_source

#: What they answer depends on sizes alone.
OF_SIZES = {"size", "sym_size", "_shape_as_tensor", "numel", "sym_numel", "dim"}
#: Larger tensors are no shapes.
MOST_ELEMENTS = 64


def program(module: torch.jit.ScriptModule, args: tuple[torch.Tensor, ...]) -> Any:
    """The exported program of a module at the sizes of ``args``; it gives a flat tuple."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each number that became a constant is one weight that nothing uses any more
        made = _AtSizes(module, args).convert().module()
    flat = torch_source.FlatOutputs(made, lambda tensors: (tensors, {}))
    return torch.export.export(flat, args)


class _AtSizes(TS2EPConverter):
    def retrace_as_exported_program(self, gm: fx.GraphModule, name_to_constant: dict[str, Any]) -> Any:
        fold_sizes(gm, self.sample_args)
        return super().retrace_as_exported_program(gm, name_to_constant)


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
            _replace(module, node, value)
    module.graph.eliminate_dead_code()
    module.recompile()


def _of_sizes(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that compute something from nothing but sizes and constants, in order."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr" and _is_constant(getattr(module, str(node.target), None)):
            found.add(node)
        if node.op == "call_function" and (
            _name(node) in OF_SIZES or (node.all_input_nodes and found.issuperset(node.all_input_nodes))
        ):
            found.add(node)
    return [node for node in module.graph.nodes if node in found and node.op == "call_function"]


def _is_constant(value: Any) -> bool:
    """What a trace keeps of a number: no weight is a few integers."""
    return isinstance(value, torch.Tensor) and value.numel() <= MOST_ELEMENTS and not value.is_floating_point()


def _name(node: fx.Node) -> str:
    """Of ``aten.size.int`` the word ``size``."""
    parts = str(node.target).split(".")
    return parts[1] if parts[0] == "aten" and len(parts) > 1 else ""


def _replace(module: fx.GraphModule, node: fx.Node, value: Any) -> None:
    kept: Any = value
    if isinstance(value, torch.Tensor):
        name = f"{node.name}_at_these_sizes"
        module.register_buffer(name, value)
        with module.graph.inserting_before(node):
            kept = module.graph.get_attr(name)

    def swap(item: Any) -> Any:
        return kept if item is node else item

    for user in list(node.users):
        user.args = fx.node.map_aggregate(user.args, swap)
        user.kwargs = fx.node.map_aggregate(user.kwargs, swap)


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
