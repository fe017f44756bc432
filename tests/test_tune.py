"""How a model runs fastest here is measured once and used from then on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from handmade import settle

from edge_infer import Pool, load
from edge_infer import bundle as bundles
from edge_infer.bundle import Bundle
from edge_infer.errors import OutOfMemory
from edge_infer.runtime import cli, cores, engine_cache, plan, throughput, tuning
from edge_infer.runtime.golden import read_golden
from edge_infer.runtime.plan import Measured, PoolMeasured, PoolSetting, Setting
from edge_infer.runtime.threads import default_threads
from edge_infer.store import Store, default_root


@pytest.fixture
def bundle(packaged: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bundle:
    monkeypatch.setenv("EDGE_INFER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "SECONDS", 0.05)
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
    assert tuning.choose(rows, max_memory=200).setting == best


def test_slow_runs_or_the_median_count() -> None:
    rows = [Measured(ONE, 1.02, 1.12, 1), Measured(TWO, 0.61, 1.26, 1)]
    assert tuning.choose(rows).setting == ONE
    assert tuning.choose(rows, by="p50").setting == TWO


def test_too_little_memory_for_every_setting_is_refused() -> None:
    with pytest.raises(OutOfMemory, match="within 50 bytes, the least was 90"):
        tuning.choose([row(ONE, 1.0), row(TWO, 1.0, 90)], max_memory=50)


@pytest.mark.parametrize(
    ("usable", "strong", "tried"),
    [
        (4, (), ["1 thread", "2 threads", "4 threads"]),
        (6, (), ["1 thread", "2 threads", "4 threads", "6 threads"]),
        (1, (), ["1 thread"]),
        (
            4, (2, 3),
            ["1 thread", "1 thread, on cores 2, 3", "2 threads", "2 threads, on cores 2, 3", "4 threads"],
        ),
    ],
)  # fmt: skip
def test_threads_and_cores_that_are_tried(usable: int, strong: tuple[int, ...], tried: list[str]) -> None:
    assert [str(setting) for setting in tuning.thread_settings(usable, strong)] == tried


def test_spinning_and_the_other_way_of_packing_are_tried_where_they_matter(
    packaged: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(bundle: Bundle) -> list[str]:
        return [str(further(ONE)) for further in tuning.further_settings(bundle)]

    monkeypatch.setattr(tuning, "default_threads", lambda: 4)
    onnx = packaged("torch.onnx", "onnx", "float32")
    assert tried(onnx) == ["2 threads, spinning"]
    assert tried(packaged("keras.keras", "tflite", "float32")) == []
    monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 0)
    packed = onnx.manifest.artifact.prepack
    assert tried(onnx) == ["2 threads, spinning", f"1 thread, weights {'as they are' if packed else 'repacked'}"]
    monkeypatch.setattr(tuning, "default_threads", lambda: 1)
    assert len(tried(onnx)) == 1


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


def test_each_step_goes_on_from_the_best(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(tuning, "default_threads", lambda: 2)
    other = not bundle.manifest.artifact.prepack
    speed = {ONE: 9.0, TWO: 5.0, SPIN: 3.0, replace(SPIN, prepack=other): 1.0}
    monkeypatch.setattr(tuning, "measure", lambda bundle, tried, progress: [row(one, speed[one]) for one in tried])
    best, rows = tuning.tune(bundle)
    assert best.setting == replace(SPIN, prepack=other)
    assert {row.setting: row.p95_ms for row in rows} == speed


@pytest.mark.parametrize("prepack", [True, False])
def test_a_plan_says_how_weights_are_packed(
    bundle: Bundle, prepack: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 0)
    with load(bundle.path, cache_dir=tmp_path) as session:
        expected = session.run(read_golden(bundle)[0][0])
    assert len(list(tmp_path.glob("*/model.onnx"))) == 1
    assert plan.keep(bundle, tmp_path, row(Setting(1, prepack=prepack), 1.0))
    with load(bundle.path, cache_dir=tmp_path) as session:
        assert session.setting.prepack is prepack and not session.info.notes
        answer = session.run(read_golden(bundle)[0][0])
    # What was made for the bundle's own way is not mapped for the other.
    assert len(list(tmp_path.glob("*/model.onnx"))) == (1 if prepack == bundle.manifest.artifact.prepack else 2)
    for name, array in expected.items():
        np.testing.assert_allclose(answer[name], array, atol=1e-5)


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


def test_a_full_check_hashes_the_plan_too(bundle: Bundle, tmp_path: Path) -> None:
    """Where a stamp says that a damaged one is sound, it is believed otherwise."""
    assert plan.keep(bundle, tmp_path, row(Setting(3), 1.0))
    (kept,) = tmp_path.glob(f"*/{plan.PLAN_NAME}")
    kept.write_text(kept.read_text().replace('"threads": 3', '"threads": 4'))
    bundles._write_stamp(tmp_path / f"{kept.parent.name}.verified", bundles._stamps(kept.parent, [kept.name]))
    with load(bundle.path, cache_dir=tmp_path) as session:
        assert session.info.threads == 4
    with load(bundle.path, cache_dir=tmp_path, verify="full") as session:
        assert session.info.threads == default_threads()
    assert not kept.exists()


def test_a_home_by_a_relative_path_is_the_same_for_the_children(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Children run in the root folder, where the path would be another one."""
    monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGE_INFER_HOME", "here")
    with load(bundle.path) as session:
        assert session.info.notes == ()  # weights were laid out in the cache
    assert list((tmp_path / "here" / "cache").glob("*/model.onnx"))
    assert cli.main(["tune", str(bundle.path), "--json"]) == 0
    assert not Path("/here").exists()


def test_where_nothing_can_be_kept_the_answer_is_told_all_the_same(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EDGE_INFER_HOME", str(tmp_path / "file"))
    assert cli.main(["tune", str(bundle.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] is False


# -- cores of different strength ---------------------------------------------------------------------------------------


def board(folder: Path, *capacities: int) -> Path:
    """What the kernel says of its cores, in a folder of the test's own: this machine's are all alike."""
    for core, capacity in enumerate(capacities):
        (folder / f"cpu{core}").mkdir()
        (folder / f"cpu{core}" / "cpu_capacity").write_text(f"{capacity}\n")
    return folder


@pytest.mark.parametrize(
    ("capacities", "usable", "strong"),
    [
        ((446, 446, 1024, 1024), {0, 1, 2, 3}, (2, 3)),
        ((446, 446, 1024, 1024), {0, 1, 3}, (3,)),
        ((446, 446, 1024, 1024), {2, 3}, ()),
        ((1024, 1024), {0, 1}, ()),
        ((), {0, 1}, ()),
    ],
)
def test_the_strong_cores_are_those_that_the_kernel_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capacities: tuple[int, ...], usable: set[int], strong: object
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: usable)
    assert cores.strongest(board(tmp_path, *capacities)) == strong


def engine_threads(before: set[str]) -> list[set[int]]:
    """The cores that threads started since may use."""
    started = set(os.listdir("/proc/self/task")) - before
    return [os.sched_getaffinity(int(number)) for number in started]


def test_a_plan_keeps_the_engines_threads_on_its_cores_and_leaves_the_caller_alone(
    bundle: Bundle, tmp_path: Path
) -> None:
    usable = os.sched_getaffinity(0)
    one = max(usable)
    assert plan.keep(bundle, tmp_path, row(Setting(3, cores=(one,)), 1.0))
    before = set(os.listdir("/proc/self/task"))
    with load(bundle.path, cache_dir=tmp_path) as session:
        assert session.run(read_golden(bundle)[0][0])
        kept = engine_threads(before)
        assert len(kept) == 2 and all(allowed == {one} for allowed in kept)
        assert os.sched_getaffinity(0) == usable
        assert session.stats().count == 1
    with Pool(bundle.path, cache_dir=tmp_path, sessions=1) as pool:  # asks for something of its own
        assert not pool.sessions[0].setting.cores


def test_cores_that_are_gone_are_no_reason_to_fail(bundle: Bundle, tmp_path: Path) -> None:
    assert plan.keep(bundle, tmp_path, row(Setting(1, cores=(4000,)), 1.0))
    usable = os.sched_getaffinity(0)
    with load(bundle.path, cache_dir=tmp_path) as session:
        assert session.run(read_golden(bundle)[0][0])
    assert os.sched_getaffinity(0) == usable


# -- answers a second --------------------------------------------------------------------------------------------------


def test_how_a_pool_is_divided() -> None:
    assert [str(setting) for setting in throughput.settings(4, joins=False)] == [
        "1 x 4, batch 1",
        "2 x 2, batch 1",
        "4 x 1, batch 1",
    ]
    assert [setting.batch for setting in throughput.settings(1, joins=True)] == [1, 4, 16]


@pytest.mark.parametrize(("speeds", "best"), [((10, 12, 12.1), 1), ((10, 10.2, 9), 0), ((10, 10, 30), 2)])
def test_more_sessions_have_to_be_worth_it(speeds: tuple[float, ...], best: int) -> None:
    rows = [PoolMeasured(PoolSetting(n + 1, 1), speed, 1.0, 1) for n, speed in enumerate(speeds)]
    assert throughput.choose(rows) is rows[best]


def test_the_best_pool_is_used_by_every_pool_that_does_not_say_otherwise(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", str(bundle.path), "--throughput", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kept"] and {row["batch"] for row in told["throughput"]} == {1, 4, 16}
    assert all(row["per_second"] > 0 and row["p50_ms"] > 0 for row in told["throughput"])
    best = PoolSetting(**told["best"])
    with Pool(bundle.path) as pool:
        assert len(pool.sessions) == best.sessions and pool.sessions[0].info.threads == best.threads
    assert plan.keep_pool(bundle, Store(default_root()).cache, PoolMeasured(PoolSetting(3, 1, 2), 9.0, 1.0, 1))
    with Pool(bundle.path) as pool:
        assert len(pool.sessions) == 3
    with Pool(bundle.path, sessions=1) as pool:
        assert len(pool.sessions) == 1
    assert cli.main(["info", str(bundle.path)]) == 0
    assert "3 x 1, batch 2: 9 answers a second" in capsys.readouterr().out


def test_throughput_alone_keeps_nothing(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(bundle.path), "--throughput"]) == 0
    header, *rows = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert header.split() == ["sessions", "threads", "batch", "answers/s", "p50", "ms", "peak", "MB"]
    assert len(rows) == len(throughput.settings(throughput.default_threads(), joins=True))
    assert plan.read_pool(bundle, Store(default_root()).cache) is None


@pytest.mark.parametrize(
    ("verb", "options", "named"),
    [
        ("bench", ["--threads", "1"], "--threads"),
        ("bench", ["--max-memory", "9"], "--max-memory"),
        ("bench", ["--profile"], "--profile"),
        ("tune", ["--by", "p50"], "--by"),
    ],
)
def test_an_option_that_throughput_would_not_heed_is_refused(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], verb: str, options: list[str], named: str
) -> None:
    assert cli.main([verb, str(bundle.path), *options, "--throughput"]) == 2
    assert f"--throughput tries its own settings, expected no {named} beside it" in capsys.readouterr().err
