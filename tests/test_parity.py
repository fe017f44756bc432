"""The gates between a source and its bundle: what is asked, what is compared, and that a wrong model gets stuck."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import save, value

from edge_infer import convert, measure, probe, worker
from edge_infer.bundle import Bundle, open_bundle
from edge_infer.convert import INPUTS_FILE
from edge_infer.errors import ConversionError, ParityError, UsageError
from edge_infer.manifest import TensorSpec
from edge_infer.package import Request, package
from edge_infer.samples import Samples, spool
from edge_infer.steps import Steps

Feeds = list[probe.Feed]


def case(**outputs: object) -> Feeds:
    """One case; numbers are float32, the rest as numpy has it."""
    return [{name: np.asarray(value) for name, value in outputs.items()}]


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


class TestCompare:
    def test_equal_answers_pass_with_nothing_observed(self) -> None:
        (check,) = measure.compare("a against b", case(y=floats(1, 2)), case(y=floats(1, 2)), "float32")
        assert (check.output, check.observed, check.allowed) == ("y", 0.0, 1e-4)

    def test_the_worst_output_is_named_with_observed_and_allowed(self) -> None:
        expected = case(good=floats(1, 2), bad=floats(1, 2), worst=floats(1, 2))
        observed = case(good=floats(1, 2), bad=floats(1, 2.02), worst=floats(1, 3))
        with pytest.raises(ParityError, match=r"a against b: output 'worst' differs by 0\.5 .* allowed is 0\.0001"):
            measure.compare("a against b", expected, observed, "float32")

    def test_a_difference_counts_against_the_largest_value_of_all_cases(self) -> None:
        expected = case(y=floats(1000)) + case(y=floats(1))
        observed = case(y=floats(1000)) + case(y=floats(1.05))
        (check,) = measure.compare("", expected, observed, "float32")
        assert check.observed == pytest.approx(5e-5, rel=0.01)

    def test_each_precision_has_its_own_tolerance(self) -> None:
        expected, observed = case(y=floats(-1, 0, 1)), case(y=floats(-1, 0, 1.01))
        for precision in ("float16", "int8-dynamic", "int8"):
            assert measure.compare("", expected, observed, precision)[0].observed > 0
        with pytest.raises(ParityError):
            measure.compare("", expected, observed, "float32")

    def test_a_constant_offset_does_not_hide_behind_a_large_mean(self) -> None:
        expected = case(y=floats(1000, 1001, 1002))
        with pytest.raises(ParityError, match="rms"):
            measure.compare("", expected, case(y=floats(1002, 1001, 1000)), "int8")

    @pytest.mark.parametrize("wrong", [np.nan, np.inf])
    def test_a_value_that_is_no_number_is_refused(self, wrong: float) -> None:
        with pytest.raises(ParityError, match="output 'y' has NaN or infinity"):
            measure.compare("", case(y=floats(1, 2)), case(y=floats(1, wrong)), "int8")

    def test_a_number_where_the_source_has_none_is_refused(self) -> None:
        with pytest.raises(ParityError, match="output 'y' has NaN or infinity"):
            measure.compare("", case(y=floats(1, np.nan)), case(y=floats(1, 2)), "int8")

    def test_the_same_infinities_pass(self) -> None:
        answers = case(y=floats(-np.inf, np.nan, 3))
        assert measure.compare("", answers, answers, "float32")[0].observed == 0

    def test_integers_are_counted_not_measured(self) -> None:
        expected, observed = case(label=np.arange(100)), case(label=np.arange(100))
        observed[0]["label"][7] += 1_000_000
        (check,) = measure.compare("", expected, observed, "int8")
        assert (check.observed, check.unit) == (0.01, "share of values changed")
        with pytest.raises(ParityError, match=r"'label' differs by 0\.01 \(share of values changed\), allowed is 0"):
            measure.compare("", expected, observed, "float32")

    def test_a_changed_shape_is_refused(self) -> None:
        with pytest.raises(ParityError, match=r"output 'y' is float32\[1, 2\], expected float32\[2\]"):
            measure.compare("", case(y=floats(1, 2)), case(y=floats(1, 2)[None]), "float32")

    def test_a_changed_dtype_is_refused(self) -> None:
        with pytest.raises(ParityError, match=r"output 'y' is float64\[1\], expected float32\[1\]"):
            measure.compare("", case(y=floats(1)), case(y=np.array([1.0])), "float32")

    def test_an_output_of_zeros_allows_nothing_else(self) -> None:
        zeros = case(y=floats(0, 0))
        assert measure.compare("", zeros, zeros, "int8")[0].observed == 0
        with pytest.raises(ParityError):
            measure.compare("", zeros, case(y=floats(0, 1e-6)), "int8")


class TestGoldenChoice:
    def test_cases_that_differ_are_preferred(self) -> None:
        results = [case(y=floats(x))[0] for x in (0, 0.001, 5, 0.002, -5, 0.003)]
        choice = measure.choose_golden([{}] * 6, results, "float32")
        assert {0, 2, 4} < set(choice.cases)
        assert choice.blind == ()

    def test_an_output_that_never_changes_is_blind(self) -> None:
        results = [case(alive=floats(x), dead=floats(7))[0] for x in range(4)]
        assert measure.choose_golden([{}] * 4, results, "float32").blind == ("dead",)

    def test_a_change_within_the_tolerance_is_blind_too(self) -> None:
        results = [case(y=floats(100 + x / 1000))[0] for x in range(4)]
        assert measure.choose_golden([{}] * 4, results, "float32").blind == ("y",)

    def test_integers_that_change_are_seen(self) -> None:
        results = [case(label=np.array([x]))[0] for x in range(4)]
        choice = measure.choose_golden([{}] * 4, results, "int8")
        assert (choice.blind, choice.tolerance) == ((), {"label": 0.0})

    def test_the_target_may_say_how_far_its_kernels_differ(self) -> None:
        results = [case(y=floats(x))[0] for x in (0, 10)]
        assert measure.choose_golden([{}] * 2, results, "int8").tolerance == {"y": 0.5}
        assert measure.choose_golden([{}] * 2, results, "int8", 0.08).tolerance == {"y": 0.8}

    def test_large_answers_leave_two_cases(self) -> None:
        results = [case(y=np.full(1 << 20, x, np.float32))[0] for x in range(6)]
        assert len(measure.choose_golden([{}] * 6, results, "float32").cases) == 2


INPUTS = [TensorSpec("x", "float32", (None, 4)), TensorSpec("ids", "int64", (None, None)), TensorSpec("k", "int32", ())]


def save_probe_inputs(request: dict[str, str]) -> dict[str, str]:
    """Run by a child of the test below."""
    probe.save_feeds(Path(request["out"]), probe.make_feeds(INPUTS, None))
    return {}


class TestProbeInputs:
    def test_they_are_the_same_in_every_process(self, tmp_path: Path) -> None:
        for out in ("a", "b"):
            worker.run("test_parity:save_probe_inputs", {"out": str(tmp_path / out)}, tmp_path / "log")
        probe.save_feeds(tmp_path / "here", probe.make_feeds(INPUTS, None))
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "here").read_bytes()

    def test_dynamic_dimensions_take_several_sizes(self) -> None:
        feeds = probe.make_feeds(INPUTS, None)
        assert {feed["x"].shape for feed in feeds} == {(1, 4), (2, 4), (3, 4)}
        assert {feed["ids"].shape[1] for feed in feeds} == {32, 64}
        assert all(isinstance(feed["k"], np.ndarray) and feed["k"].shape == () for feed in feeds)

    def test_integers_index_the_smallest_table(self) -> None:
        for feed in probe.make_feeds(INPUTS, None):
            assert set(np.unique(feed["ids"])) <= {0, 1}

    def test_they_survive_a_file(self, tmp_path: Path) -> None:
        spec = TensorSpec("a/b c.0", "float32", (None, 2))
        feeds = probe.make_feeds([spec], None)
        probe.save_feeds(tmp_path / "feeds.npz", feeds)
        for kept, feed in zip(probe.load_feeds(tmp_path / "feeds.npz"), feeds, strict=True):
            np.testing.assert_array_equal(kept[spec.name], feed[spec.name])

    def test_with_calibration_data_they_are_real_samples(self, tmp_path: Path) -> None:
        samples = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
        np.savez(tmp_path / "c.npz", x=samples)
        spool(
            {
                "source": str(tmp_path / "c.npz"),
                "inputs": [convert.spec_to_json(INPUTS[0])],
                "labels": False,
                "out": str(tmp_path),
            }
        )
        feeds = probe.make_feeds(INPUTS[:1], Samples(tmp_path, INPUTS[:1]))
        assert len(feeds) == 32
        assert {len(feed["x"]) for feed in feeds} == {1, 2, 3}
        rows = {row.tobytes() for row in samples}
        assert all(row.tobytes() in rows for feed in feeds for row in feed["x"])

    def test_a_length_that_calibration_data_has_once_is_asked_in_another_too(self) -> None:
        feeds = [{"ids": np.arange(10).reshape(1, 10)}, {"ids": np.arange(20).reshape(2, 10)}]
        longer, shorter = (probe.stretched(INPUTS[1:2], feeds, factor) for factor in probe.STRETCHES)
        assert [feed["ids"].shape for feed in longer] == [(1, 20), (2, 20)]
        assert [feed["ids"].shape for feed in shorter] == [(1, 5), (2, 5)]

    def test_dimensions_that_vary_already_are_left(self) -> None:
        assert probe.stretched(INPUTS[:1], [{"x": np.zeros((n, 4), np.float32)} for n in (1, 2)], 2.0) == []


def test_an_output_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ConversionError, match="output 'y' has dtype complex64"):
        probe.observed_specs(["y"], case(y=np.zeros(2, np.complex64)))


def npz(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "calibration.npz", **arrays)
    return folder / "calibration.npz"


CHILDREN = """
import os, signal, sys
from edge_infer.errors import UsageError

def answers(request): return {"twice": 2 * request["number"]}
def refuses(request): raise UsageError("this option is wrong")
def raises(request): raise ValueError("\\n\\nthe reason\\nand pages of more")
def dies(request): os.kill(os.getpid(), signal.SIGSEGV)
def is_killed(request): os.kill(os.getpid(), signal.SIGKILL)
def leaves(request): sys.exit(3)
def chatters(request):
    for _ in range(100_000): print("noise noise noise")
    print("the last words", file=sys.stderr, flush=True)
    raise ValueError("after much noise")
def litters(request):
    import tempfile
    return {"left": tempfile.mkdtemp()}
"""


class TestWorker:
    @pytest.fixture(autouse=True)
    def children(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "children.py").write_text(CHILDREN)
        monkeypatch.syspath_prepend(str(tmp_path))
        self.log = tmp_path / "log.txt"

    def call(self, name: str, **request: object) -> dict[str, object]:
        return worker.run(f"children:{name}", request, self.log)

    def test_data_goes_there_and_back(self) -> None:
        assert self.call("answers", number=21) == {"twice": 42}

    def test_our_own_errors_keep_their_type(self) -> None:
        with pytest.raises(UsageError, match="this option is wrong"):
            self.call("refuses")

    def test_any_other_error_becomes_one_line_with_a_log(self) -> None:
        with pytest.raises(ConversionError) as failure:
            self.call("raises")
        assert str(failure.value) == "ValueError: the reason"
        assert "and pages of more" in failure.value.log

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("dies", "was ended by SIGSEGV"),
            ("is_killed", "was ended by SIGKILL (out of memory?)"),
            ("leaves", "ended with status 3 and no answer"),
        ],
    )
    def test_a_child_that_ends_early_is_a_failed_conversion(self, name: str, words: str) -> None:
        with pytest.raises(ConversionError) as failure:
            self.call(name)
        assert f"children:{name} {words}" in str(failure.value)

    def test_of_much_output_the_end_is_kept(self) -> None:
        with pytest.raises(ConversionError, match="after much noise") as failure:
            self.call("chatters")
        assert len(failure.value.log) == 20_000
        assert "the last words" in failure.value.log
        assert self.log.stat().st_size > 1_000_000

    def test_nothing_a_child_leaves_in_the_temporary_folder_stays(self) -> None:
        assert not Path(str(self.call("litters")["left"])).exists()


@pytest.fixture
def older_bundle(packaged, tmp_path: Path) -> Bundle:
    """What lay at the output path before."""
    shutil.copytree(packaged("torch.onnx", "onnx", "float32").path, tmp_path / "old.edge")
    return open_bundle(tmp_path / "old.edge")


def test_a_converter_that_computes_something_else_is_found_out(
    models: Path, older_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sabotaged(model: convert.Read) -> list[probe.Feed]:
        answers = honest(model)
        answers[3]["digit"] = answers[3]["digit"] + np.float32(0.01)
        return answers

    honest = convert.Read.answers
    monkeypatch.setattr(convert.Read, "answers", sabotaged)
    with pytest.raises(ParityError, match=r"float32 against the source: output 'digit' differs by 0\.01"):
        package(Request(models / "torch.onnx", "cpu-x86_64", older_bundle.path, "onnx", "float32"))
    assert open_bundle(older_bundle.path) == older_bundle
    assert [path.name for path in older_bundle.path.parent.iterdir()] == ["old.edge"]


def wide_range_model(folder: Path) -> Path:
    """Hidden values of 1e6 beside some of 1e-3, of which only the small ones reach the output."""
    first = np.repeat(np.random.default_rng(1).standard_normal((4, 8)), 2, axis=1).astype(np.float32)
    first *= np.where(np.arange(16) % 2, 1e-3, 1e6).astype(np.float32)
    second = (np.arange(16) % 2)[:, None].astype(np.float32) * np.ones((16, 2), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    weights = [numpy_helper.from_array(first, "a"), numpy_helper.from_array(second, "b")]
    io = [value("x", TensorProto.FLOAT, ["n", 4])], [value("y", TensorProto.FLOAT, ["n", 2])]
    return save(folder / "wide.onnx", nodes, *io, weights)


def test_auto_passes_over_what_quantization_destroys(tmp_path: Path) -> None:
    samples = npz(tmp_path, x=np.random.default_rng(2).standard_normal((40, 4)).astype(np.float32))
    request = Request(wide_range_model(tmp_path), "cpu-x86_64", tmp_path / "out.edge", "onnx", calibration=samples)
    done = package(request)
    assert done.chosen.precision == "float32"
    assert [item.precision for item in done.dropped][:2] == ["int8", "int8-mixed"]
    assert isinstance(done.dropped[0].error, ParityError)


def test_a_network_that_ignores_its_input_is_reported_blind(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "bias"], ["dead"]),
        helper.make_node("Neg", ["x"], ["alive"]),
    ]
    outputs = [value(name, TensorProto.FLOAT, ["n", 4]) for name in ("dead", "alive")]
    weights = [numpy_helper.from_array(floats(0), "zero"), numpy_helper.from_array(floats(1, 2, 3, 4), "bias")]
    source = save(tmp_path / "blind.onnx", nodes, [value("x", TensorProto.FLOAT, ["n", 4])], outputs, weights)
    done = package(Request(source, "cpu-x86_64", tmp_path / "out.edge", "onnx", "float32"))
    assert done.bundle.manifest.golden.blind == ("dead",)


def test_probe_inputs_of_one_source_are_the_same_from_run_to_run(models: Path, tmp_path: Path) -> None:
    source = convert.source.read_source(models / "torch.onnx")
    runs = [Steps(tmp_path / run, tmp_path / "log", lambda step: None) for run in ("a", "b")]
    folders = [convert.read(source, convert.ReadOptions(), run).made.folder for run in runs]
    assert folders[0] != folders[1]
    assert (folders[0] / INPUTS_FILE).read_bytes() == (folders[1] / INPUTS_FILE).read_bytes()
