"""What a push keeps on the host: found by digest, believed only when its hash is right, and never in the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from handmade import make_bundle

from edge_infer import delta, steps
from edge_infer.bundle import Bundle, open_bundle
from edge_infer.deploy import difference
from edge_infer.deploy.bases import Bases, bases_root
from edge_infer.errors import BundleError, UsageError

BOTH = ("zlib", "lzma")
DATA = np.random.default_rng(1).integers(-100, 100, 40_000, np.int8)


def release(path: Path, step: int = 0) -> Bundle:
    """A handmade bundle with weights that differ from those of another ``step`` by little."""
    changed = DATA + (np.arange(len(DATA)) % 7 < step)
    return make_bundle(path, {"model.tflite": changed.astype(np.int8).tobytes(), "golden.npz": b"golden"})


@pytest.fixture
def bases(tmp_path: Path) -> Bases:
    return Bases(tmp_path / "bases")


@pytest.fixture
def old(tmp_path: Path) -> Bundle:
    return release(tmp_path / "old.edge")


@pytest.fixture
def new(tmp_path: Path) -> Bundle:
    return release(tmp_path / "new.edge", 1)


def test_a_release_is_kept_by_its_digest(bases: Bases, old: Bundle) -> None:
    assert bases.find(old.digest) is None
    bases.keep(old)
    bases.keep(old)
    found = bases.find(old.digest)
    assert found is not None
    assert (found.digest, found.manifest) == (old.digest, old.manifest)
    assert found.path != old.path


def test_the_bundle_stays_as_it_was(bases: Bases, old: Bundle) -> None:
    """A second name for weights would keep the onnx package from reading them."""
    bases.keep(old)
    found = bases.find(old.digest)
    assert found is not None
    assert all(old.file(name).stat().st_nlink == 1 for name in old.manifest.files)
    assert all(found.file(name).read_bytes() == old.file(name).read_bytes() for name in old.manifest.files)


def test_it_outlives_the_bundle(bases: Bases, old: Bundle, tmp_path: Path) -> None:
    bases.keep(old)
    shutil.rmtree(tmp_path / "old.edge-parts")
    release(tmp_path / "old.edge", 2)  # replaces the bundle, as packaging again does
    assert bases.find(old.digest) is not None


def test_another_file_system_gets_a_copy(old: Bundle) -> None:
    memory = Path("/dev/shm")
    assert memory.stat().st_dev != old.path.stat().st_dev
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        bases = Bases(Path(folder))
        bases.keep(old)
        assert bases.find(old.digest) is not None


def test_a_release_that_was_changed_is_thrown_away(bases: Bases, old: Bundle) -> None:
    bases.keep(old)
    kept = bases.root / "releases" / old.digest / "model.tflite"
    kept.unlink()
    kept.write_bytes(bytes(len(DATA)))
    assert bases.find(old.digest) is None
    assert not kept.parent.exists()
    bases.keep(old)
    assert bases.find(old.digest) is not None


def test_a_release_under_another_ones_digest_is_thrown_away(bases: Bases, old: Bundle, new: Bundle) -> None:
    bases.keep(old)
    (bases.root / "releases" / old.digest).rename(bases.root / "releases" / new.digest)
    assert bases.find(new.digest) is None


def test_the_devices_newest_release_that_is_here_is_chosen(bases: Bases, old: Bundle, new: Bundle) -> None:
    assert bases.choose([]) is None
    bases.keep(old)
    bases.keep(new)
    for digests, expected in (([new.digest, old.digest], new), (["0" * 64, old.digest], old), (["0" * 64], None)):
        chosen = bases.choose(digests)
        assert (chosen.digest if chosen else None) == (expected.digest if expected else None)


def test_a_base_given_must_be_on_the_device_and_whole(bases: Bases, old: Bundle, new: Bundle) -> None:
    assert bases.choose([new.digest, old.digest], old) is old
    with pytest.raises(UsageError, match=f"--base .*old.edge is the release {old.digest[:12]}, which the device does"):
        bases.choose([new.digest], old)
    with pytest.raises(UsageError, match="it has: none"):
        bases.choose([], old)
    old.file("model.tflite").write_bytes(bytes(len(DATA)))
    with pytest.raises(BundleError, match="damaged"):
        bases.choose([old.digest], open_bundle(old.path))


def test_deltas_are_made_once_and_are_right(
    bases: Bases, old: Bundle, new: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bases.differences(old, new, ["model.tflite"], BOTH)
    assert first.keys() == {"model.tflite"}
    made = first["model.tflite"]
    assert (made.base, made.full_size, made.size) == (old.digest, len(DATA), made.path.stat().st_size)
    assert made.size < 0.1 * len(DATA)
    name = "model.tflite"
    delta.apply(old.file(name), old.manifest.files[name], made.path, tmp_path / "out", new.manifest.files[name])
    assert (tmp_path / "out").read_bytes() == new.file(name).read_bytes()
    monkeypatch.setattr(difference, "make", None)
    assert bases.differences(old, new, ["model.tflite"], list(reversed(BOTH))) == first


def test_a_delta_that_is_not_worth_it_is_looked_for_once(
    bases: Bases, old: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(2).bytes(len(DATA))
    other = make_bundle(tmp_path / "other.edge", {"model.tflite": noise, "golden.npz": b"golden"})
    assert bases.differences(old, other, ["model.tflite"], BOTH) == {}
    monkeypatch.setattr(difference, "make", None)
    assert bases.differences(old, other, ["model.tflite"], BOTH) == {}


def test_a_fleet_makes_a_delta_once(bases: Bases, old: Bundle, new: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = difference.make

    def counted(*arguments: object) -> object:
        made.append(str(arguments[2]))
        time.sleep(0.05)
        return make(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(difference, "make", counted)
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(bases.differences(old, new, ["model.tflite"], BOTH)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["model.tflite"]
    assert len(found) == 8
    assert all(item == found[0] for item in found)


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    bundles = [release(tmp_path / f"{step}.edge", step) for step in range(3)]
    size = steps.size_of([bundles[0].path])
    bases = Bases(tmp_path / "bases", most=int(2.5 * size))
    for number, bundle in enumerate(bundles[:2]):
        bases.keep(bundle)
        os.utime(bases.root / "releases" / bundle.digest, (number + 1, number + 1))
    assert bases.find(bundles[0].digest) is not None  # which is a use
    bases.keep(bundles[2])
    assert [bases.find(bundle.digest) is not None for bundle in bundles] == [True, False, True]
    assert bases.trim(0) > 0
    assert bases.entries() == []


def test_what_is_larger_than_the_limit_is_kept_alone(tmp_path: Path, old: Bundle, new: Bundle) -> None:
    bases = Bases(tmp_path / "bases", most=10)
    bases.keep(old)
    bases.keep(new)
    assert (bases.find(old.digest), bases.find(new.digest) is not None) == (None, True)


def cache(*arguments: str) -> dict[str, object]:
    command = [sys.executable, "-m", "edge_infer.cli", "cache", "--json", *arguments]
    answer: dict[str, object] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


def test_the_cache_command_shows_it_and_makes_room_in_both(
    old: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_INFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(steps.__file__).parents[1]))
    step = tmp_path / "cache" / "step"
    step.mkdir(parents=True)
    (step / steps.ANSWER).write_bytes(b"x" * 1000)
    os.utime(step, (1, 1))
    bases = Bases(bases_root())
    bases.keep(old)
    size = steps.size_of([old.path])
    shown = cache()
    pushed = {"path": str(tmp_path / "cache" / "bases"), "size": size, "most": bases.most}
    assert (shown["steps"], shown["size"], shown["pushed"]) == (1, 1000, pushed)
    assert steps.trim(tmp_path / "cache", 1000) == 0  # packaging makes room among its own
    trimmed = cache("--trim", str(size))
    assert (trimmed["removed"], trimmed["steps"], trimmed["pushed"]) == (1000, 0, pushed)
    assert steps.trim(tmp_path / "cache", 0) == 0
    assert bases.find(old.digest) is not None
    assert cache("--trim", "0")["removed"] == size
    assert bases.find(old.digest) is None
