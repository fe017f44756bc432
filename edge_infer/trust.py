"""Who may sign what this device runs: OpenSSH signatures, checked by the device's own ``ssh-keygen``.

``manifest.sig`` in a bundle is a statement of five lines (name, digest, serial, time) and the armored signature that
``ssh-keygen -Y sign -n edge-infer`` made of it. What a device demands lies in two folders, ``/etc/edge-infer`` and the
root of the store; the first wins where it says something.

    allowed_signers.FORMAT   who may sign bundles of this format (tflite, onnx, torchscript), as ssh-keygen(1) has it
    allowed_signers          who may sign bundles of all other formats; a format without either file needs no signature
    revoked_keys             keys that count no more, whoever lists them: public keys, or a KRL
    oldest_serials           NAME SERIAL lines: what is older than this is refused

    serials/NAME             in the store: serial, time and digest of the newest release that was activated

Standard library only, Python >= 3.8: a push sends this file along.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

from edge_infer.bundle import SIGNATURE_MAX_BYTES, Bundle, read_plain_file, replace_file, sync_directory
from edge_infer.errors import BundleError, DeviceError, EdgeInferError
from edge_infer.manifest import PLAIN_NAME, SIGNATURE_NAME
from edge_infer.records import Record
from edge_infer.store import store_of

if TYPE_CHECKING:
    import subprocess

#: A signature made for anything else (git, files, e-mail) does not count, and one made here counts nowhere else.
NAMESPACE = "edge-infer"
#: The folder that only the administrator writes.
SYSTEM = Path("/etc/edge-infer")
KEYS_NAME, REVOKED_NAME, OLDEST_NAME = "allowed_signers", "revoked_keys", "oldest_serials"
#: Room for hundreds of keys, and for a KRL.
POLICY_MAX_BYTES = 256 * 1024
#: ssh-keygen takes milliseconds; a security key is never asked to verify.
TIMEOUT_S = 60.0

#: Up to 18 and 10 digits: whole numbers that every language and clock can hold.
STATEMENT = (  # compiled when it is first used: most loads have nothing to do with signatures
    rb"edge-infer signature 1\n"
    rb"name ([A-Za-z0-9_][A-Za-z0-9_.+-]{0,99})\n"
    rb"digest ([0-9a-f]{64})\n"
    rb"serial (0|[1-9][0-9]{0,17})\n"
    rb"time (0|[1-9][0-9]{0,9})\n\Z"
)
ARMOR_BEGIN, ARMOR_END = b"-----BEGIN SSH SIGNATURE-----\n", b"-----END SSH SIGNATURE-----\n"
SERIAL_MAX = 10**18 - 1


@dataclass(eq=False, repr=False)
class Statement(Record):
    """What is signed. ``time`` is the signer's clock, in seconds since 1970 UTC."""

    name: str
    digest: str
    serial: int
    time: int

    def to_bytes(self) -> bytes:
        return (
            f"edge-infer signature 1\nname {self.name}\ndigest {self.digest}\nserial {self.serial}\ntime {self.time}\n"
        ).encode("ascii")


@dataclass(eq=False, repr=False)
class Signed(Record):
    """A signature that was found good. ``principal`` is the name in allowed_signers, or in the certificate."""

    principal: str
    key: str
    serial: int
    time: int

    def __str__(self) -> str:
        return f"{self.principal}, serial {self.serial}, key {self.key}"


@dataclass(eq=False, repr=False)
class Demand(Record):
    """What a device demands of one model's signatures: ``keys`` are the lines of the allowed_signers at ``path``."""

    path: Path
    keys: bytes
    revoked: Tuple[bytes, ...]
    oldest: int


# -- what the device demands -------------------------------------------------------------------------------------------


def demand(
    root: Optional[Path], name: str, format: str, changed: Mapping[Path, Optional[bytes]] = MappingProxyType({})
) -> Optional[Demand]:
    """What this device demands of the model ``name``; None where it needs no signature.

    ``root`` is the store that it lies in or goes to, None for a bundle elsewhere; ``changed`` is the content of files
    as it would be. Raises DeviceError when a file that decides this cannot be read.
    """

    def content(path: Path) -> Optional[bytes]:
        return changed[path] if path in changed else read_policy(path)

    folders = [SYSTEM, root] if root else [SYSTEM]
    for folder in folders:
        for leaf in (f"{KEYS_NAME}.{format}", KEYS_NAME):
            keys = content(folder / leaf)
            if keys is not None:
                revoked = [content(each / REVOKED_NAME) for each in folders]
                oldest = max(_oldest(each / OLDEST_NAME, name) for each in folders)
                return Demand(folder / leaf, keys, tuple(data for data in revoked if data is not None), oldest)
    return None


def read_policy(path: Path) -> Optional[bytes]:
    """The content of a file that decides whom this device trusts; None when there is none. Raises DeviceError."""
    try:
        os.lstat(str(path))
    except FileNotFoundError:
        return None
    except OSError:
        pass  # who may not even look must not take it for absent
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            plain = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            data = file.read(POLICY_MAX_BYTES + 1) if plain else b""
    except OSError as error:
        reason = str(error.strerror)
    else:
        if plain and len(data) <= POLICY_MAX_BYTES:
            return data
        reason = f"it is no plain file of at most {POLICY_MAX_BYTES} bytes"
    raise DeviceError(f"{path} cannot be read: {reason}; it says whose bundles may run here, so none may until then")


def _oldest(path: Path, name: str) -> int:
    """The serial that ``path`` sets for ``name``, 0 where it sets none. Raises DeviceError for a line it cannot read.

    A line that was meant to keep something out must not be passed over.
    """
    oldest = 0
    for line in (read_policy(path) or b"").decode("utf-8", "replace").split("\n"):
        if line.strip() and not line.startswith("#"):
            found = re.match(r"(\S+)[ \t]+([0-9]{1,18})\s*\Z", line)
            if not found or not PLAIN_NAME.match(found[1]):
                raise DeviceError(
                    f"{path} holds {line[:80]!r}, expected a model's name and a serial, or # and a comment"
                )
            if found[1] == name:
                oldest = max(oldest, int(found[2]))
    return oldest


# -- the signature -----------------------------------------------------------------------------------------------------


def read_signature(folder: Path) -> Optional[bytes]:
    """The bundle's ``manifest.sig``; None when it is not signed. Raises BundleError when it is no plain file."""
    if not os.path.lexists(str(folder / SIGNATURE_NAME)):
        return None
    return read_plain_file(folder / SIGNATURE_NAME, SIGNATURE_MAX_BYTES)


def parse_signature(data: bytes) -> Tuple[Statement, bytes]:
    """The statement and the armored signature. Raises BundleError unless ``data`` has exactly the known form."""
    text, begin, rest = data.partition(ARMOR_BEGIN)
    found = re.match(STATEMENT, text)
    if len(data) > SIGNATURE_MAX_BYTES or not found or not begin or not rest.endswith(ARMOR_END):
        raise BundleError(f"{SIGNATURE_NAME} is damaged, or of a kind that this edge-infer does not know; sign again")
    name, digest = found[1].decode("ascii"), found[2].decode("ascii")
    return Statement(name, digest, int(found[3]), int(found[4])), begin + rest


def require_about(statement: Statement, name: str, digest: str) -> None:
    """Raise BundleError when the statement is about another bundle."""
    if (statement.name, statement.digest) != (name, digest):
        raise BundleError(
            f"the signature is for {statement.name} {statement.digest[:12]}, and lies beside {name} {digest[:12]}; "
            "a signature does not pass from one bundle to another: sign this one"
        )


def check(root: Optional[Path], name: str, digest: str, format: str, signature: Optional[bytes]) -> Optional[Signed]:
    """Whether this device takes the model: who signed it, or None where it needs no signature.

    Raises BundleError when the signature is missing, wrong, about another bundle, by nobody who is allowed to, or
    older than the device's ``oldest_serials``; DeviceError when the device cannot tell.
    """
    wanted = demand(root, name, format)
    if wanted is None:
        return None
    return check_demand(wanted, name, digest, signature, _latest_time(root))


def check_demand(wanted: Demand, name: str, digest: str, signature: Optional[bytes], latest: int = 0) -> Signed:
    """``check`` with a demand that is known. ``latest`` is a time that has passed, whatever the clock says."""
    if signature is None:
        raise BundleError(
            f"{name} {digest[:12]} is not signed, and {wanted.path} takes only what its keys signed; "
            "sign it: edge-infer sign BUNDLE --key FILE"
        )
    statement, armored = parse_signature(signature)
    require_about(statement, name, digest)
    if statement.serial < wanted.oldest:
        raise BundleError(
            f"{name} {digest[:12]} has serial {statement.serial}, and this device's {OLDEST_NAME} takes none below "
            f"{wanted.oldest}; sign the bundle again if it is to run"
        )
    key = signing_key(statement, armored)
    principal = _principal(wanted, statement.to_bytes(), armored, key, _verify_time(latest))
    return Signed(principal, key, statement.serial, statement.time)


def signing_key(statement: Statement, armored: bytes) -> str:
    """The fingerprint of the key that made the signature, whoever has it. Raises BundleError when it does not fit."""
    done = ssh_keygen(["-Y", "check-novalidate", "-n", NAMESPACE, "-s", armored], statement.to_bytes())
    found = re.search(rb" key (SHA256:[A-Za-z0-9+/]{43})\s*\Z", done.stdout)
    if done.returncode or not found:
        raise BundleError(
            f"the signature of {statement.name} is wrong: it was not made of this statement for the namespace "
            f"{NAMESPACE!r}{_words(done.stderr)}; sign again with edge-infer sign"
        )
    return found[1].decode("ascii")


def _principal(wanted: Demand, statement: bytes, armored: bytes, key: str, at: Sequence[str]) -> str:
    """Who of ``wanted.keys`` signed.

    Each line is asked alone: ssh-keygen names the first line that has the key, whatever namespace that line is for, and
    would never come to a later one that allows it.
    """
    known = ssh_keygen(["-Y", "find-principals", *at, "-s", armored, "-f", wanted.keys])
    reasons = known.stderr
    for line in wanted.keys.split(b"\n") if not known.returncode else ():
        listed = ssh_keygen(["-Y", "find-principals", *at, "-s", armored, "-f", line + b"\n"])
        for principal in re.split(r"[\n,]", os.fsdecode(listed.stdout)) if not listed.returncode else ():
            verify = ["-Y", "verify", *at, "-n", NAMESPACE, "-I", principal, "-s", armored, "-f", line + b"\n"]
            done = ssh_keygen(verify, statement)
            reasons += done.stderr
            if done.returncode == 0:
                for revoked in wanted.revoked:
                    if ssh_keygen([*verify, "-r", revoked], statement).returncode:
                        raise BundleError(
                            f"the key {key} of {principal} counts no more: it is in this device's {REVOKED_NAME}, or "
                            "that file is none that ssh-keygen can read; sign with another key"
                        )
                return principal.encode("utf-8", "replace").decode("utf-8")
    other = "list this one: edge-infer trust DEVICE --key FILE.pub --principal NAME"
    if b"verify time" in reasons:
        other = "set this device's clock, if that is not the time: edge-infer doctor DEVICE"
    raise BundleError(
        f"the signature is by the key {key}, which {wanted.path} does not allow{_words(reasons)}; sign with a key "
        f"that is listed there, or {other}"
    )


def _words(errors: bytes) -> str:
    """The last reason that ssh-keygen gave, without the name of the file that it was given."""
    lines = [re.sub(r"^\S+:\d+: |^error: ", "", line) for line in errors.decode("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line.strip() and not line.startswith("No principal matched")]
    return f" ({lines[-1][:200]})" if lines else ""


def ssh_keygen(arguments: Sequence[Union[str, bytes]], message: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the device's ssh-keygen; an argument in bytes is the content of a file for it. Raises DeviceError.

    The content goes through memory: what it judges is what was read here, and a full disk keeps no model from loading.
    """
    import subprocess  # here, since its import takes longer than opening a model

    descriptors: List[int] = []
    command = ["ssh-keygen"]
    try:
        for argument in arguments:
            if isinstance(argument, bytes):
                descriptors.append(_unnamed_file(argument))
                command.append(f"/proc/self/fd/{descriptors[-1]}")
            else:
                command.append(argument)
        return subprocess.run(
            command,
            input=message,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
            timeout=TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise DeviceError(
            "signatures are demanded here and there is no ssh-keygen to check them; install OpenSSH's client "
            "(Debian: apt-get install openssh-client)"
        ) from None
    except subprocess.TimeoutExpired:
        raise DeviceError(f"ssh-keygen did not end within {TIMEOUT_S:g} s; see what keeps it on the device") from None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _unnamed_file(content: bytes) -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("edge-infer")
    else:  # a Python built for an old C library
        import tempfile

        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


# -- before an engine sees it ------------------------------------------------------------------------------------------


def require_signed(bundle: Bundle, cache: Optional[Path] = None, verify: str = "auto") -> Optional[Signed]:
    """``check`` for an opened bundle, in a store or not; called before an engine sees it.

    What was found is kept in ``cache`` for this manifest, this signature and these files of the device, and stands in
    for asking ssh-keygen again unless ``verify`` is "full". Raises as ``check``.
    """
    store = store_of(bundle.path)
    root = store.root if store else None
    name = bundle.manifest.name
    wanted = demand(root, name, bundle.manifest.artifact.format)
    if wanted is None:
        return None
    signature = read_signature(bundle.path)
    if cache is None or signature is None:
        return check_demand(wanted, name, bundle.digest, signature, _latest_time(root))
    stamp, asked = cache / f"{bundle.digest}.signed", _asked(wanted, bundle.digest, signature)
    found = _read_stamp(stamp, asked) if verify == "auto" else None
    if found is None:
        found = check_demand(wanted, name, bundle.digest, signature, _latest_time(root))
        _write_stamp(stamp, asked, found)
    return found


def _asked(wanted: Demand, digest: str, signature: bytes) -> str:
    """A hash of all that the verdict follows from, but the time."""
    parts = (os.fsencode(wanted.path), wanted.keys, *wanted.revoked, b"%d" % wanted.oldest, digest.encode(), signature)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _read_stamp(path: Path, asked: str) -> Optional[Signed]:
    try:
        row = json.loads(read_plain_file(path, SIGNATURE_MAX_BYTES))
        return Signed(**row["signed"]) if row["asked"] == asked else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):  # BundleError is a ValueError
        return None


def _write_stamp(path: Path, asked: str, signed: Signed) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"asked": asked, "signed": signed.__dict__}).encode(), durable=False)
    except OSError:
        pass  # a read-only or full disk: ssh-keygen is asked again at the next load


def said(bundle: Bundle) -> Optional[str]:
    """Who signed, for people: never an error, since it is only shown. None when nobody did."""
    try:
        signature = read_signature(bundle.path)
        if signature is None:
            return None
        statement, armored = parse_signature(signature)
        require_about(statement, bundle.manifest.name, bundle.digest)
        signed = require_signed(bundle)
        if signed:
            return str(signed)
        key = signing_key(statement, armored)
        return f"serial {statement.serial}, key {key}; nothing here says whose it is"
    except EdgeInferError as error:
        return f"not valid: {error}"


# -- serials -----------------------------------------------------------------------------------------------------------


def check_serial(
    root: Path, name: str, digest: str, signed: Signed, kept: Iterable[str], allow_older: bool = False
) -> None:
    """Raise BundleError when ``signed`` is older than the newest release of ``name`` that was activated in ``root``.

    ``kept`` are the digests in use and to go back to: they were accepted before, and may come again. ``allow_older`` is
    the operator's word for an older one; nothing allows another bundle of the same serial.
    """
    try:
        newest = _read_serial(root, name)
    except BundleError:
        if not allow_older:
            raise
        return
    if newest is None or digest in kept:
        return
    if signed.serial < newest.serial and not allow_older:
        raise BundleError(
            f"{name} {digest[:12]} has serial {signed.serial}, and is older than {newest.digest[:12]} with "
            f"{newest.serial}, which was in use here; sign it again, or push it with --allow-older"
        )
    if signed.serial == newest.serial and digest != newest.digest:
        raise BundleError(
            f"{name} {digest[:12]} has serial {signed.serial}, as {newest.digest[:12]} has that was in use here; "
            "two bundles of one serial are mixed up: sign the newer one again"
        )


def keep_serial(root: Path, name: str, digest: str, signed: Signed) -> None:
    """Remember that ``name`` went so far; it never goes back.

    Called with the store locked, after the self-test and before the pointer moves: a power cut between the two leaves
    the old release in use, and the new one may come again.
    """
    try:
        newest = _read_serial(root, name)
    except BundleError:
        newest = None  # damaged; whoever comes here was allowed past it
    if newest and newest.serial >= signed.serial:
        return
    folder = root / "serials"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*"):
        left.unlink()  # of a writer that died before the rename
    replace_file(folder / name, Statement(name, digest, signed.serial, signed.time).to_bytes())
    sync_directory(root)


def _read_serial(root: Path, name: str) -> Optional[Statement]:
    path = root / "serials" / name
    try:
        found = re.match(STATEMENT, read_plain_file(path, SIGNATURE_MAX_BYTES)) if path.exists() else None
    except OSError as error:
        raise DeviceError(f"{path} cannot be read: {error}") from None
    if found is None:
        if not os.path.lexists(str(path)):
            return None
        raise BundleError(f"{path} is damaged, so nobody knows what is older; push with --allow-older to begin anew")
    return Statement(name, found[2].decode("ascii"), int(found[3]), int(found[4]))


def _latest_time(root: Optional[Path]) -> int:
    """The latest time that an accepted signature names: a board without a battery may have started years before it."""
    times = [0]
    folder = root / "serials" if root else None
    for path in folder.glob("[!.]*") if folder else ():
        try:
            newest = _read_serial(path.parent.parent, path.name)
        except EdgeInferError:
            continue
        times.append(newest.time if newest else 0)
    return max(times)


def _verify_time(latest: int) -> List[str]:
    """ssh-keygen's option for the later of the clock and ``latest``; nothing where the clock is right, since OpenSSH
    before 8.7 does not know it."""
    if latest <= time.time():
        return []
    # Without a Z it is in the local time zone, as are the dates in allowed_signers; OpenSSH before 9.1 knows no Z.
    return ["-O", time.strftime("verify-time=%Y%m%d%H%M%S", time.localtime(latest))]
