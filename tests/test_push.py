"""Pushes to a local device and over a real OpenSSH server: what arrives, what is refused, what stays."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import SOURCES
from sshd import SshServer

from edge_infer.bundle import Bundle, describe_files, open_bundle, write_bundle
from edge_infer.cli import main
from edge_infer.deploy.conversation import Conversation, open_transport
from edge_infer.deploy.local import LocalTransport
from edge_infer.deploy.push import push, rollback, status
from edge_infer.deploy.receiver import Receiver
from edge_infer.deploy.transport import Transport
from edge_infer.errors import DeviceError, EdgeInferError, EngineMissing, SelfTestFailed
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
            return push(bundle, transport, python=PYTHON, **options)  # type: ignore[arg-type]

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
        conversation.ask("begin", manifest=onnx.manifest.to_bytes().decode(), python=PYTHON)
        data = onnx.file(largest).read_bytes()
        conversation.send("file", name=largest, offset=0, size=len(data))
        conversation._write(data[:cut])
        conversation._process.close_input()
        with pytest.raises(DeviceError, match="middle of a file"):
            conversation.ask("finish")
    pushed = device.push(onnx)
    step = next(step for step in pushed.steps if step.subject == largest)
    assert (step.offset, pushed.sent_bytes) == (cut, onnx.manifest.size - cut)
    assert device.current("digits").digest == onnx.digest


def test_a_damaged_partial_file_is_found_and_the_next_push_starts_anew(local, onnx):
    staged = local.store / "staging" / onnx.digest
    staged.mkdir(parents=True)
    (staged / "weights.bin").write_bytes(b"\xff" * 1000)
    with pytest.raises(DeviceError, match=r"weights\.bin has SHA-256"):
        local.push(onnx)
    assert not staged.exists() and Store(local.store).names() == []
    assert local.push(onnx).sent_bytes == onnx.manifest.size


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
    with contextlib.closing(local.transport()) as transport, pytest.raises(EngineMissing) as caught:
        push(onnx, transport, python=str(python))
    assert "onnxruntime>=" in str(caught.value) and f"{python} -m pip install 'edge-infer[onnx]'" in str(caught.value)
    assert not (local.store / "staging").exists()


def test_a_python_without_edge_infer_is_named_with_the_pip_command(local, onnx):
    with (
        contextlib.closing(local.transport()) as transport,
        pytest.raises(EngineMissing, match="pip install 'edge-infer"),
    ):
        push(onnx, transport, python="/usr/bin/python3")


def test_a_python_that_is_not_there(local, onnx):
    with (
        contextlib.closing(local.transport()) as transport,
        pytest.raises(DeviceError, match="cannot start /no/python"),
    ):
        push(onnx, transport, python="/no/python")


def test_a_damaged_bundle_never_leaves_the_host(local, onnx, tmp_path):
    copy = tmp_path / "copy.edge"
    shutil.copytree(onnx.path, copy)
    with (copy / "weights.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(EdgeInferError, match="SHA-256") as caught:
        local.push(open_bundle(copy))
    assert caught.value.exit_status == 4 and not local.store.exists()


def test_two_pushes_at_once(local, onnx, onnx_int8):
    with contextlib.closing(local.transport()) as transport, Conversation(transport) as first:
        first.ask("begin", manifest=onnx.manifest.to_bytes().decode(), python=PYTHON)
        with pytest.raises(DeviceError, match="busy with another push"):
            local.push(onnx_int8)
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
    first = [] if manifest is None else [{"op": "begin", "store": str(store), "manifest": manifest, "python": PYTHON}]
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
        {"op": "explode"},
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
    from edge_infer.deploy.conversation import BOOTSTRAP, payload

    request = json.dumps({"op": "status", "store": str(local.store)}).encode() + b"\n"
    done = subprocess.run(
        [PYTHON, "-I", "-S", "-c", BOOTSTRAP], input=payload() + request, capture_output=True, check=True
    )
    assert json.loads(done.stdout)["ok"]["models"] == []
