"""Host keys: what known_hosts files say of a host, and whether the key it shows agrees."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edge_infer.deploy.ssh_route import Hop
from edge_infer.errors import DeviceError


@dataclass(frozen=True)
class KnownKey:
    """One line of a known_hosts file that speaks of the host in question."""

    revoked: bool
    kind: str
    blob: bytes


def known_keys(files: Iterable[Path], name: str) -> list[KnownKey]:
    """What ``files`` say of the host ``name``, plain or hashed. A file that is not there says nothing.

    paramiko's own reader is not used: it takes no notice of ``@revoked``, of patterns, or of a second key of a type.
    Raises DeviceError for a file that cannot be read.
    """
    lines: list[str] = []
    for path in files:
        try:
            lines += path.read_text("utf-8", "replace").splitlines()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DeviceError(f"{path} cannot be read ({error.strerror}), so no host key can be verified") from error
    return [key for line in lines if (key := _known_key(line, name)) is not None]


def _known_key(line: str, name: str) -> KnownKey | None:
    fields = line.split()
    marker = fields.pop(0) if line.lstrip().startswith("@") else ""
    # @cert-authority is not a key that the host itself shows.
    if len(fields) < 3 or fields[0].startswith("#") or marker not in ("", "@revoked") or not _covers(fields[0], name):
        return None
    try:
        return KnownKey(bool(marker), fields[1], base64.b64decode(fields[2], validate=True))
    except ValueError:
        return None


def _covers(patterns: str, name: str) -> bool:
    """Whether a known_hosts line's first field means the host ``name``: a hash, or patterns with ``* ? !``."""
    if patterns.startswith("|"):
        return _hash_covers(patterns, name)
    covered = False
    for pattern in patterns.lower().split(","):
        # Not fnmatch: there, the brackets of [host]:port would be a set of characters.
        glob = re.escape(pattern.removeprefix("!")).replace(r"\*", ".*").replace(r"\?", ".")
        if re.fullmatch(glob, name):
            if pattern.startswith("!"):
                return False
            covered = True
    return covered


def _hash_covers(hashed: str, name: str) -> bool:
    """Whether ``|1|SALT|HASH`` is the HMAC-SHA1 of ``name`` (the format that ssh-keygen -H writes)."""
    try:
        _, version, salt, digest = hashed.split("|")
        found = hmac.digest(base64.b64decode(salt), name.encode(), "sha1")
        return version == "1" and hmac.compare_digest(found, base64.b64decode(digest))
    except ValueError:
        return False


def fingerprint(blob: bytes) -> str:
    """A public key's fingerprint as ssh-keygen prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def verify_host_key(hop: Hop, known: list[KnownKey], kind: str, blob: bytes) -> None:
    """Raises DeviceError unless the key shown is known for ``hop`` and not revoked."""
    shown = f"{kind} key {fingerprint(blob)}"
    where = hop.known_hosts[0] if hop.known_hosts else "~/.ssh/known_hosts"
    plain = [entry for entry in known if not entry.revoked]
    if any(entry.revoked and entry.blob == blob for entry in known):
        raise DeviceError(f"{hop} shows the {shown}, which {where} marks as revoked; give that host a new key")
    if any(entry.blob == blob for entry in plain):
        return
    if plain:
        expected = " or ".join(f"{entry.kind} {fingerprint(entry.blob)}" for entry in plain)
        raise DeviceError(
            f"the host key of {hop} has changed: it shows the {shown}, known is {expected}; someone may be in between; "
            f"if the device was set up anew, remove the old key with `ssh-keygen -R '{hop.known_as}' -f {where}`"
        )
    raise DeviceError(
        f"the host key of {hop} is not known: it shows the {shown}; compare that with the device's own (there: "
        "`ssh-keygen -lf` on its /etc/ssh/ssh_host_*_key.pub), then connect once with ssh or add the key with "
        f"`ssh-keyscan -p {hop.port} {hop.host} >> {where}`"
    )
