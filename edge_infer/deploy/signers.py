"""The device's side of ``edge-infer trust``: who may sign there, shown and changed.

Standard library only, Python >= 3.8: a push sends this file along.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from edge_infer import trust
from edge_infer.bundle import Bundle, replace_file, sync_directory
from edge_infer.errors import DeviceError, EdgeInferError, UsageError
from edge_infer.manifest import FORMATS
from edge_infer.store import Store
from edge_infer.trust import KEYS_NAME, OLDEST_NAME, POLICY_MAX_BYTES, REVOKED_NAME, read_policy

VERBS = ("show", "set", "add", "remove", "clear", "revoke")
#: How a key revocation list begins, which only ssh-keygen writes.
KRL = b"SSHKRL\n\0"

KEY = r"(?P<type>(?:ssh|ecdsa|sk)-[a-zA-Z0-9@.-]+)[ \t]+(?P<blob>[A-Za-z0-9+/]+=*)(?:[ \t]+(?P<comment>.*))?\Z"
PUBLIC_KEY = re.compile(KEY)
#: A line of allowed_signers: principals, options or none, key.
SIGNER = re.compile(r'(?P<principals>"[^"]*"|[^\s"]+)[ \t]+(?:(?P<options>(?:[^\s"]|"[^"]*")+)[ \t]+)?' + KEY)


def trust_request(store: Store, request: Mapping[str, Any]) -> Dict[str, Any]:
    """Do what ``request`` asks, with the store locked, and give what is so then.

    ``verb`` is show, set (``text`` is the whole file), add (its lines), remove (``text`` is a fingerprint or the
    principals of a line), clear (no signature is needed any more) or revoke (``text`` is public keys); ``format`` has
    signers of its own, None for all others; ``force`` is for a change after which a model in use would not load.

    Raises UsageError for a request that cannot be met, DeviceError when the device cannot do it.
    """
    verb, text, format = request["verb"], request.get("text") or "", request.get("format")
    if verb not in VERBS or format not in (None, *FORMATS):
        raise UsageError(f"{verb!r} for {format!r}, expected one of {', '.join(VERBS)} for one of {', '.join(FORMATS)}")
    if verb != "show":
        path = store.root / (REVOKED_NAME if verb == "revoke" else _leaf(format))
        _require_own(path)
        change(store, path, _changed(path, verb, text), bool(request.get("force")))
    return show(store)


def _leaf(format: Optional[str]) -> str:
    return f"{KEYS_NAME}.{format}" if format else KEYS_NAME


def _require_own(path: Path) -> None:
    """Raise DeviceError for a file of the store that counts for nothing, since the administrator's stands before it."""
    for leaf in {path.name, KEYS_NAME} if path.name.startswith(KEYS_NAME) else ():
        if read_policy(trust.SYSTEM / leaf) is not None:
            raise DeviceError(
                f"{trust.SYSTEM / leaf} says who may sign here, and {path} counts for nothing beside it; "
                "the device's administrator changes it"
            )


def _changed(path: Path, verb: str, text: str) -> Optional[bytes]:
    """What ``path`` holds after the change; None for no file. Raises UsageError."""
    if verb == "clear":
        return None
    before = (read_policy(path) or b"") if verb != "set" else b""
    if before.startswith(KRL):
        raise UsageError(f"{path} is a key revocation list; change it with ssh-keygen -k -u, and copy it there")
    lines = before.decode("utf-8", "surrogateescape").splitlines()
    if verb == "remove":
        kept = [line for line in lines if not _is_named(line, text)]
        if kept == lines:
            known = ", ".join(f"{row['principals']} {row['key']}" for row in rows(before)) or "none"
            raise UsageError(f"no key at {path} has the fingerprint or the principals {text!r}; it has {known}")
        lines = kept
    else:
        added = text.splitlines()
        require_keys(added, PUBLIC_KEY if verb == "revoke" else SIGNER)
        lines += [line for line in added if line not in lines]
    data = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    if len(data) > POLICY_MAX_BYTES:
        raise UsageError(f"{path} would have {len(data)} bytes, at most {POLICY_MAX_BYTES} are read")
    return data


def _is_named(line: str, text: str) -> bool:
    found = SIGNER.match(line.strip())
    return found is not None and text in (found["principals"], fingerprint(found["blob"]))


def require_keys(lines: List[str], form: re.Pattern[str]) -> None:
    """Raise UsageError unless each line is empty, a comment, or in ``form`` with a key that is one.

    ssh-keygen passes over a line that it cannot read, so whoever wrote it would wonder later.
    """
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            found = form.match(line.strip())
            if not found or not _is_blob(found["type"], found["blob"]):
                expected = "TYPE BASE64" if form is PUBLIC_KEY else "PRINCIPALS [OPTIONS] TYPE BASE64"
                raise UsageError(f"line {number} is {line[:60]!r}, expected a public key: {expected}")


def _is_blob(kind: str, blob: str) -> bool:
    """Whether the key's bytes begin with the name of its type, as all do."""
    try:
        data = base64.b64decode(blob, validate=True)
    except binascii.Error:
        return False
    return data[:4] == len(kind).to_bytes(4, "big") and data[4 : 4 + len(kind)] == kind.encode("ascii")


def fingerprint(blob: str) -> str:
    """As ssh-keygen prints it, of a public key in base64."""
    try:
        digest = hashlib.sha256(base64.b64decode(blob)).digest()
    except binascii.Error:
        return "not a key"
    return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")


def rows(data: bytes) -> List[Dict[str, str]]:
    """The keys of an allowed_signers or revoked_keys file."""
    found = []
    for line in data.decode("utf-8", "replace").splitlines():
        match = SIGNER.match(line.strip()) or PUBLIC_KEY.match(line.strip())
        if match and not line.lstrip().startswith("#"):
            fields = match.groupdict()
            found.append(
                {
                    "principals": fields.get("principals") or "",
                    "options": fields.get("options") or "",
                    "type": fields["type"],
                    "key": fingerprint(fields["blob"]),
                    "comment": fields["comment"] or "",
                }
            )
    return found


# -- changing ----------------------------------------------------------------------------------------------------------


def change(store: Store, path: Path, data: Optional[bytes], force: bool) -> None:
    """Make ``data`` the content of ``path``, in one step.

    Without ``force`` it is refused with UsageError when a model in use, which loads now, would not load any more.
    """
    trust.ssh_keygen(["-?"])  # a device that cannot check signatures must not come to demand them
    accepted, refused = judge(store, {path: data})
    if data is not None and not force:
        _, already = judge(store, {})
        fresh = {name: why for name, why in refused.items() if name not in already}
        if fresh:
            raise UsageError(
                f"after this change {', '.join(sorted(fresh))} would not load any more ({next(iter(fresh.values()))}); "
                "push what is signed first, or insist with --force"
            )
    if data is None:
        if path.exists():
            path.unlink()
            sync_directory(path.parent)
    else:
        replace_file(path, data)
    for name, (digest, signed) in accepted.items():
        trust.keep_serial(store.root, name, digest, signed)  # what is in use is what newer ones are compared with


def judge(store: Store, changed: Mapping[Path, Optional[bytes]]) -> Any:
    """Two mappings by name of the models in use that need a signature: (digest, Signed), and why one is refused."""
    accepted, refused = {}, {}
    for name in store.names():
        try:
            bundle = store.open_current(name)
        except EdgeInferError:
            continue  # it does not load in any case
        wanted = trust.demand(store.root, name, bundle.manifest.artifact.format, changed)
        if wanted is None:
            continue
        try:
            signature = trust.read_signature(bundle.path)
            accepted[name] = (bundle.digest, trust.check_demand(wanted, name, bundle.digest, signature))
        except EdgeInferError as error:
            refused[name] = str(error)
    return accepted, refused


# -- showing -----------------------------------------------------------------------------------------------------------


def show(store: Store) -> Dict[str, Any]:
    """``signers``: one row a file that is in force; ``revoked``; ``oldest``; ``models``: who signed what is in use."""
    return {
        "signers": [row for format in (*FORMATS, None) for row in _in_force(store, format)],
        "revoked": [row for folder in (trust.SYSTEM, store.root) for row in _revoked(folder / REVOKED_NAME)],
        "oldest": [line for folder in (trust.SYSTEM, store.root) for line in _lines(folder / OLDEST_NAME)],
        "models": [_model(bundle) for bundle in _in_use(store)],
    }


def _in_force(store: Store, format: Optional[str]) -> List[Dict[str, Any]]:
    """The file for bundles of ``format``, or for those that have none of their own."""
    own = [folder / _leaf(format) for folder in (trust.SYSTEM, store.root)]
    if format and read_policy(trust.SYSTEM / KEYS_NAME) is not None:
        own = own[:1]
    for path in own:
        data = read_policy(path)
        if data is not None:
            return [{"path": str(path), "format": format, "keys": rows(data)}]
    return []


def _revoked(path: Path) -> List[Dict[str, str]]:
    data = read_policy(path) or b""
    return [{"key": f"a list made by ssh-keygen -k ({path})"}] if data.startswith(KRL) else rows(data)


def _lines(path: Path) -> List[str]:
    lines = (read_policy(path) or b"").decode("utf-8", "replace").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _in_use(store: Store) -> List[Bundle]:
    found = []
    for name in store.names():
        try:
            found.append(store.open_current(name))
        except EdgeInferError:
            continue  # status says what is wrong with it
    return found


def _model(bundle: Bundle) -> Dict[str, Any]:
    row: Dict[str, Any] = {"name": bundle.manifest.name, "digest": bundle.digest, "signed": trust.said(bundle)}
    try:
        trust.require_signed(bundle)
        row["refused"] = None
    except EdgeInferError as error:
        row["refused"] = str(error)
    return row
