"""How golden tolerances follow from what is measured between machines."""

from __future__ import annotations

import importlib
import json
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT

from edge_infer.measure import TOLERANCES
from edge_infer.target import read_target


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("answer_rule")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("device_answers")


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.031, 0.04), (0.05, 0.05), (0.0901, 0.1), (0.96, 1.0), (2e-6, 2e-6), (0, 0)]
)
def test_a_figure_is_rounded_up_and_never_down(rule: ModuleType, value: float, rounded: float) -> None:
    assert rule.round_up(value) == rounded


def test_a_tolerance_is_more_than_what_was_seen_and_no_more_than_everything(rule: ModuleType) -> None:
    assert rule.figure(0.027, "int8") == 0.06
    assert rule.figure(0.9, "int8") == 1.0
    assert rule.figure(0.0, "float32") == 1e-4


def test_float16_is_judged_by_the_processor_and_the_rest_by_all(rule: ModuleType) -> None:
    rows = [
        {"format": "onnx", "precision": precision, "place": place, "largest": seen}
        for place, seen in (("pi-4", 0.01), ("pi-5", 0.2))
        for precision in ("int8", "float16")
    ]
    assert rule.largest(rows, "onnx", "float16", "raspberry-pi-4") == 0.01
    assert rule.largest(rows, "onnx", "float16", "raspberry-pi-5") == 0.2
    assert rule.largest(rows, "onnx", "float16", "cpu-aarch64") == 0.2
    assert rule.largest(rows, "onnx", "int8", "raspberry-pi-4") == 0.2
    assert rule.largest(rows, "tflite", "int8", "raspberry-pi-4") is None
    assert rule.measured(rows) == ["raspberry-pi-4", "raspberry-pi-5"]


def test_a_share_is_the_largest_difference_of_a_question_over_the_largest_value(answers: ModuleType) -> None:
    here, there = np.array([[1.0, 4.0], [2.0, 2.0]]), np.array([[1.0, 3.0], [2.0, 2.5]])
    assert answers.share(here, there, 4.0).tolist() == [0.25, 0.125]


def test_what_other_machines_saw_stays_and_what_this_one_saw_is_replaced(answers: ModuleType) -> None:
    engines = {"onnx": ["onnxruntime", "1.32.0"]}

    def found(**more: object) -> dict[str, object]:
        return {"engines": engines, "machines": {}, "refused": {}, **more}

    other, before, now = (
        {"host": name, "largest": at} for name, at in (("another", 1), (answers.host(), 2), (answers.host(), 3))
    )
    kept = found(rows=[other, before])
    assert answers.beside_others(found(rows=[now]), kept)["rows"] == [other, now]
    assert answers.beside_others(found(rows=[now]), {**kept, "engines": {}})["rows"] == [now]
    assert answers.beside_others(found(rows=[now]), {})["rows"] == [now]


def test_targets_allow_what_the_rule_makes_of_what_was_measured(rule: ModuleType) -> None:
    rows = json.loads((ROOT / "docs" / "device-answers.json").read_text())["rows"]
    assert set(rule.measured(rows)) == set(rule.BOARDS)
    for name in rule.measured(rows):
        for engine in read_target(name).engines:
            for precision in engine.precisions:
                seen = rule.largest(rows, engine.format, precision, name)
                if seen is not None:
                    allowed = engine.golden_tolerance.get(precision, TOLERANCES[precision].golden)
                    assert allowed == rule.figure(seen, precision), (name, engine.format, precision)
