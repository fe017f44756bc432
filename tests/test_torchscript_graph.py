"""Lean TorchScript: what is folded, what is not, and that the answers stay."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edge_infer import load
from edge_infer.bundle import Bundle, open_bundle
from edge_infer.cli.options import parse_input as spec
from edge_infer.package import package
from edge_infer.quantize import torchscript
from edge_infer.quantize.torchscript_graph import NORMS, lean, nodes
from edge_infer.request import Request
from edge_infer.runtime.engines.torchscript import TENSOR_TABLE
from tests import torch_models

Image = tuple[torch.Tensor, ...]


def image(batch: int = 2, side: int = 9, shift: float = 0.0, seed: int = 1) -> Image:
    return (torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) + shift,)


IMAGES = [image(), image(1, 12, shift=-1, seed=2)]
TOKENS = [(torch.arange(10).reshape(2, 5) % 7,), (torch.arange(9).reshape(3, 3),)]
STEPS = [(torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(3)),)]


class Tupled(nn.Module):
    """As the packager has every model: a flat tuple of answers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> Any:
        answer = self.module(x)
        return answer if isinstance(answer, tuple) else (answer,)


def traced(module: nn.Module, example: Image) -> Any:
    return torch.jit.trace(Tupled(module), example)


def traced_script(module: nn.Module, example: Image) -> Any:
    return torch.jit.trace(Tupled(torch.jit.script(module)), example)


def traced_program(module: nn.Module, example: Image) -> Any:
    axes = {0: torch.export.Dim.AUTO}
    program = torch.export.export(module, example, dynamic_shapes=(axes,)).module()
    return torch.jit.trace(Tupled(program), example)


def traced_core_program(module: nn.Module, example: Image) -> Any:
    axes = {0: torch.export.Dim.AUTO}
    program = torch.export.export(module, example, dynamic_shapes=(axes,)).run_decompositions().module()
    return torch.jit.trace(Tupled(program), example)


WAYS = [traced, traced_script, traced_program, traced_core_program]


def stored(module: Any) -> Any:
    """Saved and loaded, as between two steps of the packager."""
    return torch.jit.load(io.BytesIO(module.save_to_buffer())).eval()


def norms(module: Any) -> list[str]:
    return [node.kind() for node in nodes(module.inlined_graph) if node.kind() in NORMS]


def weight_bytes(module: Any) -> int:
    storages = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def assert_same(made: Any, module: nn.Module, feeds: list[Image]) -> None:
    with torch.no_grad():
        for feed in feeds:
            wanted = Tupled(module)(*feed)
            for want, have in zip(wanted, made(*feed), strict=True):
                torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_every_normalisation_goes_into_the_layer_before_it(way: Callable[..., Any]) -> None:
    module = torch_models.lively(torch_models.Normalised())
    before = stored(way(module, IMAGES[0]))
    assert len(norms(before)) == 5
    after = stored(lean(before, [IMAGES[0]]))
    kinds = {node.kind() for node in nodes(after.graph)}
    assert norms(after) == [] and not kinds & {"aten::dropout", "prim::CallMethod"}
    assert len(list(after.modules())) == 1
    assert weight_bytes(after) < weight_bytes(before)
    images = IMAGES[:1] if "program" in way.__name__ else IMAGES  # the others were exported for one size
    assert_same(after, module, images)


def test_branches_stay_and_their_normalisations_are_folded() -> None:
    module = torch_models.lively(torch_models.NormalisedInBranches())
    dark, bright = image(shift=-1), image(shift=1)
    before = stored(traced_script(module, dark))
    after = stored(lean(before, [dark]))
    assert norms(after) == [] and [node.kind() for node in nodes(after.graph)].count("prim::If") == 1
    assert_same(after, module, [dark, bright])


@pytest.mark.parametrize(
    ("name", "kept", "feeds"),
    [("SharedConvolution", 2, IMAGES), ("ReadBesides", 1, IMAGES), ("OwnStatistics", 2, IMAGES),
     ("NormalisedSteps", 1, STEPS)],
)  # fmt: skip
@pytest.mark.parametrize("way", [traced, traced_script])
def test_what_may_not_be_folded_stays(name: str, kept: int, feeds: list[Image], way: Callable[..., Any]) -> None:
    module = torch_models.lively(getattr(torch_models, name)())
    before = stored(way(module, feeds[0]))
    after = stored(lean(before, feeds))
    assert len(norms(after)) == kept
    assert weight_bytes(after) <= weight_bytes(before)
    assert_same(after, module, feeds)


def test_a_module_that_would_grow_is_left_alone() -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Parameter(torch.rand(1, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (self.row * torch.arange(64.0)[:, None]).exp().tanh()

    before = stored(traced(Spread().eval(), (torch.rand(64, 64),)))
    assert lean(before, [(torch.rand(64, 64),)]) is before


def test_half_precision_is_folded_in_its_own_kind() -> None:
    module = torch_models.lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).half()
    feed = (image()[0].half(),)
    after = lean(stored(traced(module, feed)), [feed])
    assert norms(after) == [] and {tensor.dtype for tensor in after.buffers()} == {torch.float16}
    with torch.no_grad():
        torch.testing.assert_close(after(*feed)[0], module(*feed), rtol=1e-2, atol=1e-2)


def test_tied_weights_stay_tied_beside_a_fold(tmp_path: Path) -> None:
    module = torch_models.lively(torch_models.TiedAndNormalised())
    after = lean(stored(traced(module, TOKENS[0])), [TOKENS[0]])
    assert norms(after) == []
    assert_same(after, module, TOKENS)
    size = torchscript.save_mapped(after, tmp_path, 4096)
    assert 512 * 64 * 4 < size < 1.3 * 512 * 64 * 4


# -- through the packager ---------------------------------------------------------------------------------------------


def packaged(module: nn.Module, folder: Path, precision: str = "float32", **options: Any) -> Bundle:
    torch.jit.script(module).save(str(folder / "net.pt"))
    source, path = folder / "net.pt", folder / f"{precision}.edge"
    return package(Request(source, "cpu-x86_64", path, "torchscript", precision, **options)).bundle


def test_a_bundle_holds_no_normalisation_and_answers_as_its_source(tmp_path: Path) -> None:
    module = torch_models.lively(torch_models.Normalised())
    bundle = packaged(module, tmp_path, inputs=(spec("x=float32:?,3,9,9"),))
    assert "aten::batch_norm" not in bundle.manifest.artifact.operators
    for batch in (1, 3):
        x = image(batch)[0]
        with load(bundle.path) as session, torch.no_grad():
            np.testing.assert_allclose(session(x.numpy()), module(x).numpy(), rtol=1e-4, atol=1e-5)


MEMORY = """
import sys
import numpy as np, torch
from pathlib import Path
from edge_infer import load
from edge_infer.runtime.memory import private_bytes
from edge_infer.runtime.residency import mappings
torch.backends.quantized.engine = "qnnpack"
x = np.ones((1, 512), np.float32)
small, large = sys.argv[1:]
with load(Path(small)) as session:  # what torch makes once
    session(x)
before = private_bytes()
session = load(Path(large))
opened = private_bytes() - before
session(x)
session(x)
print(opened, private_bytes() - before, sum(row.end - row.start for row in mappings([Path(large)])))
"""


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(512, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 512)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize(("precision", "most"), [("float32", 0.1), ("int8", 1.6), ("int8-dynamic", 1.6)])
def test_weights_are_mapped_and_packed_at_most_once(precision: str, most: float, tmp_path: Path) -> None:
    """qnnpack packs int8 weights for itself at the first run; nothing is private before, and only that after."""
    import subprocess
    import sys

    np.savez(tmp_path / "samples.npz", x=np.random.default_rng(4).random((16, 512), dtype=np.float32))
    bundles = []
    for width in (8, 8192):
        (tmp_path / str(width)).mkdir()
        torch.manual_seed(width)
        module = torch_models.lively(Wide(width))
        options = {"inputs": (spec("x=float32:?,512"),), "calibration": tmp_path / "samples.npz", "max_drop": 0.99}
        bundles.append(packaged(module, tmp_path / str(width), precision, **options).path)
    weights = open_bundle(bundles[1]).manifest.files["weights.bin"].size
    assert weights > 8e6 and open_bundle(bundles[1]).manifest.files["model.torchscript"].size < 100_000
    command = [sys.executable, "-c", MEMORY, *map(str, bundles)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    opened, ran, mapped = map(int, done.stdout.split())
    assert mapped >= weights
    assert opened < 0.1 * weights
    assert ran < most * weights


def test_packed_weights_of_another_skeleton_are_refused(tmp_path: Path) -> None:
    """A table that names what the skeleton lacks is the sign of a runtime, or a file, that does not fit."""
    import json

    from edge_infer.errors import BundleError
    from edge_infer.runtime.engines.torchscript import _attach

    module = traced(nn.Linear(4, 4), (torch.ones(1, 4),))
    table = {"packed": {"class": "__torch__.torch.classes.quantized.LinearPackedParamsBase", "state": []}}
    with pytest.raises(BundleError, match="no tensor 'packed'"):
        _attach(module, json.loads(json.dumps(table)), torch.UntypedStorage(0))
    assert TENSOR_TABLE == "tensors.json"
