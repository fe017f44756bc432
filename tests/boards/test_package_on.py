"""Figures that are measured on an emulated board: taken, judged as asked, and marked wherever they are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MODELS, SOURCES

from boards.board import PYTHON, TestBoard
from boards.record import note
from edge_infer.bundle import Bundle, open_bundle

TARGET = "raspberry-pi-zero-2w"
EMULATED = "QEMU's virt machine imitating a cortex-a53"
CALIBRATION = MODELS / "calibration.npz"
TREE = "/sys/firmware/devicetree/base"


def package(board: TestBoard, out: Path, *words: str, status: int = 0) -> Any:
    source = MODELS / "keras.keras"
    common = ("package", source, "--target", TARGET, "--on", board.name, "--calibration", CALIBRATION, "-o", out)
    return board.edge_infer(*common, *words, status=status)


@pytest.mark.long
def test_candidates_of_two_engines_are_measured_on_the_board_and_marked(zero: TestBoard, tmp_path: Path) -> None:
    words = ("--precision", "float32", "--max-latency", "60s", "--json")
    said = json.loads(package(zero, tmp_path / "d.edge", *words).stdout)
    rows = {row["id"]: row for row in said["candidates"]}
    assert set(rows) == {"tflite float32", "onnx float32"}
    for row in rows.values():
        assert (row["measured_on"], row["emulated"]) == (f"{zero.name}, emulated", EMULATED), row["reason"]
        assert row["p50_ms"] > 0 and row["runs"] >= 1
    page = Path(said["report"]).read_text()
    assert "Its times and memory are those of an emulated machine." in page and "imitating a cortex-a53" in page
    # Nothing of it is in the bundle, and nothing of the candidates is left on the board.
    bundle = open_bundle(Path(said["bundle"]))
    assert b"emulated" not in bundle.manifest.to_bytes()
    assert zero.answer("status", zero.name)["models"] == []
    note(
        "measured", "package",
        chosen=said["chosen"],
        candidates={
            name: {key: row[key] for key in ("status", "reason", "measured_on", "emulated", "runs", "first_look")}
            for name, row in rows.items()
        },
    )  # fmt: skip


def test_a_limit_is_judged_by_emulated_figures_and_says_so(zero: TestBoard, tmp_path: Path) -> None:
    words = ("--format", "tflite", "--precision", "int8", "--max-latency", "0.0001ms")
    done = package(zero, tmp_path / "d.edge", *words, status=3)
    refusal = done.stderr.splitlines()[-1]
    assert "as emulated, allowed is at most 0.0001 ms (--max-latency)" in refusal
    assert f"That machine is emulated ({EMULATED}): its times and memory are no board's." in done.stderr
    assert not (tmp_path / "d.edge").exists()
    note("measured", "limit", refusal=refusal)


@pytest.fixture(scope="module")
def tuned(zero: TestBoard, packaged: Callable[..., Bundle]) -> dict[str, Any]:
    """What a push says that tunes on the board."""
    bundle = packaged(SOURCES["tflite"], "tflite", "float32", TARGET)
    (row,) = zero.answer("push", bundle.path, zero.name, "--tune", "--self-test-timeout", "600")["devices"]
    return dict(row)


@pytest.mark.long
def test_a_tuned_push_says_that_the_plan_is_of_an_emulated_machine(zero: TestBoard, tuned: dict[str, Any]) -> None:
    assert tuned["tuned"].endswith(f", on an emulated machine ({EMULATED})")
    assert "not tuned" not in tuned["tuned"]
    said = json.loads(zero.shell(f"{PYTHON} -m edge_infer info digits --json").stdout)
    assert said["tuned"].endswith(f", emulated ({EMULATED})")
    note("measured", "tune", push=tuned["tuned"], info=said["tuned"].partition(":")[0])


@pytest.mark.long
def test_a_plan_does_not_go_along_with_the_card_to_another_machine(zero: TestBoard, tuned: dict[str, Any]) -> None:
    """Without its device tree the board is none that is known to be emulated."""
    zero.shell(f"mount -t tmpfs none {TREE}", user="root")
    try:
        said = json.loads(zero.shell(f"{PYTHON} -m edge_infer info digits --json").stdout)
    finally:
        zero.shell(f"umount {TREE}", user="root")
    assert said["digest"] == tuned["digest"] and said["tuned"] is None


@pytest.mark.long
def test_a_benchmark_on_the_board_says_that_it_is_emulated(zero: TestBoard, tuned: dict[str, Any]) -> None:
    measured = json.loads(zero.shell(f"{PYTHON} -m edge_infer bench digits --runs 5 --json").stdout)
    assert measured["emulated"] == EMULATED and measured["runs"] >= 1
    table = zero.shell(f"{PYTHON} -m edge_infer bench digits --runs 5").stdout.decode()
    assert f"emulated       {EMULATED}\n" in table


@pytest.mark.long
def test_a_doctor_says_that_the_board_is_emulated(zero: TestBoard) -> None:
    lines = {line["topic"]: line for line in zero.answer("doctor", zero.name)["lines"]}
    assert lines["system"]["text"].endswith(f", emulated: {EMULATED}") and lines["system"]["state"] == "ok"
