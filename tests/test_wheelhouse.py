"""Choosing wheels for a device on the host: what fits, what it needs there, what is locked and kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from wheels import WHEELHOUSE, add_pip, make_wheel, small_engine

from edge_infer.bundle import hash_file
from edge_infer.deploy.own_wheel import write_own_wheel
from edge_infer.deploy.platforms import Platform
from edge_infer.deploy.wheelhouse import Lock, choose, find_lock, prepare
from edge_infer.errors import BundleError, DeviceError, EngineMissing, UsageError

CASES = sorted((ROOT / "tests" / "data" / "platforms").glob("*.json"))


def platform(name: str, **changes: object) -> Platform:
    facts = json.loads((ROOT / "tests" / "data" / "platforms" / f"{name}.json").read_text())["facts"]
    return Platform.from_facts({**facts, **changes})


PI = platform("raspberry_pi_os_bookworm")
TRIXIE = platform("raspberry_pi_os_trixie")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def names(lock: Lock) -> list[str]:
    return [f"{pin.project} {pin.version}" for pin in lock.pins if pin.project != "pip"]


# -- which wheels fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_wheels_that_fit_a_device(path: Path) -> None:
    case = json.loads(path.read_text())
    if "refused" in case:
        with pytest.raises(DeviceError) as caught:
            Platform.from_facts(case["facts"])
        assert str(caught.value) == case["refused"]
        return
    found = Platform.from_facts(case["facts"])
    assert (str(found), found.key, found.pip_arguments()) == (case["says"], case["key"], case["pip"])
    assert case["markers"].items() <= found.markers().items()
    assert [wheel for wheel in case["takes"] if not found.takes(wheel)] == []
    assert [wheel for wheel in case["refuses"] if found.takes(wheel)] == []


# -- what pip chooses --------------------------------------------------------------------------------------------------


def test_what_a_wheel_needs_is_judged_for_the_device(index: Path) -> None:
    make_wheel(index, "numpy", "2.1.0", "cp311-cp311-manylinux_2_28_aarch64")
    make_wheel(index, "numpy", "2.2.0", "cp311-cp311-manylinux_2_28_x86_64")
    make_wheel(index, "numpy", "2.3.0", "cp311-cp311-manylinux_2_39_aarch64")
    needs = ['on-arm; platform_machine == "aarch64"', 'on-x86; platform_machine == "x86_64"']
    needs += ['before-3-12; python_version < "3.12"', 'from-3-12; python_version >= "3.12"', 'more; extra == "all"']
    make_wheel(index, "ai-edge-litert", "2.0", "cp311-cp311-manylinux_2_28_aarch64", [*needs, "numpy<2.3"])
    make_wheel(index, "on-arm", "1.0", needs=["deeper>=1"])
    for name in ("before-3-12", "deeper"):
        make_wheel(index, name, "1.0")
    add_pip(index)
    wanted = ["ai-edge-litert 2.0", "before-3-12 1.0", "deeper 1.0", "numpy 2.1.0", "on-arm 1.0"]
    assert names(choose(PI, ["tflite"])) == wanted


def test_a_need_found_later_takes_back_a_newer_choice(index: Path) -> None:
    for version in ("1.26.4", "2.0.0"):
        make_wheel(index, "numpy", version)
    make_wheel(index, "onnxruntime", "1.20", needs=["adapter"])
    make_wheel(index, "adapter", "1.0", needs=["numpy<2"])
    add_pip(index)
    assert names(choose(PI, ["onnx"])) == ["adapter 1.0", "numpy 1.26.4", "onnxruntime 1.20"]


def test_an_engine_that_wants_a_graphics_card_is_passed_over(index: Path) -> None:
    make_wheel(index, "numpy", "2.0.0")
    make_wheel(index, "torch", "2.8.0", needs=['nvidia-cublas; platform_machine == "x86_64"', "filelock"])
    make_wheel(index, "torch", "2.9.0", needs=['cuda-toolkit[cublas]==13; platform_system == "Linux"', "never-there"])
    make_wheel(index, "filelock", "3.0")
    add_pip(index)
    assert names(choose(PI, ["torch"])) == ["filelock 3.0", "numpy 2.0.0", "torch 2.8.0"]
    with pytest.raises(
        EngineMissing, match=r"every wheel of torch for CPython 3\.11\.2 on x86_64 .* needs a graphics card"
    ):
        choose(platform("debian_x86_64"), ["torch"])


def test_an_engine_that_ends_with_an_illegal_instruction_there_is_passed_over(index: Path, tmp_path: Path) -> None:
    for name, version in (("numpy", "2.0.0"), ("torch", "2.9.1"), ("torch", "2.10.0")):
        make_wheel(index, name, version)
    add_pip(index)
    newer = platform("raspberry_pi_os_bookworm", features=[*PI.features, "atomics"])
    unknown = platform("raspberry_pi_os_bookworm", features=[])
    steps: list[str] = []
    assert "torch 2.9.1" in names(choose(PI, ["torch"], steps.append))
    assert "torch 2.10.0 needs a processor with atomics there; looking for an older one" in steps
    assert "torch 2.10.0" in names(choose(newer, ["torch"])) and "torch 2.10.0" in names(choose(unknown, ["torch"]))


def test_a_lock_of_a_better_processor_is_not_taken(index: Path, tmp_path: Path) -> None:
    for name, version in (("numpy", "2.0.0"), ("torch", "2.9.1"), ("torch", "2.10.0")):
        make_wheel(index, name, version)
    add_pip(index)
    house = tmp_path / "house"
    newer = platform("raspberry_pi_os_bookworm", features=[*PI.features, "atomics"])
    assert "torch 2.10.0" in names(prepare(newer, ["torch"], house, whole=False).lock)
    assert find_lock(PI, ["torch"], house) is None
    assert "torch 2.9.1" in names(prepare(PI, ["torch"], house, whole=False).lock)
    assert "torch 2.9.1" in names(prepare(newer, ["torch"], house, whole=False).lock)


def test_a_constraint_bounds_what_is_chosen_and_which_lock_is_taken(index: Path, tmp_path: Path) -> None:
    for name, version in (("numpy", "2.0.0"), ("torch", "2.8.0"), ("torch", "2.9.1")):
        make_wheel(index, name, version)
    add_pip(index)
    house = tmp_path / "house"
    assert "torch 2.9.1" in names(prepare(PI, ["torch"], house, whole=False).lock)
    older = prepare(PI, ["torch"], house, constraints=["torch<2.9", "never-asked-for>1"], whole=False)
    assert names(older.lock) == ["numpy 2.0.0", "torch 2.8.0"]
    assert "torch 2.8.0" in names(prepare(PI, ["torch"], house, whole=False).lock)
    with pytest.raises(EngineMissing, match=r"torch"):
        prepare(PI, ["torch"], house, constraints=["torch<2"], whole=False)


@pytest.mark.parametrize("text", ["torch<<2", "torch", "torch @ file:///x.whl", "torch<2; python_version > '3'"])
def test_what_bounds_no_version_is_no_constraint(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"the constraint .* expected such as 'torch<2\.9'"):
        prepare(PI, ["torch"], tmp_path, constraints=[text])


def test_what_does_not_exist_for_the_device_is_named(index: Path) -> None:
    make_wheel(index, "numpy", "2.0.0", "cp311-cp311-manylinux_2_28_aarch64")
    make_wheel(index, "onnxruntime", "1.20", needs=["numpy", "left-out"])
    add_pip(index)
    with pytest.raises(
        EngineMissing, match=r"no wheel of left-out is made for CPython 3.11.2 on aarch64 with glibc 2.36"
    ):
        choose(PI, ["onnx"])
    with pytest.raises(
        EngineMissing, match=r"no wheel of ai-edge-litert>=1.4.0 is made for .*--engine \(tflite-runtime"
    ):
        choose(PI, ["tflite"])
    for name in ("raspberry_pi_os_32_bit_on_a_64_bit_kernel", "debian_32_bit_arm"):
        with pytest.raises(EngineMissing, match=r"no wheel of numpy>=1.26 is made for CPython 3.11.2 on armv7l"):
            choose(platform(name), ["onnx"])


def test_an_engine_that_ends_before_the_devices_python(index: Path) -> None:
    """edge-infer's own metadata rules it out; pip is not even asked."""
    with pytest.raises(EngineMissing, match=r"no wheel of tflite-runtime is made for CPython 3\.13\.5"):
        choose(TRIXIE, ["tflite-runtime"])


def test_engines_that_cannot_be_together(index: Path) -> None:
    for version in ("1.26.4", "2.0.0"):
        make_wheel(index, "numpy", version)
    make_wheel(index, "tflite-runtime", "2.14.0")
    make_wheel(index, "onnxruntime", "1.20", needs=["numpy>=2"])
    add_pip(index)
    with pytest.raises(EngineMissing, match="cannot be together in one environment; give fewer with --engine"):
        choose(PI, ["tflite-runtime", "onnx"])


def test_an_index_out_of_reach_is_not_called_a_missing_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(DeviceError, match="is the package index within reach") as caught:
        prepare(PI, ["onnx"], tmp_path)
    assert not isinstance(caught.value, EngineMissing)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_engine(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no engine is called 'caffe', expected tflite, tflite-runtime, onnx, torch"):
        prepare(PI, ["caffe"], tmp_path)


# -- what is locked and kept -------------------------------------------------------------------------------------------


def test_a_lock_serves_devices_of_its_kind_without_network(index: Path, tmp_path: Path) -> None:
    small_engine(index, "2.0")
    folder = tmp_path / "wheelhouse"
    first = prepare(PI, ["tflite"], folder)
    assert [path.name for path in folder.glob("*.txt")] == ["tflite-cp311-aarch64-glibc2.36.txt"]
    make_wheel(index, "ai-edge-litert", "2.1", needs=["numpy"])
    for path in index.iterdir():
        path.rename(tmp_path / path.name)  # the index is gone
    again = prepare(PI, ["tflite"], folder)
    assert (again.requirements, again.lock) == (first.requirements, first.lock)
    assert prepare(platform("raspberry_pi_os_bookworm", libc_version="2.41"), ["tflite"], folder).lock == first.lock
    for path in tmp_path.glob("*.whl"):
        path.rename(index / path.name)
    assert names(prepare(PI, ["tflite"], folder, upgrade=True).lock) == ["ai-edge-litert 2.1", "numpy 2.0.0"]


def test_a_lock_is_read_as_it_was_written_and_serves_only_what_it_fits(tmp_path: Path) -> None:
    (path,) = WHEELHOUSE.glob("tflite-runtime-*.txt")
    lock = Lock.from_text(path.read_text())
    assert lock.to_text(str(PI)) == path.read_text()
    assert find_lock(PI, ["tflite-runtime"], WHEELHOUSE) == lock
    assert not lock.fits(PI, ["tflite"])
    assert not lock.fits(platform("raspberry_pi_os_bookworm", libc_version="2.31"), ["tflite-runtime"])
    assert not lock.fits(platform("jetson_ubuntu_jammy"), ["tflite-runtime"])
    assert not lock.fits(platform("debian_x86_64"), ["tflite-runtime"])
    (tmp_path / "tflite-runtime-old.txt").write_text(path.read_text().replace("numpy==1.26.4", "numpy==1.25.0"))
    assert find_lock(PI, ["tflite-runtime"], tmp_path) is None  # edge-infer needs a later one


def test_a_damaged_wheel_is_refused_and_a_missing_one_fetched(index: Path, tmp_path: Path) -> None:
    small_engine(index, "2.0")
    house = prepare(PI, ["tflite"], tmp_path / "house")
    (pin,) = (pin for pin in house.pins if pin.project == "numpy")
    data = bytearray(house.path(pin).read_bytes())
    data[len(data) // 2] ^= 1
    house.path(pin).write_bytes(data)
    with pytest.raises(
        BundleError, match=r"numpy-2.0.0-py3-none-any.whl has SHA-256 .*, the lock says .*; remove that"
    ):
        prepare(PI, ["tflite"], tmp_path / "house")
    house.path(pin).unlink()
    assert hash_file(prepare(PI, ["tflite"], tmp_path / "house").path(pin)) == pin.sha256


def test_another_wheel_of_the_same_version_in_the_index_is_refused(index: Path, tmp_path: Path) -> None:
    small_engine(index, "2.0")
    house = prepare(PI, ["tflite"], tmp_path / "house", whole=False)
    assert {path.name for path in house.folder.glob("*.whl")} == {house.own.file, house.pip.file}
    small_engine(index, "2.0", "evil = True")
    with pytest.raises(DeviceError, match="DO NOT MATCH THE HASHES"):
        prepare(PI, ["tflite"], tmp_path / "house")


def test_wheels_for_a_pi_were_downloaded_by_pip_here(tmp_path: Path) -> None:
    """By scripts/test. Their libraries are for another processor than this one, whatever this one is."""
    (path,) = WHEELHOUSE.glob("tflite-runtime-cp311-aarch64-*.txt")
    lock = Lock.from_text(path.read_text())
    assert {pin.project for pin in lock.pins} == {"numpy", "pip", "tflite-runtime"}
    for pin in lock.pins:
        assert hash_file(WHEELHOUSE / pin.file) == pin.sha256
        with zipfile.ZipFile(WHEELHOUSE / pin.file) as wheel:
            libraries = [wheel.read(name)[:20] for name in wheel.namelist() if name.endswith(".so")]
        assert all(struct.unpack_from("<H", head, 18) == (183,) for head in libraries)  # EM_AARCH64
        assert bool(libraries) == (pin.project != "pip")


# -- edge-infer's own wheel --------------------------------------------------------------------------------------------


def test_the_own_wheel_is_the_one_that_the_build_makes(tmp_path: Path) -> None:
    """Made from the built wheel's unpacked files, as from any installation."""
    (built,) = (ROOT / "build" / "wheel").glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
        wanted = {name: archive.read(name) for name in archive.namelist()}
    (info,) = site.glob("*.dist-info")
    made = write_own_wheel(tmp_path, site / "edge_infer", importlib.metadata.Distribution.at(info))
    assert made.name == built.name
    with zipfile.ZipFile(made) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    assert found.keys() == wanted.keys()
    assert {name for name in found if found[name] != wanted[name]} == {f"{info.name}/WHEEL", f"{info.name}/RECORD"}


def test_the_own_wheel_of_a_checkout_is_whole_and_always_the_same(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first, second = write_own_wheel(tmp_path / "a"), write_own_wheel(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        packed = set(archive.namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "edge_infer", "targets"], cwd=ROOT, check=False, capture_output=True, text=True
    ).stdout.split()
    expected = {name if name.startswith("edge_infer") else f"edge_infer/{name}" for name in tracked}
    assert expected <= packed and {name for name in packed - expected if not name.startswith("edge_infer-")} <= {
        f"edge_infer/{path.relative_to(ROOT / 'edge_infer').as_posix()}" for path in (ROOT / "edge_infer").rglob("*")
    }
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(first)]
    subprocess.run(pip, check=True, capture_output=True)
    assert (target / "edge_infer" / "targets" / "raspberry-pi-4.toml").is_file()
