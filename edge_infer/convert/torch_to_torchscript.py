"""PyTorch to TorchScript by tracing; a part that is TorchScript already keeps its control flow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edge_infer.convert import ask_source, torch_source
from edge_infer.errors import ConversionError


def convert(request: dict[str, Any]) -> dict[str, Any]:
    model = torch_source.load(request)
    feeds, answer = ask_source(request, model.inputs, model.run)
    try:
        with torch.no_grad():
            traced = torch.jit.trace(
                model.tuple_module(), torch_source.examples(model, feeds), strict=False, check_trace=False
            )
    except Exception as error:  # tracing runs the model's own code
        raise ConversionError(f"torch.jit.trace fails: {str(error).strip().splitlines()[0][:300]}") from error
    path = Path(request["work"]) / "model.pt"
    traced.save(str(path))
    return {**answer, "details": {"model": str(path), "tools": {"torch": torch.__version__}}}
