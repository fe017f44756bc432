"""ONNX optimized for this processor, its weights mapped as they are laid out for it: made at the first open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import rebuild, settle

from edge_infer import Session, load
from edge_infer.bundle import Bundle
from edge_infer.runtime import engine_cache
from edge_infer.runtime.engines import EngineOptions, onnx
from edge_infer.runtime.golden import self_test

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def _small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 0)


@pytest.fixture
def bundle(packaged: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    """The digits network with its dense layers repacked."""
    plain = packaged("torch.onnx", "onnx", "float32")
    return settle(rebuild(plain, tmp_path / "repacked.edge", artifact=replace(plain.manifest.artifact, prepack=True)))


def weights(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/weights.bin"))


def maps() -> str:
    return Path("/proc/self/maps").read_text()


def test_repacked_weights_are_made_once_and_mapped(bundle: Bundle, tmp_path: Path) -> None:
    load(bundle.path, cache_dir=tmp_path / "cache").close()
    (kept,) = weights(tmp_path / "cache")
    made = kept.stat()
    with load(bundle.path, threads=1, cache_dir=tmp_path / "cache") as session:
        assert session.info.notes == () and str(kept) in maps()
        self_test(session)
        (spec,) = session.inputs
        plain = Session(bundle, onnx.open_model(bundle, EngineOptions(threads=1)))
        for count in (1, 5, 2):
            image = np.random.default_rng(count).random((count, *spec.shape[1:]), dtype=np.float32)  # type: ignore[misc]
            np.testing.assert_allclose(session(image), plain(image), atol=1e-6)
        plain.close()
    again = kept.stat()
    assert (again.st_ino, again.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_weights_that_are_not_repacked_are_kept_as_they_are_laid_out(bundle: Bundle, tmp_path: Path) -> None:
    """Convolutions get another layout when a model is optimized for a processor."""
    plain = rebuild(bundle, tmp_path / "plain.edge", artifact=replace(bundle.manifest.artifact, prepack=False))
    for path in (bundle.path, plain.path):
        load(path, cache_dir=tmp_path / "cache").close()
    sizes = {path.parent.name.split(".")[0]: path.stat().st_size for path in weights(tmp_path / "cache")}
    assert sizes[plain.digest] < sizes[bundle.digest]
    with load(plain.path, cache_dir=tmp_path / "cache") as session:
        assert session.info.notes == ()
        self_test(session)


def test_a_small_model_needs_no_entry(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 10**6)
    with load(bundle.path, cache_dir=tmp_path / "cache") as session:
        assert session.info.notes == ()
    assert weights(tmp_path / "cache") == []


def test_damaged_weights_are_made_anew(bundle: Bundle, tmp_path: Path) -> None:
    load(bundle.path, cache_dir=tmp_path / "cache").close()
    (kept,) = weights(tmp_path / "cache")
    kept.write_bytes(bytes(kept.stat().st_size))
    with load(bundle.path, cache_dir=tmp_path / "cache") as session:
        assert session.info.notes == ()
        self_test(session)


def test_without_a_place_for_the_cache_it_runs_and_says_so(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with load(bundle.path, cache_dir=tmp_path / "file") as session:
        assert "laid out in private memory: " in session.info.notes[0]
        self_test(session)
