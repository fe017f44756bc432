"""The client's side of tests with a real SSH server: a home of its own, an agent, and how a refusal reads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sshd import SshServer

from edge_infer.deploy import ssh_route
from edge_infer.deploy.ssh import SshTransport
from edge_infer.deploy.transport import Process, Transport
from edge_infer.errors import DeviceError


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, *arguments]


def read_all(process: Process) -> bytes:
    return b"".join(iter(process.readline, b""))


def eventually(is_so: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so()


def private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No key, agent or ssh_config of whoever runs the tests takes part."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setattr(ssh_route, "GLOBAL_KNOWN_HOSTS", tmp_path / "no_such_file")
    return tmp_path / "home"


def connect_to(server: SshServer, **options: Any) -> SshTransport:
    """Not connected yet, by address; ``options`` replace the ones that would work."""
    chosen = {"known_hosts": server.known_hosts, "identity": server.identity, **options}
    return SshTransport(server.address, **chosen)


def run(transport: Transport, command: list[str]) -> bytes:
    with closing(transport), closing(transport.start(command)) as process:
        output = read_all(process)
        assert process.wait() == 0, process.errors()
        return output


def refusal(transport: Transport) -> str:
    """The sentence a start is refused with."""
    with closing(transport), pytest.raises(DeviceError) as caught:
        transport.start(["true"])
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 1000
    return sentence


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def agent_with(directory: Path, *keys: Path) -> Iterator[None]:
    """A running ssh-agent that holds ``keys``, all with the passphrase ``secret``."""
    path = directory / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    try:
        assert eventually(lambda: _listens(path))
        os.environ["SSH_AUTH_SOCK"] = str(path)
        ask = directory / "ask"
        ask.write_text("#!/bin/sh\necho secret\n")
        ask.chmod(0o700)
        environment = {**os.environ, "SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force"}
        subprocess.run(["ssh-add", "-q", *keys], env=environment, check=True, capture_output=True)
        yield
    finally:
        os.environ.pop("SSH_AUTH_SOCK", None)
        agent.terminate()
        agent.wait()
