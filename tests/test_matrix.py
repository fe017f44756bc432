"""scripts/test_matrix: its rows are what pyproject.toml promises, and the docs are what it found."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib
from conftest import ROOT, SOURCES, Package
from handmade import make_bundle, rebuild

from edge_infer.quantize import onnx_age, tflite_releases, torchscript
from edge_infer.runtime.arrays import read_npz, write_npz
from edge_infer.runtime.engines import EXTRAS, at_least, release_numbers
from edge_infer.target import read_target

SCRIPTS = ROOT / "scripts"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Engines that have wheels for each Python; tflite-runtime has none past 3.11.
KEPT = ("ai-edge-litert", "onnxruntime", "torch")


@pytest.fixture(scope="module")
def matrix() -> Iterator[ModuleType]:
    """The script under another name than this module's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        spec = importlib.util.spec_from_file_location("matrix_script", SCRIPTS / "test_matrix.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "matrix_script", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def found(matrix: ModuleType) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(matrix.DATA.read_text())
    return rows


def engines(matrix: ModuleType) -> set[tuple[str, tuple[int, ...]]]:
    return {(row.package, release(row.engine)) for row in matrix.ROWS}


def release(version: str) -> tuple[int, ...]:
    """2.14 and 2.14.0 are the same."""
    numbers = release_numbers(version)
    while numbers and numbers[-1] == 0:
        numbers = numbers[:-1]
    return numbers


def oldest(requirements: list[str], package: str) -> str:
    (text,) = [text for text in requirements if re.match(rf"{package}\b[^-]", text)]
    version = re.search(r">=([\d.]+)", text)
    assert version, text
    return version[1]


# -- the rows ----------------------------------------------------------------------------------------------------------


def test_each_promised_python_runs_each_engine(matrix: ModuleType) -> None:
    pattern = r"Programming Language :: Python :: (3\.\d+)"
    pythons = [match[1] for text in PROJECT["classifiers"] if (match := re.fullmatch(pattern, text))]
    assert PROJECT["requires-python"] == f">={pythons[0]}" and len(pythons) == 4
    rows = {(row.python, row.package) for row in matrix.ROWS if at_least(row.numpy, "2")}
    assert {(python, package) for python in pythons for package in KEPT} <= rows


def test_the_oldest_engine_of_each_extra_is_tried(matrix: ModuleType) -> None:
    extras = PROJECT["optional-dependencies"]
    floors = {(package, release(oldest(extras[extra], package))) for package, extra in EXTRAS.items()}
    assert floors <= engines(matrix)


def test_the_oldest_engines_that_manifests_go_back_to_are_tried(matrix: ModuleType) -> None:
    floors = {
        "ai-edge-litert": tflite_releases.LITERT_FIRST,
        "onnxruntime": onnx_age.OLDEST,
        "torch": torchscript.OLDEST,
    }
    assert {(package, release(version)) for package, version in floors.items()} <= engines(matrix)


def test_the_newest_engines_are_those_that_are_packaged_with(matrix: ModuleType) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins |= dict(line.split("==") for line in (ROOT / "constraints-tflite-runtime.txt").read_text().splitlines())
    assert {(package, release(pins[package])) for package in EXTRAS} <= engines(matrix)
    assert all(at_least(pins[row.package], row.engine) for row in matrix.ROWS)


def test_the_engines_of_the_targets_are_tried(matrix: ModuleType) -> None:
    assert {(engine.package, release(engine.version)) for engine in read_target("cpu-x86_64").engines} <= engines(
        matrix
    )


def test_the_oldest_numpy_is_tried_with_each_engine(matrix: ModuleType) -> None:
    floor = release(oldest(PROJECT["dependencies"], "numpy"))
    assert {row.package for row in matrix.ROWS if release(row.numpy) == floor} == set(EXTRAS)


def test_each_row_has_a_name_of_its_own(matrix: ModuleType) -> None:
    names = [row.name for row in matrix.ROWS]
    assert len(set(names)) == len(names)


# -- the docs ----------------------------------------------------------------------------------------------------------


def test_the_docs_have_an_outcome_for_each_row_and_none_failed(matrix: ModuleType, found: list[dict[str, Any]]) -> None:
    assert [result["row"] for result in found] == [row.name for row in matrix.ROWS]
    for row, result in zip(matrix.ROWS, found, strict=True):
        assert (result["outcome"] == "passed" and not result["reason"]) or (
            result["outcome"] == "not run" and result["reason"]
        ), result
        if result["outcome"] == "passed":
            assert set(result["bundles"]) == expected_bundles(matrix, row), row.name
            assert result["python"].startswith(f"{row.python}.") and result["large"]


def expected_bundles(matrix: ModuleType, row: Any) -> set[str]:
    format = matrix.FORMATS[row.package]
    small = {f"{matrix.SMALL}-{format}-{precision}" for precision in matrix.PRECISIONS[format]}
    return small | {f"{matrix.LARGE}-{format}-float32"}


def test_most_of_what_was_tried_ran(found: list[dict[str, Any]]) -> None:
    """A bundle that is refused shows less than one that runs."""
    outcomes = [text for result in found for text in result["bundles"].values()]
    assert {text for text in outcomes if text != "passed"} == {
        text for text in outcomes if text.startswith("refused: ")
    }
    assert outcomes.count("passed") > 0.9 * len(outcomes)


def test_the_page_is_what_the_figures_give(matrix: ModuleType, found: list[dict[str, Any]]) -> None:
    assert matrix.PAGE.read_text() == matrix.page(found)


# -- the script --------------------------------------------------------------------------------------------------------


def test_a_python_is_taken_by_its_version_alone(matrix: ModuleType) -> None:
    here = "{}.{}".format(*sys.version_info)
    given = [Path("/nowhere/python"), Path("/bin/false"), Path(sys.executable)]
    assert matrix.find_python(here, given) == Path(sys.executable)
    with pytest.raises(matrix.NotRun, match=r"there is no Python 3\.2 with its venv module here; name one"):
        matrix.find_python("3.2", given)


def test_a_row_without_its_python_says_so(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    result = matrix.run_row(matrix.Row("3.2", "torch", "2.1.0", "1.26.0"), tmp_path / "no.whl", [], [], keep=False)
    assert (result.outcome, result.bundles) == ("not run", {}) and "no Python 3.2" in result.reason


@pytest.mark.parametrize(
    ("package", "version", "refused"),
    [("ai-edge-litert", "1.3.0", True), ("ai-edge-litert", "1.4.0", False), ("tflite-runtime", "2.14.0", True)],
)
def test_a_row_knows_what_must_be_refused(
    matrix: ModuleType, tmp_path: Path, package: str, version: str, refused: bool
) -> None:
    """The bundle needs ai-edge-litert 1.4.0."""
    bundle = make_bundle(tmp_path / "b.edge")
    needed = matrix.refusal(matrix.Row("3.11", package, version, "1.26.0"), bundle)
    assert list(map(str, needed)) == (["ai-edge-litert>=1.4.0"] if refused else [])


def test_the_probe_ends_with_what_is_wrong(packaged: Package, tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        arrays = dict(read_npz(folder / "golden.npz"))
        write_npz(folder / "golden.npz", arrays | {"out.0.0": arrays["out.0.0"] + 1})

    wrong = rebuild(packaged(SOURCES["tflite"], "tflite", "float32"), tmp_path / "wrong.edge", spoil)
    command = [sys.executable, str(SCRIPTS / "device_probe.py"), str(wrong.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"run: \w+ differs by 1, allowed is [\d.e-]+", done.stderr.strip().splitlines()[-1])
