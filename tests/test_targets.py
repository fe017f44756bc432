"""The target profiles that come along, and what is said about broken ones."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import tomllib

import edge_infer
from edge_infer.errors import UsageError
from edge_infer.quantize import PRECISIONS
from edge_infer.target import EngineProfile, TargetProfile, read_target, target_names

PACKAGE = Path(edge_infer.__file__).parent
PROFILES = PACKAGE.parent / "targets"
NAMES = [
    "cpu-aarch64",
    "cpu-x86_64",
    "jetson-agx-orin",
    "jetson-orin-nano",
    "raspberry-pi-3b-plus",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "raspberry-pi-zero-2w",
]


def test_the_promised_devices_come_along() -> None:
    assert target_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
class TestProfile:
    def test_its_name_is_its_file(self, name: str) -> None:
        assert read_target(name).name == name

    def test_hardware_figures_cite_a_page(self, name: str) -> None:
        sources = read_target(name).sources
        assert any("https://" in source for source in sources)
        about_hardware = [line for line in sources if re.match(r"(RAM|Cores|CPU features|Page size|OS)\b", line)]
        assert about_hardware and all("https://" in line for line in about_hardware)

    def test_limits_are_part_of_what_the_device_has(self, name: str) -> None:
        profile = read_target(name)
        assert 0 < profile.ram_limit_bytes <= profile.ram_bytes
        assert 0 < profile.storage_limit_bytes <= profile.storage_bytes

    def test_engines_promise_only_precisions_that_exist(self, name: str) -> None:
        for engine in read_target(name).engines:
            assert set(engine.precisions) <= set(PRECISIONS[engine.format]), engine.format

    def test_each_format_and_each_preference_is_listed_once(self, name: str) -> None:
        engines = read_target(name).engines
        assert len({engine.format for engine in engines}) == len(engines)
        for engine in engines:
            assert len(set(engine.precisions)) == len(engine.precisions)
            assert engine.providers[-1] == "cpu"


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'raspberry-pi-5'"):
        read_target("rasberry-pi5")


def test_a_missing_format_is_answered_with_those_there() -> None:
    profile = dataclasses.replace(read_target("cpu-x86_64"), engines=read_target("cpu-x86_64").engines[:1])
    with pytest.raises(UsageError, match=r"cpu-x86_64 has no engine for tflite, it has: onnx"):
        profile.engine("tflite")


@pytest.mark.parametrize("kind", [TargetProfile, EngineProfile])
def test_every_field_is_read_by_something(kind: type) -> None:
    """A figure in a profile that nothing reads would be a promise that nobody keeps."""
    read = {name for path in PACKAGE.rglob("*.py") for name in _attributes(path)}
    assert {item.name for item in dataclasses.fields(kind)} - read == set()


def _attributes(path: Path) -> set[str]:
    """Names read as ``something.name`` or ``something["name"]``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            found.add(str(node.slice.value))
    return found


#: What was done to a sound profile, and what its reader says.
BROKEN = {
    "field nothing reads": ("cores = 4\n", "cores = 4\nclock_mhz = 1500\n", "'clock_mhz' that nothing reads"),
    "misspelt field": ("ram_bytes = 4", "ram_byte = 4", "ram_byte"),
    "missing field": ("cores = 4\n", "", "lacks the field 'cores'"),
    "word for a number": ("cores = 4\n", 'cores = "four"\n', "cores is 'four', expected int"),
    "truth for a number": ("cores = 4\n", "cores = true\n", "cores is True, expected int"),
    "number for a list": ('cpu_features = ["avx2", "fma"]', "cpu_features = 2", "cpu_features is 2"),
    "no cores": ("cores = 4\n", "cores = 0\n", "cores is 0, expected at least 1"),
    "negative memory": ("ram_bytes = 4_294_967_296", "ram_bytes = -1", "ram_bytes is -1, expected at least 1"),
    "share of nothing": ("model_ram_share = 0.5", "model_ram_share = 0", "a share of 0"),
    "share of more than all": ("model_storage_share = 0.25", "model_storage_share = 1.5", "a share of 1.5"),
    "page size": ("page_size_bytes = 4096", "page_size_bytes = 5000", "page_size_bytes is 5000"),
    "unknown format": ('format = "tflite"', 'format = "coreml"', "format 'coreml' is not known"),
    "unknown precision": ('"int8-dynamic", "float16",', '"int4",', "precision 'int4' is not known"),
    "precision no engine has": (
        'precisions = ["int8", "float32", "int8-dynamic"]',
        'precisions = ["float16"]',
        "torchscript has no float16",
    ),
    "no precision": (
        'precisions = ["int8", "float32", "int8-dynamic"]',
        "precisions = []",
        "torchscript engine has no precisions",
    ),
    "unknown provider": ('providers = ["cpu"]', 'providers = ["npu"]', "provider 'npu' is not known"),
    "format twice": ('format = "tflite"', 'format = "onnx"', "onnx twice"),
    "no engines": ("[[engines]]", "[[motors]]", "lists no [[engines]]"),
    "version that is none": ('version = "2.1.0"', 'version = "latest"', "version 'latest'"),
    "Python that is none": ('python = "3.10"', 'python = "three"', "python is 'three'"),
    "name that is none": ('name = "cpu-x86_64"', 'name = "my box!"', "'my box!'"),
    "tolerance of nothing": (
        'format = "tflite"',
        'format = "tflite"\ngolden_tolerance = { int8 = 0 }',
        "golden_tolerance of 0 for int8",
    ),
    "tolerance of a precision that is not there": (
        'format = "tflite"',
        'format = "tflite"\ngolden_tolerance = { int3 = 0.1 }',
        "golden_tolerance of 0.1 for int3",
    ),
    "tolerance that is none": (
        'format = "tflite"',
        'format = "tflite"\ngolden_tolerance = { int8 = "a bit" }',
        "a bit",
    ),
    "no TOML": ("cores = 4\n", "cores = = 4\n", "is not a TOML file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_profile_is_refused_by_name(case: str, tmp_path: Path) -> None:
    sound, broken, words = BROKEN[case]
    text = (PROFILES / "cpu-x86_64.toml").read_text()
    assert sound in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(sound, broken))
    with pytest.raises(UsageError) as refusal:
        read_target(str(path))
    assert words in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_a_sound_profile_of_the_users_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((PROFILES / "cpu-x86_64.toml").read_text())
    assert read_target(str(path)) == read_target("cpu-x86_64")


def test_a_profile_may_say_how_far_its_kernels_differ(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = (PROFILES / "cpu-x86_64.toml").read_text()
    path.write_text(text.replace('format = "tflite"', 'format = "tflite"\ngolden_tolerance = { int8 = 0.08 }'))
    assert read_target(str(path)).engine("tflite").golden_tolerance == {"int8": 0.08}
    assert read_target("cpu-x86_64").engine("tflite").golden_tolerance == {}


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no target file"):
        read_target(str(tmp_path / "absent.toml"))


def test_what_parses_here_is_what_the_files_say() -> None:
    for name in NAMES:
        table = tomllib.loads((PROFILES / f"{name}.toml").read_text())
        profile = read_target(name)
        assert [engine.package for engine in profile.engines] == [row["package"] for row in table["engines"]]
        assert profile.ram_bytes == table["ram_bytes"]
