"""How much of a model's files is in memory, and how to keep it there."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_infer import load
from edge_infer.bundle import Bundle
from edge_infer.errors import UsageError
from edge_infer.runtime import engine_cache

PAGE = resource.getpagesize()


@pytest.fixture
def bundle(packaged: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 0)
    return packaged("torch_script.pt", "torchscript", "float32")


@pytest.mark.parametrize(("source", "format"), [("torch_script.pt", "torchscript"), ("keras.keras", "tflite")])
def test_memory_tells_what_is_mapped_and_what_of_it_is_resident(
    packaged: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, format: str
) -> None:
    monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 0)
    bundle = packaged(source, format, "float32")
    with load(bundle.path, cache_dir=tmp_path, residency="prefault") as session:
        spec = session.inputs[0]
        session.run({spec.name: np.ones([size or 1 for size in spec.shape], np.float32)})
        memory = session.memory()
    weights = 4 * 80_000  # the network has 85,000 parameters
    assert memory.mapped >= memory.resident >= memory.shared >= weights
    assert memory.private > 0
    assert session.memory().mapped == session.memory().resident == 0


@pytest.mark.parametrize("residency", ["prefault", "lock"])
def test_pages_are_read_before_the_first_run(bundle: Bundle, tmp_path: Path, residency: str) -> None:
    with load(bundle.path, cache_dir=tmp_path, residency=residency) as session:
        memory = session.memory()
        assert memory.mapped - memory.resident < PAGE


LOCK = """
import resource, sys
from pathlib import Path
import edge_infer
resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, PAGE))
try:
    edge_infer.load(Path(sys.argv[1]), cache_dir=sys.argv[2], residency="lock")
except MemoryError as error:
    print(type(error).__name__, error)
""".replace("PAGE", str(PAGE))


def test_what_cannot_be_locked_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    # Root may lock what it likes unless that right is taken away.
    ordinary = [] if os.getuid() else ["setpriv", "--bounding-set=-ipc_lock"]
    command = [*ordinary, sys.executable, "-c", LOCK, str(bundle.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("OutOfMemory cannot lock "), done.stderr[-1000:]
    assert "residency='prefault'" in done.stdout


def test_an_unknown_residency_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="expected one of lazy, prefault, lock"):
        load(bundle.path, residency="always")
