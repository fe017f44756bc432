"""Where a model's time goes: real profilers of real engines, the table, the trace, and what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import converter_models
import numpy as np
import onnx
import pytest
import tflite_models
import torch
import torch_models
from conftest import ROOT, SOURCES
from handmade import make_bundle

from edge_infer.bundle import Bundle, open_bundle
from edge_infer.convert.tflite_files import SIGNATURE
from edge_infer.errors import EngineError, UsageError
from edge_infer.manifest import Artifact, Golden, Requirement, TensorSpec
from edge_infer.package import Request, package
from edge_infer.runtime import commands, engine_cache, profile
from edge_infer.runtime.engines import EngineOptions, litert
from edge_infer.runtime.engines import onnx as onnx_engine
from edge_infer.runtime.golden import read_golden, write_golden
from edge_infer.runtime.profile import CALLER, Event, Limit, Profile, self_times

Packaged = Callable[..., Bundle]

#: Kinds of operators that the digits network has, as each engine names them.
KINDS = {
    "tflite": ("Convolution", "Fully Connected", "Max Pooling", "Softmax"),
    "onnx": ("Conv", "Gemm", "MaxPool", "Softmax"),
    "torchscript": ("aten::_convolution", "aten::linear", "aten::max_pool2d", "aten::softmax"),
}


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine's own profile is a file: neither the current nor the temporary folder may keep it."""
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert list(here.iterdir()) == list(temporary.iterdir()) == []


def taken(bundle: Bundle, runs: int = 5, cache: Path | None = None) -> Profile:
    asked = read_golden(bundle)[0][0]
    arrays = [asked[spec.name] for spec in bundle.manifest.inputs]
    return profile.take(bundle, EngineOptions(threads=1, cache=cache), arrays, Limit(runs, 60))


def own_times(found: Profile) -> dict[str, float]:
    """Microseconds by kind of operator."""
    times: dict[str, float] = {}
    for run in found.runs:
        for event, own in self_times(run.events):
            times[event.operator] = times.get(event.operator, 0) + own
    return times


def counts(found: Profile) -> dict[str, int]:
    """How many operators of each kind a run has."""
    rows = profile.summary(found)["operators"]
    return {row["operator"]: row["calls"] // len(found.runs) for row in rows}


def check_times(found: Profile) -> None:
    """No thread worked longer than the caller waited, and what is counted is in the run."""
    for run in found.runs:
        spent: dict[str, float] = {}
        for event, own in self_times(run.events):
            spent[event.thread] = spent.get(event.thread, 0) + own
            assert 0 <= own <= event.duration_us
            assert event.start_us >= -1 and event.end_us <= run.span.duration_us + 1
        assert max(spent.values()) <= run.span.duration_us


# -- what a profile says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("format", SOURCES)
def test_the_operators_of_a_model_with_their_times(
    packaged: Packaged, tmp_path: Path, format: str, precision: str
) -> None:
    bundle = packaged(SOURCES[format], format, precision)
    found = taken(bundle, cache=tmp_path / "cache")
    assert found.info.package in [requirement.package for requirement in bundle.manifest.artifact.requires]
    assert len(found.runs) == 5
    check_times(found)
    kinds = counts(found)
    if precision == "float32":
        for word in KINDS[format]:
            assert any(kind.startswith(word) for kind in kinds), f"no {word} among {sorted(kinds)}"
    convolutions = [count for kind, count in kinds.items() if "conv" in kind.lower() and "convert" not in kind.lower()]
    assert sum(convolutions) == 2
    assert max(own_times(found).values()) > 0


@pytest.mark.parametrize("format", SOURCES)
def test_bench_gives_the_profile_beside_what_it_gives_otherwise(
    packaged: Packaged, tmp_path: Path, format: str
) -> None:
    bundle = packaged(SOURCES[format], format, "float32")
    answer = commands.bench(bundle.path, threads=1, runs=40, seconds=30, profile=True, trace=tmp_path / "trace.json")
    found = answer["profile"]
    assert answer["runs"] == 40 and found["runs"] == profile.MOST_RUNS
    assert found["unprofiled_p50_ms"] == answer["p50_ms"]
    assert all(row["calls"] % found["runs"] == 0 for row in found["operators"])
    times = [row["total_ms"] for row in found["operators"]]
    assert times == sorted(times, reverse=True)
    shares = [row["share"] for row in (*found["operators"], found["rest"])]
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert len(found["slowest"]) == min(found["nodes"], profile.SLOWEST)
    assert found["trace"] == str(tmp_path / "trace.json")
    assert json.loads(json.dumps(found)) == found
    lines = profile.table(found)
    assert lines[-1] == f"trace: {tmp_path}/trace.json"
    for row in (*found["operators"], *found["slowest"]):
        assert any(row["operator"] in line and f" {row['calls']} " in line for line in lines)


def test_layers_of_torchscript_have_their_names(packaged: Packaged) -> None:
    found = profile.summary(taken(packaged(SOURCES["torchscript"], "torchscript", "float32")))
    names = {row["name"]: row["operator"] for row in found["slowest"]}
    layers = {name: kind for name, kind in names.items() if not name.startswith("operator ")}
    assert list(layers.values()).count("aten::_convolution") == list(layers.values()).count("aten::linear") == 2
    weights = set(torch.jit.load(packaged(SOURCES["torchscript"], "torchscript", "float32").file("model.torchscript"))
                  .state_dict())  # fmt: skip
    assert all(f"{name}.weight" in weights or f"module.{name}.weight" in weights for name in layers)


# -- what is timed is what runs ----------------------------------------------------------------------------------


def test_onnx_is_profiled_as_it_was_optimized_for_the_processor(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 0)
    found = taken(packaged(SOURCES["onnx"], "onnx", "float32"), cache=tmp_path)
    (optimized,) = tmp_path.glob(f"*/{onnx_engine.MODEL}")
    nodes = onnx.load(str(optimized), load_external_data=False).graph.node
    timed = {(event.name, event.operator) for event in found.runs[0].events}
    assert timed == {(node.name, node.op_type) for node in nodes}


def test_tflite_is_profiled_over_its_mapped_weights(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = packaged(SOURCES["tflite"], "tflite", "float32")
    small = taken(bundle, cache=tmp_path)
    assert small.notes[0].startswith("timed in a compiled model")
    assert not tmp_path.joinpath("cache").exists() and not list(tmp_path.glob(f"*/{litert.WEIGHTS}"))
    monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 0)
    mapped = taken(bundle, cache=tmp_path)
    assert list(tmp_path.glob(f"*/{litert.WEIGHTS}"))
    assert mapped.notes == small.notes[1:] and counts(mapped) == counts(small)


def test_the_threads_that_were_asked_for_are_profiled(packaged: Packaged) -> None:
    bundle = packaged(SOURCES["onnx"], "onnx", "float32")
    asked = read_golden(bundle)[0][0]
    found = profile.take(bundle, EngineOptions(threads=2), [asked["image"]], Limit(1, 60))
    assert found.info.threads == 2 and {event.thread for event in found.runs[0].events} == {CALLER}


# -- operators within operators ----------------------------------------------------------------------------------


def test_a_branch_of_onnx_is_not_counted_twice(tmp_path: Path) -> None:
    source = converter_models.deciding(tmp_path / "if.onnx")
    path = tmp_path / "if.edge"
    package(Request(source, "cpu-x86_64", path, "onnx", "float32", name="if"))
    found = taken(open_bundle(path), runs=3)
    assert counts(found)["If"] == counts(found)["MatMul"] == 1
    check_times(found)
    for run in found.runs:
        own = {event.operator: (event, time) for event, time in self_times(run.events)}
        outer, inner = own["If"][0], own["MatMul"][0]
        assert outer.start_us <= inner.start_us < outer.end_us
        assert own["If"][1] <= outer.duration_us - (min(inner.end_us, outer.end_us) - inner.start_us)


def test_a_loop_of_torchscript_counts_each_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.jit.script(torch_models.Halving().eval()).save(str(tmp_path / "halving.pt"))
    path = tmp_path / "halving.edge"
    inputs = (TensorSpec("x", "float32", (None, 4)),)
    package(Request(tmp_path / "halving.pt", "cpu-x86_64", path, "torchscript", "float32", inputs=inputs))
    found = taken(open_bundle(path), runs=3)
    check_times(found)
    kinds = counts(found)
    assert kinds["aten::linear"] == 1 and kinds["aten::abs"] == kinds["aten::max"]
    names = {row["name"] for row in profile.summary(found)["slowest"]}
    assert all(name.startswith("operator ") for name in names)


def looping(folder: Path) -> Bundle:
    """Dense layers around an operator that no delegate takes, then a loop of three rounds with the same within."""
    net = tflite_models.Net()
    x = net.input("x", (1, 32))
    zero = net.constant("zero", np.zeros((), np.int32))
    y = net.dense(x, "before", tflite_models.weights(1, 32, 32))
    y = net.call("CUMSUM", [y, net.constant("axis", np.ones((), np.int32))], [net.tensor("summed", (1, 32))],
                 tflite_models.schema.CumsumOptionsT())  # fmt: skip
    y = net.dense(y, "after", tflite_models.weights(2, 32, 32))
    options = tflite_models.schema.WhileOptionsT()
    options.condSubgraphIndex, options.bodySubgraphIndex = 1, 2
    outputs = [net.tensor("rounds", (), "int32"), net.tensor("looped", (1, 32))]
    net.call("WHILE", [zero, y], outputs, options)
    y = net.dense(outputs[1], "last", tflite_models.weights(4, 32, 32))
    for number in (1, 2):
        sub = tflite_models.Net()
        sub.model = net.model
        net.model.subgraphs.append(sub.graph)
        step, value = sub.input("step", (), "int32"), sub.input("value", (1, 32))
        if number == 1:
            less = sub.tensor("less", (), "int32")
            sub.graph.tensors[less].type = tflite_models.TYPES.BOOL
            three = sub.constant("three", np.full((), 3, np.int32))
            sub.call("LESS", [step, three], [less], tflite_models.schema.LessOptionsT())
            sub.graph.outputs = [less]
        else:
            one = sub.constant("one", np.ones((), np.int32))
            following = sub.call("ADD", [step, one], [sub.tensor("next", (), "int32")],
                                 tflite_models.schema.AddOptionsT())  # fmt: skip
            sub.graph.outputs = [following, sub.dense(value, "within", tflite_models.weights(3, 32, 32))]
    folder.mkdir()
    model = net.finish(folder / "loop.tflite", {"x": x}, {"y": y})
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(model)).get_signature_runner(SIGNATURE)
    asked = {"x": np.random.default_rng(1).standard_normal((1, 32)).astype(np.float32)}
    inputs, outputs_ = (TensorSpec("x", "float32", (1, 32)),), (TensorSpec("y", "float32", (1, 32)),)
    write_golden(folder / "golden.npz", inputs, outputs_, [(asked, runner(**asked))])
    files = {"model.tflite": model.read_bytes(), "golden.npz": (folder / "golden.npz").read_bytes()}
    artifact = Artifact(
        "tflite", "float32", "model.tflite", (Requirement("ai-edge-litert", "1.4.0"),), (), ("cpu",),
        signature=SIGNATURE,
    )  # fmt: skip
    return make_bundle(
        folder / "loop.edge", files, artifact=artifact, inputs=inputs, outputs=outputs_,
        golden=Golden("golden.npz", 1, {"y": 1e-4}),
    )  # fmt: skip


def test_loops_and_delegates_of_tflite_are_told_apart(tmp_path: Path) -> None:
    found = taken(looping(tmp_path / "loop"), runs=3)
    check_times(found)
    kinds = counts(found)
    (dense,) = [kind for kind in kinds if kind.startswith("Fully Connected")]
    assert (kinds["WHILE"], kinds["CUMSUM"], kinds["LESS"], kinds[dense]) == (1, 1, 4, 6)
    for run in found.runs:
        (loop,) = [event for event in run.events if event.operator == "WHILE"]
        layers = [event for event in run.events if event.operator == dense]
        within = [event for event in layers if loop.start_us <= event.start_us < loop.end_us]
        assert [len({event.name for event in group}) for group in (layers, within)] == [4, 1]
        assert len(within) == 3 and layers[-1].start_us >= loop.end_us


def test_enclosed_time_is_taken_from_the_innermost_that_encloses_it() -> None:
    events = [
        Event("outer", "If", 0, 100),
        Event("middle", "Loop", 10, 50),
        Event("first", "Add", 10, 20),
        Event("second", "Add", 30, 31),  # a clock of whole microseconds: it ends after its Loop
        Event("work", "copy", 5, 90, inner=True),
        Event("elsewhere", "Add", 0, 100, thread="cuda"),
        Event("later", "Mul", 100, 7),
    ]
    own = {event.name: time for event, time in self_times(reversed(events))}
    assert own == {"outer": 50, "middle": 0, "first": 20, "second": 31, "elsewhere": 100, "later": 7}


# -- the trace ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SOURCES)
def test_the_trace_is_one_that_viewers_open(packaged: Packaged, tmp_path: Path, format: str) -> None:
    bundle = packaged(SOURCES[format], format, "float32")
    found = taken(bundle, runs=4)
    path = tmp_path / "trace.json"
    path.write_text("an older one")
    profile.write_trace(found, "digits", path)
    assert [other.name for other in tmp_path.iterdir() if "trace" in other.name] == ["trace.json"]
    document = json.loads(path.read_text())
    assert found.info.package in document["otherData"]["engine"]
    rows = document["traceEvents"]
    assert {row["ph"] for row in rows} == {"M", "X"}
    names = {row["tid"]: row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    timed = [row for row in rows if row["ph"] == "X"]
    for row in timed:
        assert row.keys() == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"}
        assert row["name"] and row["pid"] == os.getpid() and row["tid"] in names
        assert row["ts"] >= 0 and row["dur"] >= 0
    runs = [row for row in timed if row["cat"] == "run"]
    assert [row["args"]["number"] for row in runs] == [0, 1, 2, 3]
    assert all(a["ts"] + a["dur"] <= b["ts"] + 0.01 for a, b in pairwise(runs))
    operators = [row for row in timed if row["cat"] == "operator"]
    assert len(operators) == sum(not event.inner for run in found.runs for event in run.events)
    for row in operators:
        assert any(run["ts"] - 1 <= row["ts"] and row["ts"] + row["dur"] <= run["ts"] + run["dur"] + 1 for run in runs)


# -- refusals ----------------------------------------------------------------------------------------------------


def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_measured(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = packaged(SOURCES["onnx"], "onnx", "float32")
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr(commands, "load", None)
    for path, words in (
        (tmp_path / "no" / "trace.json", f"there is no folder {tmp_path}/no to write the trace in"),
        (bundle.path, "expected a name that ends in .json"),
        (tmp_path / "folder.json", "which is a folder"),
    ):
        with pytest.raises(UsageError, match=words.replace(".", r"\.")):
            commands.bench(bundle.path, profile=True, trace=path)


@pytest.mark.parametrize("format", SOURCES)
def test_a_run_that_fails_is_one_sentence(packaged: Packaged, tmp_path: Path, format: str) -> None:
    bundle = packaged(SOURCES[format], format, "float32")
    with pytest.raises(EngineError) as caught:
        profile.take(bundle, EngineOptions(1), [np.zeros((1, 2), np.float32)], Limit(3, 60))
    assert "\n" not in str(caught.value)
    assert len(taken(bundle, runs=2).runs) == 2  # no profiler of the failed one is in the way


def test_litert_without_the_library_of_compiled_models_is_refused(
    packaged: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litert, "_library_path", lambda: None)
    with pytest.raises(EngineError, match="profiles compiled models alone, and digits cannot be one here"):
        taken(packaged(SOURCES["tflite"], "tflite", "float32"))


def test_a_model_that_fails_when_it_is_compiled_is_refused(tmp_path: Path) -> None:
    """A child finds out: the golden answers here are not the model's."""
    bundle = looping(tmp_path / "loop")
    arrays = {"in.0.0": np.ones((1, 32), np.float32), "out.0.0": np.ones((1, 32), np.float32)}
    np.savez(tmp_path / "golden.npz", **arrays)
    files = {
        "model.tflite": bundle.file("model.tflite").read_bytes(),
        "golden.npz": (tmp_path / "golden.npz").read_bytes(),
    }
    manifest = bundle.manifest
    wrong = make_bundle(
        tmp_path / "wrong.edge", files, artifact=manifest.artifact, inputs=manifest.inputs, outputs=manifest.outputs,
        golden=replace(manifest.golden),
    )  # fmt: skip
    with pytest.raises(EngineError, match="profiles compiled models alone, which failed on this one: golden case 0"):
        taken(wrong)


def test_the_classic_runtime_has_no_profile(
    packaged: Packaged, device_python: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = packaged(SOURCES["tflite"], "tflite", "float32")
    done = subprocess.run(
        [str(device_python("tflite-runtime")), "-m", "edge_infer", "bench", str(bundle.path), "--profile"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == (
        "python -m edge_infer: tflite-runtime 2.14.0 has no profiler of operators; "
        "install ai-edge-litert 2.1.6 or later, or leave out --profile\n"
    )


# -- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SOURCES)
def test_the_command_line_shows_the_table_and_nothing_else(packaged: Packaged, tmp_path: Path, format: str) -> None:
    bundle = packaged(SOURCES[format], format, "float32")
    line = [sys.executable, "-m", "edge_infer", "bench", str(bundle.path), "--runs", "3", "--profile"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "profile of 3 runs, " in done.stdout and " ms without a profiler\n" in done.stdout
    assert "\n(no operator) " in done.stdout and "trace:" not in done.stdout
    assert KINDS[format][0] in done.stdout
    done = subprocess.run([*line, str(tmp_path / "t.json"), "--json"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["profile"]["trace"] == str(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


@pytest.mark.parametrize("format", SOURCES)
def test_who_only_times_pays_for_no_profiler(packaged: Packaged, format: str) -> None:
    bundle = packaged(SOURCES[format], format, "float32")
    code = (
        "import sys\nfrom edge_infer.runtime.cli import main\n"
        f"assert main(['bench', {str(bundle.path)!r}, '--runs', '1', '--json']) == 0\n"
        "print(sorted(name for name in sys.modules if name.startswith('edge_infer') and 'profile' in name))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
