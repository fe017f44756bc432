"""What doctor says of a device and of this machine: each line, its mending command, and the exit status."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import SOURCES
from sshd import SshServer

from edge_infer.cli import main
from edge_infer.deploy import doctor
from edge_infer.store import Store

NOW = 1_800_000_000.0
FACTS: dict[str, Any] = {
    "platform": {
        "python": "3.11.2", "implementation": "cpython", "abi": "cp311", "machine": "aarch64", "bits": 64,
        "libc": "glibc", "libc_version": "2.36", "venv": True, "executable": "/usr/bin/python3.11",
    },
    "kernel": "Linux 6.12.25", "emulated": None, "page_size_bytes": 16384, "ram_bytes": 512_000_000,
    "available_bytes": 300_000_000, "free_bytes": 4_000_000_000, "reserve_bytes": 16_777_216, "writable": True,
    "read_only": None,
    "time": NOW + 0.5,
    "store": "/home/pi/.edge-infer", "current": "aa", "previous": "bb", "by_hand": False, "environments": ["aa", "bb"],
    "environment": {"engines": ["onnx"], "python": "3.11.2"}, "engines": ["onnx"], "formats": ["onnx"],
    "serving": {
        "serving_python": "/home/pi/.edge-infer/venv/bin/python", "python": "3.11",
        "packages": {"edge-infer": "0.1.0", "onnxruntime": "1.32.0"},
    },
    "models": [
        {
            "name": "digits", "digest": "c" * 64, "format": "onnx",
            "engine": {"package": "onnxruntime", "version": "1.32.0"},
        }
    ],
    "unfinished_bytes": 0, "ssh_keygen": "/usr/bin/ssh-keygen",
    "signers": {"tflite": None, "onnx": None, "torchscript": None},
}  # fmt: skip


PROVISION = "edge-infer provision kitchen"


def judged(changes: Mapping[str, Any]) -> dict[str, doctor.Line]:
    facts = copy.deepcopy(FACTS)
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(facts[name], dict):
            facts[name].update(value)
        else:
            facts[name] = value
    return {line.topic: line for line in doctor.judge("kitchen", facts, (NOW, NOW + 1))}


def test_a_device_that_lacks_nothing() -> None:
    lines = judged({})
    assert {line.state for line in lines.values()} == {"ok"} and not any(line.mend for line in lines.values())
    assert lines["system"].text == "aarch64, glibc 2.36, Linux 6.12.25, 16 KiB pages"
    assert lines["environment"].text == "aa (onnx; Python 3.11.2), before it bb"
    assert lines["model digits"].text == "cccccccccccc answers with onnxruntime 1.32.0"
    assert lines["clock"].text == "as this machine's"


@pytest.mark.parametrize(
    ("changes", "topic", "state", "text", "mend"),
    [
        ({"platform": {"python": "3.9.2"}}, "python", "wrong", "cpython 3.9.2", "install Python 3.10 or later there"),
        ({"platform": {"venv": False}}, "python", "wrong", "without its venv module", "apt install python3-venv"),
        ({"emulated": "qemu-aarch64"}, "system", "ok", "16 KiB pages, emulated: qemu-aarch64", ""),
        ({"platform": {"bits": 32}}, "system", "wrong", "aarch64, 32-bit Python", "install the 64-bit system"),
        ({"free_bytes": 0}, "storage", "wrong", "0 B free beyond a reserve of 16.8 MB", "free some space at /home/pi"),
        ({"writable": False}, "storage", "wrong", "cannot be written", "sudo chown -R $USER /home/pi/.edge-infer"),
        ({"writable": False, "read_only": "/"}, "storage", "wrong", "read-only", "there: sudo mount -o remount,rw /;"),
        ({"time": NOW - 86_400}, "clock", "wrong", "86,400 s behind this machine's", "timedatectl set-ntp true"),
        ({"time": NOW + 86_401}, "clock", "wrong", "86,400 s ahead of this machine's", "timedatectl set-ntp true"),
        ({"time": NOW + 31}, "clock", "ok", "30 s ahead of this machine's", ""),
        ({"unfinished_bytes": 5_000_000}, "store", "ok", "1 model in use, 5 MB of unfinished pushes", ""),
        ({"current": None, "environment": None}, "environment", "missing", "none", PROVISION),
        ({"environment": None}, "environment", "wrong", "aa is gone or incomplete", PROVISION),
        ({"by_hand": True, "current": None}, "environment", "ok", "made by hand", ""),
        ({"serving": {"python": "3.13"}}, "environment", "wrong", "Python has become 3.13", PROVISION),
        ({"serving": {"error": "cannot start it"}}, "engines", "wrong", "cannot start it", PROVISION),
        ({"serving": {"packages": {}}}, "engines", "wrong", "has no edge-infer", PROVISION),
        ({"serving": {"packages": {"edge-infer": "1"}}}, "engines", "wrong", "has no engine", "--engine tflite"),
        ({"ssh_keygen": None}, "ssh-keygen", "missing", "signed bundles need it", "apt install openssh-client"),
        ({"ssh_keygen": None, "signers": {"onnx": "/a"}}, "ssh-keygen", "wrong", "not there", "openssh-client"),
        ({"signers": {"onnx": "/a"}}, "signing", "ok", "onnx by /a; any bundle of tflite, torchscript", ""),
        (
            {"models": [{"name": "d", "digest": "", "error": "weights.bin is damaged", "damaged": True}]},
            "model d", "wrong", "weights.bin is damaged", "edge-infer push BUNDLE kitchen",
        ),
        (
            {"models": [{"name": "d", "digest": "", "format": "tflite", "error": "has none; pip", "damaged": False}]},
            "model d", "wrong", "has none", f"{PROVISION} --engine tflite, or edge-infer rollback kitchen d",
        ),
        (
            {"models": [{**FACTS["models"][0], "pending_s": 40}]},
            "model digits", "ok", "onnxruntime 1.32.0, on trial for 40 s more", "",
        ),
    ],
)  # fmt: skip
def test_what_is_told_of_a_device(changes, topic, state, text, mend):
    line = judged(changes)[topic]
    assert line.state == state and text.replace(" ", "") in line.text.replace("\u00a0", "").replace(" ", "")
    assert line.mend.startswith(mend) or mend in line.mend
    assert bool(line.mend) == (state != "ok")


def test_a_real_device_with_a_model_and_then_a_damaged_one(packaged, tmp_path, capsys):
    bundle = packaged(SOURCES["onnx"], "onnx", "float32")
    address = f"local:{tmp_path}"
    assert main(["push", str(bundle.path), address]) == 0
    capsys.readouterr()
    assert main(["doctor", address]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("ok ") and "answers with onnxruntime" in shown
    assert f"mend: edge-infer provision {address}" in shown  # no environment of its own: missing, but not wrong
    weights = Store(tmp_path).open_current("digits").path / "weights.bin"
    weights.write_bytes(b"short")
    assert main(["doctor", address, "--json"]) == 5
    answer = json.loads(capsys.readouterr().out)
    (wrong,) = [line for line in answer["lines"] if line["state"] == "wrong"]
    assert wrong["topic"] == "model digits" and wrong["mend"] == f"edge-infer push BUNDLE {address}"
    assert answer["exit_status"] == 5


def test_a_connection_that_fails_is_the_first_line(tmp_path, capsys):
    with SshServer(tmp_path / "sshd") as server:
        (tmp_path / "empty").write_text("")
        arguments = ["doctor", server.address, "--identity", str(server.identity)]
        assert main([*arguments, "--known-hosts", str(server.known_hosts)]) in (0, 5)
        assert "its host key is known, and a key logs in" in capsys.readouterr().out
        assert main([*arguments, "--known-hosts", str(tmp_path / "empty")]) == 5
        shown = capsys.readouterr().out.splitlines()
        assert shown[0].startswith("wrong") and "is not known" in shown[0] and "ssh-keyscan" in shown[1]
        assert len(shown) == 2
    assert main(arguments) == 5
    shown = capsys.readouterr().out.splitlines()
    assert "nothing listens at" in shown[0] and "mend: check the port" in shown[1]


def test_this_machine(monkeypatch, capsys):
    assert main(["doctor", "--json"]) == 0
    lines = {line["topic"]: line for line in json.loads(capsys.readouterr().out)["lines"]}
    assert "tensorflow" in lines["packaging"]["text"] and "paramiko" in lines["pushing to devices"]["text"]
    assert lines["converter onnx2tf"]["mend"] == "edge-infer converters install onnx2tf"
    assert lines["wheelhouse"]["text"].endswith("0 wheels, 0\u00a0B")

    real = importlib.metadata.version

    def without(name: str) -> str:
        if name == "onnxslim":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "tf2onnx" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert main(["doctor", "--json"]) == 1
    lines = {line["topic"]: line for line in json.loads(capsys.readouterr().out)["lines"]}
    assert lines["onnxslim"]["state"] == "missing" and lines["onnxslim"]["text"] == "not installed; for packaging"
    assert lines["onnxslim"]["mend"] == f"{sys.executable} -m pip install --upgrade 'edge-infer[host]'"
    assert lines["tf2onnx"]["state"] == "wrong" and lines["tf2onnx"]["text"].startswith("0.1, expected >=")


def test_keys_in_the_agent_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (line,) = doctor._ssh()
    assert (line.state, line.mend) == ("missing", "ssh-keygen -t ed25519")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", tmp_path / "agent"], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        for _ in range(100):
            if subprocess.run(["ssh-add", "-q", tmp_path / "key"], check=False, capture_output=True).returncode == 0:
                break
        (line,) = doctor._ssh()
        assert (line.state, line.text) == ("ok", "1 in the agent")
    finally:
        agent.terminate()
        agent.wait()
