"""A bundle is tried in a child: whatever happens there is an error here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import rebuild

import edge_infer
from edge_infer.bundle import Bundle
from edge_infer.errors import BundleError, EngineError, OutOfMemory, SelfTestFailed, UsageError

SOURCES = {"tflite": "keras.keras", "onnx": "torch.onnx", "torchscript": "torch_script.pt"}


@pytest.fixture(params=SOURCES)
def bundle(request: pytest.FixtureRequest, packaged: Callable[..., Bundle]) -> Bundle:
    return packaged(SOURCES[request.param], request.param, "float32")


def test_a_sound_bundle_is_verified(bundle: Bundle) -> None:
    verified = edge_infer.verify(bundle.path)
    assert verified.provider == "cpu" and list(verified.largest_difference) == ["digit"]
    assert verified.package == bundle.manifest.artifact.requires[0].package


def test_too_little_memory_is_told(bundle: Bundle) -> None:
    with pytest.raises(OutOfMemory):
        edge_infer.verify(bundle.path, max_memory=8_000_000)
    assert edge_infer.verify(bundle.path, max_memory=4_000_000_000)


def test_a_hang_is_told(bundle: Bundle) -> None:
    with pytest.raises(SelfTestFailed, match=r"no answer within 0.01 s"):
        edge_infer.verify(bundle.path, timeout_s=0.01)


def test_a_model_that_is_no_model_is_told(bundle: Bundle, tmp_path: Path) -> None:
    name = bundle.manifest.artifact.model

    def garble(folder: Path) -> None:
        (folder / name).write_bytes(b"no model at all" * 100)

    with pytest.raises((EngineError, BundleError)):
        edge_infer.verify(rebuild(bundle, tmp_path / "garbled.edge", garble).path)


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"timeout_s": -1}, {"max_memory": 0}])
def test_limits_of_nothing_are_refused(packaged: Callable[..., Bundle], options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="expected numbers above 0"):
        edge_infer.verify(packaged("torch.onnx", "onnx", "float32").path, **options)
