"""One contract for every transport, then what only SSH can get wrong: host keys, logins, ssh_config, jump hosts."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ssh_client import agent_with, connect_to, eventually, private_home, python, read_all, refusal, run
from sshd import SshServer, free_port, make_key, public_key

from edge_infer.deploy import ssh_route
from edge_infer.deploy.local import LocalTransport
from edge_infer.deploy.ssh import SshTransport
from edge_infer.deploy.ssh_host_keys import known_keys
from edge_infer.deploy.ssh_route import Address, parse_address
from edge_infer.deploy.transport import SLICE_BYTES, Process, Transport
from edge_infer.errors import DeviceError, UsageError

MIB = 1 << 20
ECHO_AT_END = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
ROOT = Path(__file__).parents[1]


def is_running(pid: int) -> bool:
    """Whether the process still does something; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return private_home(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("device"), host_key_types=("ed25519", "ecdsa")) as started:
        yield started


@pytest.fixture(params=["local", "ssh"])
def transport(request: pytest.FixtureRequest, server: SshServer, tmp_path: Path) -> Iterator[Transport]:
    made: Transport
    if request.param == "local":
        made = LocalTransport(f"local:{tmp_path}")
    else:
        made = SshTransport(server.alias, ssh_config=server.ssh_config)
    with closing(made):
        yield made


# -- the contract ------------------------------------------------------------------------------------------------------


def test_several_mib_of_binary_data_come_back_unchanged(transport: Transport) -> None:
    data = random.Random(7).randbytes(5 * MIB + 12345)
    with closing(transport.start(python(ECHO_AT_END))) as process:
        process.write(memoryview(data))
        process.close_input()
        assert read_all(process) == data
        assert process.wait() == 0


@pytest.mark.parametrize("size", [0, 1, SLICE_BYTES - 1, SLICE_BYTES, SLICE_BYTES + 1])
def test_any_size_is_written_whole(transport: Transport, size: int) -> None:
    with closing(transport.start(python("import sys; print(len(sys.stdin.buffer.read()))"))) as process:
        process.write(b"x" * size)
        process.close_input()
        assert process.readline() == b"%d\n" % size


def test_a_view_of_wider_items_is_written_as_bytes(transport: Transport) -> None:
    numbers = memoryview(bytes(range(16))).cast("I")
    with closing(transport.start(python(ECHO_AT_END))) as process:
        process.write(numbers)
        process.close_input()
        assert read_all(process) == bytes(range(16))


def test_question_and_answer(transport: Transport) -> None:
    code = "import sys\nfor line in sys.stdin: print(int(line) * 2, flush=True)"
    with closing(transport.start(python(code))) as process:
        for number in range(50):
            process.write(b"%d\n" % number)
            assert process.readline() == b"%d\n" % (2 * number)
        process.close_input()
        assert process.readline() == b""
        assert process.wait() == 0


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_exit_status(transport: Transport, status: int) -> None:
    with closing(transport.start(python(f"raise SystemExit({status})"))) as process:
        assert process.wait() == status


def test_arguments_arrive_as_given(transport: Transport) -> None:
    arguments = ["two words", "", "it's", '"$HOME" `id` $(id)', "a\nb", "*", "~", "-n", "größer", "a;b|c&d>e"]
    code = "import sys; print(ascii(sys.argv[1:]))"
    with closing(transport.start(python(code, *arguments))) as process:
        assert process.readline().decode() == f"{arguments!a}\n"


def test_a_flood_of_errors_blocks_nothing_and_its_end_is_kept(transport: Transport) -> None:
    flood = "for _ in range(3072): sys.stderr.write('e' * 1023 + chr(10))"
    code = f"import sys\n{flood}\nprint('done', file=sys.stderr)\nprint('ok')"
    with closing(transport.start(python(code))) as process:
        assert process.readline() == b"ok\n"
        assert process.wait() == 0
        assert process.errors().endswith("e\ndone\n")
        assert len(process.errors()) == 8 * 1024


def test_errors_that_are_no_text_do_no_harm(transport: Transport) -> None:
    code = "import sys; sys.stderr.buffer.write(bytes([255, 10]))"
    with closing(transport.start(python(code))) as process:
        process.wait()
        assert process.errors() == "\ufffd\n"


def test_errors_can_be_read_while_it_runs(transport: Transport) -> None:
    code = "import sys; print('warming up', file=sys.stderr, flush=True); sys.stdin.read()"
    with closing(transport.start(python(code))) as process:
        assert eventually(lambda: process.errors() == "warming up\n")


def test_a_line_of_one_mib_is_read_and_a_longer_one_refused(transport: Transport) -> None:
    code = f"import sys\nfor extra in (0, 1): sys.stdout.write('x' * ({MIB} - 1 + extra) + chr(10))"
    with closing(transport.start(python(code))) as process:
        assert process.readline() == b"x" * (MIB - 1) + b"\n"
        with pytest.raises(DeviceError, match="over 1048576 bytes"):
            process.readline()


def test_a_last_line_without_newline_is_read(transport: Transport) -> None:
    with closing(transport.start(python("print('a'); print('b', end='')"))) as process:
        assert [process.readline() for _ in range(4)] == [b"a\n", b"b", b"", b""]


def test_wait_is_not_held_up_by_output_nobody_reads(transport: Transport) -> None:
    with closing(transport.start(python(f"print('x' * {5 * MIB}); raise SystemExit(3)"))) as process:
        assert process.wait() == 3


def test_writing_to_a_command_that_ended_fails_and_tells_its_last_words(transport: Transport) -> None:
    code = "import sys; print('no space left', file=sys.stderr); raise SystemExit(1)"
    with closing(transport.start(python(code))) as process:
        with pytest.raises(DeviceError, match=r"ended while data was being sent to it: no space left$"):
            for _ in range(256):
                process.write(bytes(MIB))
        assert process.wait() == 1


def test_writing_after_the_end_of_input_fails(transport: Transport) -> None:
    with closing(transport.start(python(ECHO_AT_END))) as process:
        process.close_input()
        with pytest.raises(DeviceError, match="its input has been ended"):
            process.write(b"more")


def test_a_command_killed_by_a_signal_has_no_status(transport: Transport) -> None:
    code = "import os, sys; sys.stderr.write('out of memory'); sys.stderr.flush(); os.kill(os.getpid(), 9)"
    with (
        closing(transport.start(python(code))) as process,
        pytest.raises(DeviceError, match=r"signal|SIGKILL") as caught,
    ):
        process.wait()
    assert str(caught.value).endswith(": out of memory")


def test_close_stops_a_command_that_still_waits_for_input(transport: Transport) -> None:
    process = transport.start(python("import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"))
    pid = int(process.readline())
    assert is_running(pid)
    process.close()
    process.close()
    assert eventually(lambda: not is_running(pid))


def test_two_commands_run_side_by_side(transport: Transport) -> None:
    with ExitStack() as stack:
        first, second = (stack.enter_context(closing(transport.start(python(ECHO_AT_END)))) for _ in range(2))
        first.write(b"one\n")
        second.write(b"two\n")
        second.close_input()
        assert read_all(second) == b"two\n"
        first.close_input()
        assert read_all(first) == b"one\n"


def test_one_thread_may_read_while_another_writes(transport: Transport) -> None:
    code = "import sys\nfor line in sys.stdin.buffer: sys.stdout.buffer.write(line)"
    data = (b"x" * 1023 + b"\n") * 4096
    with closing(transport.start(python(code))) as process:
        writer = threading.Thread(target=lambda: (process.write(data), process.close_input()))
        writer.start()
        assert read_all(process) == data
        writer.join()
        assert process.wait() == 0


def test_nothing_is_left_after_close(transport: Transport) -> None:
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    process = transport.start(python("import sys; sys.stderr.write('e'); sys.stdin.read()"))
    assert set(os.listdir("/proc/self/fd")) != descriptors
    process.close()
    transport.close()
    transport.close()
    assert set(threading.enumerate()) == threads
    assert set(os.listdir("/proc/self/fd")) == descriptors


# -- local only --------------------------------------------------------------------------------------------------------


def test_a_local_address_names_the_store(tmp_path: Path, home: Path) -> None:
    assert LocalTransport(f"local:{tmp_path}").store == tmp_path
    assert LocalTransport("local:~/store").store == home / "store"
    assert LocalTransport("local:store").address == "local:store"


@pytest.mark.parametrize("address", ["local:", "pi@kitchen", ""])
def test_other_addresses_are_not_local(address: str) -> None:
    with pytest.raises(UsageError, match="local:PATH"):
        LocalTransport(address)


def test_a_local_command_that_does_not_exist() -> None:
    with pytest.raises(DeviceError, match="cannot start no-such-command -x"):
        LocalTransport("local:store").start(["no-such-command", "-x"])


def test_close_stops_a_local_command_and_what_it_started() -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(os.getpid(), child.pid, flush=True); time.sleep(60)"
    )
    process = LocalTransport("local:store").start(python(code))
    pids = [int(text) for text in process.readline().split()]
    assert all(map(is_running, pids))
    process.close()
    assert eventually(lambda: not any(map(is_running, pids)))


# -- SSH: addresses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kitchen-pi", Address("kitchen-pi")),
        ("pi@10.0.0.7", Address("10.0.0.7", "pi")),
        ("pi@kitchen.local:2222", Address("kitchen.local", "pi", 2222)),
        ("kitchen:1", Address("kitchen", None, 1)),
        ("[::1]:2222", Address("::1", None, 2222)),
        ("pi@[fe80::1%eth0]", Address("fe80::1%eth0", "pi")),
        ("fe80::1", Address("fe80::1")),
        ("pi@::1", Address("::1", "pi")),
        ("first.last@corp@gate:65535", Address("gate", "first.last@corp", 65535)),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "@host", "pi@", "a b", "host\n", "host/path", "-oProxyCommand=x", "-x@host"),
        *("host:", "host:0", "host:65536", "host:ssh", "host:\uff12\uff12"),
        *("[::1", "::1]:22", "[host]:22", "[::1]22", "a:b:c"),
    ],
)
def test_malformed_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="no SSH address"):
        parse_address(text)
    with pytest.raises(UsageError):
        SshTransport(text)


# -- SSH: host keys ----------------------------------------------------------------------------------------------------


def test_an_unknown_host_key_is_refused_and_not_learned(server: SshServer, tmp_path: Path) -> None:
    empty = tmp_path / "known_hosts"
    empty.write_text("")
    logged = len(server.log())
    sentence = refusal(connect_to(server, known_hosts=empty))
    assert f"127.0.0.1 port {server.port} is not known: it shows the ssh-ed25519 key {server.fingerprint};" in sentence
    assert f"ssh-keyscan -p {server.port} 127.0.0.1 >> {empty}" in sentence
    assert empty.read_text() == ""
    assert eventually(lambda: "[preauth]" in server.log()[logged:])  # the words before it differ with the timing
    assert "Accepted" not in server.log()[logged:] and "authenticating user" not in server.log()[logged:]


def test_a_missing_known_hosts_file_knows_nobody(server: SshServer, tmp_path: Path) -> None:
    assert "is not known" in refusal(connect_to(server, known_hosts=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_what_ssh_keyscan_prints_makes_the_host_known(server: SshServer, tmp_path: Path) -> None:
    scan = subprocess.run(["ssh-keyscan", "-p", str(server.port), "127.0.0.1"], check=True, capture_output=True)
    (tmp_path / "known").write_bytes(scan.stdout)
    assert run(connect_to(server, known_hosts=tmp_path / "known"), ["echo", "hello"]) == b"hello\n"


def test_a_changed_host_key_is_refused(server: SshServer, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    known = tmp_path / "known"
    known.write_text(f"{server.known_name} {public_key(tmp_path / 'other')}\n")
    sentence = refusal(connect_to(server, known_hosts=known))
    assert f"has changed: it shows the ssh-ed25519 key {server.fingerprint}, known is ssh-ed25519 SHA256:" in sentence
    assert f"ssh-keygen -R '{server.known_name}' -f {known}" in sentence


KNOWN_LINES = {
    "plain": ("{name} {key}", True),
    "comment and spaces": ("  {name}\t{key}   me@desk", True),
    "one name of several": ("other.example,{name},10.0.0.1 {key}", True),
    "pattern": ("[127.0.0.*]:* {key}", True),
    "pattern for one character": ("[127.0.0.?]:{port} {key}", True),
    "after an old key of the same type": ("{name} {other}\n{name} {key}", True),
    "after lines that are no entries": ("# comment\n\nnonsense\n{name} ssh-ed25519 ???\n{name} {key}", True),
    "an authority besides": ("@cert-authority * {other}\n{name} {key}", True),
    "another host revoked": ("@revoked elsewhere {key}\n{name} {key}", True),
    "another key revoked": ("@revoked * {other}\n{name} {key}", True),
    "excluded by a negated pattern": ("*,!{name} {key}", False),
    "without the port": ("127.0.0.1 {key}", False),
    "another port": ("[127.0.0.1]:1 {key}", False),
    "brackets are no set of characters": ("[127.0.0.1:]*{port} {key}", False),
    "only an authority": ("@cert-authority * {key}", False),
    "commented out": ("#{name} {key}", False),
    "an unknown mark": ("@odd {name} {key}", False),
}


@pytest.mark.parametrize(("lines", "is_known"), KNOWN_LINES.values(), ids=KNOWN_LINES.keys())
def test_known_hosts_lines(server: SshServer, tmp_path: Path, lines: str, is_known: bool) -> None:
    make_key(tmp_path / "other")
    values = {"name": server.known_name, "port": server.port, "key": server.host_key()}
    (tmp_path / "known").write_text(lines.format(**values, other=public_key(tmp_path / "other")) + "\n")
    transport = connect_to(server, known_hosts=tmp_path / "known")
    if is_known:
        assert run(transport, ["echo", "hello"]) == b"hello\n"
    else:
        assert "is not known" in refusal(transport)


@pytest.mark.parametrize(
    "lines", ["@revoked {name} {key}", "{name} {key}\n@revoked * {key}", "@revoked {name} {key}\n{name} {key}"]
)
def test_a_revoked_host_key_is_refused(server: SshServer, tmp_path: Path, lines: str) -> None:
    (tmp_path / "known").write_text(lines.format(name=server.known_name, key=server.host_key()))
    sentence = refusal(connect_to(server, known_hosts=tmp_path / "known"))
    assert f"{server.fingerprint}, which {tmp_path / 'known'} marks as revoked" in sentence


def test_hashed_names_are_known(server: SshServer, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_text(f"{server.known_name} {server.host_key()}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True)
    assert known.read_text().startswith("|1|")
    assert run(connect_to(server, known_hosts=known), ["echo", "hello"]) == b"hello\n"
    assert known_keys([known], "[127.0.0.1]:1") == []


@pytest.mark.parametrize("field", ["|1|", "|1|a|b", "|2|YWJj|YWJj", "|1|YWJj|YWJj|YWJj", "|1|ä|ö"])
def test_damaged_hashes_match_nothing(tmp_path: Path, field: str) -> None:
    (tmp_path / "known").write_text(f"{field} ssh-ed25519 YWJj\n* ssh-ed25519 ZGVm\n", "utf-8")
    assert [key.blob for key in known_keys([tmp_path / "known"], "host")] == [b"def"]


def test_a_known_key_of_another_type_is_asked_for_first(server: SshServer, tmp_path: Path) -> None:
    (tmp_path / "known").write_text(f"{server.known_name} {server.host_key('ecdsa')}\n")
    assert run(connect_to(server, known_hosts=tmp_path / "known"), ["echo", "hello"]) == b"hello\n"


def test_a_known_rsa_key_is_asked_for_first_and_not_with_sha1(tmp_path: Path) -> None:
    options = ["LogLevel DEBUG1"]
    with SshServer(tmp_path / "device", options=options, host_key_types=("rsa", "ed25519")) as device:
        assert run(connect_to(device), ["echo", "hello"]) == b"hello\n"
        assert "kex: host key algorithm: rsa-sha2-512" in device.log()


def test_known_hosts_that_cannot_be_read(server: SshServer, tmp_path: Path) -> None:
    assert f"{tmp_path} cannot be read (Is a directory)" in refusal(connect_to(server, known_hosts=tmp_path))


# -- SSH: logging in ---------------------------------------------------------------------------------------------------


def test_a_refused_login_names_user_host_and_key(server: SshServer, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger")
    sentence = refusal(connect_to(server, identity=tmp_path / "stranger"))
    assert f"{server.port} refused the login of {server.user}: tried {tmp_path / 'stranger'};" in sentence
    assert f"ssh-copy-id -p {server.port} {server.user}@127.0.0.1" in sentence


def test_a_login_without_any_key(server: SshServer, home: Path) -> None:
    transport = SshTransport(server.address, known_hosts=server.known_hosts)
    assert f"no key to try in {home}/.ssh/id_ed25519, " in refusal(transport)


@pytest.mark.parametrize("name", ["id_ed25519", "id_ecdsa", "id_rsa"])
def test_the_usual_key_files_are_tried(server: SshServer, home: Path, name: str) -> None:
    make_key(home / ".ssh" / "id_ed25519")
    (home / ".ssh" / name).write_bytes(server.identity.read_bytes())
    assert run(SshTransport(server.address, known_hosts=server.known_hosts), ["echo", "hello"]) == b"hello\n"


def test_an_rsa_account_key_logs_in_without_sha1(tmp_path: Path) -> None:
    options = ["PubkeyAcceptedAlgorithms rsa-sha2-512,rsa-sha2-256"]
    with SshServer(tmp_path / "device", options=options) as device:
        make_key(tmp_path / "rsa", "rsa")
        (device.directory / "authorized_keys").write_text(public_key(tmp_path / "rsa") + "\n")
        assert run(connect_to(device, identity=tmp_path / "rsa"), ["echo", "hello"]) == b"hello\n"


def test_a_locked_key_is_named_and_no_passphrase_is_asked(server: SshServer, tmp_path: Path) -> None:
    make_key(tmp_path / "locked", passphrase="secret")
    sentence = refusal(connect_to(server, identity=tmp_path / "locked"))
    assert f"{tmp_path / 'locked'} needs its passphrase: run `ssh-add {tmp_path / 'locked'}` first" in sentence


def test_a_damaged_key_is_named(server: SshServer, tmp_path: Path) -> None:
    (tmp_path / "damaged").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n")
    assert f"{tmp_path / 'damaged'} cannot be used (" in refusal(connect_to(server, identity=tmp_path / "damaged"))


def test_the_agent_opens_a_locked_key_and_others_of_it_are_kept_back(tmp_path: Path) -> None:
    device = SshServer(tmp_path / "device")
    device.directory.mkdir()
    make_key(device.identity, passphrase="secret")
    make_key(tmp_path / "private", passphrase="secret")
    with device, agent_with(tmp_path, tmp_path / "private", device.identity):
        assert run(connect_to(device), ["echo", "hello"]) == b"hello\n"
        assert "Accepted publickey" in device.log() and "Failed publickey" not in device.log()


def test_the_agent_alone_logs_in(tmp_path: Path) -> None:
    device = SshServer(tmp_path / "device")
    device.directory.mkdir()
    make_key(device.identity, passphrase="secret")
    with device, agent_with(tmp_path, device.identity):
        transport = SshTransport(device.address, known_hosts=device.known_hosts)
        assert run(transport, ["echo", "hello"]) == b"hello\n"


def test_a_certificate_beside_the_key_is_used(tmp_path: Path) -> None:
    make_key(tmp_path / "authority")
    make_key(tmp_path / "worker")
    options = [f"TrustedUserCAKeys {tmp_path / 'authority'}.pub", "AuthorizedKeysFile none"]
    with SshServer(tmp_path / "device", options=options) as device:
        assert "refused the login" in refusal(connect_to(device, identity=tmp_path / "worker"))
        sign = ["ssh-keygen", "-q", "-s", tmp_path / "authority", "-I", "worker", "-n", device.user]
        subprocess.run([*sign, tmp_path / "worker.pub"], check=True, capture_output=True)
        assert run(connect_to(device, identity=tmp_path / "worker"), ["echo", "hello"]) == b"hello\n"


def test_the_bare_key_is_tried_where_its_certificate_is_refused(server: SshServer, tmp_path: Path) -> None:
    make_key(tmp_path / "authority")
    for suffix in ("", ".pub"):
        source = server.identity.with_name(server.identity.name + suffix)
        (tmp_path / f"key{suffix}").write_bytes(source.read_bytes())
    sign = ["ssh-keygen", "-q", "-s", tmp_path / "authority", "-I", "x", "-n", "x", tmp_path / "key.pub"]
    subprocess.run(sign, check=True, capture_output=True)
    assert (tmp_path / "key-cert.pub").exists()
    assert run(connect_to(server, identity=tmp_path / "key"), ["echo", "hello"]) == b"hello\n"


def test_a_server_that_ends_the_connection_after_one_key(tmp_path: Path) -> None:
    with SshServer(tmp_path / "device", options=["MaxAuthTries 1"]) as device:
        make_key(tmp_path / "stranger")
        sentence = refusal(connect_to(device, identity=tmp_path / "stranger"))
        assert f"tried {tmp_path / 'stranger'}; the server then ended the connection;" in sentence


def test_a_server_that_takes_no_keys(tmp_path: Path) -> None:
    options = ["PubkeyAuthentication no", "PasswordAuthentication yes"]
    with SshServer(tmp_path / "device", options=options) as device:
        assert f"lets {device.user} log in by password only, expected publickey" in refusal(connect_to(device))


def test_a_server_that_wants_more_than_a_key(tmp_path: Path) -> None:
    options = ["PasswordAuthentication yes", "AuthenticationMethods publickey,password"]
    with SshServer(tmp_path / "device", options=options) as device:
        assert f"asks {device.user} for more than a key (password)" in refusal(connect_to(device))


def test_a_server_that_does_not_answer_a_login_in_time(tmp_path: Path) -> None:
    options = ["AuthorizedKeysFile none", "AuthorizedKeysCommand /bin/sleep 3", "AuthorizedKeysCommandUser %u"]
    with SshServer(tmp_path / "device", options=options) as device:
        sentence = refusal(connect_to(device, timeout_s=0.5))
        assert f"127.0.0.1 port {device.port} did not answer within 0.5 s" in sentence


# -- SSH: ssh_config and jump hosts ------------------------------------------------------------------------------------


def test_an_alias_in_the_users_own_config(server: SshServer, home: Path) -> None:
    (home / ".ssh" / "config").write_text(server.alias_block())
    assert run(SshTransport("kitchen-pi"), ["echo", "hello"]) == b"hello\n"


def test_the_address_wins_over_the_config(server: SshServer, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(server.alias_block("User nobody-here", "Port 1"))
    assert "nothing listens at 127.0.0.1 port 1;" in refusal(SshTransport("kitchen-pi", ssh_config=config))
    sentence = refusal(SshTransport(f"kitchen-pi:{server.port}", ssh_config=config))
    assert "refused the login of nobody-here" in sentence
    transport = SshTransport(f"{server.user}@kitchen-pi:{server.port}", ssh_config=config)
    assert run(transport, ["echo", "hello"]) == b"hello\n"


def test_several_known_hosts_files_and_a_host_key_alias(server: SshServer, tmp_path: Path, home: Path) -> None:
    (home / "known").write_text(f"kitchen-pi-key {server.host_key()}\n")
    config = tmp_path / "config"
    config.write_text(server.alias_block("HostKeyAlias kitchen-pi-key", "UserKnownHostsFile /dev/null ~/known"))
    assert run(SshTransport("kitchen-pi", ssh_config=config), ["echo", "hello"]) == b"hello\n"


def test_the_machines_known_hosts_count_too(server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_route, "GLOBAL_KNOWN_HOSTS", server.known_hosts)
    transport = SshTransport(server.address, identity=server.identity)
    assert run(transport, ["echo", "hello"]) == b"hello\n"


def test_identities_only_keeps_the_agents_keys_back(server: SshServer, tmp_path: Path) -> None:
    make_key(tmp_path / "private", passphrase="secret")
    config = tmp_path / "config"
    for only, is_offered in (("yes", False), ("no", True)):
        config.write_text(server.alias_block(f"IdentitiesOnly {only}").replace(str(server.identity), "/none"))
        with agent_with(tmp_path, tmp_path / "private"):
            sentence = refusal(SshTransport("kitchen-pi", ssh_config=config))
        assert ("private (agent)" in sentence) is is_offered


@pytest.fixture(scope="module")
def jump(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("jump"), alias="workshop") as started:
        yield started


def jump_config(path: Path, jump: SshServer, device: SshServer, *lines: str) -> Path:
    path.write_text(jump.alias_block() + device.alias_block(*lines, "ProxyJump workshop"))
    return path


def test_a_jump_host_is_gone_through(server: SshServer, jump: SshServer, tmp_path: Path) -> None:
    logged = len(jump.log())
    transport = SshTransport("kitchen-pi", ssh_config=jump_config(tmp_path / "config", jump, server))
    peer = run(transport, ["sh", "-c", "echo $SSH_CONNECTION"]).split()
    assert int(peer[3]) == server.port
    assert jump.log()[logged:].count("Accepted publickey") == 1


def test_a_jump_host_given_by_address_and_two_of_them(server: SshServer, jump: SshServer, tmp_path: Path) -> None:
    config = tmp_path / "config"
    logged = len(jump.log())
    # The same server under two names makes a chain of two.
    by_address = f"Host 127.0.0.1\n IdentityFile {jump.identity}\n UserKnownHostsFile {jump.known_hosts}\n"
    jumps = f"ProxyJump ssh://{jump.address}, workshop"
    config.write_text(jump.alias_block() + server.alias_block(jumps) + by_address)
    assert run(SshTransport("kitchen-pi", ssh_config=config), ["echo", "hello"]) == b"hello\n"
    assert jump.log()[logged:].count("Accepted publickey") == 2


def test_bulk_data_through_a_jump_host_leaves_nothing(server: SshServer, jump: SshServer, tmp_path: Path) -> None:
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    data = random.Random(8).randbytes(3 * MIB)
    transport = SshTransport("kitchen-pi", ssh_config=jump_config(tmp_path / "config", jump, server))
    with closing(transport), closing(transport.start(python(ECHO_AT_END))) as process:
        process.write(data)
        process.close_input()
        assert read_all(process) == data
    assert set(threading.enumerate()) == threads
    assert set(os.listdir("/proc/self/fd")) == descriptors


def test_every_hops_host_key_is_verified(server: SshServer, jump: SshServer, tmp_path: Path) -> None:
    config = jump_config(tmp_path / "config", jump, server)
    text = config.read_text()
    config.write_text(text.replace(str(jump.known_hosts), "/dev/null"))
    assert f"port {jump.port} is not known" in refusal(SshTransport("kitchen-pi", ssh_config=config))
    config.write_text(text.replace(str(server.known_hosts), "/dev/null"))
    assert f"port {server.port} is not known" in refusal(SshTransport("kitchen-pi", ssh_config=config))


def test_a_device_that_the_jump_host_cannot_reach(server: SshServer, jump: SshServer, tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    port = free_port()
    config = jump_config(tmp_path / "config", jump, server, f"Port {port}")
    sentence = refusal(SshTransport("kitchen-pi", ssh_config=config))
    assert f"127.0.0.1 port {port} cannot be reached through the jump host (Connect failed)" in sentence
    assert set(threading.enumerate()) == threads


def test_jump_hosts_in_a_circle(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host a\n ProxyJump b\nHost b\n ProxyJump a\nHost *\n UserKnownHostsFile none\n")
    assert refusal(SshTransport("a", ssh_config=config)).endswith("leads in a circle: a -> b -> a")
    config.write_text("Host *\n ProxyJump x%h\n")
    assert "leads in a circle: a -> xa -> xxa -> " in refusal(SshTransport("a", ssh_config=config))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("Host a\n ProxyCommand nc %h %p\n", "ProxyCommand for a, which is not followed; use ProxyJump"),
        ("Host a\n Port many\n", "gives 'many' for port, expected a number"),
        ("Host a\n ConnectTimeout soon\n", "gives 'soon' for connecttimeout, expected a number"),
        ("nonsense\n", "cannot be read as an ssh_config"),
    ],
)
def test_a_config_that_cannot_be_followed(tmp_path: Path, lines: str, expected: str) -> None:
    (tmp_path / "config").write_text(lines)
    assert expected in refusal(SshTransport("a", ssh_config=tmp_path / "config"))


def test_chosen_files_that_are_not_there(server: SshServer, tmp_path: Path) -> None:
    for options in ({"identity": tmp_path / "none"}, {"ssh_config": tmp_path / "none"}):
        with pytest.raises(UsageError, match=f"there is no file {tmp_path / 'none'}"):
            connect_to(server, **options).connect()


# -- SSH: connections --------------------------------------------------------------------------------------------------


def test_the_fast_cipher_is_agreed_on(tmp_path: Path) -> None:
    with SshServer(tmp_path / "device", options=["LogLevel DEBUG1"]) as device:
        assert run(connect_to(device), ["echo", "hello"]) == b"hello\n"
        agreed = [line for line in device.log().splitlines() if "cipher:" in line]
    assert len(agreed) == 2 and all("cipher: aes128-gcm@openssh.com " in line for line in agreed)


@pytest.mark.parametrize(
    "options",
    [
        ["Ciphers aes128-cbc,3des-cbc"],
        ["Ciphers aes128-ctr", "MACs hmac-sha1,hmac-md5"],
        ["KexAlgorithms diffie-hellman-group14-sha1"],
    ],
    ids=["cbc", "sha1 and md5", "sha1 key exchange"],
)
def test_a_server_with_weak_algorithms_only_is_refused(tmp_path: Path, options: list[str]) -> None:
    threads = set(threading.enumerate())
    with SshServer(tmp_path / "device", options=options) as device:
        assert "offers only outdated algorithms" in refusal(connect_to(device))
    assert eventually(lambda: set(threading.enumerate()) == threads, 1)


def test_a_port_that_nobody_listens_on() -> None:
    port = free_port()
    sentence = refusal(SshTransport(f"127.0.0.1:{port}"))
    assert sentence == f"nothing listens at 127.0.0.1 port {port}; check the port and that the SSH server runs"


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "no address is known for kitchen" in refusal(SshTransport("kitchen"))
    monkeypatch.undo()
    assert "no address is known for xxxx" in refusal(SshTransport("x" * 70))


@contextmanager
def listener(answer: bytes) -> Iterator[int]:
    """A port that says ``answer`` to one client and then nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as held:

        def serve() -> None:
            client = held.enter_context(server.accept()[0])
            client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-Slow\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "stuck", "no ssh"]
)
def test_a_server_that_does_not_go_on(answer: bytes) -> None:
    threads = set(threading.enumerate())
    began = time.monotonic()
    with listener(answer) as port:
        assert f"127.0.0.1 port {port} " in refusal(SshTransport(f"127.0.0.1:{port}", timeout_s=0.3))
    assert time.monotonic() - began < 3.5
    assert eventually(lambda: set(threading.enumerate()) == threads, 1)


def test_connect_timeout_of_the_config(tmp_path: Path) -> None:
    began = time.monotonic()
    with listener(b"") as port:
        (tmp_path / "config").write_text(f"Host kitchen\n HostName 127.0.0.1\n Port {port}\n ConnectTimeout 1\n")
        refusal(SshTransport("kitchen", ssh_config=tmp_path / "config"))
    assert 0.9 < time.monotonic() - began < 4


def test_a_silent_network_is_noticed_by_the_kernel(server: SshServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []
    create = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda *given: made.append(create(*given)) or made[-1])
    with closing(connect_to(server)) as transport:
        transport.connect()
        assert made[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 45_000


@pytest.fixture
def lost(tmp_path: Path) -> Iterator[tuple[SshServer, SshTransport, Process]]:
    """A command that waits for input, to be cut off from."""
    with SshServer(tmp_path / "device") as device, closing(connect_to(device)) as transport:
        code = "import sys; print('ready', flush=True); sys.stdin.buffer.read(1); sys.stdin.buffer.read()"
        with closing(transport.start(python(code))) as process:
            assert process.readline() == b"ready\n"
            yield device, transport, process


Lost = tuple[SshServer, SshTransport, Process]


def test_a_lost_connection_is_no_end_of_output(lost: Lost) -> None:
    device, _, process = lost
    dropping = threading.Timer(0.1, device.drop_connections)
    dropping.start()
    with pytest.raises(DeviceError, match=f"the connection to 127.0.0.1 port {device.port} is lost"):
        process.readline()
    dropping.join()
    with pytest.raises(DeviceError, match="is lost"):
        process.wait()


def test_a_connection_lost_while_writing(lost: Lost) -> None:
    device, _, process = lost
    dropping = threading.Timer(0.1, device.drop_connections)
    dropping.start()
    with pytest.raises(DeviceError, match="is lost"):
        for _ in range(1024):
            process.write(bytes(MIB))
    dropping.join()


def test_after_a_lost_connection_nothing_starts_until_it_is_made_anew(lost: Lost) -> None:
    device, transport, process = lost
    device.drop_connections()
    with pytest.raises(DeviceError):
        process.wait()
    with pytest.raises(DeviceError, match="did not start a command"):
        transport.start(["true"])
    transport.close()
    assert run(transport, ["echo", "again"]) == b"again\n"


def test_a_command_that_is_not_there_has_the_shells_status(server: SshServer) -> None:
    with closing(connect_to(server)) as transport, closing(transport.start(["no-such-command"])) as process:
        assert process.wait() == 127
        assert "no-such-command" in process.errors()


# -- SSH: in a program of its own --------------------------------------------------------------------------------------


def run_alone(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_paramiko_the_sentence_names_the_extra() -> None:
    done = run_alone("import sys; sys.modules['paramiko'] = None; import edge_infer.deploy.ssh")
    assert "UsageError: SSH devices need paramiko" in done.stderr
    assert done.stderr.endswith("install it with python3 -m pip install 'edge-infer[ssh]'\n")


def test_paramiko_prints_nothing_of_its_own() -> None:
    with listener(b"HTTP/1.1 400 Bad Request\r\n" * 2) as port:
        code = (
            "from edge_infer.deploy.ssh import SshTransport\n"
            f"try: SshTransport('127.0.0.1:{port}', timeout_s=0.2).connect()\n"
            "except OSError as error: print(error)"
        )
        done = run_alone(code)
    assert "cannot be reached over SSH" in done.stdout
    assert done.stderr == ""
