"""The search: limits that bind, scores on samples nobody saw, mixed precision, pruning, the cache, the report."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS, calibration_for
from onnx import TensorProto, helper, numpy_helper
from onnx_models import save, value

from edge_infer.bundle import open_bundle
from edge_infer.cli import main
from edge_infer.errors import EXIT_NOTHING_FITS, EngineMissing, LimitError, SelfTestFailed, UsageError
from edge_infer.package import Packaged, Request, package, report_path
from edge_infer.report import text
from edge_infer.runtime.session import load


def digits(output: Path, **options: Any) -> Request:
    given = {"format": "onnx", "precision": "int8", "calibration": MODELS / "calibration_nchw.npz", "name": "digits"}
    return Request(MODELS / "torch.onnx", "cpu-x86_64", output, **{**given, **options})


LABELLED = {"evaluation": MODELS / "test_nchw.npz", "metric": "top1"}


@pytest.fixture(scope="module")
def searched(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """Every precision that ONNX has, judged by labels."""
    return package(digits(tmp_path_factory.mktemp("searched") / "d.edge", precision="auto", **LABELLED))


class TestScores:
    def test_accuracy_with_labels_on_two_halves(self, searched: Packaged) -> None:
        with np.load(MODELS / "test_nchw.npz") as data, load(searched.bundle.path) as session:
            right = session(data["image"]).argmax(1) == data["label"]
        scores = {score.samples: score for score in searched.bundle.manifest.scores}
        assert {name: score.metric for name, score in scores.items()} == {"search": "top1", "holdout": "top1"}
        assert scores["search"].count + scores["holdout"].count == len(right)
        # Both halves together are the whole set, whatever the split.
        assert sum(score.value * score.count for score in scores.values()) == pytest.approx(right.sum(), abs=0.01)
        assert all(score.low < score.value <= score.high for score in scores.values())

    def test_the_loss_is_of_the_held_out_samples_against_the_source(self, models: Path, tmp_path: Path) -> None:
        done = package(digits(tmp_path / "d.edge", precision="float32", sparsity=0.9, max_drop=0.9, **LABELLED))
        (row,) = done.record["candidates"]
        source = done.record["metric"]["source"]["value"]
        assert row["holdout"]["value"] < source  # so much pruning costs something
        assert row["loss"]["value"] == pytest.approx(1 - row["holdout"]["value"] / source)
        assert row["loss"]["low"] < row["loss"]["value"] < row["loss"]["high"]
        assert f"the loss against it is {row['loss']['value']:.1%} (" in text.summary(done.record)

    def test_a_precision_that_changes_no_answer_loses_nothing(self, searched: Packaged) -> None:
        row = next(row for row in searched.record["candidates"] if row["precision"] == "float32")
        assert row["loss"]["value"] == 0
        assert row["loss"]["low"] < 0 < row["loss"]["high"]

    def test_without_labels_it_is_agreement(self, models: Path, tmp_path: Path) -> None:
        done = package(digits(tmp_path / "d.edge"))
        assert {score.metric for score in done.bundle.manifest.scores} == {"agreement-top1"}
        assert {score.source for score in done.bundle.manifest.scores} == {1.0}
        assert done.record["metric"]["kind"] == "agreement"
        assert "% (" in text.summary(done.record) and "the source has" not in text.summary(done.record)
        assert all(row["loss"] is None for row in done.record["candidates"])

    def test_the_agreement_of_values_is_in_decibels(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(9)
        weights = numpy_helper.from_array(rng.standard_normal((16, 1)).astype(np.float32), "w")
        io = [value("x", TensorProto.FLOAT, ["n", 16])], [value("y", TensorProto.FLOAT, ["n", 1])]
        source = save(tmp_path / "line.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], *io, [weights])
        np.savez(tmp_path / "c.npz", x=rng.standard_normal((40, 16)).astype(np.float32))
        given = Request(source, "cpu-x86_64", tmp_path / "l.edge", "onnx", "float32", calibration=tmp_path / "c.npz")
        done = package(given)
        assert done.record["metric"]["name"] == "agreement-sqnr-db"
        says = text.summary(done.record)
        assert " dB." in says or " dB (" in says
        assert "%" not in says and "the source has" not in says
        assert " dB allowed" in done.report.read_text("utf-8").replace("\u00a0", " ")

    def test_an_agreement_may_be_named(self, models: Path, tmp_path: Path) -> None:
        done = package(digits(tmp_path / "d.edge", metric="agreement-sqnr-db"))
        assert {score.metric for score in done.bundle.manifest.scores} == {"agreement-sqnr-db"}
        assert done.record["metric"]["unit"] == "dB"

    def test_samples_to_judge_by_must_be_new(self, models: Path, tmp_path: Path) -> None:
        given = digits(tmp_path / "d.edge", evaluation=MODELS / "calibration_nchw.npz")
        with pytest.raises(UsageError, match=r"of --evaluate are in --calibration too"):
            package(given)

    def test_a_metric_needs_labels(self, models: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "bare.npz", image=np.load(MODELS / "test_nchw.npz")["image"])
        with pytest.raises(UsageError, match="holds no labels"):
            package(digits(tmp_path / "d.edge", evaluation=tmp_path / "bare.npz", metric="top1"))

    def test_random_calibration_is_judged_by_nothing(self, models: Path, tmp_path: Path) -> None:
        done = package(digits(tmp_path / "d.edge", calibration="random"))
        assert done.bundle.manifest.scores == ()
        assert done.record["samples"]["search"] is None


class TestSizeByLayer:
    @pytest.mark.parametrize(
        ("format", "precision"), [("onnx", "int8"), ("onnx", "float16"), ("tflite", "int4-weights")]
    )
    def test_the_layers_of_the_record_hold_the_weights_of_the_bundle(
        self, models: Path, tmp_path: Path, format: str, precision: str
    ) -> None:
        form = "torch.onnx" if format == "onnx" else "keras.keras"
        given = Request(
            models / form, "cpu-x86_64", tmp_path / "d.edge", format, precision, calibration=calibration_for(form)
        )
        done = package(given)
        layers = [row for row in done.record["layers"] if row["bytes"]]
        shapes = [(32, 1 * 3 * 3), (64, 32 * 3 * 3), (64, 64 * 4 * 4), (10, 64)]
        assert [row["bytes"] for row in layers] == [4 * (rows * columns + rows) for rows, columns in shapes]
        files = sum(row.size for name, row in done.bundle.manifest.files.items() if name != "golden.npz")
        stored = [row["stored_bytes"] for row in layers]
        assert 0.8 * files < sum(stored) < files
        # The largest holds nearly all of its bytes in the weights themselves.
        bits = {"int8": 8, "float16": 16, "int4-weights": 4}[precision]
        assert stored[2] == pytest.approx(layers[2]["bytes"] * bits / 32, rel=0.03)
        assert ("error" in layers[0]) == (precision == "int8")
        page = done.report.read_text("utf-8")
        assert ("Error of int8 and size by layer" in page) == (precision == "int8") and "ize by layer" in page


class TestLimits:
    @pytest.mark.parametrize(
        ("option", "figure", "binding"), [("max_size", "size_bytes", "size"), ("max_ram", "peak_bytes", "memory")]
    )
    def test_just_below_what_the_best_needs_nothing_fits(
        self, searched: Packaged, tmp_path: Path, option: str, figure: str, binding: str
    ) -> None:
        """Of all candidates the least needs one byte (of memory: one percent) more than is allowed."""
        made = [row for row in searched.record["candidates"] if row[figure] is not None]
        least = min(row[figure] for row in made)
        allowed = least - 1 if binding == "size" else int(least * 0.9)
        with pytest.raises(LimitError) as refused:
            package(digits(tmp_path / "d.edge", precision="auto", **LABELLED, **{option: allowed}))
        found = refused.value.record
        assert found is not None
        assert refused.value.exit_status == EXIT_NOTHING_FITS
        assert found["nothing_fits"]["binding"] == binding
        assert found["nothing_fits"]["allowed"] == allowed
        assert {row["status"] for row in found["candidates"]} == {"dropped"}
        assert not (tmp_path / "d.edge").exists() and not report_path(tmp_path / "d.edge").exists()

    def test_what_is_named_as_nearest_fits_once_relaxed(self, searched: Packaged, tmp_path: Path) -> None:
        least = min(row["size_bytes"] for row in searched.record["candidates"] if row["size_bytes"])
        done = package(digits(tmp_path / "d.edge", precision="auto", **LABELLED, max_size=least))
        assert done.chosen.size == least

    def test_an_accuracy_that_no_candidate_has(self, models: Path, tmp_path: Path) -> None:
        with pytest.raises(LimitError, match=r"score is 0\.9\d+ top1, allowed is at least 1 top1 \(--min-accuracy\)"):
            package(digits(tmp_path / "d.edge", precision="float32", **LABELLED, min_score=1.0))

    @pytest.mark.parametrize(("prefer", "figure"), [("size", "size_bytes"), ("latency", "p50_ms")])
    def test_the_preferred_figure_is_least(self, searched: Packaged, tmp_path: Path, prefer: str, figure: str) -> None:
        done = package(digits(tmp_path / "d.edge", precision="auto", **LABELLED, prefer=prefer))
        rows = [row for row in done.record["candidates"] if row["status"] != "dropped"]
        chosen = next(row for row in rows if row["status"] == "chosen")
        assert chosen[figure] == min(row[figure] for row in rows)

    def test_the_command_line_shows_all_candidates_and_exits_with_3(
        self, searched: Packaged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["package", str(MODELS / "torch.onnx"), "--target", "cpu-x86_64", "-o", str(tmp_path / "d.edge")]
        arguments += ["--format", "onnx", "--calibration", str(MODELS / "calibration_nchw.npz"), "--max-size", "1KB"]
        assert main(arguments) == EXIT_NOTHING_FITS
        told = capsys.readouterr().err
        assert "nothing fits cpu-x86_64: nearest is onnx" in told and "(--max-size)" in told
        assert "Time and memory: this machine" in told
        assert all(f"onnx {precision} " in told for precision in ("int8", "float32", "float16", "int8-dynamic"))


def wild_network(folder: Path) -> Path:
    """Four dense layers; what the second gives has channels a thousand times larger than those that matter."""
    rng = np.random.default_rng(5)
    sizes = (16, 64, 32, 64, 8)
    weights = [(rng.standard_normal((a, b)) / np.sqrt(a)).astype(np.float32) for a, b in itertools.pairwise(sizes)]
    loud = np.ones(32, np.float32)
    loud[:4] = 4096.0
    weights[1] *= loud
    weights[2] /= loud[:, None]
    nodes, before = [], "x"
    for index in range(4):
        nodes.append(helper.make_node("MatMul", [before, f"w{index}"], [f"m{index}"], name=f"dense{index}"))
        before = f"m{index}"
        if index < 3:
            nodes.append(helper.make_node("Relu", [before], [f"r{index}"], name=f"relu{index}"))
            before = f"r{index}"
    nodes[-1].output[0] = "y"
    io = [value("x", TensorProto.FLOAT, ["n", 16])], [value("y", TensorProto.FLOAT, ["n", 8])]
    named = [numpy_helper.from_array(array, f"w{index}") for index, array in enumerate(weights)]
    return save(folder / "wild.onnx", nodes, *io, named)


def test_mixed_precision_keeps_the_culprit_in_float(tmp_path: Path) -> None:
    source = wild_network(tmp_path)
    np.savez(tmp_path / "c.npz", x=np.random.default_rng(6).standard_normal((400, 16)).astype(np.float32))
    request = Request(source, "cpu-x86_64", tmp_path / "w.edge", "onnx", calibration=tmp_path / "c.npz", max_drop=0.05)
    done = package(request)
    plain, mixed = (next(row for row in done.candidates if row.precision == name) for name in ("int8", "int8-mixed"))
    assert plain.id in done.verdict.reasons
    assert mixed.id not in done.verdict.reasons
    assert done.chosen == mixed  # in the target's order it stands in for int8, before float32
    assert (
        {"dense1", "dense2"} <= set(mixed.kept_float) < {f"dense{n}" for n in range(4)} | {f"relu{n}" for n in range(3)}
    )
    assert mixed.holdout is not None and mixed.holdout.value >= 0.95
    assert done.record["trials"]


class TestPruning:
    def test_half_the_weights_are_zero_and_a_transfer_is_smaller(self, searched: Packaged, tmp_path: Path) -> None:
        done = package(digits(tmp_path / "d.edge", precision="float32", sparsity=0.5, max_drop=0.05, **LABELLED))
        whole = next(item for item in searched.candidates if item.precision == "float32")
        assert done.chosen.download < 0.75 * whole.download
        assert done.chosen.size == pytest.approx(whole.size, rel=0.01)
        assert done.chosen.sparsity == 0.5

    def test_it_needs_samples_to_know_what_it_costs(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--prune needs real samples to judge by"):
            package(digits(tmp_path / "d.edge", precision="float32", calibration=None, sparsity=0.5))


class TestCache:
    def test_packaging_again_runs_no_step(self, searched: Packaged, tmp_path: Path) -> None:
        steps: list[str] = []
        again = package(digits(tmp_path / "again" / "d.edge", precision="auto", **LABELLED), steps.append)
        assert steps == []
        assert again.bundle.digest == searched.bundle.digest
        assert again.record["candidates"] == searched.record["candidates"]

    def test_another_option_redoes_only_what_depends_on_it(self, searched: Packaged, tmp_path: Path) -> None:
        steps: list[str] = []
        package(digits(tmp_path / "d.edge", precision="auto", ranges="percentile", **LABELLED), steps.append)
        again = {"building onnx int8", "checking onnx int8", "measuring onnx int8"}
        assert again <= set(steps) <= again | {"measuring what int8 costs each layer of onnx"}

    def test_without_it_everything_is_done_anew_to_the_same_bytes(self, searched: Packaged, tmp_path: Path) -> None:
        steps: list[str] = []
        anew = package(digits(tmp_path / "d.edge", **LABELLED, cache=False), steps.append)
        assert "reading torch.onnx" in steps
        kept = package(digits(tmp_path / "e.edge", **LABELLED))
        assert anew.bundle.digest == kept.bundle.digest


def test_the_report_lies_beside_the_bundle_and_holds_the_record(searched: Packaged) -> None:
    page = searched.report.read_text("utf-8")
    assert searched.report == searched.bundle.path.with_name("d.report.html")
    assert searched.bundle.digest in page
    assert all(row["id"] in page for row in searched.record["candidates"])
    assert json.loads(json.dumps(searched.record)) == searched.record
    assert searched.record["layers"] and all(row["error"] >= 0 for row in searched.record["layers"])
    assert sum(searched.record["outputs"][0]["counts"]) > 0
    assert 0.99 < searched.record["outputs"][0]["cosine"] < 1
    assert "cosine similarity 0.99" in page


def test_candidates_are_measured_on_a_device_and_leave_nothing_there(models: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = package(digits(tmp_path / "d.edge", precision="auto", device=f"local:{store}"))
    assert done.chosen.measured_on == f"local:{store}"
    assert done.chosen.measured["p50_ms"] > 0
    assert not [path for path in (store / "releases").rglob("*") if path.is_file()]
    assert not (store / "current").exists() or not list((store / "current").iterdir())
    assert open_bundle(done.bundle.path).digest == done.bundle.digest
    # The first in the target's order that fits is timed to the end; of those after it a first look is enough.
    looks = [row["first_look"] for row in done.record["candidates"] if row["measured_on"]]
    assert looks == [False] + [True] * (len(looks) - 1) and len(looks) > 2
    assert all(row["runs"] <= 10 for row in done.record["candidates"] if row["first_look"])
    assert done.chosen.measured["runs"] > 10
    assert "A few runs were enough to see" in done.report.read_text("utf-8")


def test_a_slow_device_may_have_more_time_or_less(models: Path, tmp_path: Path) -> None:
    asked = Request(
        models / "keras.keras", "cpu-x86_64", tmp_path / "d.edge", "tflite", "float32",
        device=f"local:{tmp_path / 'store'}",
    )  # fmt: skip
    with pytest.raises(SelfTestFailed, match=r"no answer within 0\.01 s"):
        package(replace(asked, self_test_timeout=0.01))
    with pytest.raises(UsageError, match="--self-test-timeout -1, expected more than 0"):
        package(replace(asked, self_test_timeout=-1))
    with pytest.raises(UsageError, match="the time for timeout is 1e"):
        package(replace(asked, self_test_timeout=1e9))


def test_what_a_device_refuses_is_dropped_with_its_words(
    models: Path, tmp_path: Path, device_python: Callable[[str], Path]
) -> None:
    store = f"local:{tmp_path / 'store'}"
    asked = Request(models / "keras.keras", "cpu-x86_64", tmp_path / "d.edge", precision="float32", device=store)
    done = package(replace(asked, python=str(device_python("onnx"))))
    assert done.chosen.id == "onnx float32"
    assert "has no such engine" in done.verdict.reasons["tflite float32"]
    with pytest.raises(EngineMissing, match=r"has no such engine; edge-infer provision .*pip install"):
        package(replace(asked, format="tflite", python=str(device_python("onnx"))))
