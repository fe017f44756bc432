"""Converters in environments of their own, and the routes from ONNX to TFLite and TorchScript that stand on them."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

import converter_models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT

from edge_infer import probe, worker
from edge_infer.cli import converters as command
from edge_infer.convert import environments, spec_to_json, tflite_files
from edge_infer.convert.environments import child
from edge_infer.errors import ConversionError, UsageError
from edge_infer.manifest import TensorSpec
from edge_infer.runtime.cli import report

#: Where the real converters are kept from one test run to the next: 500 MB.
HOME = ROOT / "build" / "converters-home"
#: Of the largest value of an output: float32 in another order of summation.
TOLERANCE = 5e-5


# -- environments -----------------------------------------------------------------------------------------------------


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the lock of ``tiny``, whose one wheel lies beside it; pip looks nowhere else."""
    folder = tmp_path / "locks"
    folder.mkdir()
    wheel = make_wheel(folder, "1.0")
    write_lock(folder, wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, version: str) -> Path:
    path = folder / f"tiny-{version}-py3-none-any.whl"
    about = f"tiny-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny.py", f"version = {version!r}\n")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", f"tiny.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    return path


def write_lock(folder: Path, wheel: Path, digest: str | None = None) -> None:
    digest = digest or hashlib.sha256(wheel.read_bytes()).hexdigest()
    version = wheel.name.split("-")[1]
    (folder / "tiny.txt").write_text(
        f"# does: nothing much\n# takes: a moment\ntiny=={version} \\\n    --hash=sha256:{digest}\n"
    )


def quiet(step: str) -> None:
    pass


def version_in(python: Path) -> str:
    question = [str(python), "-I", "-c", "import tiny; print(tiny.version)"]
    return subprocess.run(question, capture_output=True, text=True, check=True).stdout.strip()


def left(home: Path) -> list[str]:
    """What lies among the converters, other than lock files."""
    return sorted(path.name for path in (home / "converters").iterdir() if path.suffix != ".lock")


def test_what_is_missing_says_how_to_install_it_and_what_that_takes(locks: Path) -> None:
    with pytest.raises(ConversionError, match=r"edge-infer converters install tiny \(takes a moment\)"):
        environments.python_of("tiny", locks)


def test_an_unknown_name_lists_the_known_ones(locks: Path) -> None:
    with pytest.raises(UsageError, match=r"no converter is called 'huge', there are: tiny"):
        environments.install("huge", quiet, locks)


def test_an_installed_converter_is_found_until_its_lock_changes_or_it_is_removed(locks: Path, own_home: Path) -> None:
    folder = environments.install("tiny", quiet, locks)
    assert version_in(environments.python_of("tiny", locks)) == "1.0"
    assert (environments.library_of("tiny", locks) / "tiny.py").is_file()
    said: list[str] = []
    assert environments.install("tiny", said.append, locks) == folder
    assert said == ["tiny is installed already"]

    write_lock(locks, make_wheel(locks, "2.0"))
    with pytest.raises(ConversionError, match="not installed"):
        environments.python_of("tiny", locks)
    assert environments.locks_of("tiny", locks)[0].folder != folder
    (row,) = environments.installed(locks)
    assert row["path"] == str(folder) and not row["current"]

    assert environments.remove("tiny", locks) > 1_000_000  # pip alone is more
    assert left(own_home) == []


def test_a_wheel_of_another_hash_is_refused_and_leaves_nothing(locks: Path, own_home: Path) -> None:
    write_lock(locks, locks / "tiny-1.0-py3-none-any.whl", digest="0" * 64)
    with pytest.raises(ConversionError, match=r"tiny cannot be installed: .*[Hh]ash"):
        environments.install("tiny", quiet, locks)
    assert left(own_home) == []


def test_an_interruption_leaves_nothing(locks: Path, own_home: Path) -> None:
    def interrupt(step: str) -> None:
        if "Installing" in step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environments.install("tiny", interrupt, locks)
    assert left(own_home) == []


INSTALL = """
import sys
from pathlib import Path
from edge_infer.convert import environments
print(environments.install("tiny", lambda step: print(step, flush=True), Path(sys.argv[1])))
"""


def start_install(locks: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", INSTALL, str(locks)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert any(word in line for line in process.stdout), f"ended without {word!r}"


def test_a_second_installation_waits_and_clears_up_after_a_killed_one(locks: Path, own_home: Path) -> None:
    with start_install(locks) as first:
        until(first, "making an environment")
        with start_install(locks) as second:
            until(second, "waiting for another process")
            first.kill()
            words, _ = second.communicate()
            assert second.returncode == 0
    folder = environments.python_of("tiny", locks).parent.parent
    assert str(folder) in words
    assert left(own_home) == [folder.name]
    assert version_in(folder / "bin" / "python") == "1.0"


def test_interpreters_that_do_not_start_are_passed_over(
    locks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = tmp_path / "bin" / "python3.99"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\necho 'no such version' >&2\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(shim.parent), prepend=os.pathsep)
    (locks / "tiny.txt").rename(locks / "tiny-py399.txt")
    with pytest.raises(ConversionError, match=r"tiny needs Python 3\.99 with venv and pip, and none"):
        environments.find_python(environments.locks_of("tiny", locks))
    mine = locks / f"tiny-py3{sys.version_info.minor}.txt"
    mine.write_text("# last: only where no other is found\n" + (locks / "tiny-py399.txt").read_text())
    path, lock = environments.find_python(environments.locks_of("tiny", locks))
    assert lock.path == mine
    assert path.resolve() == Path(sys.executable).resolve()


def test_the_real_locks_pin_everything_and_name_no_host() -> None:
    assert environments.names() == ["onnx2fx", "onnx2tf"]
    for name in environments.names():
        for lock in environments.locks_of(name):
            text = lock.path.read_text()
            assert lock.does and lock.takes
            assert "://" not in text and "index" not in text
            packages = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
            assert packages and all("==" in line and line.endswith("\\") for line in packages)
    assert [lock.python for lock in environments.locks_of("onnx2tf")] == [(3, 13), (3, 12), (3, 11)]


def test_the_command_lists_installs_and_removes(
    locks: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    parser.set_defaults(program="edge-infer")
    command.add_command(parser.add_subparsers())

    def call(*words: str) -> dict[str, Any]:
        assert report(parser.parse_args(["converters", *words, "--json"])) == 0
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    monkeypatch.setattr(environments, "LOCKS", locks)
    (row,) = call("list")["converters"]
    assert row == {"name": "tiny", "version": "1.0", "does": "nothing much", "takes": "a moment", "installed": None}
    folder = call("install", "tiny")["path"]
    assert Path(folder).parent == own_home / "converters"
    assert call("list")["converters"][0]["installed"]["path"] == folder
    assert report(parser.parse_args(["converters", "list"])) == 0
    assert "installed, " in capsys.readouterr().out
    assert call("remove", "tiny")["freed_bytes"] > 1_000_000
    assert report(parser.parse_args(["converters", "install", "huge"])) == UsageError.exit_status
    assert "no converter is called 'huge'" in capsys.readouterr().err


# -- running them -----------------------------------------------------------------------------------------------------

PLENTY = child.Limits(memory_bytes=2**32, seconds=60)


def run_program(tmp_path: Path, body: str, limits: child.Limits = PLENTY) -> dict[str, Any]:
    """Run a program that gets ``request`` and answers with what it puts into ``answer``."""
    main = tmp_path / "main.py"
    main.write_text(
        "import json, os, subprocess, sys, time\n"
        "folder = sys.argv[1]\n"
        "request = json.load(open(folder + '/request.json'))\n"
        "answer = None\n" + textwrap.dedent(body) + "\n"
        "if answer is not None: json.dump(answer, open(folder + '/answer.json', 'w'))\n"
    )
    log = tmp_path / "log"
    return child.run("tiny", Path(sys.executable), main, {"number": 20}, log, limits)


def test_a_request_is_answered_and_nothing_leads_to_the_hosts_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nonsense")
    answer = run_program(
        tmp_path, "print('working'); answer = {'twice': 2 * request['number'], 'path': sys.path + [os.getcwd()]}"
    )
    assert answer["twice"] == 40
    assert "/nonsense" not in answer["path"] and str(tmp_path) not in answer["path"]
    assert (tmp_path / "log").read_text() == "working\n"


def test_a_refusal_is_the_programs_own_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as raised:
        run_program(tmp_path, "print('chatter'); answer = {'refused': 'the operator Odd has no form'}")
    assert str(raised.value) == "the operator Odd has no form"
    assert raised.value.log == ""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print('chatter'); answer = {'failed': 'ValueError: odd'}", "the converter tiny failed: ValueError: odd"),
        ("print('chatter', flush=True); os._exit(3)", "the converter tiny ended with status 3 and no answer"),
        ("print('chatter', flush=True); os.kill(os.getpid(), 11)", "the converter tiny was ended by SIGSEGV"),
        (
            "print('chatter'); open(folder + '/answer.json', 'w').write('{\"mod')",
            "the converter tiny ended with status 0 and no answer",
        ),
    ],
)
def test_a_failure_is_one_sentence_and_its_log(tmp_path: Path, body: str, words: str) -> None:
    with pytest.raises(ConversionError) as raised:
        run_program(tmp_path, body)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)
    assert "chatter" in raised.value.log


def test_too_much_memory_ends_it(tmp_path: Path) -> None:
    # Taken by a child of the program, as converters do that run others.
    body = """
        program = 'import time; taken = bytearray(os.urandom(1)) * 400_000_000; time.sleep(60)'
        subprocess.run([sys.executable, '-c', 'import os;' + program])
    """
    started = time.monotonic()
    with pytest.raises(
        ConversionError, match=r"took \d+ MB of memory, 200 MB are allowed.*EDGE_INFER_CONVERTER_MEMORY"
    ):
        run_program(tmp_path, body, child.Limits(memory_bytes=200_000_000, seconds=50))
    assert time.monotonic() - started < 50  # or it was the other cap


def test_too_much_time_ends_it_and_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    body = f"""
        sleeping = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
        open({str(pid)!r}, 'w').write(str(sleeping.pid))
        sleeping.wait()
    """
    with pytest.raises(
        ConversionError, match=r"had not ended after 3 s and was stopped; .*EDGE_INFER_CONVERTER_SECONDS"
    ):
        run_program(tmp_path, body, child.Limits(memory_bytes=2**32, seconds=3))
    assert_ended(int(pid.read_text()))


def assert_ended(pid: int) -> None:
    """A killed orphan is collected by the system's first process, a moment later."""
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} is still running")


def test_caps_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < child.limits().memory_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setenv(child.MEMORY_VARIABLE, "512")
    monkeypatch.setenv(child.SECONDS_VARIABLE, "7.5")
    assert child.limits() == child.Limits(512_000_000, 7.5)
    for nonsense in ("much", "-1", "0", "inf"):
        monkeypatch.setenv(child.SECONDS_VARIABLE, nonsense)
        with pytest.raises(UsageError, match="EDGE_INFER_CONVERTER_SECONDS"):
            child.limits()


# -- routes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real converters, installed once: 131 MB to download."""
    monkeypatch.setenv("EDGE_INFER_HOME", str(HOME))
    for name in ("onnx2tf", "onnx2fx"):
        environments.install(name, quiet)


class Made:
    """A converted model beside its source, and the answers of ONNX Runtime to probe inputs."""

    def __init__(self, format: str, source: Path, work: Path, child: bool = False) -> None:
        work.mkdir()
        self.session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
        self.names = [item.name for item in self.session.get_outputs()]
        types = {"tensor(float)": "float32", "tensor(int64)": "int64"}
        self.inputs = [
            TensorSpec(
                item.name, types[item.type], tuple(size if isinstance(size, int) else None for size in item.shape)
            )
            for item in self.session.get_inputs()
        ]
        self.feeds = probe.make_feeds(self.inputs, None)
        self.wanted = [dict(zip(self.names, self.session.run(self.names, feed), strict=True)) for feed in self.feeds]
        self.outputs = probe.observed_specs(self.names, self.wanted)
        probe.save_feeds(work.parent / f"{work.name}.npz", self.feeds)
        request = {
            "from": {"model": str(source)},
            "out": str(work),
            "inputs": [spec_to_json(spec) for spec in self.inputs],
            "outputs": [spec_to_json(spec) for spec in self.outputs],
            "feeds": str(work.parent / f"{work.name}.npz"),
        }
        step = f"edge_infer.convert.onnx_to_{format}"
        if child:  # as the packager calls it
            answer = worker.run(f"{step}:convert", request, work.parent / "log")
        else:
            answer = json.loads(json.dumps(importlib.import_module(step).convert(request)))
        self.details, self.tools, self.request = answer["details"], answer["tools"], request

    def on_to_tflite(self) -> None:
        """The TorchScript that was made takes one step more."""
        request = {**self.request, "from": self.details}
        answer = importlib.import_module("edge_infer.convert.torchscript_to_tflite").convert(request)
        self.details = json.loads(json.dumps(answer))["details"]

    def tflite(self) -> list[probe.Feed]:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=self.details["model"], num_threads=1)
        run = interpreter.get_signature_runner(self.details["signature"])
        return [run(**feed) for feed in self.feeds]

    def torchscript(self) -> list[probe.Feed]:
        module = torch.jit.load(self.details["model"])
        answers = []
        for feed in self.feeds:
            with torch.no_grad():
                given = module(*(torch.from_numpy(feed[spec.name]) for spec in self.inputs))
            assert isinstance(given, tuple)
            answers.append({name: tensor.numpy() for name, tensor in zip(self.names, given, strict=True)})
        return answers

    def check(self, answers: list[probe.Feed]) -> None:
        moved = 0.0
        for want, have in zip(self.wanted, answers, strict=True):
            assert sorted(have) == sorted(want)
            for name, array in want.items():
                assert have[name].shape == array.shape and have[name].dtype == array.dtype, name
                scale = max(1e-6, float(np.abs(array).max()))
                assert np.abs(have[name].astype(float) - array).max() <= TOLERANCE * scale, name
                if array.shape == self.wanted[0][name].shape:
                    moved = max(moved, float(np.abs(array - self.wanted[0][name]).max()) / scale)
        assert moved > 1e-2, "the model ignores its inputs, so nothing was compared"


def route(format: str, name: str, folder: Path, child: bool = False) -> Made:
    source = converter_models.slimmed(converter_models.export(name, folder / "model.onnx"))
    return Made(format, source, folder / "work", child)


TFLITE = ["mobile", "masks", "attention", "attention_any_length", "lstm_both_ways", "gru", "two_in_two_out"]


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("name", TFLITE)
def test_onnx_to_tflite_keeps_the_contract(name: str, tmp_path: Path) -> None:
    made = route("tflite", name, tmp_path)
    made.check(made.tflite())
    model = tflite_files.read(Path(made.details["model"]))
    assert tflite_files.operators(model)  # refuses custom ones
    signature = tflite_files.only_signature(model)
    assert {entry.name.decode() for entry in signature.inputs} == {spec.name for spec in made.inputs}
    assert {entry.name.decode() for entry in signature.outputs} == set(made.names)
    assert made.tools["onnx2tf"] == environments.version_of("onnx2tf")


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("name", list(converter_models.EXAMPLES))
def test_onnx_to_torchscript_keeps_the_contract(name: str, tmp_path: Path) -> None:
    made = route("torchscript", name, tmp_path)
    made.check(made.torchscript())
    module = torch.jit.load(made.details["model"])
    parameters = sum(parameter.numel() for parameter in module.parameters())
    trained = sum(parameter.numel() for parameter in converter_models.EXAMPLES[name].make().parameters())
    assert parameters > 0.85 * trained  # normalization may be folded into others


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("name", ["attention_any_length", "gru_any_batch", "two_in_two_out"])
def test_dynamic_sizes_reach_tflite_through_torchscript(name: str, tmp_path: Path) -> None:
    made = route("torchscript", name, tmp_path)
    made.on_to_tflite()
    made.check(made.tflite())


@pytest.mark.usefixtures("real")
def test_an_element_counted_from_the_end(tmp_path: Path) -> None:
    made = Made("torchscript", converter_models.last_step(tmp_path / "model.onnx"), tmp_path / "work")
    made.check(made.torchscript())


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_recurrent_node_that_names_its_first_output_alone(name: str, tmp_path: Path) -> None:
    """As torch's newer exporter writes it."""
    source = converter_models.slimmed(converter_models.export(name, tmp_path / "model.onnx"))
    model = onnx.load(source)
    (node,) = (node for node in model.graph.node if node.op_type == name.upper())
    del node.output[1:]
    onnx.save(model, source)
    made = Made("torchscript", source, tmp_path / "work")
    made.check(made.torchscript())


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("format", ["tflite", "torchscript"])
def test_the_digits_network_goes_all_ways(format: str, models: Path, tmp_path: Path) -> None:
    made = Made(format, models / "torch.onnx", tmp_path / "work")
    made.check(made.tflite() if format == "tflite" else made.torchscript())


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("format", ["tflite", "torchscript"])
def test_what_is_handed_through_and_alike_names_stay_apart(format: str, tmp_path: Path) -> None:
    made = Made(format, converter_models.handed_through(tmp_path / "model.onnx"), tmp_path / "work")
    made.check(made.tflite() if format == "tflite" else made.torchscript())


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lstm_any_length", r"one length and one batch; .*--input x=float32:1,\d+,6"),
        ("gru_any_batch", r"the operator GRU in layer /layer/GRU: .*--input x=float32:1,10,6"),
    ],
)
def test_onnx_to_tflite_refuses_dynamic_recurrences_and_says_how_to_fix_them(
    name: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=words):
        route("tflite", name, tmp_path)


@pytest.mark.usefixtures("real")
def test_onnx_to_tflite_refuses_custom_operators_by_name_and_layer(tmp_path: Path) -> None:
    with pytest.raises(
        ConversionError, match=r"the operator If in layer /choose/If only as the custom operator ONNX_IF"
    ):
        Made("tflite", converter_models.deciding(tmp_path / "model.onnx"), tmp_path / "work")


@pytest.mark.usefixtures("real")
def test_onnx_to_torchscript_refuses_what_a_trace_cannot_follow(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"the operator If in layer /choose/If decides while running"):
        Made("torchscript", converter_models.deciding(tmp_path / "model.onnx"), tmp_path / "work")


@pytest.mark.usefixtures("real")
def test_onnx_to_torchscript_names_an_operator_it_does_not_know(tmp_path: Path) -> None:
    from edge_infer.convert import onnx_to_torchscript

    model = onnx.load(converter_models.without_form(tmp_path / "model.onnx"))
    with pytest.raises(ConversionError, match=r"no operator Mystery \(layer /odd/Mystery\)"):
        onnx_to_torchscript._module(model, tmp_path)


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("format", ["tflite", "torchscript"])
def test_the_same_model_gives_the_same_bytes(format: str, tmp_path: Path) -> None:
    from edge_infer.quantize.torchscript import save_archive

    files = []
    for folder in (tmp_path / "one", tmp_path / "two, elsewhere"):
        folder.mkdir()
        path = Path(route(format, "lstm", folder, child=True).details["model"])
        if format == "torchscript":  # as the builder leaves it: without the places in this machine's files
            save_archive(torch.jit.load(str(path)), folder / "model.torchscript", {})
            path = folder / "model.torchscript"
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_without_its_converter_a_route_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"edge-infer converters install onnx2tf \(takes a download of 131 MB"):
        route("tflite", "gru", tmp_path)
