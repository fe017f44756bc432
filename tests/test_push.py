"""Pushes to a local device and over a real OpenSSH server: what arrives, what is refused, what stays."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import SOURCES
from sshd import SshServer

import edge_infer
from edge_infer.bundle import Bundle, describe_files, open_bundle, write_bundle
from edge_infer.cli import main
from edge_infer.delta import codecs
from edge_infer.deploy import conversation
from edge_infer.deploy.bases import Bases, bases_root
from edge_infer.deploy.conversation import Conversation, open_transport, payload
from edge_infer.deploy.incoming import PIECE_BYTES
from edge_infer.deploy.local import LocalTransport
from edge_infer.deploy.plan import PushOptions
from edge_infer.deploy.push import confirm, push, rollback, status
from edge_infer.deploy.receiver import Receiver
from edge_infer.deploy.transport import Transport
from edge_infer.errors import DeviceError, EdgeInferError, EngineMissing, ReleaseNotFound, SelfTestFailed, UsageError
from edge_infer.runtime import plan
from edge_infer.runtime.arrays import write_npz
from edge_infer.runtime.session import load
from edge_infer.store import Store

PYTHON = sys.executable


@dataclasses.dataclass
class Device:
    """A device of the tests: how to reach it, and where its store lies on this machine."""

    store: Path
    arguments: list[str]
    server: SshServer | None = None

    def transport(self) -> Transport:
        if self.server is None:
            return open_transport(f"local:{self.store}")
        return open_transport(self.server.alias, ssh_config=self.server.ssh_config)

    def push(self, bundle: Bundle, **options: object) -> object:
        with contextlib.closing(self.transport()) as transport:
            how = {name: options.pop(name) for name in ("dry_run", "progress") if name in options}
            return push(bundle, transport, PushOptions(**{"python": PYTHON, **options}), **how)  # type: ignore[arg-type]

    def answer(self, name: str, image: np.ndarray) -> np.ndarray:
        with load(self.current(name).path) as session:
            return session(image)

    def current(self, name: str) -> Bundle:
        return Store(self.store).open_current(name)


@pytest.fixture(scope="module")
def server_and_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SshServer, Path]]:
    store = tmp_path_factory.mktemp("ssh-device") / "store"
    with SshServer(tmp_path_factory.mktemp("sshd"), options=[f"SetEnv EDGE_INFER_HOME={store}"]) as server:
        yield server, store


@pytest.fixture(params=["local", "ssh"])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Device]:
    if request.param == "local":
        yield Device(tmp_path / "store", [f"local:{tmp_path / 'store'}"])
        return
    server, store = request.getfixturevalue("server_and_store")
    yield Device(store, [server.alias, "--ssh-config", str(server.ssh_config)], server)
    shutil.rmtree(store, ignore_errors=True)


@pytest.fixture
def local(tmp_path: Path) -> Device:
    return Device(tmp_path / "store", [f"local:{tmp_path / 'store'}"])


@pytest.fixture(scope="session")
def onnx(packaged) -> Bundle:  # type: ignore[no-untyped-def]
    return packaged(SOURCES["onnx"], "onnx", "float32")


@pytest.fixture(scope="session")
def onnx_int8(packaged) -> Bundle:  # type: ignore[no-untyped-def]
    return packaged(SOURCES["onnx"], "onnx", "int8")


def rewritten(bundle: Bundle, folder: Path, **changes: object) -> Bundle:
    """The same files under a manifest with changed fields."""
    copy = folder / "files"
    shutil.copytree(bundle.path, copy)
    (copy / "manifest.json").unlink()
    manifest = dataclasses.replace(bundle.manifest, **changes)  # type: ignore[arg-type]
    manifest = dataclasses.replace(manifest, files=describe_files(copy, list(manifest.files)))
    return write_bundle(manifest, copy, folder / "rewritten.edge")


#: How a push begins, beside the manifest and the device's Python.
ORDINARY = {"signature": None, "allow_older": False, "who": "the tests", "wait_s": 0}


def beginning(bundle: Bundle) -> dict[str, object]:
    """The first request of a push."""
    return {"manifest": bundle.manifest.to_bytes().decode(), "python": PYTHON, **ORDINARY}


#: The last one.
FINISH = {"timeout_s": 60, "tune": False, "keep": 2, "confirm_within_s": None, "health": None}


def with_attachment(bundle: Bundle, folder: Path, size: int) -> Bundle:
    """The same model beside a file of random bytes."""
    copy = folder / "attached"
    shutil.copytree(bundle.path, copy)
    (copy / "manifest.json").unlink()
    (copy / "extra.bin").write_bytes(random.Random(5).randbytes(size))
    names = [*bundle.manifest.files, "extra.bin"]
    return write_bundle(
        dataclasses.replace(bundle.manifest, files=describe_files(copy, names)), copy, folder / "a.edge"
    )


def with_wrong_answers(bundle: Bundle, folder: Path) -> Bundle:
    """A bundle whose engine will not give the golden answers."""
    copy = folder / "wrong"
    shutil.copytree(bundle.path, copy)
    with np.load(copy / "golden.npz") as golden:
        arrays = {name: golden[name] + (1.0 if name.startswith("out") else 0.0) for name in golden.files}
    write_npz(copy / "golden.npz", {name: array.astype(np.float32) for name, array in arrays.items()})
    (copy / "manifest.json").unlink()
    manifest = dataclasses.replace(bundle.manifest, files=describe_files(copy, list(bundle.manifest.files)))
    return write_bundle(manifest, copy, folder / "wrong.edge")


# -- what works --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["tflite", "onnx", "torchscript"])
def test_a_pushed_bundle_runs_from_the_store_by_name(device, packaged, digits_test_set, format, monkeypatch):
    bundle = packaged(SOURCES[format], format, "int8")
    pushed = device.push(bundle)
    assert (pushed.sent_bytes, pushed.replaced) == (bundle.manifest.size, None)
    assert pushed.report["largest_difference"]["digit"] <= bundle.manifest.golden.tolerance["digit"]
    monkeypatch.setenv("EDGE_INFER_HOME", str(device.store))
    images, labels = digits_test_set(SOURCES[format])
    with load("digits") as session:
        assert session.bundle.digest == bundle.digest
        assert (session(images).argmax(1) == labels).mean() > 0.96


def test_a_second_push_of_the_same_sends_nothing(device, onnx):
    device.push(onnx)
    again = device.push(onnx)
    assert again.sent_bytes == 0
    assert [step.action for step in again.steps] == ["keep", "self-test", "activate"]


def test_rollback_goes_back_and_forth(device, onnx, onnx_int8, digits_test_set):
    device.push(onnx)
    assert device.push(onnx_int8).replaced == onnx.digest
    with contextlib.closing(device.transport()) as transport:
        assert rollback(transport, "digits") == onnx.digest
    assert device.current("digits").digest == onnx.digest
    with (
        contextlib.closing(device.transport()) as transport,
        pytest.raises(DeviceError, match="only the release in use"),
    ):
        rollback(transport, "digits")


def test_status_shows_facts_and_models(device, onnx):
    device.push(onnx)
    with contextlib.closing(device.transport()) as transport:
        answer = status(transport, PYTHON)
    assert answer["facts"]["architecture"] == os.uname().machine
    assert answer["facts"]["packages"]["onnxruntime"]
    assert [(row["name"], row["digest"], row["precision"]) for row in answer["models"]] == [
        ("digits", onnx.digest, "float32")
    ]


def test_only_the_release_in_use_and_the_one_before_are_kept(local, packaged):
    bundles = [packaged(SOURCES["onnx"], "onnx", precision) for precision in ("float32", "int8", "float16")]
    for bundle in bundles:
        local.push(bundle)
    kept = {path.name for path in (local.store / "releases" / "digits").iterdir()}
    assert kept == {bundles[1].digest, bundles[2].digest}
    assert list((local.store / "staging").iterdir()) == []


def test_a_file_that_another_release_has_is_not_sent_again(local, onnx, tmp_path):
    local.push(onnx)
    renamed = rewritten(onnx, tmp_path, version="2")
    pushed = local.push(renamed)
    assert pushed.sent_bytes == 0 and pushed.digest != onnx.digest
    assert "copy weights.bin from another release" in [str(step) for step in pushed.steps]
    assert local.current("digits").manifest.version == "2"


def test_a_push_can_tune_the_model_before_it_serves(device, onnx, monkeypatch):
    pushed = device.push(onnx, tune=True)
    assert f"tune {onnx.digest[:12]}" in [str(step) for step in pushed.steps]
    monkeypatch.setenv("EDGE_INFER_HOME", str(device.store))
    kept = plan.read(device.current("digits"), Store(device.store).cache)
    assert kept is not None and str(kept.setting) == pushed.tuned
    with load("digits") as session:
        assert session.setting == kept.setting


def test_tuning_that_fails_keeps_no_model_from_serving(local, onnx, tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$3" = tune ] && echo broken >&2 && exit 9\nexec {PYTHON} "$@"\n')
    python.chmod(0o755)
    assert main(["push", str(onnx.path), *local.arguments, "--python", str(python), "--tune"]) == 0
    assert "; not tuned: " in capsys.readouterr().out
    assert local.current("digits").digest == onnx.digest


def test_an_interrupted_push_goes_on_where_it_stopped(device, onnx):
    cut = max(entry.size for entry in onnx.manifest.files.values()) // 2
    largest = max(onnx.manifest.files, key=lambda name: onnx.manifest.files[name].size)
    with contextlib.closing(device.transport()) as transport, Conversation(transport) as conversation:
        conversation.ask("begin", **beginning(onnx))
        data = onnx.file(largest).read_bytes()
        conversation.send("file", name=largest, offset=0, size=len(data))
        conversation._write(data[:cut])
        conversation._process.close_input()
        with pytest.raises(DeviceError, match="middle of a file"):
            conversation.ask("finish", **FINISH)
    pushed = device.push(onnx)
    step = next(step for step in pushed.steps if step.subject == largest)
    assert (step.offset, pushed.sent_bytes) == (cut, onnx.manifest.size - cut)
    assert device.current("digits").digest == onnx.digest


def test_of_a_damaged_partial_file_the_sound_pieces_are_kept(local, onnx, tmp_path):
    large = with_attachment(onnx, tmp_path, 3 * PIECE_BYTES + 1000)
    data = bytearray(large.file("extra.bin").read_bytes())
    data[PIECE_BYTES + 5] ^= 1
    staged = local.store / "staging" / large.digest
    staged.mkdir(parents=True)
    (staged / "extra.bin").write_bytes(data[:-500])
    pushed = local.push(large)
    step = next(step for step in pushed.steps if step.subject == "extra.bin")
    assert (step.offset, pushed.sent_bytes) == (PIECE_BYTES, large.manifest.size - PIECE_BYTES)
    assert local.current("digits").digest == large.digest


def test_a_whole_file_that_was_staged_and_then_damaged_is_sent_again(local, onnx, tmp_path):
    """The hash is looked at once more before the bundle is admitted, whatever the pieces said."""
    with contextlib.closing(local.transport()) as transport, Conversation(transport) as conversation:
        conversation.ask("begin", **beginning(onnx))
        for name in onnx.manifest.files:
            conversation.send_file(name, onnx.file(name), 0)
        conversation.end()
    (local.store / "staging" / onnx.digest / "weights.bin").write_bytes(bytes(onnx.manifest.files["weights.bin"].size))
    with contextlib.closing(local.transport()) as transport, Conversation(transport) as conversation:
        conversation.ask("begin", **beginning(onnx))
        with pytest.raises(DeviceError, match=r"weights\.bin has SHA-256"):
            conversation.ask("finish", **FINISH)
    pushed = local.push(onnx)
    assert pushed.sent_bytes == onnx.manifest.files["weights.bin"].size


def test_a_damaged_release_on_the_device_is_sent_again(local, onnx):
    local.push(onnx)
    damaged = local.current("digits").file("weights.bin")
    data = bytearray(damaged.read_bytes())
    data[100] ^= 1
    damaged.write_bytes(data)
    assert local.push(onnx).sent_bytes > 0
    assert local.answer("digits", np.zeros((1, 1, 8, 8), np.float32)).shape == (1, 10)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_wrong_golden_answers_leave_the_old_model_serving(device, onnx, tmp_path):
    device.push(onnx)
    wrong = with_wrong_answers(onnx, tmp_path)
    with pytest.raises(SelfTestFailed, match=r"golden case 0: output 'digit' differs.*stays in use"):
        device.push(wrong)
    assert device.current("digits").digest == onnx.digest
    assert not Store(device.store).release("digits", wrong.digest).exists()


def test_a_first_model_that_fails_its_self_test_is_not_activated(local, onnx, tmp_path):
    with pytest.raises(SelfTestFailed, match="nothing was activated"):
        local.push(with_wrong_answers(onnx, tmp_path))
    assert Store(local.store).names() == []


def test_a_bundle_for_another_processor_is_refused_before_a_byte_is_sent(local, packaged):
    bundle = packaged("torch.onnx", "onnx", "float32", "raspberry-pi-4")
    with pytest.raises(DeviceError, match="the device is x86_64, the bundle is for aarch64"):
        local.push(bundle)
    assert not (local.store / "staging").exists()


def test_a_missing_engine_is_named_with_the_pip_command(local, onnx, device_python):
    python = device_python("tflite")
    with pytest.raises(EngineMissing) as caught:
        local.push(onnx, python=str(python))
    assert "onnxruntime>=" in str(caught.value) and f"{python} -m pip install 'edge-infer[onnx]'" in str(caught.value)
    assert not (local.store / "staging").exists()


def test_a_python_without_edge_infer_is_named_with_the_pip_command(local, onnx):
    with pytest.raises(EngineMissing, match="pip install 'edge-infer"):
        local.push(onnx, python="/usr/bin/python3")


def test_a_python_that_is_not_there(local, onnx):
    with pytest.raises(DeviceError, match="cannot start /no/python"):
        local.push(onnx, python="/no/python")


def test_a_damaged_bundle_never_leaves_the_host(local, onnx, tmp_path):
    copy = tmp_path / "copy.edge"
    shutil.copytree(onnx.path, copy)
    with (copy / "weights.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(EdgeInferError, match="SHA-256") as caught:
        local.push(open_bundle(copy))
    assert caught.value.exit_status == 4 and not (local.store / "staging").exists()


def test_two_pushes_at_once(local, onnx, onnx_int8):
    with contextlib.closing(local.transport()) as transport, Conversation(transport) as first:
        first.ask("begin", **beginning(onnx))
        with pytest.raises(DeviceError, match="busy with a push of digits by the tests; try again"):
            local.push(onnx_int8)
        with pytest.raises(DeviceError, match=r"still busy after 0.2 s with a push of digits"):
            local.push(onnx_int8, wait_s=0.2)
    assert local.push(onnx_int8).digest == onnx_int8.digest


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of its own of that size; needs root, as scripts/test says."""
    sudo = [] if os.getuid() == 0 else ["sudo"]
    path.mkdir()
    options = f"size={size},mode=1777"
    subprocess.run([*sudo, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run([*sudo, "umount", "-l", str(path)], check=True)


def test_too_small_a_disk_is_refused_before_a_byte_is_sent(tmp_path, onnx):
    with small_disk(tmp_path / "disk", "1m"):
        with pytest.raises(DeviceError, match=r"needs [\d,]+ bytes, the device has 0 free"):
            Device(tmp_path / "disk" / "store", []).push(onnx)
        assert not (tmp_path / "disk" / "store" / "staging").exists()


def test_a_disk_that_fills_up_during_the_push(tmp_path, onnx, onnx_int8):
    with small_disk(tmp_path / "disk", "32m"):
        device = Device(tmp_path / "disk" / "store", [])
        device.push(onnx)

        def fill(step: str) -> None:
            if step.startswith("send"):
                with contextlib.suppress(OSError), (tmp_path / "disk" / "filler").open("ab", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))

        with pytest.raises(DeviceError, match=r"storage at .* is full"):
            device.push(onnx_int8, progress=fill)
        assert device.current("digits").digest == onnx.digest
        (tmp_path / "disk" / "filler").unlink()
        assert device.push(onnx_int8).digest == onnx_int8.digest


# -- a release on trial ------------------------------------------------------------------------------------------------


def test_a_release_on_trial_stays_when_the_application_confirms_it(device, onnx, onnx_int8, monkeypatch):
    device.push(onnx)
    pushed = device.push(onnx_int8, confirm_within_s=60)
    assert 50 <= pushed.pending_s <= 61
    monkeypatch.setenv("EDGE_INFER_HOME", str(device.store))
    with load("digits") as session:
        assert edge_infer.confirm(session) == onnx_int8.digest
    assert Store(device.store).pointer("digits").pending is None
    assert edge_infer.confirm("digits") == onnx_int8.digest


def test_a_session_of_the_release_before_confirms_nothing(device, onnx, onnx_int8, monkeypatch):
    device.push(onnx)
    monkeypatch.setenv("EDGE_INFER_HOME", str(device.store))
    with load("digits") as session:
        device.push(onnx_int8, confirm_within_s=60)
        with pytest.raises(ReleaseNotFound, match=f"{onnx.digest[:12]} of 'digits' cannot be confirmed"):
            edge_infer.confirm(session)


def test_the_host_confirms_and_the_device_goes_back_by_itself(device, onnx, onnx_int8, monkeypatch):
    device.push(onnx)
    device.push(onnx_int8, confirm_within_s=60)
    with contextlib.closing(device.transport()) as transport:
        assert confirm(transport, "digits") == onnx_int8.digest
    device.push(onnx, confirm_within_s=0.01)
    time.sleep(1.1)  # deadlines are whole seconds
    assert device.current("digits").digest == onnx_int8.digest
    with pytest.raises(ReleaseNotFound, match="cannot be confirmed"):
        Store(device.store).confirm("digits", onnx.digest)
    assert [row["event"] for row in Store(device.store).events("digits")][-2:] == ["on trial", "not confirmed"]


@pytest.mark.parametrize(
    ("command", "words"),
    [("false", "status 1"), ("echo no answer; exit 3", "status 3: no answer"), ("sleep 60", "it still ran")],
)
def test_a_health_command_that_does_not_pass_brings_the_old_model_back(device, onnx, onnx_int8, command, words):
    device.push(onnx)
    with pytest.raises(SelfTestFailed, match=f"in time: {words}; the release {onnx.digest[:12]} is in use again"):
        device.push(onnx_int8, health=command, confirm_within_s=1)
    assert device.current("digits").digest == onnx.digest
    assert not Store(device.store).release("digits", onnx_int8.digest).exists()
    assert Store(device.store).events("digits")[-1]["event"] == "refused"


def test_a_health_command_that_passes_confirms(device, onnx, onnx_int8, tmp_path):
    device.push(onnx)
    # The second try passes; what it leaves running holds nothing up.
    flag = tmp_path / "flag"
    command = f'sleep 30 & [ "$EDGE_INFER_MODEL" = digits ] && [ -e {flag} ] || {{ touch {flag}; exit 1; }}'
    pushed = device.push(onnx_int8, health=command)
    assert pushed.pending_s is None and device.current("digits").digest == onnx_int8.digest
    assert Store(device.store).pointer("digits").pending is None
    assert Store(device.store).events("digits")[-1]["who"] == "the health command"


def test_what_serves_already_is_not_put_on_trial_and_the_plan_says_so(device, onnx, onnx_int8):
    device.push(onnx)
    for kept in (onnx, onnx_int8):
        device.push(kept)
    pushed = device.push(onnx_int8, health="false", confirm_within_s=1)
    assert [step.action for step in pushed.steps] == ["keep", "self-test", "activate"]
    assert pushed.pending_s is None and device.current("digits").digest == onnx_int8.digest


def test_a_script_on_the_device_confirms_by_name(local, onnx, onnx_int8):
    local.push(onnx)
    local.push(onnx_int8, confirm_within_s=60)
    command = [PYTHON, "-m", "edge_infer", "confirm", "digits"]
    environment = {**os.environ, "EDGE_INFER_HOME": str(local.store)}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert done.stdout.decode() == f"digits stays {onnx_int8.digest[:12]}\n"
    assert Store(local.store).pointer("digits").pending is None


def test_the_application_may_confirm_while_the_health_command_runs(device, onnx):
    command = f"{PYTHON} -c 'import edge_infer; edge_infer.confirm(\"digits\")'; exit 1"
    pushed = device.push(onnx, health=command)
    assert pushed.pending_s is None and device.current("digits").digest == onnx.digest


def test_a_host_that_says_nothing_lets_go_of_the_store(local, onnx, monkeypatch):
    main = "sys.modules[{main!r}].main()"
    short = main.replace("main()", "SILENCE_S = 0.5")
    assert main in conversation.LOADER
    with monkeypatch.context() as patch:
        patch.setattr(conversation, "LOADER", conversation.LOADER.replace(main, f"{short}\n{main}"))
        patch.setattr(conversation, "payload", conversation.payload.__wrapped__)  # not the one that is kept
        silent = Conversation(local.transport())
    with silent:
        silent.ask("begin", **beginning(onnx))
        assert local.push(onnx, wait_s=20).digest == onnx.digest
        with pytest.raises(DeviceError, match=r"said nothing for 0\.5 s"):
            silent.ask("finish", **FINISH)


# -- the golden gate ---------------------------------------------------------------------------------------------------

#: A Python that serves with the engine of these tests, whose process meets with something on the way to the answers.
FAULTS = {
    "illegal instruction": (
        "import ctypes, mmap\n"
        "code = mmap.mmap(-1, 4096, prot=7)\n"
        "code.write(bytes.fromhex({'x86_64': '0f0b', 'aarch64': '00000000'}[os.uname().machine]))\n"
        "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()\n"
    ),
    "too little memory": "import resource\nresource.setrlimit(resource.RLIMIT_DATA, (40_000_000, 40_000_000))\n",
    "killed": "import signal\nos.kill(os.getpid(), signal.SIGKILL)\n",
    "hangs": "import time\ntime.sleep(60)\n",
    "wrong engine version": (
        "import onnxruntime\n"
        "def refuse(*arguments, **options):\n"
        "    raise RuntimeError('Unsupported model IR version: 10, max supported IR version: 9')\n"
        "onnxruntime.InferenceSession = refuse\n"
    ),
}


def python_with(fault: str, folder: Path) -> Path:
    """This Python, but what it runs as ``-m edge_infer selftest`` meets with the fault first."""
    (folder / "fault.py").write_text(
        f"import os, runpy, sys\n{FAULTS[fault]}\nrunpy.run_module('edge_infer', run_name='__main__')\n"
    )
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$3" = selftest ] && shift 2 && exec {PYTHON} {folder}/fault.py "$@"\nexec {PYTHON} "$@"\n'
    )
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("illegal instruction", "SIGILL: illegal instruction: this engine build does not fit the processor"),
        ("too little memory", "[Mm]emory"),
        ("killed", "SIGKILL: it was killed, most likely for lack of memory"),
        ("hangs", "no answer within 8 s"),
        ("wrong engine version", "Unsupported model IR version"),
    ],
)
def test_what_the_golden_gate_finds_is_named_and_leaves_the_old_model(local, onnx, onnx_int8, tmp_path, fault, words):
    local.push(onnx)
    python = python_with(fault, tmp_path)
    with pytest.raises(SelfTestFailed, match=words) as caught:
        local.push(onnx_int8, python=str(python), timeout_s=8 if fault == "hangs" else 120)
    assert str(caught.value).endswith(f"; the release {onnx.digest[:12]} stays in use")
    assert local.current("digits").digest == onnx.digest
    assert not Store(local.store).release("digits", onnx_int8.digest).exists()
    refused = Store(local.store).events("digits")[-1]
    assert (refused["event"], refused["digest"]) == ("refused", onnx_int8.digest)


# -- deltas ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def releases(onnx, tmp_path) -> list[Bundle]:
    """Two of one model, beside files that differ in a tenth of their bytes."""
    data = np.frombuffer(random.Random(3).randbytes(1_000_000), np.uint8)
    changed = data.copy()
    changed[::10] += 1
    made = []
    for number, content in enumerate((data, changed)):
        copy = tmp_path / f"files-{number}"
        shutil.copytree(onnx.path, copy)
        (copy / "manifest.json").unlink()
        (copy / "table.bin").write_bytes(content.tobytes())
        files = describe_files(copy, [*onnx.manifest.files, "table.bin"])
        manifest = dataclasses.replace(onnx.manifest, version=str(number), files=files)
        made.append(write_bundle(manifest, copy, tmp_path / f"release-{number}.edge"))
    return made


def test_a_release_is_sent_as_what_changed_since_the_one_that_is_there(device, releases):
    first, second = releases
    device.push(first)
    pushed = device.push(second, delta="only")
    patch = next(step for step in pushed.steps if step.action == "patch")
    assert (patch.subject, patch.base) == ("table.bin", first.digest)
    assert pushed.sent_bytes == patch.size < 400_000
    assert device.current("digits").digest == second.digest
    assert device.current("digits").file("table.bin").read_bytes() == second.file("table.bin").read_bytes()
    assert list((device.store / "staging").iterdir()) == []


def test_a_delta_is_for_slow_links_and_what_is_asked_for(device, releases):
    first, second = releases
    device.push(first)
    steps = device.push(second, dry_run=True).steps
    # On this machine itself there is nothing to gain.
    assert ("patch" in [step.action for step in steps]) == (device.server is not None)
    assert "patch" not in [step.action for step in device.push(second, dry_run=True, delta="never").steps]


def test_a_base_that_is_named_is_compared_with_on_this_machine_too(local, releases, monkeypatch, tmp_path):
    first, second = releases
    local.push(first)
    monkeypatch.setenv("EDGE_INFER_CACHE", str(tmp_path / "another-host"))
    assert "patch" in [step.action for step in local.push(second, base=first, dry_run=True).steps]
    with pytest.raises(UsageError, match="leave out --base or --no-delta"):
        local.push(second, base=first, delta="never")


def test_a_store_beside_one_that_the_address_names_is_refused(local, onnx, tmp_path, capsys):
    assert main(["push", str(onnx.path), *local.arguments, "--store", str(tmp_path / "other")]) == 2
    assert "names its store itself" in capsys.readouterr().err


def test_delta_only_never_sends_all_in_silence(local, releases, onnx_int8, monkeypatch, tmp_path):
    first, second = releases
    local.push(first)
    monkeypatch.setenv("EDGE_INFER_CACHE", str(tmp_path / "another-host"))
    with pytest.raises(DeviceError, match="none of the device's releases of this model is kept on this machine"):
        local.push(second, delta="only")
    assert local.push(second, delta="only", base=first, dry_run=True).steps[0].action != "send"
    with pytest.raises(UsageError, match="which the device does not have"):
        local.push(second, delta="only", base=onnx_int8)
    with pytest.raises(DeviceError, match=r"--delta-only: what changed since \w+ takes [\d,]+ of [\d,]+ bytes"):
        local.push(onnx_int8, delta="only", base=first)
    assert local.current("digits").digest == first.digest


def test_a_delta_that_was_interrupted_goes_on(device, releases):
    first, second = releases
    device.push(first)
    planned = device.push(second, delta="only", dry_run=True)
    patch = next(step for step in planned.steps if step.action == "patch")
    found = Bases(bases_root()).differences(first, second, ["table.bin"], codecs())["table.bin"].path.read_bytes()
    cut = len(found) // 2
    with contextlib.closing(device.transport()) as transport, Conversation(transport) as broken:
        broken.ask("begin", **beginning(second))
        broken.send("delta", name="table.bin", base=first.digest, offset=0, size=len(found))
        broken._write(found[:cut])
        broken._process.close_input()
        with pytest.raises(DeviceError, match="middle of a file"):
            broken.ask("finish", **FINISH)
    pushed = device.push(second, delta="only")
    again = next(step for step in pushed.steps if step.action == "patch")
    assert (again.offset, again.size, pushed.sent_bytes) == (cut, patch.size - cut, patch.size - cut)
    assert device.current("digits").digest == second.digest


def test_a_delta_from_a_damaged_release_is_refused_and_says_what_helps(local, releases):
    first, second = releases
    local.push(first)
    table = local.current("digits").file("table.bin")
    data = bytearray(table.read_bytes())
    data[5] ^= 1
    table.write_bytes(data)
    with pytest.raises(DeviceError, match=r"which it starts from, is damaged; push again with --no-delta"):
        local.push(second, delta="only")
    assert local.current("digits").digest == first.digest
    assert local.push(second, delta="never").digest == second.digest


# -- the command line --------------------------------------------------------------------------------------------------


def test_push_status_and_rollback_by_command(device, onnx, onnx_int8, capsys):
    python = ["--python", PYTHON]
    assert main(["push", str(onnx.path), *device.arguments, *python]) == 0
    assert main(["push", str(onnx_int8.path), *device.arguments, *python]) == 0
    assert f"replacing {onnx.digest[:12]}" in capsys.readouterr().out
    assert main(["push", str(onnx_int8.path), *device.arguments, *python]) == 0
    assert f"digits is {onnx_int8.digest[:12]} as before; sent 0 B" in capsys.readouterr().out
    assert main(["status", *device.arguments, *python]) == 0
    assert onnx_int8.digest[:12] in capsys.readouterr().out
    address, *options = device.arguments
    assert main(["rollback", address, "digits", *options]) == 0
    assert device.current("digits").digest == onnx.digest


def test_trial_history_and_collection_by_command(device, onnx, onnx_int8, packaged, capsys):
    address, *options = device.arguments
    push_, python = ["push", address, *options], ["--python", PYTHON]
    assert main([*push_[:1], str(onnx.path), *push_[1:], *python]) == 0
    assert main([*push_[:1], str(onnx_int8.path), *push_[1:], *python, "--confirm-within", "60", "--keep", "3"]) == 0
    assert "; on trial: it goes back in " in capsys.readouterr().out
    assert main(["status", address, *options, *python]) == 0
    assert "on trial, " in capsys.readouterr().out
    assert main(["confirm", address, "digits", *options]) == 0
    assert capsys.readouterr().out == f"digits stays {onnx_int8.digest[:12]}\n"
    half = packaged(SOURCES["onnx"], "onnx", "float16")
    assert main([*push_[:1], str(half.path), *push_[1:], *python, "--keep", "3"]) == 0
    assert main(["rollback", address, "digits", "--to", onnx.digest[:8], *options]) == 0
    assert main([*push_[:1], str(onnx_int8.path), *push_[1:], *python]) == 0
    capsys.readouterr()
    assert main(["history", address, "digits", *options, "--json"]) == 0
    events = json.loads(capsys.readouterr().out)["events"]
    assert [row["event"] for row in events] == [
        "activated", "on trial", "confirmed", "activated", "rolled back", "activated",
    ]  # fmt: skip
    assert main(["history", address, "digits", *options]) == 0
    assert "rolled back" in capsys.readouterr().out
    (device.store / "current" / "damaged").write_text("nothing")
    assert main(["gc", address, "nothing", *options]) == 5
    assert "no model 'nothing' in the store" in capsys.readouterr().err
    assert main(["gc", address, "--keep", "1", *options]) == 0
    assert "KB freed" in capsys.readouterr().out
    assert Store(device.store).digests("digits") == [onnx_int8.digest]


def test_a_dry_run_prints_the_steps_that_the_run_takes(device, onnx, capsys):
    command = ["push", str(onnx.path), *device.arguments, "--python", PYTHON, "--json"]
    assert main([*command, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)["devices"][0]
    assert Store(device.store).names() == []
    assert main(command) == 0
    taken = json.loads(capsys.readouterr().out)["devices"][0]
    assert planned["steps"] == taken["steps"] and planned["sent_bytes"] == 0 < taken["sent_bytes"]


def test_one_device_that_fails_does_not_keep_the_other_from_its_model(tmp_path, onnx, capsys):
    (tmp_path / "not-a-folder").write_text("")
    command = ["push", str(onnx.path), f"local:{tmp_path / 'not-a-folder'}", f"local:{tmp_path / 'store'}"]
    assert main(command) == 5
    assert "not-a-folder" in capsys.readouterr().err
    assert Store(tmp_path / "store").open_current("digits").digest == onnx.digest


def test_a_failed_self_test_has_status_5_and_the_devices_words(local, onnx, tmp_path, capsys):
    wrong = with_wrong_answers(onnx, tmp_path)
    assert main(["push", str(wrong.path), *local.arguments]) == 5
    assert "golden case 0" in capsys.readouterr().err


def test_an_unknown_host_key_has_status_5(server_and_store, onnx, tmp_path, capsys):
    server, _ = server_and_store
    (tmp_path / "empty").write_text("")
    options = ["--ssh-config", str(server.ssh_config), "--known-hosts", str(tmp_path / "empty")]
    assert main(["push", str(onnx.path), server.alias, *options]) == 5
    assert server.fingerprint in capsys.readouterr().err


def test_a_refused_login_has_status_5(server_and_store, onnx, tmp_path, capsys):
    server, _ = server_and_store
    key = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    options = ["--ssh-config", str(server.ssh_config), "--identity", str(key)]
    assert main(["push", str(onnx.path), server.alias, *options]) == 5
    assert "refused the login" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        ("echo 'sh: 1: python3: not found' >&2; exit 127", "has no python3"),
        ("echo Welcome; exec sh -c \"$SSH_ORIGINAL_COMMAND\"", "login shell prints nothing"),
        ("exit 3", "ended without an answer"),
    ],
)  # fmt: skip
def test_a_device_that_cannot_run_the_receiver(tmp_path, onnx, capsys, shell, words):
    script = tmp_path / "shell"
    script.write_text(f"#!/bin/sh\n{shell}\n")
    script.chmod(0o755)
    with SshServer(tmp_path / "sshd", options=[f"ForceCommand {script}"]) as server:
        assert main(["push", str(onnx.path), server.alias, "--ssh-config", str(server.ssh_config)]) == 5
    assert words in capsys.readouterr().err


# -- the receiver against a hostile host -------------------------------------------------------------------------------


def converse(store: Path, manifest: str | None, *lines: object) -> list[dict]:
    """What the receiver answers to these requests; bytes are sent as they are."""
    first = [] if manifest is None else [{"op": "begin", "manifest": manifest, "python": PYTHON, **ORDINARY}]
    sent = b"".join(
        line if isinstance(line, bytes) else json.dumps({"store": str(store), **line}).encode() + b"\n"  # type: ignore[dict-item]
        for line in [*first, *lines]
    )
    told = io.BytesIO()
    Receiver(io.BytesIO(sent), told).serve()
    return [json.loads(line) for line in told.getvalue().splitlines()]


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "file", "name": "../escaped", "offset": 0, "size": 3},
        {"op": "file", "name": "/tmp/escaped", "offset": 0, "size": 3},
        {"op": "file", "name": "manifest.json", "offset": 0, "size": 3},
        {"op": "file", "name": "weights.bin", "offset": -1, "size": 3},
        {"op": "file", "name": "weights.bin", "offset": 0, "size": 10**12},
        {"op": "file", "name": "weights.bin", "offset": "x", "size": 3},
        {"op": "file"},
        {"op": "finish"},
        {"op": "finish", **FINISH, "keep": "2"},
        {"op": "finish", **FINISH, "timeout_s": float("nan")},
        {"op": "finish", **FINISH, "confirm_within_s": 1e9},
        {"op": "explode"},
        {"op": "status"},
        {"op": "begin"},
        b"not json\n",
        b"[]\n",
        b'{"op": "file", "name": "weights.bin", "offset": 0, "size": 9}\nabc',
    ],
)  # fmt: skip
def test_a_bad_request_ends_the_conversation_and_writes_nothing_outside(tmp_path, onnx, request_):
    answers = converse(tmp_path / "store", onnx.manifest.to_bytes().decode(), request_, b"abc")
    assert "ok" in answers[0] and "error" in answers[1] and len(answers) == 2
    outside = [path for path in tmp_path.rglob("*") if tmp_path / "store" not in (path, *path.parents)]
    assert outside == []


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b'{"op": "finish"}\n', b'{"op": "file"}\n', b"\xff\xfe\n", b"["])
def test_a_conversation_that_begins_badly_is_answered_with_an_error(tmp_path, line, monkeypatch):
    monkeypatch.setenv("EDGE_INFER_HOME", str(tmp_path / "store"))
    answers = converse(tmp_path / "store", None, line)
    assert len(answers) == 1 and answers[0]["error"]["message"]


def test_a_push_is_over_when_it_is_finished(tmp_path, onnx):
    store, manifest = tmp_path / "store", onnx.manifest.to_bytes().decode()
    files = [
        part
        for name, entry in onnx.manifest.files.items()
        for part in ({"op": "file", "name": name, "offset": 0, "size": entry.size}, onnx.file(name).read_bytes())
    ]
    more = {"op": "file", "name": "weights.bin", "offset": 0, "size": 0}
    answers = converse(store, manifest, *files, {"op": "finish", **FINISH}, more)
    assert ["ok" in answer for answer in answers] == [True, True, False]
    assert "came before it said which bundle" in answers[2]["error"]["message"]
    assert Store(store).open_current("digits").digest == onnx.digest


def test_a_link_in_the_staging_folder_is_not_followed(tmp_path, onnx):
    staged = tmp_path / "store" / "staging" / onnx.digest
    staged.mkdir(parents=True)
    (staged / "weights.bin").symlink_to(tmp_path / "victim")
    (tmp_path / "victim").write_text("mine")
    request = {"op": "file", "name": "weights.bin", "offset": 0, "size": 3}
    answers = converse(tmp_path / "store", onnx.manifest.to_bytes().decode(), request, b"abc")
    assert "error" in answers[-1] and (tmp_path / "victim").read_text() == "mine"


def test_the_receiver_needs_only_itself(local):
    """Python's isolated mode without site-packages: what is sent along is all there is."""
    assert isinstance(local.transport(), LocalTransport)
    from edge_infer.deploy.conversation import BOOTSTRAP

    request = json.dumps({"op": "status", "store": str(local.store)}).encode() + b"\n"
    done = subprocess.run(
        [PYTHON, "-I", "-S", "-c", BOOTSTRAP], input=payload() + request, capture_output=True, check=True
    )
    assert json.loads(done.stdout)["ok"]["models"] == []
