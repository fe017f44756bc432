"""The way to a device: its address, and what ssh_config says of it and of the jump hosts before it."""

from __future__ import annotations

import getpass
import ipaddress
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_infer.deploy.ssh_config import look_up, read_config
from edge_infer.errors import DeviceError, UsageError

# After ssh_config, which says how to install it when it is missing.
import paramiko  # isort: skip

SSH_PORT = 22
TIMEOUT_S = 15.0
MAX_HOPS = 8
DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
GLOBAL_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")

# No name starts with a dash: where one ends up on a command line, it would be read as an option.
_USER = re.compile(r"[^\s@:/-][^\s:/]*")
_PLACE = re.compile(r"(?:\[(?P<literal>[^\s\[\]]+)\]|(?P<host>[^\s@:/\[\]-][^\s@:/\[\]]*))(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True)
class Address:
    """What an address says; what it leaves out is None and up to ssh_config."""

    host: str
    user: str | None = None
    port: int | None = None


def parse_address(text: str) -> Address:
    """Read ``[user@]host[:port]``, with an IPv6 host in brackets when a port follows.

    Raises UsageError for anything else.
    """
    user, at, place = text.rpartition("@")
    match = _PLACE.fullmatch(f"[{place}]" if _is_ipv6(place) else place)
    if match is None or (match["literal"] and not _is_ipv6(match["literal"])) or (at and not _USER.fullmatch(user)):
        raise UsageError(f"{text!r} is no SSH address, expected [user@]host[:port] or [user@][ipv6]:port")
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 1 <= port <= 65535:
        raise UsageError(f"{text!r} is no SSH address: the port is {port}, expected 1 to 65535")
    return Address(match["literal"] or match["host"], user or None, port)


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Hop:
    """One server on the way, the last being the device: where it is, who logs in, what proves its identity.

    ``own_known_hosts`` is the user's own file among ``known_hosts``; a key that is not known is added there if
    ``accept_new`` allows it, with the name hashed if ``hash_known_hosts``.
    """

    host: str
    port: int
    user: str
    keys: tuple[Path, ...]
    certificates: tuple[Path, ...]
    only_these_keys: bool
    known_hosts: tuple[Path, ...]
    own_known_hosts: Path | None
    accept_new: bool
    hash_known_hosts: bool
    known_as: str
    timeout_s: float

    def __str__(self) -> str:
        return f"{self.host} port {self.port}"


@dataclass(frozen=True)
class Options:
    """The caller's choices; what is None is up to ssh_config. ``jump`` is the ProxyJump of the device alone."""

    ssh_config: Path | None = None
    known_hosts: Path | None = None
    identity: Path | None = None
    timeout_s: float | None = None
    accept_new: bool = False
    jump: str | None = None


def find_route(address: Address, options: Options) -> list[Hop]:
    """The hops to ``address``, jump hosts first. As with ``ssh -i``, the chosen identity is for the device alone.

    Raises DeviceError for an ssh_config that cannot be read or followed, UsageError for a file that is not there.
    """
    for path in (options.identity, options.ssh_config):
        if path is not None and not path.is_file():
            raise UsageError(f"there is no file {path}")
    hops = _route(address, read_config(options.ssh_config), options, ())
    if options.identity is not None:
        hops[-1] = replace(hops[-1], keys=(options.identity,), only_these_keys=True)
    return hops


def _route(address: Address, config: paramiko.SSHConfig, options: Options, seen: tuple[str, ...]) -> list[Hop]:
    if address.host in seen or len(seen) >= MAX_HOPS:
        raise DeviceError(f"ProxyJump in the ssh_config leads in a circle: {' -> '.join((*seen, address.host))}")
    found = look_up(config, address.host)
    jumps = (None if seen else options.jump) or found.get("proxyjump") or "none"
    if (found.get("proxycommand") or "none") != "none" and jumps == "none":
        raise DeviceError(f"the ssh_config has a ProxyCommand for {address.host}, which is not followed; use ProxyJump")
    before: list[Hop] = []
    if jumps.lower() != "none":
        first, *others = [parse_address(jump.strip().removeprefix("ssh://")) for jump in jumps.split(",")]
        # As in ssh, the first jump host's own ProxyJump counts; the others are reached through their predecessor.
        before = _route(first, config, options, (*seen, address.host))
        before += [_hop(other, look_up(config, other.host), options) for other in others]
    return [*before, _hop(address, found, options)]


def _hop(address: Address, found: Mapping[str, Any], options: Options) -> Hop:
    host = str(found["hostname"])
    port = address.port or int(_number(found, "port", SSH_PORT))
    keys = [Path(key).expanduser() for key in found["identityfile"] if key != "none"]
    own_known_hosts = _own_known_hosts(found, options)
    return Hop(
        host=host,
        port=port,
        user=address.user or str(found.get("user") or getpass.getuser()),
        keys=tuple(keys) or tuple(Path.home() / ".ssh" / name for name in DEFAULT_KEYS),
        certificates=tuple(Path(path).expanduser() for path in found["certificatefile"] if path != "none"),
        only_these_keys=found.get("identitiesonly") == "yes",
        known_hosts=(*own_known_hosts, *(() if options.known_hosts else (GLOBAL_KNOWN_HOSTS,))),
        own_known_hosts=own_known_hosts[0] if own_known_hosts else None,
        accept_new=options.accept_new,
        hash_known_hosts=found.get("hashknownhosts") == "yes",
        known_as=str(found.get("hostkeyalias") or (host if port == SSH_PORT else f"[{host}]:{port}")).lower(),
        timeout_s=options.timeout_s or _number(found, "connecttimeout", TIMEOUT_S),
    )


def _own_known_hosts(found: Mapping[str, Any], options: Options) -> tuple[Path, ...]:
    if options.known_hosts is not None:
        return (options.known_hosts,)
    named = shlex.split(str(found.get("userknownhostsfile") or "~/.ssh/known_hosts"))
    return tuple(Path(name).expanduser() for name in named if name != "none")


def _number(found: Mapping[str, Any], key: str, default: float) -> float:
    value = found.get(key, default)
    try:
        return float(str(value))
    except ValueError:
        raise DeviceError(f"the ssh_config gives {value!r} for {key}, expected a number") from None
