"""PyTorch to TFLite with litert-torch; inputs keep the layout of the source, NCHW images included.

The converter knows fixed shapes well and dynamic ones badly, so a model with dynamic dimensions is converted at
several sizes, from which ``tflite_dynamic`` makes one that takes any.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("LITERT_TORCH_SHOW_PROGRESS", "n")  # before the import, which reads it

import litert_torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from edge_infer import probe
from edge_infer.convert import spec_from_json, tflite_dynamic, tflite_files, torch_source, torchscript_program
from edge_infer.convert.torch_source import TorchModel, causes
from edge_infer.errors import ConversionError, EdgeInferError
from edge_infer.manifest import TensorSpec
from edge_infer.user_code import first_line

#: Of more weights the converter makes fewer copies, at the price of folding constants in another way: a dense network
#: of 500 MB took 1.6 GB instead of 2.5 GB (litert-torch 0.10).
LARGE_BYTES = 2**27
#: The largest size of a dimension that is converted at, where the model has a largest.
LARGEST = 4096


@dataclass(frozen=True)
class Size:
    """A dynamic size: the axes (input, axis) that have it, that of the first conversion and another one."""

    axes: tuple[tuple[int, int], ...]
    first: int
    other: int
    #: ``first`` is the largest that the model takes.
    bounded: bool = False


def convert(request: dict[str, Any]) -> dict[str, Any]:
    return convert_model(torch_source.load(request["from"]), request)


def convert_model(model: TorchModel, request: dict[str, Any]) -> dict[str, Any]:
    feeds = probe.load_feeds(Path(request["feeds"]))
    outputs = [spec_from_json(row) for row in request["outputs"]]
    found = sizes(model, feeds)
    work = Path(request["out"])
    parts = [_convert_at(model, found, other, work / f"{number}.tflite") for number, other in enumerate([None, *found])]
    made = [tflite_files.read(path) for path in parts]
    words = [_words(model, size) for size in found]
    whole = tflite_dynamic.generalize(made, words, [size.bounded for size in found]) if found else made[0]
    tflite_files.operators(whole)
    _rename(whole, [spec.name for spec in model.inputs], [spec.name for spec in outputs])
    tflite_files.strip(whole)
    path = work / "model.tflite"
    tflite_files.write(whole, path)
    for part in parts:
        part.unlink()
    _try(path, feeds, outputs)
    tools = {"torch": torch.__version__, "litert-torch": litert_torch.__version__}
    return {"details": {"model": str(path), "signature": tflite_files.SIGNATURE}, "tools": tools}


def _words(model: TorchModel, size: Size) -> str:
    place, axis = size.axes[0]
    return f"axis {axis} of input {model.inputs[place].name!r}"


# Which sizes there are.


def sizes(model: TorchModel, feeds: list[probe.Feed]) -> list[Size]:
    """The model's dynamic sizes. Raises ConversionError when one is not dynamic in what the model computes."""
    axes = [(n, axis) for n, spec in enumerate(model.inputs) for axis, size in enumerate(spec.shape) if size is None]
    if not axes:
        return []
    found = _asked(model, feeds, axes) if model.scripted else _exported(model, feeds, axes)
    return [_two_sizes(model, feeds, size) for size in found]


def _exported(model: TorchModel, feeds: list[probe.Feed], axes: list[tuple[int, int]]) -> list[Size]:
    """From the exported program, which has a symbol for each size, the same for axes that must agree."""
    args = torch_source.examples(model, feeds)
    program = torch_source.export(model, args)
    by_name = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    values = [
        by_name[name] for name in program.graph_signature.user_inputs if isinstance(by_name.get(name), torch.Tensor)
    ]
    groups: dict[Any, list[tuple[int, int]]] = {}
    for place, axis in axes:
        expression = getattr(getattr(values[place].shape[axis], "node", None), "expr", None)
        if expression is None or not expression.is_symbol:
            raise ConversionError(
                f"axis {axis} of input {model.inputs[place].name!r} is {expression or 'fixed'} in the exported "
                "program, expected any size; give it with --input, or export the model with that dimension dynamic"
            )
        groups.setdefault(expression, []).append((place, axis))
    found = []
    for symbol, places in groups.items():
        upper = program.range_constraints[symbol].upper if symbol in program.range_constraints else None
        bound = int(upper) if upper is not None and upper.is_Integer and upper <= LARGEST else 0
        first = bound or int(args[places[0][0]].shape[places[0][1]])
        found.append(Size(tuple(places), first, first, bounded=bool(bound)))
    return found


def _asked(model: TorchModel, feeds: list[probe.Feed], axes: list[tuple[int, int]]) -> list[Size]:
    """From the model's own reactions: an axis that cannot change alone goes with others of the same size."""
    args = torch_source.examples(model, feeds)
    alone: list[Size] = []
    tied: dict[int, list[tuple[int, int]]] = {}
    for place, axis in axes:
        size = Size(((place, axis),), args[place].shape[axis], args[place].shape[axis] - 1)
        if size.other > 0 and _runs(model, _at(model, args, [size], size)):
            alone.append(size)
        else:
            tied.setdefault(size.first, []).append((place, axis))
    return [*alone, *(Size(tuple(places), first, first) for first, places in tied.items())]


def _runs(model: TorchModel, args: tuple[torch.Tensor, ...]) -> bool:
    try:
        with torch.inference_mode():
            model.tuple_module()(*args)
    except Exception:  # a model raises what it likes at a size it does not take
        return False
    return True


def _two_sizes(model: TorchModel, feeds: list[probe.Feed], size: Size) -> Size:
    """A second size to convert at: one that is no multiple tells more; else one that some feed has."""
    args = torch_source.examples(model, feeds)
    place, axis = size.axes[0]
    seen = sorted({feed[model.inputs[place].name].shape[axis] for feed in feeds}, reverse=True)
    for other in (size.first // 2 + 1, *seen, size.first - 1, size.first + 1):
        candidate = replace(size, other=other)
        if other not in (1, size.first) and other > 0 and _runs(model, _at(model, args, [candidate], candidate)):
            return candidate
    raise ConversionError(f"{_words(model, size)} takes one size alone, {size.first}; give it with --input")


def _at(
    model: TorchModel, args: tuple[torch.Tensor, ...], found: Sequence[Size], other: Size | None
) -> tuple[torch.Tensor, ...]:
    """Example tensors in the first sizes, but ``other`` in its second."""
    shapes = [list(tensor.shape) for tensor in args]
    for size in found:
        for place, axis in size.axes:
            shapes[place][axis] = size.other if size is other else size.first
    return tuple(_resized(tensor, shape) for tensor, shape in zip(args, shapes, strict=True))


def _resized(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    for axis, size in enumerate(shape):
        tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor


# The conversion.


def _convert_at(model: TorchModel, found: Sequence[Size], other: Size | None, path: Path) -> Path:
    """A ``.tflite`` of fixed shapes. Raises ConversionError."""
    base = tuple(
        torch.ones([size if size is not None else 1 for size in spec.shape], dtype=getattr(torch, spec.dtype))
        for spec in model.inputs
    )
    args = _at(model, base, found, other)
    try:
        module = torchscript_program.at_sizes(model.module, args).module() if model.scripted else model.tuple_module()
        # Without 64-bit types, integer inputs and outputs would silently become int32.
        large = model.weight_bytes > LARGE_BYTES
        litert_torch.convert(module, args, enable_x64=True, lightweight_conversion=large).export(str(path))
    except EdgeInferError:
        raise
    except Exception as error:  # the exporter's, the lowerings' and MLIR's own kinds
        raise explain(model, args, error) from error
    return path


def _rename(model: Any, inputs: list[str], outputs: list[str]) -> None:
    """litert-torch numbers them: args_0, ... and output_0, ... in the order of the module's."""
    signature = tflite_files.only_signature(model)
    old_inputs = sorted((entry.name.decode() for entry in signature.inputs), key=_number)
    old_outputs = sorted((entry.name.decode() for entry in signature.outputs), key=_number)
    for what, old, new in (("inputs", old_inputs, inputs), ("outputs", old_outputs, outputs)):
        if len(old) != len(new):  # what is not used, or given twice, the converter drops
            raise ConversionError(
                f"litert-torch made {len(old)} {what} where the model has {len(new)} ({', '.join(new)}): one is unused "
                "or another one once more; leave it out of the model, or use --format onnx"
            )
    renamed = dict(zip(old_inputs, inputs, strict=True)), dict(zip(old_outputs, outputs, strict=True))
    tflite_files.rename(model, *renamed, tflite_files.SIGNATURE)


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _try(path: Path, feeds: list[probe.Feed], outputs: Sequence[TensorSpec]) -> None:
    """Run one feed of each shape: the converter makes files that no engine opens, or not for every size."""
    seen = set()
    for feed in feeds:
        shapes = tuple(array.shape for array in feed.values())
        if shapes in seen:
            continue
        seen.add(shapes)
        try:
            resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            engine = Interpreter(str(path), experimental_op_resolver_type=resolver, num_threads=1)
            answer = engine.get_signature_runner()(**feed)
        except (RuntimeError, ValueError) as error:
            sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise ConversionError(
                f"the converted TFLite model fails on inputs {sizes}: {first_line(error)}; give the inputs one size "
                "with --input, or use --format onnx"
            ) from error
        for spec in outputs:
            if str(answer[spec.name].dtype) != spec.dtype:
                raise ConversionError(
                    f"litert-torch made output {spec.name!r} {answer[spec.name].dtype}, expected {spec.dtype}; "
                    "cast it in the model, or use --format onnx"
                )


def explain(model: TorchModel, args: tuple[torch.Tensor, ...], error: BaseException) -> ConversionError:
    """Pages of three compilers as one sentence that names operator and layer."""
    text = "\n".join(f"{type(item).__name__}: {item}" for item in causes(error))
    missing = re.search(r"Lowering not found: ([\w.:]+)|failed for node ([\w:]+)", text)
    if missing:
        operator = missing[1] or missing[2]
        where = torch_source.layer(model, args, operator)
        return ConversionError(
            f"litert-torch has no TFLite form of the operator {operator}{f' in layer {where}' if where else ''}; "
            "replace it in the model, or use --format onnx"
        )
    if "DataDependent" in text or "data-dependent" in text:
        return ConversionError(
            "what the model computes depends on its values (an if or a loop), which litert-torch cannot follow; "
            "use torch.where in the model, or use --format onnx"
        )
    running = re.search(r"While executing %\w+ : .*?target=(?:torch\.ops\.)?([\w.]+)", text)
    where = f" at operator {running[1]}" if running else ""
    last = causes(error)[-1]
    return ConversionError(
        f"litert-torch cannot convert the model{where}: {type(last).__name__}: {first_line(last)}; see all of it with "
        "-v, or try --format onnx"
    )
