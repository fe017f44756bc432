"""Logging in: keys from files, their certificates, the agent, and passphrases where somebody is there to give them."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edge_infer.deploy.ssh_certificates import read_certificate
from edge_infer.deploy.ssh_host_keys import fingerprint
from edge_infer.deploy.ssh_route import Hop
from edge_infer.errors import DeviceError

# After ssh_route, which says how to install it when it is missing.
import paramiko  # isort: skip

#: Asks for the passphrase of a key file, given whether the one before was wrong; None when there will be none.
AskPassphrase = Callable[[Path, bool], str | None]
#: As in ssh: how often a passphrase may be given.
PASSPHRASE_TRIES = 3


@dataclass
class _Attempt:
    """What has been offered to a server so far, and what could not be."""

    hop: Hop
    certificates: dict[bytes, tuple[Path, paramiko.pkey.PublicBlob]]
    tried: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    locked: list[Path] = field(default_factory=list)
    offered: set[bytes] = field(default_factory=set)


def log_in(connection: paramiko.Transport, hop: Hop, ask: AskPassphrase | None) -> None:
    """Offer keys until one is accepted: open key files, the agent's keys, then those that need a passphrase.

    Nobody is asked for a passphrase while another key may do, and never if ``ask`` is None. Raises DeviceError when
    no key is accepted.
    """
    attempt = _Attempt(hop, _certificates(hop))
    with _open_agent() as agent:
        for label, key in _candidates(attempt, agent, ask):
            attempt.tried.append(label)
            if _accepted(connection, hop, key):
                return
            if not connection.is_active():
                attempt.notes.append("the server then ended the connection")
                break
    raise DeviceError(_refusal(attempt))


def _certificates(hop: Hop) -> dict[bytes, tuple[Path, paramiko.pkey.PublicBlob]]:
    """The hop's CertificateFiles by the key that each is for. Raises DeviceError for one that cannot be used."""
    found = {}
    for path in hop.certificates:
        try:
            blob = paramiko.pkey.PublicBlob.from_file(str(path))
            certificate = read_certificate(blob.key_blob)
        except (OSError, ValueError, IndexError) as error:
            raise DeviceError(
                f"the CertificateFile {path} cannot be read ({error}); make it anew or remove it"
            ) from error
        if certificate is None:
            raise DeviceError(f"the CertificateFile {path} holds no certificate; make it with ssh-keygen -s")
        found[certificate.public] = (path, blob)
    return found


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
    attempt: _Attempt, agent: tuple[paramiko.AgentKey, ...], ask: AskPassphrase | None
) -> Iterator[tuple[str, paramiko.PKey]]:
    """Keys to offer with a name for each: files before the agent, which may hold more than a server lets one try."""
    for path in attempt.hop.keys:
        # As with ssh, an IdentityFile may be the public half of a key that only the agent has.
        key = None if path.suffix == ".pub" or not path.is_file() else _load(attempt, path)
        if key is not None:
            yield from _with_certificates(attempt, path, key)
    yield from _agent_candidates(attempt, agent)
    for path in attempt.locked:
        key = _unlock(attempt, path, ask) if ask else None
        if key is not None:
            yield from _with_certificates(attempt, path, key)
        else:
            attempt.notes.append(f"{path} needs its passphrase: run `ssh-add {path}` first")


def _load(attempt: _Attempt, path: Path) -> paramiko.PKey | None:
    """The key in a file; None, and noted, for one that is locked or cannot be used."""
    try:
        return paramiko.PKey.from_path(path)
    except (TypeError, paramiko.PasswordRequiredException):  # TypeError is cryptography's, for an encrypted key
        attempt.locked.append(path)
    except Exception as error:  # cryptography and paramiko raise a dozen kinds for a bad key
        attempt.notes.append(f"{path} cannot be used ({error})")
    return None


def _unlock(attempt: _Attempt, path: Path, ask: AskPassphrase) -> paramiko.PKey | None:
    for number in range(PASSPHRASE_TRIES):
        passphrase = ask(path, number > 0)
        if not passphrase:
            break
        try:
            return paramiko.PKey.from_path(path, passphrase.encode())
        except Exception:  # a wrong passphrase is a dozen kinds too; that the file is a key was seen before
            continue
    return None


def _with_certificates(attempt: _Attempt, path: Path, key: paramiko.PKey) -> Iterator[tuple[str, paramiko.PKey]]:
    """The key with each certificate for it, then bare: where a certificate is refused, the bare key may not be."""
    attempt.offered.add(key.asbytes())
    beside = key.public_blob
    if beside is not None:
        yield f"{path}-cert.pub", key
    if key.asbytes() in attempt.certificates:
        file, key.public_blob = attempt.certificates[key.asbytes()]
        if beside is None or key.public_blob.key_blob != beside.key_blob:
            yield f"{file}", key
    key.public_blob = None
    yield str(path), key


def _agent_candidates(attempt: _Attempt, agent: tuple[paramiko.AgentKey, ...]) -> Iterator[tuple[str, paramiko.PKey]]:
    """The agent's keys, and its certificates; with IdentitiesOnly just those whose files are among the hop's."""
    wanted = {public: path for path in attempt.hop.keys if (public := _public_half(path)) is not None}
    for key in agent:
        certificate = read_certificate(key.blob)
        public = certificate.public if certificate else key.asbytes()
        path = wanted.get(public)
        if path is None and attempt.hop.only_these_keys and public not in attempt.certificates:
            continue
        label = f"{path or key.comment or fingerprint(public)} (agent)"
        if certificate:
            # paramiko would send an RSA key bare and call it a certificate.
            key.public_blob = paramiko.pkey.PublicBlob.from_message(paramiko.Message(key.blob))
            yield f"certificate of {label}", key
            continue
        if public in attempt.offered:
            continue
        if path in attempt.locked:
            attempt.locked.remove(path)
        if public in attempt.certificates:
            file, key.public_blob = attempt.certificates[public]
            yield f"{file} with {label}", key
            key.public_blob = None
        yield label, key


def _public_half(path: Path) -> bytes | None:
    """The public key in ``path``.pub, to recognise a key in the agent by; None when there is none."""
    public = path if path.suffix == ".pub" else path.with_name(path.name + ".pub")
    try:
        return base64.b64decode(public.read_text("utf-8").split()[1])
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


def _refusal(attempt: _Attempt) -> str:
    hop = attempt.hop
    keys = (
        f"tried {', '.join(attempt.tried)}"
        if attempt.tried
        else f"no key to try in {', '.join(map(str, hop.keys))} or the agent"
    )
    notes = [*attempt.notes, f"allow a key of yours with `ssh-copy-id -p {hop.port} {hop.user}@{hop.host}`"]
    return f"{hop} refused the login of {hop.user}: {keys}; {'; '.join(notes)}"
