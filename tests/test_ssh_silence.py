"""A device that says nothing: while connecting, behind a jump host, in the middle of a command; and Terrapin."""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ssh_client import connect_to, private_home, python, refusal, run
from sshd import SshServer, descendants

from edge_infer.deploy import ssh, ssh_silence
from edge_infer.deploy.ssh import SshTransport
from edge_infer.errors import DeviceError

READY = "import sys; print('ready', flush=True); sys.stdin.read()"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return private_home(tmp_path, monkeypatch)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence that need not be waited for in minutes."""
    monkeypatch.setattr(ssh_silence, "KEEPALIVE_S", 0.3)
    monkeypatch.setattr(ssh_silence, "SILENCE_S", 1.5)


@pytest.fixture(scope="module")
def jump(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("jump"), alias="workshop") as started:
        yield started


@contextmanager
def frozen(server: SshServer) -> Iterator[None]:
    """The server's processes stopped: the kernel goes on to acknowledge what is sent to them."""
    assert server._child is not None
    pids = [server._child.pid, *descendants(server._child.pid)]
    _send(signal.SIGSTOP, pids)
    try:
        yield
    finally:
        _send(signal.SIGCONT, pids)


def _send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # the one that answered whether the server is ready may just have ended
            os.kill(pid, number)


def through(jump: SshServer, device: SshServer, path: Path, *lines: str) -> SshTransport:
    path.write_text(jump.alias_block() + device.alias_block(*lines, "ProxyJump workshop"))
    return SshTransport("kitchen-pi", ssh_config=path)


@pytest.fixture(params=["direct", "behind a jump host"])
def silent(request: pytest.FixtureRequest, tmp_path: Path, jump: SshServer) -> Iterator[tuple[SshServer, SshTransport]]:
    """A device of its own, and the way to it."""
    with SshServer(tmp_path / "device") as device:
        direct = request.param == "direct"
        with closing(connect_to(device) if direct else through(jump, device, tmp_path / "config")) as transport:
            yield device, transport


Silent = tuple[SshServer, SshTransport]


def test_an_idle_device_that_answers_is_not_given_up(short: None, silent: Silent) -> None:
    _, transport = silent
    with closing(transport.start(python(READY))) as process:
        assert process.readline() == b"ready\n"
        time.sleep(4)  # the limit is 1.5
        process.close_input()
        assert process.wait() == 0


def test_a_device_that_falls_silent_while_its_answer_is_waited_for(short: None, silent: Silent) -> None:
    device, transport = silent
    with closing(transport.start(python(READY))) as process:
        assert process.readline() == b"ready\n"
        began = time.monotonic()
        with frozen(device), pytest.raises(DeviceError, match=f"connection to 127.0.0.1 port {device.port} is lost"):
            process.readline()
    assert 1 < time.monotonic() - began < 10


def test_a_device_that_falls_silent_while_data_is_sent_to_it(short: None, silent: Silent) -> None:
    device, transport = silent
    with closing(transport.start(python(READY))) as process:
        assert process.readline() == b"ready\n"
        with frozen(device), pytest.raises(DeviceError, match="is lost"):
            for _ in range(256):
                process.write(bytes(1 << 20))


def test_nothing_of_a_silent_connection_is_left(short: None, silent: Silent) -> None:
    device, transport = silent
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    process = transport.start(python(READY))
    with frozen(device):
        with pytest.raises(DeviceError):
            process.readline(), process.readline()
        process.close()
        transport.close()
    assert set(threading.enumerate()) == threads
    assert set(os.listdir("/proc/self/fd")) == descriptors


def test_a_device_frozen_before_it_is_reached(short: None, jump: SshServer, tmp_path: Path) -> None:
    with SshServer(tmp_path / "device") as device, frozen(device):
        for transport in (
            connect_to(device, timeout_s=0.5),
            through(jump, device, tmp_path / "config", "ConnectTimeout 1"),
        ):
            began = time.monotonic()
            assert f"127.0.0.1 port {device.port} " in refusal(transport)
            assert time.monotonic() - began < 10


@contextmanager
def full_listener() -> Iterator[int]:
    """A port at which a connection is neither made nor refused."""
    with socket.socket() as server, ExitStack() as held:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(8):
            client = held.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()[1]


def test_a_channel_that_does_not_open(jump: SshServer, tmp_path: Path) -> None:
    with full_listener() as port, SshServer(tmp_path / "device") as device:
        transport = through(jump, device, tmp_path / "config", f"Port {port}", "ConnectTimeout 1")
        began = time.monotonic()
        assert f"127.0.0.1 port {port} did not answer within 1 s" in refusal(transport)
        assert time.monotonic() - began < 10


# -- Terrapin ----------------------------------------------------------------------------------------------------------

ETM = ["Ciphers aes128-ctr", "MACs hmac-sha2-256-etm@openssh.com"]


@pytest.mark.parametrize(
    ("options", "strict", "is_refused"),
    [
        (ETM, False, True),
        (ETM, True, False),
        (["Ciphers aes128-ctr", "MACs hmac-sha2-256"], False, False),
        (["Ciphers aes256-gcm@openssh.com", "MACs hmac-sha2-256-etm@openssh.com"], False, False),
    ],
    ids=["encrypt-then-MAC", "strict key exchange", "MAC-then-encrypt", "GCM"],
)
def test_what_terrapin_could_attack_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], strict: bool, is_refused: bool
) -> None:
    # A client that does not offer the strict exchange sees what a server shows that does not know it.
    monkeypatch.setattr(ssh, "Connection", functools.partial(ssh.Connection, strict_kex=strict))
    with SshServer(tmp_path / "device", options=options) as device:
        if is_refused:
            assert "can be attacked by Terrapin (CVE-2023-48795)" in refusal(connect_to(device))
        else:
            assert run(connect_to(device), ["echo", "hello"]) == b"hello\n"


def test_chacha20_and_cbc_are_not_offered(tmp_path: Path) -> None:
    for cipher in ("chacha20-poly1305@openssh.com", "aes128-cbc"):
        with SshServer(tmp_path / cipher[:4], options=[f"Ciphers {cipher}"]) as device:
            assert "offers only outdated algorithms" in refusal(connect_to(device))


def test_the_key_exchange_is_a_modern_one_and_strict(tmp_path: Path) -> None:
    with (
        SshServer(tmp_path / "device", options=["LogLevel DEBUG1"]) as device,
        closing(connect_to(device)) as transport,
    ):
        transport.connect()
        assert transport._connections[0].agreed_on_strict_kex
        agreed = next(line for line in device.log().splitlines() if "kex: algorithm: " in line)
    assert agreed.split("kex: algorithm: ")[1].split()[0] in ssh.KEY_EXCHANGES[:3]
    with SshServer(tmp_path / "old", options=["KexAlgorithms diffie-hellman-group-exchange-sha256"]) as device:
        assert "offers only outdated algorithms" in refusal(connect_to(device))
