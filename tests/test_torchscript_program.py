"""Numbers that a trace computes from sizes: the same at every size, not only at that of the trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from edge_infer.convert import torchscript_program

TRACED = torch.ones(2, 6)


class Counts(torch.nn.Module):
    """1, 2, 3, ... as far as ``length`` says, which gets the number of columns."""

    def __init__(self, length: Callable[[Any], Any]) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(1, keepdim=True) + x.new_ones(self.length(x.shape[1])).cumsum(0)


LENGTHS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda columns: columns,
    "sum": lambda columns: torch.add(columns, 3),
    "scaled sum": lambda columns: torch.add(columns, 3, alpha=2),
    "scaled difference": lambda columns: torch.sub(columns, 1, alpha=3),
    "product": lambda columns: columns * 2,
    "quotient": lambda columns: columns // 2,
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("columns", [6, 9])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_exported_trace_counts_as_the_trace_does(name: str, columns: int) -> None:
    traced = torch.jit.trace(Counts(LENGTHS[name]), TRACED)
    x = torch.rand(3, columns)
    exported = torchscript_program.of_any_size(traced, (TRACED,)).module()
    torch.testing.assert_close(exported(x), traced(x))


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_at_given_sizes_a_count_is_a_constant(name: str) -> None:
    traced = torch.jit.trace(Counts(LENGTHS[name]), TRACED)
    exported = torchscript_program.at_sizes(traced, (TRACED,)).module()
    torch.testing.assert_close(exported(TRACED)[0], traced(TRACED))
