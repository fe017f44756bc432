"""The benchmark: it runs, and what is committed of it belongs together."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@pytest.fixture
def bench_docs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench_docs")


@pytest.fixture
def report() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    return json.loads((DOCS / "benchmark.json").read_text())


def test_the_page_and_the_plots_are_what_the_report_gives(bench_docs: ModuleType, report: object) -> None:
    page = (DOCS / "benchmark.md").read_text()
    assert bench_docs.filled(page, report) == page
    for name, draw in bench_docs.PLOTS.items():
        assert (DOCS / name).read_text() == draw(report) + "\n"
        ET.parse(DOCS / name)
        assert f"docs/{name}" in (ROOT / "README.md").read_text()


def test_every_case_was_measured(bench_docs: ModuleType, report: dict[str, object]) -> None:
    cases = importlib.import_module("bench_cases").CASES
    assert list(report["results"]) == cases == list(report["bundles"])  # type: ignore[call-overload]
    assert list(report["calls"]) == [case for case in cases if case.startswith("digits-")]  # type: ignore[call-overload]
    assert len(bench_docs.goals(report)) == 24


def test_a_missed_goal_is_marked(bench_docs: ModuleType, report: dict[str, dict[str, dict]]) -> None:
    case = "dense100-tflite-float32"
    ours, plain = report["results"][case]["edge_infer"], report["results"][case]["plain"]
    ours.update(load_ms=4.0, p50_ms=1.0, private_bytes=1e6)
    plain.update(load_ms=100.0, best_p50_ms=1.0)
    assert "missed" not in str(row(bench_docs, report, case))
    for figures in ({"load_ms": 11.0}, {"load_ms": 7.0}, {"p50_ms": 1.03}, {"private_bytes": 1.1e7}):
        before = dict(ours)
        ours.update(figures)
        assert str(row(bench_docs, report, case)).count("missed") == 1
        ours.update(before)


def row(bench_docs: ModuleType, report: object, case: str) -> list[str]:
    return next(row for row in bench_docs.goals(report) if row[0] == case)


def test_a_run_of_it(tmp_path: Path, models: Path) -> None:
    """The digits network in one format, measured once; the figures are noise, and there."""
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "--runs", "1", "--cases", "digits-onnx-float32"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "report.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    for way in ("plain", "edge_infer"):
        figures = report["results"]["digits-onnx-float32"][way]
        assert all(figures[name] > 0 for name in ("load_ms", "first_ms", "p50_ms", "peak_bytes", "shared_bytes"))
    assert set(report["calls"]["digits-onnx-float32"]) == {"engine", "run", "run_buffers", "fastest"}
    assert report["imports"]["tflite"] > report["imports"]["bare"] > 0
    assert "run_buffers" in done.stdout
