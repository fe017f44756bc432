"""PyTorch to TorchScript: traced, or scripted where tracing loses what the model does for other inputs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_infer import probe
from edge_infer.convert import torch_source
from edge_infer.convert.torch_source import TorchModel
from edge_infer.errors import ConversionError
from edge_infer.user_code import first_line

#: Of the largest value: what one engine and one framework may differ by from call to call.
TOLERANCE = 1e-5


def convert(request: dict[str, Any]) -> dict[str, Any]:
    model = torch_source.load(request["from"])
    feeds = probe.load_feeds(Path(request["feeds"]))
    made, notes = compiled(model, feeds, [row["name"] for row in request["outputs"]])
    path = Path(request["out"]) / "model.pt"
    made.save(str(path))
    details = {"model": str(path), **({"notes": notes} if notes else {})}
    return {"details": details, "tools": {"torch": torch.__version__}}


def compiled(model: TorchModel, feeds: list[probe.Feed], names: Sequence[str]) -> tuple[Any, list[str]]:
    """The model as TorchScript with flat inputs and outputs, and what there is to say about it.

    Raises ConversionError when no way answers every feed as the model does.
    """
    expected = [model.run(feed) for feed in feeds]
    traced = _trace(model, feeds)
    wrong = _first_difference(traced, model, feeds, expected, names)
    if not wrong:
        return traced, []
    scripted = _script(model, feeds, wrong)
    still = _first_difference(scripted, model, feeds, expected, names)
    if still:
        raise ConversionError(f"torch.jit.trace and torch.jit.script both change the model: {still}")
    return scripted, [f"scripted, because a trace answers differently: {wrong}"]


def _trace(model: TorchModel, feeds: list[probe.Feed], module: Any = None) -> Any:
    """Part of it that is TorchScript already keeps its control flow."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = module or model.tuple_module()
            return torch.jit.trace(module, torch_source.examples(model, feeds), strict=False, check_trace=False)
    except Exception as error:  # tracing runs the model's own code
        if "dynamo-optimized" in str(error):
            raise ConversionError(
                "torch.jit.trace cannot follow torch.cond and other control flow operators; use --format onnx"
            ) from error
        way = "return tensors or tuples of them" if model.scripted else "package torch.jit.script(model)"
        raise ConversionError(f"torch.jit.trace fails: {first_line(error)}; {way}, or use --format onnx") from error


def _script(model: TorchModel, feeds: list[probe.Feed], wrong: str) -> Any:
    """The model's own code compiled, with positional inputs and a flat tuple around it by tracing."""
    if model.exported is not None:
        raise ConversionError(
            f"what the model computes depends on its inputs in a way that torch.jit.trace loses ({wrong}), and an "
            "exported program has no code to script; package the network itself, or use --format onnx"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.script(model.module)
    except Exception as error:  # the compiler's own kinds, and what its source reader raises
        raise ConversionError(
            f"what the model computes depends on its inputs in a way that torch.jit.trace loses ({wrong}) and "
            f"torch.jit.script cannot read ({first_line(error)}); use torch.where in the model"
        ) from error
    return _trace(model, feeds, torch_source.FlatOutputs(scripted, model.arrange))


def _first_difference(
    made: Any, model: TorchModel, feeds: Sequence[probe.Feed], expected: Sequence[probe.Feed], names: Sequence[str]
) -> str:
    """What is the first to differ, in words; empty when every feed gets the same answer."""
    for feed, answer in zip(feeds, expected, strict=True):
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
        try:
            with torch.inference_mode():
                flat = made(*(torch.from_numpy(feed[spec.name].copy()) for spec in model.inputs))
        except Exception as error:
            return f"it fails on inputs {shapes} ({first_line(error)})"
        for name, tensor in zip(names, flat, strict=True):
            if not _close(answer[name], tensor.numpy()):
                return f"output {name!r} on inputs {shapes}"
    return ""


def _close(expected: probe.Array, observed: probe.Array) -> bool:
    if expected.shape != observed.shape or expected.dtype != observed.dtype:
        return False
    if expected.dtype.kind != "f":
        return np.array_equal(expected, observed)
    finite = expected[np.isfinite(expected)]
    scale = float(np.abs(finite).max()) if finite.size else 1.0
    return bool(np.allclose(expected, observed, rtol=0, atol=TOLERANCE * max(scale, 1e-30), equal_nan=True))
