"""OpenSSH certificates: a key, what it may be used for, and the signature of the authority that says so.

The format is OpenSSH's PROTOCOL.certkeys. paramiko carries certificates and checks nothing in them, so the one that a
host shows is checked here.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import edge_infer.deploy.ssh_config  # noqa: F401 - it says how to install paramiko when that is missing

import paramiko  # isort: skip

CERTIFICATE = "-cert-v01@openssh.com"
HOST = 2
#: How many fields the public key of each type has in a certificate, after the nonce.
KEY_FIELDS = {
    "ssh-ed25519": 1,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
    "ssh-rsa": 2,
}
#: What an authority may sign with; not with SHA-1.
SIGNATURES = (*(kind for kind in KEY_FIELDS if kind != "ssh-rsa"), "rsa-sha2-256", "rsa-sha2-512")


@dataclass(frozen=True)
class Certificate:
    """``public`` and ``authority`` are public keys as known_hosts holds them, decoded; times are Unix seconds."""

    public: bytes
    role: int
    identity: str
    principals: tuple[str, ...]
    valid_from: int
    valid_until: int
    critical_options: bytes
    authority: bytes
    signed: bytes
    signature: bytes


def read_certificate(blob: bytes) -> Certificate | None:
    """The certificate in ``blob``; None when that is a bare key or nothing that can be read."""
    message = paramiko.Message(blob)
    try:
        kind = message.get_text()
        fields = KEY_FIELDS[kind.removesuffix(CERTIFICATE)]
        if not kind.endswith(CERTIFICATE):
            return None
        message.get_binary()  # the nonce
        public = paramiko.Message()
        public.add_string(kind.removesuffix(CERTIFICATE))
        for _ in range(fields):
            public.add_string(message.get_binary())
        message.get_int64()  # the serial number
        role, identity, names = message.get_int(), message.get_text(), paramiko.Message(message.get_binary())
        principals = []
        while names.get_remainder():
            principals.append(names.get_text())
        valid_from, valid_until = message.get_int64(), message.get_int64()
        critical, _extensions, _reserved = (message.get_binary() for _ in range(3))
        authority = message.get_binary()
        signed = message.get_so_far()
        signature = message.get_binary()
        # paramiko reads on past an end that comes too soon.
        if blob != signed + _strings(signature) or signature != _strings(*_split(signature)):
            return None
    except (KeyError, UnicodeError, ValueError, IndexError, paramiko.SSHException):
        return None
    return Certificate(
        public.asbytes(),
        role,
        identity,
        tuple(principals),
        valid_from,
        valid_until,
        critical,
        authority,
        signed,
        signature,
    )


def _strings(*values: bytes) -> bytes:
    message = paramiko.Message()
    for value in values:
        message.add_string(value)
    return bytes(message.asbytes())


def _split(signature: bytes) -> tuple[bytes, bytes]:
    """A signature's algorithm and its bytes."""
    message = paramiko.Message(signature)
    return message.get_binary(), message.get_binary()


def fault(certificate: Certificate, name: str) -> str | None:
    """Why a certificate does not prove that a host is ``name``, as a clause; None when it does.

    Whether its authority is to be trusted for that host is another question.
    """
    now = time.time()
    if not _signed_by_authority(certificate):
        return "its signature is wrong"
    if certificate.role != HOST:
        return "it is a user's, not a host's"
    if not any(matches(pattern, name) for pattern in certificate.principals):
        named = ", ".join(certificate.principals) or "no host"
        return f"it is for {named}, not for {name}"
    if now < certificate.valid_from:
        return f"it is not valid before {_day(certificate.valid_from)}, and here it is {_day(int(now))}"
    if now >= certificate.valid_until:
        return f"it was valid until {_day(certificate.valid_until)}"
    if certificate.critical_options:
        return "it has critical options, of which none is known for hosts"
    return None


def _signed_by_authority(certificate: Certificate) -> bool:
    try:
        kind = paramiko.Message(certificate.authority).get_text()
        if kind not in KEY_FIELDS or paramiko.Message(certificate.signature).get_text() not in SIGNATURES:
            return False
        key = paramiko.PKey.from_type_string(kind, certificate.authority)
        return bool(key.verify_ssh_sig(certificate.signed, paramiko.Message(certificate.signature)))
    except Exception:  # a damaged key or signature raises a dozen kinds in paramiko and cryptography
        return False


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern with ``*`` and ``?`` covers a host's name, as OpenSSH means it."""
    # Not fnmatch: there, the brackets of [host]:port would be a set of characters.
    glob = re.escape(pattern.lower()).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(glob, name.lower()) is not None


def _day(seconds: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "the end of time"
