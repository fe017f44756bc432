"""Read PyTorch models of any kind. They stay as they are: each step loads them as this reader does."""

from __future__ import annotations

from typing import Any

import torch

from edge_infer.convert import ask_source, torch_source

#: What ``torch_source.load`` needs to load the model again.
SAID = ("source", "kind", "inputs", "factory", "signature", "trust_pickle")


def read(request: dict[str, Any]) -> dict[str, Any]:
    model = torch_source.load(request)
    answer = ask_source(request, model.inputs, model.run)
    details = {name: request[name] for name in SAID}
    return {**answer, "details": details, "tools": {"torch": torch.__version__}}
