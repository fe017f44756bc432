"""A real OpenSSH server on a loopback port, for one test or a whole file; nothing of the machine's own is used.

    with SshServer(tmp_path) as server:
        SshTransport(server.alias, ssh_config=server.ssh_config)

Host key, account key, known_hosts and ssh_config lie in the given folder; it serves the current user.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

READY_S = 10.0

CONFIG = """\
ListenAddress 127.0.0.1
PidFile {directory}/sshd.pid
AuthorizedKeysFile {directory}/authorized_keys
StrictModes no
UsePAM no
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PermitUserRC no
UseDNS no
PrintMotd no
PrintLastLog no
LogLevel VERBOSE
MaxStartups 100
Subsystem sftp internal-sftp
"""


class SshServer:
    """A server that ``start`` or ``with`` starts.

    ``options`` are sshd_config lines that win over the ones here. ``host_key_types`` are as for ``ssh-keygen -t``;
    ``known_hosts`` holds the first. ``alias`` is the Host entry in ``ssh_config``.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        directory: Path,
        *,
        alias: str = "kitchen-pi",
        options: Sequence[str] = (),
        host_key_types: Sequence[str] = ("ed25519",),
    ) -> None:
        self.directory = directory
        self.alias = alias
        self.options = list(options)
        self.host_key_types = list(host_key_types)
        self.user = pwd.getpwuid(os.getuid()).pw_name
        self.port = 0
        self.identity = directory / "account_key"
        self.known_hosts = directory / "known_hosts"
        self.ssh_config = directory / "ssh_config"
        self._child: subprocess.Popen[bytes] | None = None

    # -- what a client needs to know ------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """``user@host:port``."""
        return f"{self.user}@{self.host}:{self.port}"

    @property
    def known_name(self) -> str:
        """The server's name in a known_hosts file."""
        return f"[{self.host}]:{self.port}"

    @property
    def fingerprint(self) -> str:
        """The first host key's, as ssh-keygen prints it."""
        public = self.directory / f"host_key_{self.host_key_types[0]}.pub"
        shown = subprocess.run(["ssh-keygen", "-lf", public], check=True, capture_output=True, text=True)
        return shown.stdout.split()[1]

    def host_key(self, kind: str = "") -> str:
        """``TYPE BASE64`` of a host key."""
        return public_key(self.directory / f"host_key_{kind or self.host_key_types[0]}")

    def alias_block(self, *lines: str) -> str:
        """An ssh_config entry for this server; ``lines`` are put first and so win."""
        settings = [
            *lines,
            f"HostName {self.host}",
            f"Port {self.port}",
            f"User {self.user}",
            f"IdentityFile {self.identity}",
            "IdentitiesOnly yes",
            f"UserKnownHostsFile {self.known_hosts}",
        ]
        return "".join([f"Host {self.alias}\n", *(f"    {line}\n" for line in settings)])

    def log(self) -> str:
        """What the server has said so far."""
        return (self.directory / "sshd.log").read_text("utf-8", "replace")

    # -- its life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the keys and files, start sshd and wait until it answers. Raises RuntimeError with its log if not."""
        self._make_keys()
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for _ in range(5):
            self.port = free_port()
            self._write_config()
            self._child = self._spawn()
            if self._is_ready():
                break
        else:
            raise RuntimeError(f"sshd does not start: {self.log()}")
        self.known_hosts.write_text(f"{self.known_name} {self.host_key()}\n", "ascii")
        self.ssh_config.write_text(self.alias_block(), "utf-8")

    def drop_connections(self) -> None:
        """End every open connection at once, as a power cut would; the server itself goes on."""
        if self._child is not None:
            for pid in descendants(self._child.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def stop(self) -> None:
        """End connections and server. May be called again."""
        if self._child is not None:
            self.drop_connections()
            self._child.terminate()
            self._child.wait(READY_S)
            self._child = None

    def __enter__(self) -> SshServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _make_keys(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for kind in self.host_key_types:
            make_key(self.directory / f"host_key_{kind}", kind)
        make_key(self.identity)
        (self.directory / "authorized_keys").write_text(public_key(self.identity) + "\n", "ascii")

    def _write_config(self) -> None:
        host_keys = [f"HostKey {self.directory}/host_key_{kind}" for kind in self.host_key_types]
        lines = [*self.options, f"Port {self.port}", *host_keys, CONFIG.format(directory=self.directory)]
        path = self.directory / "sshd_config"
        path.write_text("\n".join(lines), "utf-8")
        # From 9.8 on, sshd locks out a client that is often refused; older ones do not know the option.
        effective = subprocess.run([find_sshd(), "-T", "-f", path], capture_output=True, text=True, check=False)
        if "persourcepenalties" in effective.stdout:
            path.write_text("\n".join(["PerSourcePenalties no", *lines]), "utf-8")

    def _spawn(self) -> subprocess.Popen[bytes]:
        with (self.directory / "sshd.log").open("ab") as log:
            command = [find_sshd(), "-D", "-e", "-f", str(self.directory / "sshd_config")]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _is_ready(self) -> bool:
        deadline = time.monotonic() + READY_S
        while self._child is not None and self._child.poll() is None and time.monotonic() < deadline:
            try:
                with socket.create_connection((self.host, self.port), 1) as probe:
                    return probe.recv(4) == b"SSH-"
            except OSError:
                time.sleep(0.01)
        return False


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> None:
    """A new key pair at ``path`` and ``path``.pub, unless there is one."""
    if not path.exists():
        command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", path.name, "-f", str(path)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def public_key(path: Path) -> str:
    """``TYPE BASE64`` of the key pair at ``path``."""
    return " ".join(path.with_name(path.name + ".pub").read_text("utf-8").split()[:2])


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_sshd() -> str:
    """The server's path; it is in no ordinary user's PATH. Raises RuntimeError when it is not installed."""
    found = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise RuntimeError("these tests need OpenSSH's sshd (Debian: apt-get install openssh-server)")
    return found


def descendants(pid: int) -> list[int]:
    """Processes below ``pid``, parents before their children."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = [pid]
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found[1:]
