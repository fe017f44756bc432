"""Prune the weights of a TorchScript module by magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_infer.quantize import pruning
from edge_infer.quantize.torchscript_archive import save_archive

MODEL = "model.pt"
#: Operators (``aten::`` left away) with weights worth pruning, and which of their inputs those are.
#: https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/native_functions.yaml
WEIGHT_INPUTS = {
    **dict.fromkeys(("_convolution", "convolution", "conv1d", "conv2d", "conv3d", "linear"), (1,)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), (1,)),
    **dict.fromkeys(("matmul", "mm", "bmm"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm"), (1, 2)),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), (2, 3)),
    "_native_multi_head_attention": (5, 7),
    "_transformer_encoder_layer_fwd": (3, 5, 14, 16),
}
#: Recurrent layers take weights and biases as one list, after that of the states.
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
#: Operators that hand weights on in another shape, and those that do not look at their values.
HANDED_ON = {"t", "transpose", "permute", "reshape", "view", "contiguous", "detach", "squeeze", "unsqueeze", "numpy_T"}
HARMLESS = {"size", "dim", "len", "numel", "is_floating_point"}
FLOATS = (torch.float32, torch.float16, torch.float64)


def prune(request: dict[str, Any]) -> dict[str, Any]:
    """See ``pruning.masks``. Left alone are biases, norms, and what any other operator reads too, like embeddings.

    request: "from" {"model"}, "work", "sparsity", "scope". Raises UsageError, ConversionError.
    """
    module = torch.jit.load(request["from"]["model"], map_location="cpu").eval()
    arrays = {name: tensor.detach().numpy() for name, tensor in prunable(module).items()}  # not copies
    reached = pruning.prune(arrays, request["sparsity"], request["scope"])
    path = Path(request["out"]) / MODEL
    save_archive(module, path, {})
    return {"details": {"model": str(path)}, **reached, "tools": {"torch": torch.__version__}}


@dataclass
class Use:
    """A tensor of the module, under the first of its names, and whether layers with weights alone read it."""

    name: str
    tensor: torch.Tensor
    as_weight: bool = False
    otherwise: bool = False


def prunable(module: Any) -> dict[str, torch.Tensor]:
    """Weights of two or more dimensions by name, sorted; tied ones once. Writing to them writes to the module."""
    walk = _Walk(module)
    uses = sorted(walk.uses.values(), key=lambda use: use.name)
    return {use.name: use.tensor for use in uses if use.as_weight and not use.otherwise}


class _Walk:
    """Goes through the graph and notes how each tensor of the module is used."""

    def __init__(self, module: Any) -> None:
        self.uses: dict[tuple[int, int], Use] = {}
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
            self._use(name, tensor)
        graph = module.inlined_graph
        self._objects: dict[str, Any] = {next(graph.inputs()).debugName(): module}
        self.block(graph, {})

    def _use(self, name: str, tensor: torch.Tensor) -> Use:
        return self.uses.setdefault((tensor.data_ptr(), tensor.numel()), Use(name, tensor))

    def block(self, block: Any, outer: dict[str, list[Use]]) -> None:
        """``known``: by name of a value the tensors that it stands for, several for a list of them."""
        known = dict(outer)
        for node in block.nodes():
            names = [value.debugName() for value in node.inputs()]
            results = [value.debugName() for value in node.outputs()]
            kind = node.kind().removeprefix("aten::")
            if kind in ("prim::GetAttr", "prim::Constant"):
                known[results[0]] = self._stored(node, names, results[0])
            elif kind == "prim::ListConstruct":
                known[results[0]] = [use for name in names for use in known.get(name, [])]
            elif kind in HANDED_ON:
                known[results[0]] = known.get(names[0], [])
            elif kind not in HARMLESS:
                self._note(kind, names, known)
            for child in node.blocks():
                self.block(child, known)
        for value in block.outputs():
            for use in known.get(value.debugName(), []):
                use.otherwise = True

    def _stored(self, node: Any, names: list[str], result: str) -> list[Use]:
        """The tensors that an attribute or a constant holds; scripted recurrent layers have a list of them."""
        if node.kind() == "prim::GetAttr":
            value = getattr(self._objects.get(names[0]), node.s("name"), None)
            self._objects[result] = value
        else:
            is_tensor = node.outputsAt(0).type().isSubtypeOf(torch._C.TensorType.get())
            value = node.outputsAt(0).toIValue() if is_tensor else None
        parts = value if isinstance(value, (list, tuple)) else [value]
        return [self._use(f"constant {result}", part) for part in parts if isinstance(part, torch.Tensor)]

    def _note(self, kind: str, names: list[str], known: dict[str, list[Use]]) -> None:
        lists = [place for place, name in enumerate(names) if len(known.get(name, [])) > 1]
        weights = lists[-1:] if kind in RECURRENT else WEIGHT_INPUTS.get(kind, ())
        for place, name in enumerate(names):
            for use in known.get(name, []):
                tensor = use.tensor
                if place in weights and tensor.dim() >= 2 and tensor.dtype in FLOATS:
                    use.as_weight = True
                else:
                    use.otherwise = True
