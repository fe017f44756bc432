"""One real OpenSSH server that is several devices: each has a port, an alias, and a store of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sshd import SshServer, free_port

from edge_infer.store import Store

#: sshd listens on 16 sockets at most (MAX_LISTEN_SOCKS), one of which is the server's own.
MOST = 15


class Fleet(SshServer):
    """``names`` are the devices; ``store(name)`` lies on this machine. ``ssh_config`` has an alias for each."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        assert len(names) <= MOST
        self.ports = {name: free_port() for name in names}
        super().__init__(directory, alias="fleet", options=[f"Port {port}" for port in self.ports.values()])

    def store(self, name: str) -> Store:
        return Store(self.directory / "stores" / name)

    def digest(self, name: str, model: str = "digits") -> str | None:
        """The release that the device serves."""
        return next(iter(self.store(name).digests(model)), None)

    def start(self) -> None:
        super().start()
        own = self.port, self.alias
        blocks, known = [self.alias_block()], [f"{self.known_name} {self.host_key()}"]
        for name, port in self.ports.items():
            self.port, self.alias = port, name
            blocks.append(self.alias_block())
            known.append(f"{self.known_name} {self.host_key()}")
        self.port, self.alias = own
        self.ssh_config.write_text("\n".join(blocks), "utf-8")
        self.known_hosts.write_text("\n".join(known) + "\n", "ascii")

    def _write_config(self) -> None:
        super()._write_config()
        matches = [
            f"Match LocalPort {port}\n  SetEnv EDGE_INFER_HOME={self.store(name).root}"
            for name, port in self.ports.items()
        ]
        with (self.directory / "sshd_config").open("a") as config:
            config.write("\n".join(["", *matches, ""]))
