"""How a model runs fastest here is measured once and used from then on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import settle

from edge_infer import load
from edge_infer.bundle import Bundle
from edge_infer.errors import OutOfMemory
from edge_infer.runtime import cli, plan
from edge_infer.runtime.plan import Measured, Setting
from edge_infer.store import Store, default_root


@pytest.fixture
def bundle(packaged: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bundle:
    monkeypatch.setenv("EDGE_INFER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(plan, "ROUNDS", 1)
    monkeypatch.setattr(plan, "SECONDS", 0.05)
    return settle(packaged("torch.onnx", "onnx", "float32"))


def row(setting: Setting, p95_ms: float, peak_bytes: int = 100) -> Measured:
    return Measured(setting, p95_ms / 2, p95_ms, peak_bytes)


ONE, TWO, SPIN = Setting(1), Setting(2), Setting(2, spinning=True)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([row(ONE, 5.0), row(TWO, 3.0), row(SPIN, 2.0)], SPIN),
        ([row(ONE, 5.0), row(TWO, 3.0), row(SPIN, 2.9)], TWO),  # not worth a whole core
        ([row(ONE, 3.0), row(TWO, 2.9), row(SPIN, 2.9)], ONE),
        ([row(ONE, 3.0), row(TWO, 9.0), row(SPIN, 2.0, 300)], ONE),  # the fastest takes too much memory
    ],
)
def test_the_fastest_is_chosen_where_it_is_worth_its_cores(rows: list[Measured], best: Setting) -> None:
    assert plan.choose(rows, max_memory=200).setting == best


def test_too_little_memory_for_every_setting_is_refused() -> None:
    with pytest.raises(OutOfMemory, match="within 50 bytes, the least was 90"):
        plan.choose([row(ONE, 1.0), row(TWO, 1.0, 90)], max_memory=50)


@pytest.mark.parametrize(
    ("format", "cores", "tried"),
    [
        ("onnx", 4, ["1 thread", "2 threads", "4 threads", "2 threads, spinning", "4 threads, spinning"]),
        ("onnx", 1, ["1 thread"]),
        ("tflite", 6, ["1 thread", "2 threads", "4 threads", "6 threads"]),
    ],
)
def test_what_is_tried(format: str, cores: int, tried: list[str]) -> None:
    assert [str(setting) for setting in plan.settings(format, cores)] == tried


def test_what_was_found_is_used_by_every_load_that_does_not_say_otherwise(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", str(bundle.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kept"] and told["chosen"] in told["settings"]
    cache = Store(default_root()).cache
    found = plan.read(bundle, cache)
    assert found is not None and str(found.setting) == told["chosen"]
    other = Setting(found.setting.threads + 1, not found.setting.spinning)
    assert plan.keep(bundle, cache, row(other, 7.0))
    with load(bundle.path) as session:
        assert session.info.threads == other.threads
        assert ("idle threads spin" in session.info.notes) == other.spinning
    with load(bundle.path, threads=1) as session:
        assert session.info.threads == 1 and session.info.notes == ()
    assert cli.main(["info", str(bundle.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"] == f"{other}: 7 ms at 95 %"


def test_a_plan_for_other_cores_is_not_used(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan.keep(bundle, tmp_path, row(Setting(3), 1.0))
    assert plan.read(bundle, tmp_path) is not None
    monkeypatch.setattr(plan, "default_threads", lambda: 64)
    assert plan.read(bundle, tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", '{"setting": {"threads": "many"}}'])
def test_a_damaged_plan_is_none(bundle: Bundle, tmp_path: Path, text: str) -> None:
    assert plan.keep(bundle, tmp_path, row(ONE, 1.0))
    (kept,) = tmp_path.glob(f"*/{plan.PLAN_NAME}")
    kept.write_text(text)
    assert plan.read(bundle, tmp_path) is None
    with load(bundle.path, cache_dir=tmp_path):
        pass


def test_where_nothing_can_be_kept_the_answer_is_told_all_the_same(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EDGE_INFER_HOME", str(tmp_path / "file"))
    assert cli.main(["tune", str(bundle.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] is False
