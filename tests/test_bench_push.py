"""The benchmark of a push: it runs, and its page is filled from what it measured."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@pytest.fixture
def bench_push_docs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench_push_docs")


def report_of(ours_s: float) -> dict[str, object]:
    """A whole push takes ``ours_s``, its transfer half of that, every peer one second."""
    ours = {"whole_s": ours_s, "transfer_s": ours_s / 2, "sync_s": 0.1}
    ways = {"edge_infer": ours, **{way: {"whole_s": 1.0, "sync_s": 0.2} for way in ("scp", "rsync", "SFTP")}}
    facts = {"processor": "one", "cores": 2, "python": "3.11.7", "versions": {"paramiko": "5.1"}, "runs": 3}
    trips = dict.fromkeys(("0", "40", "200"), ways)
    sizes = {"100 MB": 100_000_000, "200 files": 13_000_000, "again": 100_000_000}
    return {"surroundings": facts, "sizes": sizes, "results": dict.fromkeys(sizes, trips)}


@pytest.mark.parametrize(("ours_s", "missed"), [(0.1, 0), (0.3, 1), (1.5, 4), (2.5, 7)])
def test_a_missed_goal_is_marked(bench_push_docs: ModuleType, ours_s: float, missed: int) -> None:
    rows = bench_push_docs.goals(report_of(ours_s))
    assert (len(rows), str(rows).count("missed")) == (7, missed)


def test_a_run_of_it_and_its_page(bench_push_docs: ModuleType, tmp_path: Path, models: Path) -> None:
    """Once, without a delay; the figures are noise, and there."""
    command = [sys.executable, str(ROOT / "scripts" / "bench_push.py"), "--runs", "1", "--round-trips", "0"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "report.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    for case, ways in (("100 MB", 4), ("200 files", 4), ("again", 2)):
        figures = report["results"][case]["0"]
        assert len(figures) == ways
        assert all(row["whole_s"] > 0 and row["sync_s"] >= 0 for row in figures.values())
        assert 0 < figures["edge_infer"]["transfer_s"] < figures["edge_infer"]["whole_s"]
    page = bench_push_docs.filled((DOCS / "push-benchmark.md").read_text(), report)
    assert page.count("| edge_infer, whole |") == 3
    assert bench_push_docs.around(report) in page
    assert "edge_infer, transfer" in done.stdout
