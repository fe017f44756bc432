"""Who is who over SSH: new host keys, certificates of hosts and users, agents, passphrases, and ssh_config."""

from __future__ import annotations

import base64
import os
import pty
import select
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from handmade import make_bundle
from ssh_client import agent_with, connect_to, private_home, refusal, run
from sshd import SshServer, make_key, public_key

from edge_infer.cli import main
from edge_infer.deploy import ssh_route
from edge_infer.deploy.ssh import SshTransport
from edge_infer.deploy.ssh_certificates import read_certificate
from edge_infer.deploy.ssh_host_keys import AUTHORITY, REVOKED, known_keys

HELLO = ["echo", "hello"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return private_home(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("device"), host_key_types=("ed25519", "ecdsa", "rsa")) as started:
        yield started


@pytest.fixture(scope="module")
def jump(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("jump"), alias="workshop") as started:
        yield started


def sign(authority: Path, key: Path, *options: str) -> None:
    """Make ``key``-cert.pub."""
    command = ["ssh-keygen", "-q", "-s", str(authority), "-I", "test", *options, f"{key}.pub"]
    subprocess.run(command, check=True, capture_output=True)


# -- new host keys -----------------------------------------------------------------------------------------------------


def test_a_new_host_key_is_accepted_by_name_and_then_known(server: SshServer, home: Path) -> None:
    notes: list[str] = []
    known = home / ".ssh" / "new" / "known_hosts"
    options = {"known_hosts": known, "note": notes.append}
    assert run(connect_to(server, accept_new=True, **options), HELLO) == b"hello\n"
    assert notes == [
        f"accepted the ssh-ed25519 key {server.fingerprint} of 127.0.0.1 port {server.port}, which was not known; "
        f"it is in {known} now"
    ]
    assert known.read_text() == f"{server.known_name} {server.host_key()}\n"
    assert stat.S_IMODE(known.stat().st_mode) == 0o600 and stat.S_IMODE(known.parent.stat().st_mode) == 0o700
    assert run(connect_to(server, **options), HELLO) == b"hello\n"
    assert run(connect_to(server, accept_new=True, **options), HELLO) == b"hello\n"
    assert len(notes) == 1 and known.read_text().count("\n") == 1
    found = subprocess.run(["ssh-keygen", "-F", server.known_name, "-f", known], capture_output=True, check=True)
    assert server.host_key().encode() in found.stdout


def test_a_new_key_is_added_after_a_last_line_without_its_end(server: SshServer, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_text("other.example ssh-ed25519 YWJj")
    known.chmod(0o644)
    assert run(connect_to(server, accept_new=True, known_hosts=known), HELLO) == b"hello\n"
    assert known.read_text() == f"other.example ssh-ed25519 YWJj\n{server.known_name} {server.host_key()}\n"
    assert stat.S_IMODE(known.stat().st_mode) == 0o644


def test_a_new_key_is_hashed_where_the_config_asks_for_that(server: SshServer, tmp_path: Path) -> None:
    config, known = tmp_path / "config", tmp_path / "known"
    block = server.alias_block("HashKnownHosts yes", f"UserKnownHostsFile {known}")
    config.write_text(block)
    assert run(SshTransport("kitchen-pi", ssh_config=config, accept_new=True), HELLO) == b"hello\n"
    assert known.read_text().startswith("|1|") and str(server.port) not in known.read_text().split()[0]
    found = subprocess.run(["ssh-keygen", "-F", server.known_name, "-f", known], capture_output=True, check=True)
    assert server.host_key().encode() in found.stdout
    assert run(SshTransport("kitchen-pi", ssh_config=config), HELLO) == b"hello\n"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [("{name} {other}\n", "has changed"), ("@revoked * {key}\n", "marks as revoked")],
    ids=["changed", "revoked"],
)
def test_accepting_new_keys_accepts_no_other(server: SshServer, tmp_path: Path, lines: str, expected: str) -> None:
    make_key(tmp_path / "other")
    known = tmp_path / "known"
    text = lines.format(name=server.known_name, key=server.host_key(), other=public_key(tmp_path / "other"))
    known.write_text(text)
    assert expected in refusal(connect_to(server, accept_new=True, known_hosts=known))
    assert known.read_text() == text


def test_a_key_of_another_type_does_not_become_known_beside_the_known_one(tmp_path: Path) -> None:
    with SshServer(tmp_path / "device") as device:
        make_key(tmp_path / "other", "ecdsa")
        known = tmp_path / "known"
        known.write_text(f"{device.known_name} {public_key(tmp_path / 'other')}\n")
        assert "has changed" in refusal(connect_to(device, accept_new=True, known_hosts=known))


def test_new_keys_are_accepted_at_every_hop(server: SshServer, jump: SshServer, tmp_path: Path, home: Path) -> None:
    config, notes = tmp_path / "config", list[str]()
    own = "UserKnownHostsFile ~/.ssh/known_hosts"
    config.write_text(jump.alias_block(own) + server.alias_block(own, "ProxyJump workshop"))
    assert f"port {jump.port} is not known" in refusal(SshTransport("kitchen-pi", ssh_config=config))
    transport = SshTransport("kitchen-pi", ssh_config=config, accept_new=True, note=notes.append)
    assert run(transport, HELLO) == b"hello\n"
    assert [note.split(" of ")[1].split(",")[0] for note in notes] == [
        f"127.0.0.1 port {jump.port}",
        f"127.0.0.1 port {server.port}",
    ]
    assert len((home / ".ssh" / "known_hosts").read_text().splitlines()) == 2


def test_a_changed_key_at_the_second_hop_is_refused_before_anybody_logs_in_there(
    server: SshServer, jump: SshServer, tmp_path: Path
) -> None:
    make_key(tmp_path / "other")
    (tmp_path / "known").write_text(f"{server.known_name} {public_key(tmp_path / 'other')}\n")
    config = tmp_path / "config"
    changed = f"UserKnownHostsFile {tmp_path / 'known'}"
    config.write_text(jump.alias_block() + server.alias_block(changed, "ProxyJump workshop"))
    logged = len(server.log())
    sentence = refusal(SshTransport("kitchen-pi", ssh_config=config, accept_new=True))
    assert f"the host key of 127.0.0.1 port {server.port} has changed" in sentence
    assert "Accepted" not in server.log()[logged:]


def test_a_new_key_that_cannot_be_kept_is_not_accepted(server: SshServer, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(server.alias_block("UserKnownHostsFile none"))
    transport = SshTransport("kitchen-pi", ssh_config=config, accept_new=True)
    assert "is not accepted: its UserKnownHostsFile is none" in refusal(transport)
    (tmp_path / "file").write_text("")
    sentence = refusal(connect_to(server, accept_new=True, known_hosts=tmp_path / "file" / "known"))
    assert "cannot be read (Not a directory)" in sentence


def test_a_key_accepted_into_nowhere_leaves_the_place_as_it_is(server: SshServer, tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    assert run(connect_to(server, accept_new=True, known_hosts=Path("/dev/null")), HELLO) == b"hello\n"
    assert os.stat("/dev/null").st_mode == before.st_mode


def test_the_command_says_which_key_it_accepted(
    server: SshServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--known-hosts", str(tmp_path / "known"), "--identity", str(server.identity)]
    assert main(["status", server.address, *options]) == 5
    assert "is not known" in capsys.readouterr().err
    main(["status", server.address, *options, "--accept-new", "--json", "--python", sys.executable])
    shown = capsys.readouterr()
    assert f"edge-infer: accepted the ssh-ed25519 key {server.fingerprint} of " in shown.err
    assert "accepted" not in shown.out


# -- host certificates -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["ed25519", "ecdsa", "rsa"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Certified:
    """A server whose host key an authority signed."""

    def __init__(self, tmp_path: Path, kind: str = "ed25519", authority: str = "ed25519") -> None:
        self.authority = tmp_path / "authority"
        make_key(self.authority, authority)
        directory = tmp_path / "device"
        directory.mkdir()
        self.key = directory / f"host_key_{kind}"
        make_key(self.key, kind)
        options = [f"HostCertificate {self.key}-cert.pub"]
        self.server = SshServer(directory, options=options, host_key_types=(kind,))
        self.known = tmp_path / "known_authorities"
        self.known.write_text(f"@cert-authority 127.* {public_key(self.authority)}\n")

    def transport(self) -> SshTransport:
        return connect_to(self.server, known_hosts=self.known)


@pytest.mark.parametrize("authority", ["ed25519", "ecdsa", "rsa"])
def test_a_host_certificate_of_a_known_authority_makes_the_host_known(
    tmp_path: Path, kind: str, authority: str
) -> None:
    certified = Certified(tmp_path, kind, authority)
    sign(certified.authority, certified.key, "-h", "-n", "kitchen.example,127.0.0.1", "-V", "-5m:+5m")
    with certified.server:
        assert run(certified.transport(), HELLO) == b"hello\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["-h", "-n", "kitchen.example"], "it is for kitchen.example, not for 127.0.0.1"),
        (["-h"], "it is for no host, not for 127.0.0.1"),
        (["-n", "127.0.0.1"], "it is a user's, not a host's"),
        (["-h", "-n", "127.0.0.1", "-V", "20200101:20210101"], "it was valid until 20"),
        (["-h", "-n", "127.0.0.1", "-V", "20900101:20910101"], "it is not valid before 20"),
        (["-h", "-n", "127.0.0.1", "-O", "critical:odd@example=1"], "it has critical options"),
    ],
    ids=["another host", "no host", "a user", "expired", "not yet", "critical option"],
)
def test_a_host_certificate_that_proves_nothing_is_refused(tmp_path: Path, options: list[str], expected: str) -> None:
    certified = Certified(tmp_path)
    sign(certified.authority, certified.key, *options)
    if "-h" not in options:
        # sshd itself would not load it as its own.
        from edge_infer.deploy.ssh_certificates import fault

        text = (certified.key.parent / "host_key_ed25519-cert.pub").read_text().split()[1]
        certificate = read_certificate(base64.b64decode(text))
        assert certificate is not None and fault(certificate, "127.0.0.1") == expected
        return
    with certified.server:
        sentence = refusal(certified.transport())
        assert "shows the host certificate 'test', which does not prove who it is: " in sentence
        assert expected in sentence
        # As in ssh, it is not saved by its bare key being known.
        with certified.known.open("a") as known:
            known.write(f"{certified.server.known_name} {certified.server.host_key()}\n")
        assert expected in refusal(certified.transport())


def test_patterns_in_a_host_certificate_and_the_name_of_an_alias(tmp_path: Path) -> None:
    certified = Certified(tmp_path)
    sign(certified.authority, certified.key, "-h", "-n", "*.lab.example")
    certified.known.write_text(f"@cert-authority *.lab.example {public_key(certified.authority)}\n")
    with certified.server as device:
        config = tmp_path / "config"
        config.write_text(device.alias_block("HostKeyAlias pi.lab.example", f"UserKnownHostsFile {certified.known}"))
        assert run(SshTransport("kitchen-pi", ssh_config=config), HELLO) == b"hello\n"
        assert "is not known" in refusal(certified.transport())


def test_a_certificate_of_an_unknown_authority_counts_as_its_bare_key(tmp_path: Path) -> None:
    certified = Certified(tmp_path)
    sign(certified.authority, certified.key, "-h", "-n", "127.0.0.1")
    make_key(tmp_path / "stranger")
    certified.known.write_text(f"@cert-authority * {public_key(tmp_path / 'stranger')}\n")
    with certified.server as device:
        assert "is not known" in refusal(certified.transport())
        with certified.known.open("a") as known:
            known.write(f"{device.known_name} {device.host_key()}\n")
        assert run(certified.transport(), HELLO) == b"hello\n"


@pytest.mark.parametrize("revoked", ["authority", "host"])
def test_a_revoked_authority_or_host_key_is_refused_whatever_was_signed(tmp_path: Path, revoked: str) -> None:
    certified = Certified(tmp_path)
    sign(certified.authority, certified.key, "-h", "-n", "127.0.0.1")
    key = certified.authority if revoked == "authority" else certified.key
    with certified.known.open("a") as known:
        known.write(f"@revoked * {public_key(key)}\n")
    with certified.server:
        assert "marks as revoked" in refusal(certified.transport())


def certificate_of(tmp_path: Path) -> bytes:
    make_key(tmp_path / "authority")
    make_key(tmp_path / "key")
    sign(tmp_path / "authority", tmp_path / "key", "-h", "-n", "host")
    return base64.b64decode((tmp_path / "key-cert.pub").read_text().split()[1])


def test_a_changed_or_cut_certificate_proves_nothing(tmp_path: Path) -> None:
    from edge_infer.deploy.ssh_certificates import fault

    blob = certificate_of(tmp_path)
    whole = read_certificate(blob)
    assert whole is not None and fault(whole, "host") is None
    accepted = 0
    for position in range(len(blob)):
        changed = blob[:position] + bytes([blob[position] ^ 1]) + blob[position + 1 :]
        for damaged in (changed, blob[:position]):
            certificate = read_certificate(damaged)
            accepted += certificate is not None and fault(certificate, "host") is None
    assert accepted == 0


def test_markers_and_authorities_in_known_hosts(tmp_path: Path) -> None:
    lines = "@cert-authority *.lab ssh-ed25519 YWJj\n@revoked * ssh-ed25519 ZGVm\n[pi.lab]:2222 ssh-ed25519 Z2hp\n"
    (tmp_path / "known").write_text(lines)
    found = known_keys([tmp_path / "known"], "[pi.lab]:2222")
    assert [(key.marker, key.blob) for key in found] == [(AUTHORITY, b"abc"), (REVOKED, b"def"), ("", b"ghi")]
    assert [key.marker for key in known_keys([tmp_path / "known"], "pi.example")] == [REVOKED]


# -- user certificates and agents --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """A server that knows no keys, only an authority for its users."""
    folder = tmp_path_factory.mktemp("trusting")
    make_key(folder / "authority")
    options = [f"TrustedUserCAKeys {folder / 'authority'}.pub", "AuthorizedKeysFile none"]
    with SshServer(folder / "device", options=options) as started:
        yield started


def certified_key(server: SshServer, path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A key at ``path`` and its certificate elsewhere, which is returned."""
    make_key(path, kind, passphrase)
    sign(server.directory.parent / "authority", path, "-n", server.user)
    elsewhere = path.with_name("elsewhere.pub")
    path.with_name(f"{path.name}-cert.pub").rename(elsewhere)
    return elsewhere


def test_a_certificate_file_named_in_the_config(trusting: SshServer, tmp_path: Path, kind: str) -> None:
    key, config = tmp_path / "worker", tmp_path / "config"
    certificate = certified_key(trusting, key, kind)
    make_key(tmp_path / "other")
    sign(trusting.directory.parent / "authority", tmp_path / "other", "-n", "x")
    identity = f"IdentityFile {key}"
    config.write_text(trusting.alias_block(identity))
    assert "refused the login" in refusal(SshTransport("kitchen-pi", ssh_config=config))
    others = f"CertificateFile {tmp_path / 'other-cert.pub'}"
    config.write_text(trusting.alias_block(identity, others, f'CertificateFile="{certificate}"'))
    assert run(SshTransport("kitchen-pi", ssh_config=config), HELLO) == b"hello\n"
    assert run(SshTransport("kitchen-pi", ssh_config=config, identity=key), HELLO) == b"hello\n"


def test_a_certificate_file_that_is_none(trusting: SshServer, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(trusting.alias_block(f"CertificateFile {trusting.identity}.pub"))
    assert "holds no certificate" in refusal(SshTransport("kitchen-pi", ssh_config=config))
    config.write_text(trusting.alias_block("CertificateFile /no/such"))
    assert "the CertificateFile /no/such cannot be read" in refusal(SshTransport("kitchen-pi", ssh_config=config))


def test_the_agents_own_certificate(trusting: SshServer, tmp_path: Path, kind: str) -> None:
    key = tmp_path / "worker"
    make_key(key, kind, "secret")
    sign(trusting.directory.parent / "authority", key, "-n", trusting.user)
    with agent_with(tmp_path, key):
        key.rename(tmp_path / "gone")
        assert run(connect_to(trusting, identity=None), HELLO) == b"hello\n"


def test_a_certificate_file_for_a_key_that_only_the_agent_has(trusting: SshServer, tmp_path: Path, kind: str) -> None:
    key, config = tmp_path / "worker", tmp_path / "config"
    certificate = certified_key(trusting, key, kind, "secret")
    config.write_text(trusting.alias_block(f"CertificateFile {certificate}", "IdentitiesOnly yes"))
    with agent_with(tmp_path, key):
        assert run(SshTransport("kitchen-pi", ssh_config=config), HELLO) == b"hello\n"


def test_the_public_half_names_a_key_of_the_agent(tmp_path: Path) -> None:
    device = SshServer(tmp_path / "device")
    device.directory.mkdir()
    make_key(device.identity, passphrase="secret")
    make_key(tmp_path / "private", passphrase="secret")
    with device, agent_with(tmp_path, tmp_path / "private", device.identity):
        public = device.identity.with_name(f"{device.identity.name}.pub")
        assert run(connect_to(device, identity=public), HELLO) == b"hello\n"
        assert "Failed publickey" not in device.log()


# -- passphrases -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """A server whose account key needs the passphrase ``secret``."""
    device = SshServer(tmp_path_factory.mktemp("locked"))
    make_key(device.identity, passphrase="secret")
    with device:
        yield device


def test_a_passphrase_is_asked_for_until_it_is_right(locked: SshServer) -> None:
    answers, asked = iter(["wrong", "secret"]), list[tuple[Path, bool]]()

    def ask(path: Path, wrong: bool) -> str:
        asked.append((path, wrong))
        return next(answers)

    assert run(connect_to(locked, ask_passphrase=ask), HELLO) == b"hello\n"
    assert asked == [(locked.identity, False), (locked.identity, True)]


@pytest.mark.parametrize(("answer", "times"), [("wrong", 3), ("", 1), (None, 1)])
def test_a_passphrase_that_does_not_come(locked: SshServer, answer: str | None, times: int) -> None:
    asked: list[bool] = []
    transport = connect_to(locked, ask_passphrase=lambda _, wrong: asked.append(wrong) or answer)
    assert f"{locked.identity} needs its passphrase: run `ssh-add" in refusal(transport)
    assert len(asked) == times


def test_nobody_is_asked_while_another_key_will_do(locked: SshServer, server: SshServer, tmp_path: Path) -> None:
    def nobody(path: Path, wrong: bool) -> str:
        raise AssertionError(path)

    config = tmp_path / "config"
    config.write_text(server.alias_block(f"IdentityFile {locked.identity}"))
    assert run(SshTransport("kitchen-pi", ssh_config=config, ask_passphrase=nobody), HELLO) == b"hello\n"
    with agent_with(tmp_path, locked.identity):
        assert run(connect_to(locked, ask_passphrase=nobody), HELLO) == b"hello\n"


def at_a_terminal(command: list[str], answers: list[str]) -> tuple[int, str]:
    """Run ``command`` on a terminal of its own, answer each question for a passphrase; gives status and screen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"})
    screen, waiting, deadline = b"", list(answers), time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.5)[0]:
            continue
        try:
            screen += os.read(terminal, 4096)
        except OSError:
            break  # the program has ended
        if waiting and screen.count(b"do without the key): ") > len(answers) - len(waiting):
            time.sleep(0.3)  # until getpass has switched the echo off
            os.write(terminal, waiting.pop(0).encode() + b"\n")
    if time.monotonic() > deadline:
        os.kill(pid, 9)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    return status, screen.decode()


def edge_infer(locked: SshServer, *arguments: str) -> list[str]:
    options = ["--known-hosts", str(locked.known_hosts), "--identity", str(locked.identity)]
    return [sys.executable, "-m", "edge_infer.cli", *arguments, *options, "--python", sys.executable]


def test_at_a_terminal_the_passphrase_is_asked_for(locked: SshServer) -> None:
    status, screen = at_a_terminal(edge_infer(locked, "status", locked.address), ["wrong", "secret"])
    assert f"passphrase for {locked.identity}" in screen and "wrong, once more: " in screen
    assert "secret" not in screen and "refused the login" not in screen
    assert (status, "no models yet" in screen) == (0, True)


def test_a_passphrase_is_asked_for_once_and_the_spinner_rests(locked: SshServer, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "digits.edge")
    command = edge_infer(locked, "push", str(bundle.path), locked.address, f"{locked.user}@127.0.0.1:{locked.port}")
    _, screen = at_a_terminal([*command, "--dry-run"], ["secret"])
    assert screen.count("do without the key): ") == 1
    assert "refused the login" not in screen and screen.count(f"{locked.address}: ") == 2
    after = screen.partition("do without the key): ")[2]
    assert after.startswith("\r\n"), "something was written over the question"


@pytest.mark.parametrize("how", ["json", "no terminal"])
def test_without_somebody_to_ask_the_key_is_named(locked: SshServer, how: str) -> None:
    command = edge_infer(locked, "status", locked.address)
    if how == "json":
        status, screen = at_a_terminal([*command, "--json"], [])
    else:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False
        )
        status, screen = done.returncode, done.stderr
    assert status == 5 and "do without the key" not in screen
    assert "needs its passphrase: run `ssh-add" in "".join(screen.splitlines())


def test_one_question_for_devices_pushed_to_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_infer.cli import console
    from edge_infer.cli.passphrases import Passphrases

    asked: list[str] = []

    def slowly(question: str) -> str:
        asked.append(question)
        time.sleep(0.05)
        return "secret"

    monkeypatch.setattr(console, "ask_secret", slowly)
    passphrases, given = Passphrases(), list[str | None]()
    threads = [threading.Thread(target=lambda: given.append(passphrases(Path("key"), False))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert given == ["secret"] * 8 and len(asked) == 1


# -- ssh_config --------------------------------------------------------------------------------------------------------


def looked_up(config: Path, host: str, *keys: str) -> list[object]:
    from edge_infer.deploy.ssh_config import look_up, read_config

    found = look_up(read_config(config), host)
    return [found.get(key) for key in keys]


def ssh_says(config: Path, host: str, *keys: str) -> list[object]:
    """What ssh itself makes of it."""
    done = subprocess.run(["ssh", "-G", "-F", str(config), host], capture_output=True, text=True, check=True)
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    return [lines.get(key) for key in keys]


@pytest.fixture
def included(home: Path) -> Path:
    """A config with includes of every form, in ``~/.ssh`` and elsewhere."""
    folder = home / ".ssh" / "conf.d"
    folder.mkdir()
    (folder / "10-first.conf").write_text("Host alpha\n  Port 1001\n  Include deeper/*\n  User after\n")
    (folder / "20-second.conf").write_text("Host alpha beta\n  Port 2002\n  User second\n")
    (folder / ".hidden.conf").write_text("Host *\n  Port 6666\n")
    (home / ".ssh" / "deeper").mkdir()
    (home / ".ssh" / "deeper" / "one").write_text("User deep\nHost beta\n  Port 3003\nHost alpha\n  ConnectTimeout 7\n")
    (home / "absolute").write_text("Match originalhost gamma\n  Port 4004\nHost delta\n  Port 5005\n")
    config = home / ".ssh" / "config"
    config.write_text(
        "Include conf.d/*.conf no-such-file\n"
        "ConnectTimeout 9\n"
        f"Host gamma delta\n  Include {home}/absolute\n  User inner\n"
        "Match originalhost epsilon all-of-them\n".replace(" all-of-them", "")
        + "  Include ~/absolute\n  Port 77\n"
        "Match all\n  User everybody\n"
    )
    return config


@pytest.mark.parametrize("host", ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"])
def test_includes_are_followed_as_ssh_does(included: Path, host: str) -> None:
    keys = ["port", "user", "connecttimeout"]
    # ssh itself looks up ~ by the account, not by HOME.
    absolute = included.read_text().replace("~/absolute", f"{included.parent.parent}/absolute")
    for folder in ("conf.d/*.conf", "deeper/*"):
        absolute = absolute.replace(f"Include {folder}", f"Include {included.parent}/{folder}")
    first = included.parent / "conf.d" / "10-first.conf"
    first.write_text(first.read_text().replace("deeper/*", f"{included.parent}/deeper/*"))
    (included.parent / "for-ssh").write_text(absolute)
    expected = ssh_says(included.parent / "for-ssh", host, *keys)
    found = looked_up(included, host, *keys)
    assert [found[0] or "22", found[1], found[2] or "none"] == expected


def test_relative_includes_lie_in_the_ssh_folder(included: Path) -> None:
    assert looked_up(included, "alpha", "port", "user", "connecttimeout") == ["1001", "deep", "7"]
    assert looked_up(included, "delta", "port", "user") == ["5005", "inner"]
    assert looked_up(included, "epsilon", "port") == ["77"]


def test_an_included_alias_is_reached(server: SshServer, home: Path) -> None:
    (home / ".ssh" / "config").write_text("Include devices\n")
    (home / ".ssh" / "devices").write_text(server.alias_block())
    assert run(SshTransport("kitchen-pi"), HELLO) == b"hello\n"


def test_files_that_include_each_other(home: Path) -> None:
    config = home / ".ssh" / "config"
    config.write_text("Include config\n")
    assert "more than 16 deep; end the circle" in refusal(SshTransport("anywhere"))
    config.write_text("Include link\nHost a\n ProxyCommand x\n")
    (home / ".ssh" / "link").symlink_to(home / "nowhere")
    assert "ProxyCommand for a" in refusal(SshTransport("a"))
    (home / ".ssh" / "link").unlink()
    (home / ".ssh" / "link").mkdir()
    assert f"{home}/.ssh/link cannot be read as an ssh_config: Is a directory" in refusal(SshTransport("a"))
    config.write_text('Include "open\n')
    assert "cannot be read as an ssh_config: No closing quotation" in refusal(SshTransport("a"))


def test_tokens_in_a_certificate_file(home: Path) -> None:
    config = home / ".ssh" / "config"
    config.write_text("CertificateFile %d/certs/%h.pub\nHost a\n HostName b\n CertificateFile ~/two.pub\n")
    assert looked_up(config, "a", "certificatefile", "identityfile") == [
        [f"{home}/certs/b.pub", f"{home}/two.pub"],
        [],
    ]


def test_accepting_is_by_name_only(server: SshServer, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(server.alias_block("StrictHostKeyChecking no", "UserKnownHostsFile /dev/null"))
    assert "is not known" in refusal(SshTransport("kitchen-pi", ssh_config=config))
    assert ssh_route.Options().accept_new is False


def test_the_transport_closes_after_a_refusal(server: SshServer, tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    with closing(connect_to(server, known_hosts=tmp_path / "none")) as transport:
        refusal(transport)
    assert set(threading.enumerate()) == threads
