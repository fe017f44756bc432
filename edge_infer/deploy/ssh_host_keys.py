"""Host keys: what known_hosts files say of a host, whether the key it shows agrees, and how a new one is learned."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edge_infer.deploy.ssh_certificates import Certificate, fault, matches, read_certificate
from edge_infer.deploy.ssh_route import Hop
from edge_infer.errors import DeviceError

REVOKED = "@revoked"
AUTHORITY = "@cert-authority"


@dataclass(frozen=True)
class KnownKey:
    """One line of a known_hosts file that speaks of the host in question. ``marker`` is one of the two, or empty."""

    marker: str
    kind: str
    blob: bytes


def known_keys(files: Iterable[Path], name: str) -> list[KnownKey]:
    """What ``files`` say of the host ``name`` (``[host]:port`` unless the port is 22), plain or hashed.

    A file that is not there says nothing. paramiko's own reader is not used: it takes no notice of markers, of
    patterns, or of a second key of a type. Raises DeviceError for a file that cannot be read.
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
    if len(fields) < 3 or fields[0].startswith("#") or marker not in ("", REVOKED, AUTHORITY):
        return None
    # An authority is named for a domain, whatever port its hosts listen at.
    names = [name, name[1:].partition("]")[0]] if marker == AUTHORITY and name.startswith("[") else [name]
    if not any(_covers(fields[0], each) for each in names):
        return None
    try:
        return KnownKey(marker, fields[1], base64.b64decode(fields[2], validate=True))
    except ValueError:
        return None


def _covers(patterns: str, name: str) -> bool:
    """Whether a known_hosts line's first field means the host ``name``: a hash, or patterns with ``* ? !``."""
    if patterns.startswith("|"):
        return _hash_covers(patterns, name)
    covered = False
    for pattern in patterns.split(","):
        if matches(pattern.removeprefix("!"), name):
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


def verify_host_key(hop: Hop, known: list[KnownKey], kind: str, blob: bytes, shown: bytes) -> str | None:
    """Make sure that ``hop`` is who it says. ``blob`` is its bare key, ``shown`` that or the certificate it sent.

    Returns a sentence for the user when the key was unknown and, as the hop wants it, has been accepted and written
    down. Raises DeviceError when the key is unknown, changed or revoked, when its certificate proves nothing, or
    when it cannot be written down.
    """
    text = f"{kind} key {fingerprint(blob)}"
    certificate = read_certificate(shown)
    if _revoked(known, blob, certificate):
        raise DeviceError(f"{hop} shows the {text}, which {_where(hop)} marks as revoked; give that host a new key")
    if certificate is not None and _vouched_for(hop, known, certificate):
        return None
    plain = [entry for entry in known if not entry.marker]
    if any(entry.blob == blob for entry in plain):
        return None
    if plain:
        expected = " or ".join(f"{entry.kind} {fingerprint(entry.blob)}" for entry in plain)
        raise DeviceError(
            f"the host key of {hop} has changed: it shows the {text}, known is {expected}; someone may be in between; "
            f"if the device was set up anew, remove the old key with `ssh-keygen -R '{hop.known_as}' -f {_where(hop)}`"
        )
    if hop.accept_new:
        path = _learn(hop, kind, blob)
        return f"accepted the {text} of {hop}, which was not known; it is in {path} now"
    raise DeviceError(
        f"the host key of {hop} is not known: it shows the {text}; compare that with the device's own (there: "
        "`ssh-keygen -lf` on its /etc/ssh/ssh_host_*_key.pub), then connect once with ssh, or with --accept-new, or "
        f"add the key with `ssh-keyscan -p {hop.port} {hop.host} >> {_where(hop)}`"
    )


def _where(hop: Hop) -> Path | str:
    return hop.own_known_hosts or "~/.ssh/known_hosts"


def _revoked(known: list[KnownKey], blob: bytes, certificate: Certificate | None) -> bool:
    """As in ssh, a revoked authority takes all its hosts along."""
    shown = (blob, certificate.authority) if certificate else (blob,)
    return any(entry.marker == REVOKED and entry.blob in shown for entry in known)


def _vouched_for(hop: Hop, known: list[KnownKey], certificate: Certificate) -> bool:
    """Whether an authority known for ``hop`` signed its key. Raises DeviceError when it did, for something else."""
    if not any(entry.marker == AUTHORITY and entry.blob == certificate.authority for entry in known):
        return False  # as in ssh, the bare key in it is then judged alone
    name = hop.known_as[1:].partition("]")[0] if hop.known_as.startswith("[") else hop.known_as
    reason = fault(certificate, name)
    if reason is not None:
        raise DeviceError(
            f"{hop} shows the host certificate {certificate.identity!r}, which does not prove who it is: {reason}; "
            "give that host a certificate for the name that you reach it by"
        )
    return True


def _learn(hop: Hop, kind: str, blob: bytes) -> Path:
    """Append a key to the user's known_hosts, made with its folder where it is missing. Raises DeviceError."""
    path = hop.own_known_hosts
    if path is None:
        raise DeviceError(f"the key of {hop} is not accepted: its UserKnownHostsFile is none, so nothing would keep it")
    name = _hashed(hop.known_as) if hop.hash_known_hosts else hop.known_as
    line = f"{name} {kind} {base64.b64encode(blob).decode()}\n".encode()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            file.write(line)
    except OSError as error:
        raise DeviceError(
            f"the key of {hop} is not accepted: it cannot be added to {path} ({error.strerror})"
        ) from error
    return path


def _hashed(name: str) -> str:
    salt = os.urandom(20)
    digest = hmac.digest(salt, name.encode(), "sha1")
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"
