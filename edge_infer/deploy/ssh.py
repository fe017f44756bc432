"""A device reached over SSH: one connection, one exec channel for each command.

Host keys are strict: an unknown or changed key is refused at every hop and never learned. Only keys log in (files,
their certificates, the agent); nothing asks for a password. ``~/.ssh/config`` is honoured for HostName, User, Port,
IdentityFile, IdentitiesOnly, UserKnownHostsFile, HostKeyAlias, ProxyJump and ConnectTimeout, where an address does not
say otherwise. Every failure is a DeviceError; a request that is wrong in itself is a UsageError.
"""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from edge_infer.deploy.local import ERRORS_BYTES, after_the_end, drain, ended_early, last_words, read_line
from edge_infer.deploy.ssh_host_keys import KnownKey, fingerprint, known_keys, verify_host_key
from edge_infer.deploy.ssh_route import TIMEOUT_S, Hop, Options, find_route, parse_address
from edge_infer.deploy.transport import SLICE_BYTES
from edge_infer.errors import DeviceError

# After ssh_route, which says how to install it when it is missing.
import paramiko  # isort: skip
from edge_infer.deploy.ssh_connection import Connection  # isort: skip

KEEPALIVE_S = 15
#: Seconds that sent data may stay unacknowledged before a silent device counts as lost.
SILENCE_S = 45

#: Allowed algorithms, the preferred first. AES-GCM leads: about twice as fast as the rest, and integrity is built in.
CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "chacha20-poly1305@openssh.com",
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
#: Signatures that paramiko before 5.0 would still make or accept: DSA, and RSA with SHA-1.
WEAK_SIGNATURES = ("ssh-rsa", "ssh-dss", "ssh-rsa-cert-v01@openssh.com", "ssh-dss-cert-v01@openssh.com")
#: A key type in known_hosts stands for these signature algorithms; other types are named like their algorithm.
RSA_SIGNATURES = ("rsa-sha2-512", "rsa-sha2-256")


def _connect(hop: Hop, through: paramiko.Transport | None) -> paramiko.Transport:
    """A connection to ``hop``, verified and logged in, on its own or through a jump host's. Raises DeviceError."""
    with _reported(hop):
        stream = _stream(hop, through)
        connection = Connection(stream, disabled_algorithms={"keys": WEAK_SIGNATURES, "pubkeys": WEAK_SIGNATURES})
        try:
            _agree_on_keys(connection, hop)
            _log_in(connection, hop)
        except BaseException:
            _end(connection)
            raise
        connection.set_keepalive(KEEPALIVE_S)
        return connection


def _stream(hop: Hop, through: paramiko.Transport | None) -> socket.socket | paramiko.Channel:
    if through is not None:
        return through.open_channel("direct-tcpip", (hop.host, hop.port), ("127.0.0.1", 0), timeout=hop.timeout_s)
    stream = socket.create_connection((hop.host, hop.port), hop.timeout_s)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # paramiko sends keepalives but waits for no answer to them: the kernel has to notice a device that lost power.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)
    return stream


def _agree_on_keys(connection: paramiko.Transport, hop: Hop) -> None:
    known = known_keys(hop.known_hosts, hop.known_as)
    _restrict(connection.get_security_options(), known)
    connection.banner_timeout = connection.handshake_timeout = hop.timeout_s
    connection.auth_timeout = connection.channel_timeout = hop.timeout_s
    # Twice: the banner and the key exchange each have their own limit, whose error says more than this one's.
    connection.start_client(timeout=2 * hop.timeout_s)
    shown = connection.get_remote_server_key()
    verify_host_key(hop, known, shown.get_name(), shown.asbytes())


def _restrict(options: paramiko.SecurityOptions, known: list[KnownKey]) -> None:
    options.ciphers = tuple(name for name in CIPHERS if name in options.ciphers)
    options.digests = tuple(name for name in MACS if name in options.digests)
    options.kex = tuple(name for name in options.kex if not name.endswith("-sha1"))
    # A server with several host keys shows the type asked for first: ask for one that can be verified.
    kinds = [entry.kind for entry in known if not entry.revoked]
    wanted = [name for kind in kinds for name in (RSA_SIGNATURES if kind == "ssh-rsa" else (kind,))]
    first = [name for name in dict.fromkeys(wanted) if name in options.key_types]
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
    """Turns what paramiko and the sockets raise into a DeviceError."""
    try:
        yield
    except DeviceError:
        raise
    except (OSError, EOFError, UnicodeError, paramiko.SSHException) as error:
        raise DeviceError(_sentence(hop, error)) from error


def _sentence(hop: Hop, error: Exception) -> str:
    match error:
        case socket.gaierror() | UnicodeError():
            text = f"no address is known for {hop.host}: {error}; check the name or give it a Host entry in ssh_config"
        case ConnectionRefusedError():
            text = f"nothing listens at {hop}; check the port and that the SSH server runs"
        case TimeoutError():
            text = f"{hop} did not answer within {hop.timeout_s:g} s; check that it is on and reachable"
        case paramiko.ssh_exception.IncompatiblePeer():
            text = f"{hop} offers only outdated algorithms ({error}); update its SSH server"
        case paramiko.ChannelException():
            text = f"{hop} cannot be reached through the jump host ({error.text}); check the address and that it is on"
        case EOFError():
            text = f"{hop} ended the connection before it was ready; see its SSH server's log"
        case _:
            text = f"{hop} cannot be reached over SSH: {error}; check that an SSH server listens there and see its log"
    return text


def _log_in(connection: paramiko.Transport, hop: Hop) -> None:
    """Offer keys until one is accepted. Raises DeviceError when none is."""
    tried: list[str] = []
    locked: list[Path] = []
    unusable: list[str] = []
    with _open_agent() as agent:
        for label, key in _candidates(hop, agent, locked, unusable):
            tried.append(label)
            if _accepted(connection, hop, key):
                return
            if not connection.is_active():
                unusable.append("the server then ended the connection")
                break
    unusable += [f"{path} needs its passphrase: run `ssh-add {path}` first" for path in locked]
    raise DeviceError(_refusal(hop, tried, unusable))


@contextlib.contextmanager
def _open_agent() -> Iterator[tuple[paramiko.AgentKey, ...]]:
    """The keys in the user's agent; none when there is no agent or it does not answer."""
    try:
        agent = paramiko.Agent()
    except (OSError, paramiko.SSHException):
        yield ()
        return
    try:
        yield agent.get_keys()
    finally:
        agent.close()


def _candidates(
    hop: Hop, agent: tuple[paramiko.AgentKey, ...], locked: list[Path], unusable: list[str]
) -> Iterator[tuple[str, paramiko.PKey]]:
    """Keys to offer with a name for each: files before the agent, which may hold more than a server lets one try.

    Files that need a passphrase are noted in ``locked``, unless the agent has their key; others in ``unusable``.
    """
    offered: set[bytes] = set()
    for path in filter(Path.is_file, hop.keys):
        try:
            key = paramiko.PKey.from_path(path)
        except (TypeError, paramiko.PasswordRequiredException):  # TypeError is cryptography's, for an encrypted key
            locked.append(path)
            continue
        except Exception as error:  # cryptography and paramiko raise a dozen kinds for a bad key
            unusable.append(f"{path} cannot be used ({error})")
            continue
        offered.add(key.asbytes())
        if key.public_blob is not None:
            yield f"{path}-cert.pub", key
            key.public_blob = None  # where the certificate is refused, the bare key may not be
        yield str(path), key
    yield from _agent_candidates(hop, agent, locked, offered)


def _agent_candidates(
    hop: Hop, agent: tuple[paramiko.AgentKey, ...], locked: list[Path], offered: set[bytes]
) -> Iterator[tuple[str, paramiko.PKey]]:
    wanted = {_public_half(path): path for path in locked}
    for key in agent:
        path = wanted.get(key.asbytes())
        if path is not None:
            locked.remove(path)
        elif hop.only_these_keys or key.asbytes() in offered:
            continue
        yield f"{path or key.comment or fingerprint(key.asbytes())} (agent)", key


def _public_half(path: Path) -> bytes | None:
    """The public key in ``path``.pub, to recognise a locked key in the agent by; None when there is none."""
    try:
        return base64.b64decode(path.with_name(path.name + ".pub").read_text("utf-8").split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _accepted(connection: paramiko.Transport, hop: Hop, key: paramiko.PKey) -> bool:
    asked = time.monotonic()
    try:
        further = connection.auth_publickey(hop.user, key)
    except paramiko.BadAuthenticationType as error:
        methods = ", ".join(error.allowed_types)
        raise DeviceError(f"{hop} lets {hop.user} log in by {methods} only, expected publickey; allow that") from error
    except paramiko.AuthenticationException as error:
        # To paramiko, no answer in time and the answer no are the same.
        if time.monotonic() - asked >= connection.auth_timeout:
            raise TimeoutError from error
        return False
    if further:
        raise DeviceError(f"{hop} asks {hop.user} for more than a key ({', '.join(further)}), which is not supported")
    return True


def _refusal(hop: Hop, tried: list[str], notes: list[str]) -> str:
    keys = f"tried {', '.join(tried)}" if tried else f"no key to try in {', '.join(map(str, hop.keys))} or the agent"
    notes = [*notes, f"allow a key of yours with `ssh-copy-id -p {hop.port} {hop.user}@{hop.host}`"]
    return f"{hop} refused the login of {hop.user}: {keys}; {'; '.join(notes)}"


class SshTransport:
    """Runs commands on the device at ``address``, over one connection made on first use. Use it from one thread.

    ``ssh_config`` defaults to ``~/.ssh/config``; ``known_hosts`` to its UserKnownHostsFile or ``~/.ssh/known_hosts``,
    with ``/etc/ssh/ssh_known_hosts``; ``identity`` to its IdentityFile, the usual files and the agent; ``timeout_s``,
    for each step of connecting, to its ConnectTimeout or 15. Raises UsageError for a malformed address.
    """

    def __init__(
        self,
        address: str,
        *,
        ssh_config: Path | None = None,
        known_hosts: Path | None = None,
        identity: Path | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self.address = address
        self._target = parse_address(address)
        self._options = Options(ssh_config, known_hosts, identity, timeout_s)
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
                self._connections.append(_connect(hop, through))
        except BaseException:
            self.close()
            raise

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

    def close(self) -> None:
        """End the connection, and those to jump hosts. A later ``start`` would connect anew."""
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
            raise DeviceError(_lost(self._where)) from error

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
            raise DeviceError(_lost(self._where)) from error
        if not data and not self._channel.eof_received:
            raise DeviceError(_lost(self._where))
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
