"""Manifests and bundles put together by hand, for tests that need no model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_infer.bundle import SETTLED_NS, Bundle, describe_files, open_bundle, write_bundle
from edge_infer.manifest import (
    SCHEMA,
    SEAL,
    Artifact,
    Check,
    Golden,
    Manifest,
    Requirement,
    TargetFacts,
    TensorSpec,
)

FILES = {"model.tflite": b"a model" * 100, "golden.npz": b"questions and answers", "labels.txt": b"zero\none\n"}


def manifest_for(folder: Path, names: Mapping[str, bytes], **changes: Any) -> Manifest:
    """A manifest of the files ``names`` in ``folder``, which no engine will open."""
    plain = Manifest(
        schema=SCHEMA,
        name="tiny",
        version="1",
        target=TargetFacts("pi", "aarch64", ("asimd",), 1024, 4096, "3.11"),
        artifact=Artifact("tflite", "float32", "model.tflite", (Requirement("ai-edge-litert", "1.4.0"),), (), ("cpu",)),
        inputs=(TensorSpec("x", "float32", (None, 2)),),
        outputs=(TensorSpec("y", "float32", (None, 3)),),
        golden=Golden("golden.npz", 1, {"y": 0.5}),
        checks=(Check("float32 against the source", "y", 0.0, 0.5, "largest difference"),),
        files=describe_files(folder, names),
        provenance={"tools": {"python": "3.11"}},
    )
    return replace(plain, **changes)


def make_bundle(path: Path, files: Mapping[str, bytes] = FILES, **changes: Any) -> Bundle:
    """Write a bundle of ``files`` at ``path``; ``changes`` are fields of its manifest."""
    folder = path.parent / f"{path.name}-parts"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return write_bundle(manifest_for(folder, files, **changes), folder, path)


def rebuild(bundle: Bundle, path: Path, change: Callable[[Path], None] = lambda folder: None, **fields: Any) -> Bundle:
    """A copy of ``bundle`` at ``path`` after ``change`` edited its files, with hashes that are right again."""
    folder = path.parent / f"{path.name}-parts"
    folder.mkdir()
    for name in bundle.manifest.files:
        (folder / name).write_bytes(bundle.file(name).read_bytes())
    change(folder)
    names = sorted(file.name for file in folder.iterdir())
    return write_bundle(replace(bundle.manifest, files=describe_files(folder, names), **fields), folder, path)


def settle(bundle: Bundle) -> Bundle:
    """Let so much time pass that a check of the bundle may leave a stamp; gives it opened again."""
    newest = max(bundle.file(name).stat().st_ctime_ns for name in bundle.manifest.files)
    while time.time_ns() <= newest + SETTLED_NS + 10_000_000:
        time.sleep(0.01)
    return open_bundle(bundle.path)


def as_json(manifest: Manifest) -> Any:
    """Its content, to be spoiled and sealed again."""
    value = json.loads(manifest.to_bytes())
    del value[SEAL]
    return value
