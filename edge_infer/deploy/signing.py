"""Sign a bundle with an SSH key, check a signature, and say to a device who may sign there."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_infer import trust
from edge_infer.bundle import Bundle, replace_file, verify
from edge_infer.deploy.conversation import Conversation
from edge_infer.deploy.signers import PUBLIC_KEY, SIGNER, require_keys
from edge_infer.deploy.transport import Transport
from edge_infer.errors import BundleError, UsageError
from edge_infer.manifest import SIGNATURE_NAME
from edge_infer.trust import NAMESPACE, SERIAL_MAX, Demand, Signed, Statement


def sign(bundle: Bundle, key: Path, serial: int | None = None) -> str:
    """Sign the bundle and put ``manifest.sig`` into it; gives the fingerprint of the key.

    ``key`` is a private key, or a public one whose private half an agent or a security key has; ssh-keygen asks for
    its passphrase, and for a touch, on the terminal. ``serial`` (default: seconds since 1970, or one more than the
    signature that is there) must grow from each bundle of a model to the next.

    Raises BundleError when the bundle is damaged, UsageError when it is not signed.
    """
    now = int(time.time())
    statement = Statement(bundle.manifest.name, bundle.digest, _serial(bundle, serial, now), now)
    verify(bundle, mode="full")
    armored = _ask_ssh_keygen(statement.to_bytes(), key)
    fingerprint = trust.signing_key(statement, armored)
    replace_file(bundle.path / SIGNATURE_NAME, statement.to_bytes() + armored)
    return fingerprint


def _serial(bundle: Bundle, wanted: int | None, now: int) -> int:
    if wanted is None:
        try:
            before = trust.read_signature(bundle.path)
            return max(now, trust.parse_signature(before)[0].serial + 1) if before else now
        except BundleError:
            return now  # what is there is replaced
    if not 0 <= wanted <= SERIAL_MAX:
        raise UsageError(f"--serial {wanted}, expected a whole number from 0 to {SERIAL_MAX}")
    return wanted


def _ask_ssh_keygen(message: bytes, key: Path) -> bytes:
    """The armored signature. Its questions and its reasons go to the terminal, as they do for git."""
    if not key.is_file():
        raise UsageError(f"there is no key {key}; expected an SSH private key, or FILE.pub of a key in your agent")
    with tempfile.TemporaryDirectory(prefix="edge-infer-") as folder:
        path = Path(folder) / "statement"
        path.write_bytes(message)
        try:
            # From a file: with the message on its standard input it could not ask for a passphrase there.
            command = ["ssh-keygen", "-q", "-Y", "sign", "-n", NAMESPACE, "-f", str(key.absolute()), str(path)]
            status = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        except FileNotFoundError:
            raise UsageError("there is no ssh-keygen here to sign with; install OpenSSH's client") from None
        made = path.with_name("statement.sig")
        if status or not made.is_file():
            raise UsageError(f"ssh-keygen did not sign with {key}; it says why above")
        return made.read_bytes()


def check(bundle: Bundle, signers: Path, revoked: Path | None = None) -> Signed:
    """Whether a device with this allowed_signers and revoked_keys would take the bundle.

    Raises BundleError, UsageError.
    """
    keys = signers_text(signers).encode()
    verify(bundle, mode="full")
    demand = Demand(signers, keys, (_read(revoked),) if revoked else (), 0)
    return trust.check_demand(demand, bundle.manifest.name, bundle.digest, trust.read_signature(bundle.path))


def _read(path: Path) -> bytes:
    data = trust.read_policy(path)
    if data is None:
        raise UsageError(f"there is no file {path}")
    return data


def signers_text(path: Path) -> str:
    """The content of an allowed_signers file. Raises UsageError for a line that ssh-keygen would pass over."""
    try:
        text = _read(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text in UTF-8, expected an allowed_signers file") from None
    require_keys(text.splitlines(), SIGNER)
    return text


def signer_line(key: Path, principal: str, authority: bool = False) -> str:
    """The line of allowed_signers for a public key, which counts for edge-infer and nothing else. Raises UsageError."""
    if not principal or any(letter in principal for letter in ' \t\r\n"#'):
        raise UsageError(
            f"--principal {principal!r}, expected a name such as anna@example.com, without spaces or quotes"
        )
    options = f'{"cert-authority," if authority else ""}namespaces="{NAMESPACE}"'
    return f"{principal} {options} {public_key(key)}"


def public_key(path: Path) -> str:
    """The one line of a public key file. Raises UsageError, also for a private key, which goes nowhere."""
    text = _read(path).decode("utf-8", "replace")
    if "PRIVATE KEY" in text:
        raise UsageError(f"{path} is a private key, which stays where it is; expected the public one, {path}.pub")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    require_keys(lines, PUBLIC_KEY)
    if len(lines) != 1:
        raise UsageError(f"{path} holds {len(lines)} keys, expected one")
    return lines[0]


def change_signers(
    transport: Transport,
    verb: str = "show",
    text: str | None = None,
    format: str | None = None,
    force: bool = False,
    store: str | None = None,
) -> Mapping[str, Any]:
    """Show or change who may sign on a device: see ``edge_infer.deploy.signers.trust_request``. Raises DeviceError."""
    with Conversation(transport, store) as device:
        return device.ask("trust", verb=verb, text=text, format=format, force=force)
