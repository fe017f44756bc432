"""A device reached over SSH: one connection, one exec channel for each command, or its SFTP.

Host keys are strict at every hop: a changed or revoked key is refused, an unknown one too unless the caller accepts
new ones, which are then written down. Host certificates count where known_hosts names their authority. Only keys log
in (files, their certificates, the agent); nothing asks for a password. ``~/.ssh/config`` with what it includes is
honoured for HostName, User, Port, IdentityFile, CertificateFile, IdentitiesOnly, UserKnownHostsFile, HashKnownHosts,
HostKeyAlias, ProxyJump and ConnectTimeout, where an address does not say otherwise. Every failure is a DeviceError; a
request that is wrong in itself is a UsageError.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shlex
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_infer.deploy.local import ERRORS_BYTES, after_the_end, drain, ended_early, last_words, read_line
from edge_infer.deploy.ssh_certificates import CERTIFICATE
from edge_infer.deploy.ssh_host_keys import AUTHORITY, KnownKey, known_keys, verify_host_key
from edge_infer.deploy.ssh_login import AskPassphrase, log_in
from edge_infer.deploy.ssh_route import TIMEOUT_S, Hop, Options, find_route, parse_address
from edge_infer.deploy.ssh_silence import SILENCE_S, Packetizer, Watch, keep_alive
from edge_infer.deploy.transport import SLICE_BYTES
from edge_infer.errors import DeviceError, Unreachable

# After ssh_route, which says how to install it when it is missing.
import paramiko  # isort: skip
from edge_infer.deploy.ssh_connection import Connection  # isort: skip

#: Allowed algorithms, the preferred first; paramiko may know fewer. AES-GCM leads: about twice as fast as the rest, and
#: integrity is built in.
KEY_EXCHANGES = (
    "mlkem768x25519-sha256",
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
    "diffie-hellman-group16-sha512",
    "diffie-hellman-group14-sha256",
)
CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
)
MACS = (
    "hmac-sha2-256-etm@openssh.com",
    "hmac-sha2-512-etm@openssh.com",
    "hmac-sha2-256",
    "hmac-sha2-512",
)
#: SSH_OPEN_ADMINISTRATIVELY_PROHIBITED (RFC 4254, 5.1).
OPEN_PROHIBITED = 1
#: Signatures that paramiko before 5.0 would still make or accept: DSA, and RSA with SHA-1.
WEAK_SIGNATURES = ("ssh-rsa", "ssh-dss", "ssh-rsa-cert-v01@openssh.com", "ssh-dss-cert-v01@openssh.com")
#: A key type in known_hosts stands for these signature algorithms; other types are named like their algorithm.
RSA_SIGNATURES = ("rsa-sha2-512", "rsa-sha2-256")


@dataclass(frozen=True)
class User:
    """Who is there while connecting: told of accepted keys, asked for passphrases, or None for nobody."""

    note: Callable[[str], None] | None = None
    ask_passphrase: AskPassphrase | None = None


def _connect(hop: Hop, through: paramiko.Transport | None, user: User) -> paramiko.Transport:
    """A connection to ``hop``, verified and logged in, on its own or through a jump host's. Raises DeviceError."""
    with _reported(hop):
        stream = _stream(hop, through)
        connection = Connection(
            stream,
            disabled_algorithms={"keys": WEAK_SIGNATURES, "pubkeys": WEAK_SIGNATURES},
            packetizer_class=Packetizer,
        )
        try:
            _agree_on_keys(connection, hop, user.note)
            log_in(connection, hop, user.ask_passphrase)
        except BaseException:
            _end(connection)
            raise
        keep_alive(connection)
        return connection


def _stream(hop: Hop, through: paramiko.Transport | None) -> socket.socket | paramiko.Channel:
    if through is not None:
        return through.open_channel("direct-tcpip", (hop.host, hop.port), ("127.0.0.1", 0), timeout=hop.timeout_s)
    stream = socket.create_connection((hop.host, hop.port), hop.timeout_s)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # The kernel notices a device that lost power; ssh_silence, one that only hangs.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)
    return stream


def _agree_on_keys(connection: paramiko.Transport, hop: Hop, note: Callable[[str], None] | None) -> None:
    known = known_keys(hop.known_hosts, hop.known_as)
    _restrict(connection.get_security_options(), known)
    connection.banner_timeout = connection.handshake_timeout = hop.timeout_s
    connection.auth_timeout = connection.channel_timeout = hop.timeout_s
    # Twice: the banner and the key exchange each have their own limit, whose error says more than this one's.
    connection.start_client(timeout=2 * hop.timeout_s)
    shown = connection.get_remote_server_key()
    _refuse_terrapin(connection, hop)
    certificate = shown.public_blob.key_blob if shown.public_blob else b""
    accepted = verify_host_key(hop, known, shown.get_name(), shown.asbytes(), certificate)
    if accepted and note:
        note(accepted)


def _refuse_terrapin(connection: paramiko.Transport, hop: Hop) -> None:
    """Raises DeviceError where somebody in between could drop messages unseen (CVE-2023-48795).

    That takes a server that knows no strict key exchange, and encrypt-then-MAC; ChaCha20 and CBC are not offered.
    """
    pairs = ((connection.local_cipher, connection.local_mac), (connection.remote_cipher, connection.remote_mac))
    if connection.agreed_on_strict_kex:
        return
    if any("gcm" not in cipher and "-etm@" in mac for cipher, mac in pairs):
        raise DeviceError(f"{hop} can be attacked by Terrapin (CVE-2023-48795); update its SSH server or allow AES-GCM")


def _restrict(options: paramiko.SecurityOptions, known: list[KnownKey]) -> None:
    options.ciphers = tuple(name for name in CIPHERS if name in options.ciphers)
    options.digests = tuple(name for name in MACS if name in options.digests)
    options.kex = tuple(name for name in KEY_EXCHANGES if name in options.kex)
    # A server with several host keys shows the type asked for first: ask for one that can be verified.
    kinds = [entry.kind for entry in known if not entry.marker]
    wanted = [name for kind in kinds for name in (RSA_SIGNATURES if kind == "ssh-rsa" else (kind,))]
    if any(entry.marker == AUTHORITY for entry in known):
        wanted = [*(name + CERTIFICATE for name in options.key_types), *wanted]
    first = [name for name in dict.fromkeys(wanted) if name in paramiko.Transport._key_info]
    options.key_types = (*first, *(name for name in options.key_types if name not in first))


def _end(connection: paramiko.Transport) -> None:
    """End ``connection`` and its threads, whatever state it is in."""
    connection.close()
    connection.sock.close()
    # Ends the timer of a key exchange that failed half-way; it would outlive the connection.
    connection.packetizer.complete_handshake()
    if connection.is_alive():
        connection.join(TIMEOUT_S)


@contextlib.contextmanager
def _reported(hop: Hop) -> Iterator[None]:
    """Turns what paramiko and the sockets raise into a DeviceError: Unreachable, unless the server's answer was no."""
    try:
        yield
    except DeviceError:
        raise
    except (OSError, EOFError, UnicodeError, paramiko.SSHException) as error:
        kind = DeviceError if _is_refusal(error) else Unreachable
        raise kind(_sentence(hop, error)) from error


def _is_refusal(error: Exception) -> bool:
    """Whether trying again later cannot help: algorithms that do not match, forwarding that is forbidden."""
    if isinstance(error, paramiko.ChannelException):
        return bool(error.code == OPEN_PROHIBITED)
    return isinstance(error, paramiko.ssh_exception.IncompatiblePeer)


def _sentence(hop: Hop, error: Exception) -> str:
    # To paramiko, no channel in time is an error like others.
    if isinstance(error, TimeoutError) or str(error).startswith("Timeout opening channel"):
        return f"{hop} did not answer within {hop.timeout_s:g} s; check that it is on and reachable"
    match error:
        case socket.gaierror() | UnicodeError():
            text = f"no address is known for {hop.host}: {error}; check the name or give it a Host entry in ssh_config"
        case ConnectionRefusedError():
            text = f"nothing listens at {hop}; check the port and that the SSH server runs"
        case paramiko.ssh_exception.IncompatiblePeer():
            text = f"{hop} offers only outdated algorithms ({error}); update its SSH server"
        case paramiko.ChannelException():
            text = f"{hop} cannot be reached through the jump host ({error.text}); check the address and that it is on"
        case EOFError():
            text = f"{hop} ended the connection before it was ready; see its SSH server's log"
        case _:
            text = f"{hop} cannot be reached over SSH: {error}; check that an SSH server listens there and see its log"
    return text


class SshTransport:
    """Runs commands on the device at ``address``, over one connection made on first use. Use it from one thread.

    ``ssh_config`` defaults to ``~/.ssh/config``; ``known_hosts`` to its UserKnownHostsFile or ``~/.ssh/known_hosts``,
    with ``/etc/ssh/ssh_known_hosts``; ``identity`` to its IdentityFile, the usual files and the agent; ``timeout_s``,
    for each step of connecting, to its ConnectTimeout or 15; ``jump``, written like a ProxyJump, to its ProxyJump.
    ``accept_new``: the key of a host that is not known is added to known_hosts, and ``note`` is told so in a sentence.
    ``ask_passphrase`` is asked for that of a locked key (see ssh_login) when no other key logs in; without it, such a
    key is not used. Raises UsageError for a malformed address.
    """

    def __init__(
        self,
        address: str,
        *,
        ssh_config: Path | None = None,
        known_hosts: Path | None = None,
        identity: Path | None = None,
        timeout_s: float | None = None,
        accept_new: bool = False,
        ask_passphrase: AskPassphrase | None = None,
        note: Callable[[str], None] | None = None,
        jump: str | None = None,
    ) -> None:
        self.address = address
        self._target = parse_address(address)
        self._options = Options(ssh_config, known_hosts, identity, timeout_s, accept_new, jump)
        self._user = User(note, ask_passphrase)
        self._watch: Watch | None = None
        self._route: list[Hop] = []
        self._connections: list[paramiko.Transport] = []
        # Without any handler, Python would print paramiko's own report of an error that is raised here anyway.
        logging.getLogger("paramiko").addHandler(logging.NullHandler())

    def connect(self) -> None:
        """Connect unless that is done. Raises DeviceError, and UsageError for a file that is not there."""
        if self._connections:
            return
        self._route = find_route(self._target, self._options)
        try:
            for hop in self._route:
                through = self._connections[-1] if self._connections else None
                self._connections.append(_connect(hop, through, self._user))
        except BaseException:
            self.close()
            raise
        self._watch = Watch(self._connections)

    def start(self, command: list[str]) -> SshProcess:
        """Start ``command`` in the login shell there, quoted for a POSIX shell. Raises DeviceError and UsageError."""
        self.connect()
        hop = self._route[-1]
        try:
            channel = self._connections[-1].open_session(timeout=hop.timeout_s)
            channel.exec_command(shlex.join(command))
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise DeviceError(f"{hop} did not start a command ({error}); connect again or see its log") from error
        return SshProcess(channel, hop)

    def open_sftp(self) -> paramiko.SFTPClient:
        """The device's files. Raises DeviceError when its server offers no SFTP, and UsageError."""
        self.connect()
        hop = self._route[-1]
        try:
            channel = self._connections[-1].open_session(timeout=hop.timeout_s)
            channel.invoke_subsystem("sftp")
            return paramiko.SFTPClient(channel)
        except (OSError, EOFError, paramiko.SSHException, paramiko.SFTPError) as error:
            raise DeviceError(
                f"{hop} offers no SFTP ({error}); have its SSH server offer it (OpenSSH: Subsystem sftp internal-sftp)"
            ) from error

    def close(self) -> None:
        """End the connection, and those to jump hosts. A later ``start`` would connect anew."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        while self._connections:
            _end(self._connections.pop())


class SshProcess:
    """A command running on the device. Use it from one thread, or read in one and write in another."""

    def __init__(self, channel: paramiko.Channel, hop: Hop) -> None:
        self._channel = channel
        self._where = str(hop)
        self._output = io.BufferedReader(_Output(channel, self._where), SLICE_BYTES)
        self._errors = _ErrorTail(channel)
        self._input_ended = False

    def write(self, data: bytes | memoryview) -> None:
        """Write all of ``data`` to its standard input. Raises DeviceError when command or connection have ended."""
        if self._input_ended:
            raise DeviceError(after_the_end(self._where))
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), SLICE_BYTES):
                self._channel.sendall(bytes(view[start : start + SLICE_BYTES]))
        except (OSError, EOFError, paramiko.SSHException) as error:
            self._errors.join(1)
            # Only a command's end is announced by the end of its output.
            if self._channel.eof_received:
                raise DeviceError(ended_early(self._where, self.errors())) from error
            raise Unreachable(_lost(self._where)) from error

    def readline(self) -> bytes:
        """One line of its standard output, or ``b""`` at the end.

        Raises DeviceError for a line over 1 MiB and for a connection lost before the end of the output.
        """
        return read_line(self._output, self._where)

    def close_input(self) -> None:
        """End of its standard input."""
        self._input_ended = True
        # A connection lost by now is told by the next read.
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.shutdown_write()

    def wait(self) -> int:
        """Wait for the end and return the exit status; output not read by then is thrown away.

        Raises DeviceError when there is no status: a signal ended the command, or the connection is lost.
        """
        drain(self._output)
        status: int = self._channel.recv_exit_status()
        self._errors.join()
        if status == -1:
            raise DeviceError(
                f"the command on {self._where} ended without an exit status, killed by a signal or cut off with the "
                f"connection{last_words(self.errors())}"
            )
        return status

    def errors(self) -> str:
        """The last 8 KiB of its standard error so far."""
        return self._errors.text()

    def close(self) -> None:
        """Let go of it; a command that still runs loses its input and output, and is sent SIGTERM.

        A server may refuse to send signals (OpenSSH does where root logs in); what never reads or writes then runs on.
        """
        if not self._channel.exit_status_ready():
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                _send_signal(self._channel, "TERM")
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.close()
        self._errors.join()


def _lost(where: str) -> str:
    return f"the connection to {where} is lost; check that the device is on, and run the same again"


def _send_signal(channel: paramiko.Channel, name: str) -> None:
    """Ask the server to send the command a signal (RFC 4254, 6.9); paramiko has no method for it."""
    message = paramiko.Message()
    message.add_byte(paramiko.common.cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string("signal")
    message.add_boolean(False)
    message.add_string(name)
    channel.transport._send_user_message(message)


class _Output(io.RawIOBase):
    """A channel's standard output as a file, so that Python's own buffering finds the lines."""

    def __init__(self, channel: paramiko.Channel, where: str) -> None:
        super().__init__()
        self._channel = channel
        self._where = where

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Raises DeviceError when the connection is lost, which to paramiko looks like the end of the output."""
        try:
            data = self._channel.recv(len(buffer))
        except (EOFError, paramiko.SSHException) as error:
            raise Unreachable(_lost(self._where)) from error
        if not data and not self._channel.eof_received:
            raise Unreachable(_lost(self._where))
        buffer[: len(data)] = data
        return len(data)


class _ErrorTail(threading.Thread):
    """Keeps the end of a channel's standard error. Unread, it would use up the window that the output needs too."""

    def __init__(self, channel: paramiko.Channel) -> None:
        super().__init__(name="edge-infer-stderr", daemon=True)
        self._channel = channel
        self._tail = b""
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            while data := self._channel.recv_stderr(SLICE_BYTES):
                self._tail = (self._tail + data)[-ERRORS_BYTES:]

    def text(self) -> str:
        return self._tail.decode("utf-8", "replace")
