"""Load a PyTorch model of any kind as a module that takes tensors by position and gives a tuple of tensors."""

from __future__ import annotations

import inspect
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from edge_infer.convert import spec_from_json
from edge_infer.errors import ConversionError, UsageError
from edge_infer.manifest import TensorSpec
from edge_infer.probe import Feed
from edge_infer.user_code import first_line, resolve

#: How torch.export says that a dimension said to be dynamic is not.
FIXED_AXIS = (
    r"tensors'?\]\[(?P<place>\d+)\]\.size\(\)\[(?P<axis>\d+)\] as dynamic.* constant \((?P<size>\d+)\)",
    r"static shape of (?P<size>\d+) for dimension \S*tensors'?\]\[(?P<place>\d+)\]\.shape\[(?P<axis>\d+)\]",
)
#: torch's own fast path for transformers is one operator that no converter knows and no quantizer sees into.
torch.backends.mha.set_fastpath_enabled(False)

LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, ImportError, TypeError)


Arrange = Callable[[tuple[torch.Tensor, ...]], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass
class TorchModel:
    """``module`` in evaluation mode; ``arrange`` turns tensors in the order of ``inputs`` into its arguments."""

    module: Any
    inputs: list[TensorSpec]
    arrange: Arrange
    scripted: bool = False
    exported: Any = None

    @property
    def weight_bytes(self) -> int:
        return sum(int(tensor.nbytes) for tensor in (*self.module.parameters(), *self.module.buffers()))

    def tuple_module(self) -> FlatOutputs:
        """The module with positional inputs and a flat tuple of outputs, as engines have it."""
        flat = FlatOutputs(self.module, self.arrange)
        flat.training = False  # not eval(), which an exported program does not know
        return flat

    def run(self, feed: Feed) -> Feed:
        tensors = [torch.from_numpy(feed[spec.name].copy()) for spec in self.inputs]
        with torch.inference_mode():
            flat = self.tuple_module().named(*tensors)
        return {name: tensor.detach().numpy().copy() for name, tensor in flat.items()}


class FlatOutputs(torch.nn.Module):
    """Calls the model with its inputs in order and flattens what it returns."""

    def __init__(self, module: torch.nn.Module, arrange: Arrange) -> None:
        super().__init__()
        self.module = module
        self._arrange = arrange

    def named(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        positional, keywords = self._arrange(tensors)
        return flatten_outputs(self.module(*positional, **keywords))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.named(*tensors).values())


def flatten_outputs(value: Any, name: str = "output") -> dict[str, torch.Tensor]:
    """Names for what a forward returns: dictionary keys, fields of named tuples, otherwise ``output_0``, ..."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if value is None:
        return {}
    prefix = "" if name == "output" else f"{name}_"
    if isinstance(value, Mapping):
        items = [(f"{prefix}{key}", item) for key, item in value.items()]
    elif hasattr(value, "_fields"):
        items = [(f"{prefix}{key}", getattr(value, key)) for key in value._fields]
    elif isinstance(value, (tuple, list)):
        items = [(f"{name}_{index}" if len(value) > 1 else name, item) for index, item in enumerate(value)]
    else:
        raise ConversionError(
            f"the model returns a {type(value).__name__}, expected tensors, or tuples or dicts of them"
        )
    flat = [pair for label, item in items for pair in flatten_outputs(item, label).items()]
    names = [key for key, _ in flat]
    twice = sorted({key for key in names if names.count(key) > 1})
    if twice:
        raise ConversionError(f"the model returns two outputs that would be named {twice[0]!r}; rename one of them")
    return dict(flat)


def load(request: dict[str, Any]) -> TorchModel:
    """The source of a conversion request. Raises UsageError, ConversionError."""
    path, kind = Path(request["source"]), request["kind"]
    given = [spec_from_json(row) for row in request["inputs"]]
    if request["signature"] is not None:
        raise UsageError(f"--signature {request['signature']} was given, but PyTorch models have no signatures")
    if kind == "torch-export":
        return _load_export(path, given)
    if kind == "torch-safetensors":
        module = _load_safetensors(path, request["factory"])
    else:
        module = load_script(path) if kind == "torchscript" else _load_pickle(path, request)
    module.eval()
    inputs = _named_inputs(module, given)
    names = [spec.name for spec in inputs]

    def arrange(tensors: tuple[torch.Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), dict(zip(names, tensors, strict=True))

    return TorchModel(module, inputs, arrange, scripted=kind == "torchscript")


def load_script(path: Path) -> torch.nn.Module:
    try:
        module: torch.nn.Module = torch.jit.load(str(path), map_location="cpu")
    except LOAD_ERRORS as error:
        raise ConversionError(f"PyTorch cannot load {path} as TorchScript: {first_line(error)}") from error
    return module


def _load_export(path: Path, given: list[TensorSpec]) -> TorchModel:
    try:
        program = torch.export.load(str(path))
    except Exception as error:  # its readers raise their own kinds
        raise ConversionError(f"PyTorch cannot load {path} as an exported program: {first_line(error)}") from error
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    arguments = [row.arg for row in program.graph_signature.input_specs if row.kind.name == "USER_INPUT"]
    tensors = [argument.name for argument in arguments if isinstance(values.get(argument.name), torch.Tensor)]
    inputs = []
    for name in tensors:
        shape = tuple(size if isinstance(size, int) else None for size in values[name].shape)
        inputs.append(TensorSpec(name, str(values[name].dtype).removeprefix("torch."), shape))
    for spec in given:
        if spec not in inputs:
            raise UsageError(
                f"--input gives {spec}, but {path.name} was exported with {', '.join(map(str, inputs))}; "
                "leave --input away or export it again"
            )

    def arrange(given: tuple[torch.Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As the program was exported: keywords and containers, and in their places the constants it had then."""
        by_name = dict(zip(tensors, given, strict=True))
        flat = [by_name.get(argument.name, getattr(argument, "value", None)) for argument in arguments]
        positional, keywords = pytree.tree_unflatten(flat, program.call_spec.in_spec)
        return positional, keywords

    return TorchModel(program.module(), inputs, arrange, exported=program)


def _load_pickle(path: Path, request: dict[str, Any]) -> torch.nn.Module:
    if request["factory"]:
        return _load_state(path, request["factory"])
    if not request["trust_pickle"]:
        raise UsageError(
            f"{path} is a PyTorch pickle: give the code that builds the network with --factory module:callable, or, "
            "for a whole pickled module from a source you trust (opening it runs its code), --trust-pickle"
        )
    sys.path.insert(0, str(path.parent))  # a pickled module names the file its class came from
    try:
        module = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle raises whatever its code does
        raise ConversionError(f"PyTorch cannot load {path}: {first_line(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"{path} holds a {type(module).__name__}, not a module; give the network with --factory")
    return module


def _load_state(path: Path, factory: str) -> torch.nn.Module:
    module = build(factory)
    try:
        # Mapped, as the network has a copy of its own; the format from before torch 1.6 cannot be.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # UnpicklingError and others; the sentence names the cause
        raise ConversionError(f"PyTorch cannot load {path} as a state dict: {first_line(error)}") from error
    if not isinstance(state, Mapping):
        raise UsageError(f"{path} holds a {type(state).__name__}, expected a state dict for the network of --factory")
    _fill(module, state, path, factory)
    return module


def _load_safetensors(path: Path, factory: str | None) -> torch.nn.Module:
    if not factory:
        raise UsageError(
            f"{path} holds weights alone; give the code that builds their network with --factory module:callable"
        )
    module = build(factory)
    from safetensors.torch import load_file

    try:
        state = load_file(path, device="cpu")
    except Exception as error:  # SafetensorError, and what reading a file raises
        raise ConversionError(f"{path} is not a sound safetensors file: {first_line(error)}; copy it again") from error
    # Of weights that share memory the format keeps one alone.
    _fill(module, state | _tied(module, state), path, factory)
    return module


def _tied(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of ``module`` that ``state`` lacks but has under another name, for the same memory."""
    own = {name: _memory(tensor) for name, tensor in module.state_dict().items() if tensor.numel()}
    kept = {memory: state[name] for name, memory in own.items() if name in state}
    return {name: kept[memory] for name, memory in own.items() if name not in state and memory in kept}


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor], path: Path, factory: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UsageError(
            f"{path} does not fit the network of --factory {factory}: {' '.join(lines[:2])[:300]}"
        ) from None


def build(factory: str) -> torch.nn.Module:
    """Call ``module:callable`` or ``file.py:callable``. Raises UsageError."""
    function = resolve(factory, "--factory")
    try:
        module = function()
    except Exception as error:
        raise UsageError(f"--factory {factory} failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"--factory {factory} gives a {type(module).__name__}, expected a torch.nn.Module")
    return module


def _named_inputs(module: torch.nn.Module, given: list[TensorSpec]) -> list[TensorSpec]:
    """The user's inputs in the order of the forward's parameters."""
    known, required = _parameters(module)
    example = f"--input {known[0] if known else 'x'}=float32:?,3,224,224"
    if not given:
        raise UsageError(f"a PyTorch model carries no input shapes; give each of {', '.join(known)} as in {example}")
    for spec in given:
        if spec.name not in known:
            raise UsageError(f"--input names {spec.name!r}, the model's forward takes: {', '.join(known)}")
    absent = [name for name in required if name not in {spec.name for spec in given}]
    if absent:
        raise UsageError(f"the model's forward needs {absent[0]!r} too; give it as in {example}")
    return sorted(given, key=lambda spec: known.index(spec.name))


def _parameters(module: Any) -> tuple[list[str], list[str]]:
    """Names of all parameters of the forward, and of those without a default."""
    if isinstance(module, torch.jit.ScriptModule):
        schema: Any = module.forward
        arguments = [item for item in schema.schema.arguments if item.name != "self"]
        return [item.name for item in arguments], [item.name for item in arguments if not item.has_default_value()]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [item for item in inspect.signature(module.forward).parameters.values() if item.kind in kinds]
    return [item.name for item in parameters], [item.name for item in parameters if item.default is item.empty]


def causes(error: BaseException) -> list[BaseException]:
    """The error and those that it came from."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def examples(model: TorchModel, feeds: Sequence[Feed]) -> tuple[torch.Tensor, ...]:
    """Tensors to trace with: the largest case, so that dynamic dimensions are not of size 1, which means broadcast."""
    feed = max(feeds, key=lambda feed: sum(array.size for array in feed.values()))
    return tuple(torch.from_numpy(feed[spec.name].copy()) for spec in model.inputs)


def dynamic_shapes(model: TorchModel) -> tuple[dict[int, Any], ...]:
    """For ``torch.export``: the dynamic axes of each input, about whose relations the model decides."""
    return tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if size is None}
        for spec in model.inputs
    )


def export(model: TorchModel, args: tuple[torch.Tensor, ...]) -> Any:
    """The model as an exported program with positional inputs and, but for one loaded as such, flat outputs.

    Raises ConversionError for control flow that depends on values, and for a dynamic dimension that is none.
    """
    if model.exported is not None:
        return model.exported
    try:
        return torch.export.export(model.tuple_module(), args, dynamic_shapes=(dynamic_shapes(model),))
    except Exception as error:  # the exporter has kinds of its own
        raise explain_export(model, error) from error


def explain_export(model: TorchModel, error: BaseException) -> ConversionError:
    """Why ``torch.export`` fails, in one sentence."""
    text = "\n".join(f"{type(item).__name__}: {item}" for item in causes(error))
    if "DataDependent" in text or "data-dependent" in text:
        return ConversionError(
            "what the model computes depends on its values (an if or a loop), which torch.export cannot follow; "
            "use torch.where or torch.cond in the model, or package torch.jit.script(model)"
        )
    fixed = next(filter(None, (re.search(pattern, text) for pattern in FIXED_AXIS)), None)
    if fixed:
        place, axis, size = (int(fixed[name]) for name in ("place", "axis", "size"))
        spec = model.inputs[place]
        sizes = ",".join(
            str(size if n == axis else "?" if given is None else given) for n, given in enumerate(spec.shape)
        )
        return ConversionError(
            f"the model does not take axis {axis} of input {spec.name!r} in any size: torch.export finds it fixed at "
            f"{size}, as in a recurrent layer; give it one size, as in --input {spec.name}={spec.dtype}:{sizes}"
        )
    reason = f"{type(error).__name__}: {first_line(error)}"
    return ConversionError(f"torch.export cannot follow the model: {reason}; see all of it with -v, or trace it first")


def layer(model: TorchModel, args: tuple[torch.Tensor, ...], operator: str) -> str:
    """The path of the submodule that uses an operator, empty when that cannot be told."""
    if model.scripted:
        return ""
    try:
        program = model.exported or torch.export.export(model.tuple_module(), args)
        nodes = [*program.graph.nodes, *program.run_decompositions().graph.nodes]
    except Exception:  # only wanted for a better sentence
        return ""
    # What is prims.bessel_j0 to an exporter is aten.special_bessel_j0 in the program; "default" is no operator.
    name = [part for part in re.split("[.:]+", operator) if part not in ("default", "Tensor", "Scalar")][-1]
    same = re.compile(rf"(^|[._]){re.escape(name)}(\.|$)")
    for node in nodes:
        if same.search(str(node.target)):
            paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            return re.sub(r"^module(\.|$)", "", paths[-1]) if paths else ""
    return ""
