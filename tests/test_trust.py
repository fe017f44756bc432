"""Signatures: who a device believes, with real keys, agents and certificates of OpenSSH.

Security keys (sk-ssh-ed25519 and the like) need a device to touch; ssh-keygen treats them as it treats an agent's.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SOURCES
from handmade import FILES, make_bundle, settle
from sshd import make_key, public_key

import edge_infer
from edge_infer import admission, trust
from edge_infer.bundle import SIGNATURE_MAX_BYTES, Bundle, open_bundle
from edge_infer.cli import main
from edge_infer.deploy import signing
from edge_infer.errors import BundleError, DeviceError, UsageError
from edge_infer.runtime import commands
from edge_infer.store import Store
from edge_infer.trust import Signed

Make = Callable[..., Bundle]
ROOT = Path(__file__).parents[1]
KINDS = ("ed25519", "ecdsa", "rsa")
DAY_S = 86_400


@pytest.fixture(autouse=True)
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /etc/edge-infer, which is not there until a test makes it."""
    folder = tmp_path / "etc"
    monkeypatch.setattr(trust, "SYSTEM", folder)
    return folder


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of key pairs: one of each kind, and those of two other people."""
    folder = tmp_path_factory.mktemp("keys")
    for kind in KINDS:
        make_key(folder / kind, kind)
    for name in ("other", "authority"):
        make_key(folder / name)
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(number, key=None, serial=None, name="tiny")``: bundles that differ, signed where a key is given."""

    def make(number: int = 1, key: Path | None = None, serial: int | None = None, name: str = "tiny") -> Bundle:
        path = tmp_path / f"{name}-{number}.edge"
        if not path.exists():
            make_bundle(path, {**FILES, "labels.txt": b"%d" % number}, name=name, version=str(number))
        if key:
            signing.sign(open_bundle(path), key, serial)
        return open_bundle(path)

    return make


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store that trusts nobody in particular yet."""
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


def allow(root: Path, *lines: str, leaf: str = "allowed_signers") -> None:
    root.mkdir(exist_ok=True)
    (root / leaf).write_text("".join(f"{line}\n" for line in lines))


def check(root: Path, bundle: Bundle, **changes: Any) -> Signed | None:
    """What the device says to a bundle that arrives."""
    manifest = bundle.manifest
    wanted = {
        "name": manifest.name,
        "digest": bundle.digest,
        "format": manifest.artifact.format,
        "signature": trust.read_signature(bundle.path),
    }
    return trust.check(root, **{**wanted, **changes})


def refused(root: Path, bundle: Bundle, **changes: Any) -> str:
    with pytest.raises(BundleError) as caught:
        check(root, bundle, **changes)
    return str(caught.value)


def signature_of(bundle: Bundle) -> Path:
    return bundle.path / "manifest.sig"


def shown(key: Path) -> str:
    """A key's fingerprint, as ssh-keygen prints it."""
    done = subprocess.run(["ssh-keygen", "-lf", f"{key}.pub"], check=True, capture_output=True, text=True)
    return done.stdout.split()[1]


def ssh_keygen(*arguments: object) -> None:
    subprocess.run(["ssh-keygen", "-q", *map(str, arguments)], check=True, capture_output=True)


def date(offset_days: int) -> str:
    return time.strftime("%Y%m%d", time.localtime(time.time() + offset_days * DAY_S))


# -- what is taken -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_signed_by_an_allowed_key_is_taken(make: Make, keys: Path, root: Path, kind: str) -> None:
    allow(root, f"bob@example.com {public_key(keys / 'other')}", f"anna@example.com {public_key(keys / kind)}")
    before = int(time.time())
    signed = check(root, make(key=keys / kind))
    assert signed is not None
    assert (signed.principal, signed.key) == ("anna@example.com", shown(keys / kind))
    assert before <= signed.serial == signed.time <= time.time()


def test_a_device_without_keys_takes_what_is_not_signed_or_signed_by_anybody(
    make: Make, keys: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsigned, signed = make(1), make(2, keys / "other")
    monkeypatch.setenv("PATH", str(root))  # and needs no ssh-keygen
    assert check(root, unsigned) is None
    assert check(root, signed) is None


def test_signing_changes_neither_digest_nor_files(make: Make, keys: Path) -> None:
    plain = make()
    signed = make(key=keys / "ed25519")
    assert signed.digest == plain.digest
    assert {path.name for path in signed.path.iterdir()} == {*plain.manifest.files, "manifest.json", "manifest.sig"}
    statement = signature_of(signed).read_bytes().partition(b"-----BEGIN")[0].decode().splitlines()
    assert statement[:3] == ["edge-infer signature 1", "name tiny", f"digest {signed.digest}"]


def test_ssh_keygen_alone_can_check_it(make: Make, keys: Path, root: Path, tmp_path: Path) -> None:
    """OpenSSH's own format: nobody needs this program to believe it."""
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    text, begin, rest = signature_of(make(key=keys / "ed25519")).read_bytes().partition(b"-----BEGIN")
    (tmp_path / "sig").write_bytes(begin + rest)
    command = ["ssh-keygen", "-Y", "verify", "-f", root / "allowed_signers", "-I", "anna", "-n", "edge-infer"]
    done = subprocess.run([*command, "-s", tmp_path / "sig"], input=text, check=True, capture_output=True)
    assert done.stdout.startswith(b'Good "edge-infer" signature for anna')


def test_the_default_serial_grows_with_each_signature(make: Make, keys: Path, root: Path) -> None:
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    first = check(root, make(key=keys / "ed25519"))
    second = check(root, make(key=keys / "ed25519"))
    assert first and second and second.serial > first.serial
    far = check(root, make(key=keys / "ed25519", serial=10**15))
    after = check(root, make(key=keys / "ed25519"))
    assert far and after and (far.serial, after.serial) == (10**15, 10**15 + 1)
    assert after.time <= time.time()


@pytest.mark.parametrize("serial", [-1, 10**18])
def test_a_serial_out_of_bounds_is_refused(make: Make, keys: Path, serial: int) -> None:
    with pytest.raises(UsageError, match="expected a whole number from 0 to"):
        make(key=keys / "ed25519", serial=serial)


def test_an_agent_signs_with_a_key_that_no_file_holds(
    make: Make, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_key(tmp_path / "held", "ed25519", "secret")
    make_key(tmp_path / "key")
    allow(root, f"anna {public_key(tmp_path / 'key')}")
    socket = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not socket.exists():
            time.sleep(0.01)
            assert agent.poll() is None
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        subprocess.run(["ssh-add", "-q", tmp_path / "key"], check=True, capture_output=True)
        (tmp_path / "key").unlink()
        signed = check(root, make(key=tmp_path / "key.pub"))
        assert signed is not None and signed.key == shown(tmp_path / "key")
    finally:
        agent.terminate()
        agent.wait(10)
    with pytest.raises(UsageError, match="ssh-keygen did not sign"):
        make(2, tmp_path / "key.pub")
    assert not signature_of(make(2)).exists()


def on_a_terminal(command: list[str], answers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """Run a command with a terminal of its own and type each answer after its question; gives status and output."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], command)
    output, asked = b"", 0
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            piece = b""
        if not piece:
            break
        output += piece
        if asked < len(answers) and answers[asked][0] in output:
            os.write(terminal, answers[asked][1])
            asked += 1
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


def test_a_passphrase_is_asked_for_on_the_terminal(make: Make, root: Path, tmp_path: Path) -> None:
    make_key(tmp_path / "locked", passphrase="open sesame")
    allow(root, f"anna {public_key(tmp_path / 'locked')}")
    bundle = make()
    command = ["-m", "edge_infer.cli", "sign", str(bundle.path), "--key", str(tmp_path / "locked")]
    status, output = on_a_terminal([sys.executable, *command], [(b"passphrase", b"open sesame\n")])
    assert status == 0, output
    assert check(root, bundle) is not None


# -- certificates ------------------------------------------------------------------------------------------------------


def certified(keys: Path, folder: Path, principals: str, *options: str) -> Path:
    """A key that the authority certified for these principals; gives its certificate."""
    shutil.copy(keys / "ed25519", folder / "person")
    shutil.copy(keys / "ed25519.pub", folder / "person.pub")
    ssh_keygen("-s", keys / "authority", "-I", "a person", "-n", principals, *options, folder / "person.pub")
    return folder / "person-cert.pub"


def test_a_certificate_of_an_authority_is_taken(make: Make, keys: Path, root: Path, tmp_path: Path) -> None:
    allow(root, f"*@example.com cert-authority {public_key(keys / 'authority')}")
    signed = check(root, make(key=certified(keys, tmp_path, "bob@elsewhere.org,anna@example.com")))
    assert signed is not None and signed.principal == "anna@example.com"


@pytest.mark.parametrize(
    ("principals", "options"),
    [("anna@elsewhere.org", ()), ("anna@example.com", ("-V", "20200101:20210101")), ("anna@example.com", ("-h",))],
    ids=["another name", "expired", "of a host"],
)
def test_a_certificate_that_does_not_fit_is_refused(
    make: Make, keys: Path, root: Path, tmp_path: Path, principals: str, options: tuple[str, ...]
) -> None:
    allow(root, f"*@example.com cert-authority {public_key(keys / 'authority')}")
    bundle = make(key=certified(keys, tmp_path, principals, *options))
    assert "does not allow" in refused(root, bundle)


@pytest.mark.parametrize("key", ["authority", "ed25519"])
def test_an_authority_is_no_signer_and_its_people_need_their_certificate(
    make: Make, keys: Path, root: Path, key: str
) -> None:
    allow(root, f"*@example.com cert-authority {public_key(keys / 'authority')}")
    assert "does not allow" in refused(root, make(key=keys / key))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_device_with_keys_refuses_what_is_not_signed(make: Make, keys: Path, root: Path) -> None:
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    assert re.search(r"tiny \w{12} is not signed, and .*allowed_signers takes only", refused(root, make()))


def test_a_device_with_an_empty_list_takes_nothing(make: Make, keys: Path, root: Path) -> None:
    allow(root, "# nobody yet")
    assert "does not allow" in refused(root, make(key=keys / "ed25519"))


def test_a_key_that_is_not_listed_is_refused_and_named(make: Make, keys: Path, root: Path) -> None:
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    assert f"the signature is by the key {shown(keys / 'other')}" in refused(root, make(key=keys / "other"))


def test_a_signature_for_another_namespace_is_refused(
    make: Make, keys: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One made for git or a file is none for a bundle, whatever it says."""
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    monkeypatch.setattr(trust, "NAMESPACE", "git")
    monkeypatch.setattr(signing, "NAMESPACE", "git")
    bundle = make(key=keys / "ed25519")
    monkeypatch.undo()
    assert "not made of this statement for the namespace 'edge-infer'" in refused(root, bundle)


def test_a_key_listed_for_another_namespace_only_is_refused(make: Make, keys: Path, root: Path) -> None:
    key = public_key(keys / "ed25519")
    allow(root, f'anna namespaces="git,file" {key}')
    bundle = make(key=keys / "ed25519")
    assert 'not permitted for use in signature namespace "edge-infer"' in refused(root, bundle)
    allow(root, f'anna namespaces="git,file" {key}', f'anna.models namespaces="edge-infer" {key}')
    signed = check(root, bundle)
    assert signed is not None and signed.principal == "anna.models"


def test_a_line_that_ssh_keygen_cannot_read_allows_nobody(make: Make, keys: Path, root: Path) -> None:
    allow(root, f"anna valid-untill=20300101 {public_key(keys / 'ed25519')}")
    assert "does not allow" in refused(root, make(key=keys / "ed25519"))


def test_the_signature_of_another_bundle_is_refused(make: Make, keys: Path, root: Path) -> None:
    """Mixed: a manifest of one and a signature of another, both good in themselves."""
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    one, two = make(1, keys / "ed25519"), make(2, keys / "ed25519")
    other = make(1, keys / "ed25519", name="other")
    for wrong in (two, other):
        assert "a signature does not pass from one bundle to another" in refused(
            root, one, signature=signature_of(wrong).read_bytes()
        )
    assert "for tiny" in refused(root, one, name="other")


@pytest.mark.parametrize("field", ["name", "digest", "serial", "time"])
def test_a_statement_changed_after_signing_is_refused(make: Make, keys: Path, root: Path, field: str) -> None:
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    bundle = make(key=keys / "ed25519", serial=5)
    values = {"name": "taller", "digest": "0" * 64, "serial": "6", "time": "1"}
    data = re.sub(rf"(?m)^{field} .*$".encode(), f"{field} {values[field]}".encode(), signature_of(bundle).read_bytes())
    changed = {field: values[field]} if field in ("name", "digest") else {}
    assert "is wrong" in refused(root, bundle, signature=data, **changed)


def decoded(data: bytes) -> tuple[bytes, bytes]:
    """The statement and the signature's own bytes."""
    statement, armored = trust.parse_signature(data)
    return statement.to_bytes(), base64.b64decode(b"".join(armored.splitlines()[1:-1]))


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_no_flipped_bit_is_overlooked(make: Make, keys: Path, root: Path, kind: str) -> None:
    allow(root, f"anna {public_key(keys / kind)}")
    bundle = make(key=keys / kind)
    good = signature_of(bundle).read_bytes()
    same = 0
    for index in range(0, len(good), 1 if kind == "ed25519" else 3):
        data = bytearray(good)
        data[index] ^= 1 << index % 8
        try:
            check(root, bundle, signature=bytes(data))
        except BundleError:
            continue
        # Base64 has bits that mean nothing, and a line's end may move: then it is the same signature.
        assert decoded(bytes(data)) == decoded(good), f"byte {index} of {len(good)}"
        same += 1
    assert same < 5


def test_what_is_no_signature_is_refused(make: Make, keys: Path, root: Path) -> None:
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    bundle = make(key=keys / "ed25519", serial=5)
    good = signature_of(bundle).read_bytes()
    statement, armored = good.partition(b"-----BEGIN")[0], good[good.index(b"-----BEGIN") :]
    forms = {
        "nothing": b"",
        "a statement alone": statement,
        "a signature alone": armored,
        "cut off": good[:-1],
        "something after it": good + b"\n",
        "something before it": b"\n" + good,
        "a newer form": good.replace(b"signature 1", b"signature 2"),
        "a serial written otherwise": good.replace(b"serial 5", b"serial 05"),
        "a serial with a sign": good.replace(b"serial 5", b"serial +5"),
        "an endless serial": good.replace(b"serial 5", b"serial " + b"5" * 1000),
        "a time past every clock": re.sub(rb"time \d+", b"time 99999999999", good),
        "a longer name": good.replace(b"name tiny", b"name " + b"t" * 101),
        "a path for a name": good.replace(b"name tiny", b"name ../x"),
        "line ends of another system": good.replace(b"\n", b"\r\n"),
        "two statements": statement + good,
        "zeros": bytes(1000),
        "too long": good.replace(b"-----END", b"A" * SIGNATURE_MAX_BYTES + b"\n-----END"),
    }
    for what, data in forms.items():
        assert "damaged, or of a kind" in refused(root, bundle, signature=data), what
    long = statement + armored.replace(b"-----END", b"A" * (SIGNATURE_MAX_BYTES - len(good) - 1) + b"\n-----END")
    assert "is wrong" in refused(root, bundle, signature=long)


def as_link(path: Path) -> None:
    path.with_name("real").write_bytes(path.read_bytes())
    os.rename(path.with_name("real"), path.parent.parent / "real")
    path.unlink()
    path.symlink_to(path.parent.parent / "real")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_sparse_giant(path: Path) -> None:
    os.truncate(path, 10**12)


@pytest.mark.parametrize("become", [as_link, as_folder, as_pipe, as_sparse_giant])
def test_a_signature_that_is_no_small_plain_file_is_refused(
    make: Make, keys: Path, become: Callable[[Path], None]
) -> None:
    bundle = make(key=keys / "ed25519")
    become(signature_of(bundle))
    with pytest.raises(BundleError, match=r"manifest\.sig is not a plain file of at most 65536 bytes"):
        open_bundle(bundle.path)
    with pytest.raises(BundleError, match=r"manifest\.sig"):
        trust.read_signature(bundle.path)


# -- keys that end -----------------------------------------------------------------------------------------------------


def test_a_key_counts_from_and_until_its_dates(make: Make, keys: Path, root: Path) -> None:
    key, bundle = public_key(keys / "ed25519"), make(key=keys / "ed25519")
    allow(root, f'anna valid-after="{date(-2)}",valid-before="{date(2)}" {key}')
    assert check(root, bundle) is not None
    allow(root, f'anna valid-before="{date(-1)}" {key}')
    assert "key has expired: verify time" in refused(root, bundle)
    allow(root, f'anna valid-after="{date(2)}" {key}')
    assert "key is not yet valid" in refused(root, bundle) and "set this device's clock" in refused(root, bundle)


def test_a_clock_that_is_behind_what_was_signed_does_not_bring_a_key_back(make: Make, keys: Path, root: Path) -> None:
    """As a board without a battery starts. A later time was seen in a signature that was accepted."""
    key, bundle = public_key(keys / "ed25519"), make(key=keys / "ed25519")
    in_five_days = int(time.time()) + 5 * DAY_S
    trust.keep_serial(root, "another", "0" * 64, Signed("bob", "SHA256:x", 7, in_five_days))
    allow(root, f'anna valid-before="{date(3)}" {key}')
    assert "key has expired: verify time" in refused(root, bundle)
    allow(root, f'anna valid-after="{date(3)}",valid-before="{date(7)}" {key}')
    assert check(root, bundle) is not None


@pytest.mark.parametrize("form", ["text", "KRL"])
@pytest.mark.parametrize("where", ["store", "system"])
def test_a_revoked_key_counts_no_more(make: Make, keys: Path, root: Path, system: Path, form: str, where: str) -> None:
    bundles = {kind: make(number, keys / kind) for number, kind in enumerate(("ed25519", "ecdsa"))}
    allow(root, *(f"{kind} {public_key(keys / kind)}" for kind in bundles))
    folder = root if where == "store" else system
    folder.mkdir(exist_ok=True)
    if form == "text":
        shutil.copy(keys / "ecdsa.pub", folder / "revoked_keys")
    else:
        ssh_keygen("-k", "-f", folder / "revoked_keys", keys / "ecdsa.pub")
    assert f"the key {shown(keys / 'ecdsa')} of ecdsa counts no more" in refused(root, bundles["ecdsa"])
    assert check(root, bundles["ed25519"]) is not None


@pytest.mark.parametrize("what", ["the authority", "one certificate"])
def test_a_revoked_certificate_or_authority_counts_no_more(
    make: Make, keys: Path, root: Path, tmp_path: Path, what: str
) -> None:
    allow(root, f"* cert-authority {public_key(keys / 'authority')}")
    bundle = make(key=certified(keys, tmp_path, "anna"))
    assert check(root, bundle) is not None
    if what == "the authority":
        shutil.copy(keys / "authority.pub", root / "revoked_keys")
    else:
        (tmp_path / "spec").write_text("id: a person\n")
        ssh_keygen("-k", "-f", root / "revoked_keys", "-s", keys / "authority.pub", tmp_path / "spec")
    assert "counts no more" in refused(root, bundle)


def test_a_revocation_list_that_cannot_be_read_lets_nobody_in(make: Make, keys: Path, root: Path) -> None:
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    (root / "revoked_keys").write_text("this is not a key\n")
    assert "none that ssh-keygen can read" in refused(root, make(key=keys / "ed25519"))


# -- which file counts -------------------------------------------------------------------------------------------------


def test_the_administrators_file_wins(make: Make, keys: Path, root: Path, system: Path) -> None:
    anna, bob = make(1, keys / "ed25519"), make(2, keys / "other")
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    allow(system, f"bob {public_key(keys / 'other')}")
    assert check(root, bob) is not None
    assert str(system) in refused(root, anna)


def test_a_format_may_have_signers_of_its_own(make: Make, keys: Path, root: Path, system: Path) -> None:
    anna, bob, nobody = make(1, keys / "ed25519"), make(2, keys / "other"), make(3)
    allow(root, f"bob {public_key(keys / 'other')}", leaf="allowed_signers.torchscript")
    assert check(root, nobody, format="onnx") is None
    assert "not signed" in refused(root, nobody, format="torchscript")
    assert check(root, bob, format="torchscript") is not None
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    assert check(root, anna, format="onnx") is not None
    assert "does not allow" in refused(root, anna, format="torchscript")
    allow(system, f"anna {public_key(keys / 'ed25519')}")  # the administrator's counts for all formats
    assert check(root, anna, format="torchscript") is not None


def as_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


def as_too_much(path: Path) -> None:
    path.write_bytes(b"#" * 300_000)


@pytest.mark.parametrize("become", [as_dangling_link, as_too_much, os.mkdir, os.mkfifo])
@pytest.mark.parametrize("leaf", ["allowed_signers", "allowed_signers.tflite", "revoked_keys", "oldest_serials"])
def test_a_file_that_decides_and_cannot_be_read_lets_nobody_in(
    make: Make, keys: Path, root: Path, leaf: str, become: Callable[[Path], None]
) -> None:
    allow(root, f"anna {public_key(keys / 'ed25519')}", leaf="allowed_signers.tflite")
    bundle = make(key=keys / "ed25519")
    assert check(root, bundle) is not None
    (root / "allowed_signers.tflite").unlink()
    if leaf in ("revoked_keys", "oldest_serials"):
        allow(root, f"anna {public_key(keys / 'ed25519')}")
    become(root / leaf)
    with pytest.raises(DeviceError, match=f"{leaf} cannot be read: .*so none may until then"):
        check(root, bundle)


def test_a_folder_that_cannot_be_looked_into_lets_nobody_in(make: Make, keys: Path, root: Path, system: Path) -> None:
    system.write_text("a file")
    with pytest.raises(DeviceError, match=r"etc/allowed_signers\.tflite cannot be read: Not a directory"):
        check(root, make(key=keys / "ed25519"))


def test_without_ssh_keygen_a_device_with_keys_takes_nothing(
    make: Make, keys: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    bundle = make(key=keys / "ed25519")
    monkeypatch.setenv("PATH", str(root))
    with pytest.raises(DeviceError, match="there is no ssh-keygen to check them; install OpenSSH's client"):
        check(root, bundle)


def test_a_python_without_unnamed_memory_files_checks_as_well(
    make: Make, keys: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    one, two = make(1, keys / "ed25519"), make(2, keys / "other")
    monkeypatch.delattr(os, "memfd_create")
    assert check(root, one) is not None
    assert "does not allow" in refused(root, two)


# -- serials -----------------------------------------------------------------------------------------------------------


def accept(root: Path, bundle: Bundle, kept: tuple[str, ...] = (), allow_older: bool = False) -> None:
    """What a push does with serials, from its arrival to its pointer."""
    signed = check(root, bundle)
    assert signed is not None
    trust.check_serial(root, "tiny", bundle.digest, signed, kept, allow_older)
    trust.keep_serial(root, "tiny", bundle.digest, signed)


@pytest.fixture
def one_two(make: Make, keys: Path, root: Path) -> tuple[Bundle, Bundle]:
    """An older and a newer bundle, of which the newer was in use."""
    allow(root, f"anna {public_key(keys / 'ed25519')}")
    one, two = make(1, keys / "ed25519", 10), make(2, keys / "ed25519", 20)
    accept(root, one)
    accept(root, two)
    return one, two


def test_an_older_bundle_is_refused(one_two: tuple[Bundle, Bundle], root: Path, make: Make, keys: Path) -> None:
    one, two = one_two
    with pytest.raises(BundleError, match=rf"has serial 10, and is older than {two.digest[:12]} with 20"):
        accept(root, one)
    accept(root, two)
    accept(root, make(3, keys / "ed25519", 21))


def test_an_older_bundle_comes_back_when_it_is_still_kept_or_allowed_or_signed_again(
    one_two: tuple[Bundle, Bundle], root: Path, make: Make, keys: Path
) -> None:
    one, two = one_two
    accept(root, one, kept=(two.digest, one.digest))
    accept(root, one, allow_older=True)
    with pytest.raises(BundleError, match="is older than"):  # the newest one seen stays what others are held to
        accept(root, one)
    accept(root, make(1, keys / "ed25519", 30))


def test_another_bundle_of_the_same_serial_is_refused(
    one_two: tuple[Bundle, Bundle], root: Path, make: Make, keys: Path
) -> None:
    mixed = make(3, keys / "ed25519", 20)
    for allow_older in (False, True):
        with pytest.raises(BundleError, match="two bundles of one serial are mixed up"):
            accept(root, mixed, allow_older=allow_older)


def test_serials_of_models_do_not_meet(one_two: tuple[Bundle, Bundle], root: Path, make: Make, keys: Path) -> None:
    other = make(1, keys / "ed25519", 1, name="other")
    signed = check(root, other)
    assert signed is not None
    trust.check_serial(root, "other", other.digest, signed, ())
    trust.keep_serial(root, "other", other.digest, signed)
    assert sorted(path.name for path in (root / "serials").iterdir()) == ["other", "tiny"]


def test_a_damaged_record_is_no_way_around(one_two: tuple[Bundle, Bundle], root: Path) -> None:
    one, _ = one_two
    (root / "serials" / "tiny").write_bytes(b"")
    with pytest.raises(BundleError, match="is damaged, so nobody knows what is older; push with --allow-older"):
        accept(root, one)
    accept(root, one, allow_older=True)
    accept(root, one)


def test_what_a_writer_that_died_left_is_cleared(one_two: tuple[Bundle, Bundle], root: Path) -> None:
    (root / "serials" / ".tiny.abc").write_bytes(b"half")
    (root / "serials" / "tiny").unlink()
    accept(root, one_two[1])
    assert [path.name for path in (root / "serials").iterdir()] == ["tiny"]


@pytest.mark.parametrize("where", ["store", "system"])
def test_the_administrator_can_say_what_is_too_old(
    one_two: tuple[Bundle, Bundle], root: Path, system: Path, where: str
) -> None:
    one, two = one_two
    folder = root if where == "store" else system
    folder.mkdir(exist_ok=True)
    (folder / "oldest_serials").write_text("# after the theft\nother 99\ntiny 20\n")
    assert "this device's oldest_serials takes none below 20" in refused(root, one)
    assert check(root, two) is not None


@pytest.mark.parametrize("line", ["tiny", "tiny twenty", "tiny 20 30", "tiny -1", "../x 1"])
def test_a_line_of_oldest_serials_that_says_nothing_is_not_passed_over(
    one_two: tuple[Bundle, Bundle], root: Path, line: str
) -> None:
    (root / "oldest_serials").write_text(f"{line}\n")
    with pytest.raises(DeviceError, match="expected a model's name and a serial"):
        check(root, one_two[1])


# -- before an engine sees it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def onnx(packaged: Callable[..., Bundle]) -> Bundle:
    return packaged(SOURCES["onnx"], "onnx", "float32")


@pytest.fixture(scope="session")
def torchscript(packaged: Callable[..., Bundle]) -> Bundle:
    return packaged(SOURCES["torchscript"], "torchscript", "float32")


def put(home: Path, bundle: Bundle, key: Path | None) -> Bundle:
    """A store that was filled by other means than a push: the files are copied there."""
    store, name = Store(home), bundle.manifest.name
    folder = store.release(name, bundle.digest)
    shutil.copytree(bundle.path, folder)
    if key:
        signing.sign(open_bundle(folder), key)
    store.activate(name, bundle.digest)
    return settle(open_bundle(folder))


def answers(source: str | Path, **options: Any) -> np.ndarray:
    with edge_infer.load(source, **options) as session:
        asked = {spec.name: np.zeros([size or 1 for size in spec.shape], spec.dtype) for spec in session.inputs}
        return session.run(asked)[session.outputs[0].name]


def test_load_refuses_what_is_not_signed_in_a_store_with_keys(onnx: Bundle, keys: Path, own_home: Path) -> None:
    release = put(own_home, onnx, None)
    answers("digits")
    allow(own_home, f"anna {public_key(keys / 'ed25519')}")
    for source in ("digits", release.path):
        with pytest.raises(BundleError, match="is not signed"):
            answers(source)
    signing.sign(release, keys / "other")
    with pytest.raises(BundleError, match="does not allow"):
        answers("digits")
    signing.sign(release, keys / "ed25519")
    assert answers("digits").shape == (1, 10)
    answers(onnx.path)  # lies in no store: the store's keys say nothing of it


def test_every_way_to_an_engine_asks_first(onnx: Bundle, keys: Path, own_home: Path, tmp_path: Path) -> None:
    release = put(own_home, onnx, None)
    allow(own_home, f"anna {public_key(keys / 'ed25519')}")
    ways: list[Callable[[], object]] = [
        lambda: commands.bench("digits", runs=1),
        lambda: commands.verify("digits"),
        lambda: commands.run("digits", None, None),
        lambda: commands.tune("digits"),
        lambda: commands.prepare(release.path, tmp_path),
        lambda: edge_infer.Pool("digits"),
        lambda: edge_infer.verify("digits"),
        lambda: admission.self_test(release.path, sys.executable),
    ]
    for way in ways:
        with pytest.raises(BundleError, match="is not signed"):
            way()
    signing.sign(release, keys / "ed25519")
    admission.self_test(release.path, sys.executable)


def test_the_administrators_keys_count_for_bundles_anywhere(
    onnx: Bundle, keys: Path, system: Path, tmp_path: Path
) -> None:
    allow(system, f"anna {public_key(keys / 'ed25519')}")
    copy = shutil.copytree(onnx.path, tmp_path / "copy.edge")
    with pytest.raises(BundleError, match="is not signed"):
        answers(copy)
    signing.sign(open_bundle(copy), keys / "ed25519")
    answers(copy)


def test_torchscript_alone_can_be_held_to_signatures(
    onnx: Bundle, torchscript: Bundle, keys: Path, own_home: Path
) -> None:
    allow(own_home, f"anna {public_key(keys / 'ed25519')}", leaf="allowed_signers.torchscript")
    put(own_home, onnx, None)
    answers("digits")
    release = put(own_home, torchscript, None)
    with pytest.raises(BundleError, match=r"is not signed, and .*allowed_signers\.torchscript takes only"):
        answers("digits")
    signing.sign(release, keys / "ed25519")
    answers("digits")


def test_a_verdict_is_kept_until_something_that_it_follows_from_changes(
    onnx: Bundle, keys: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(own_home, f"anna {public_key(keys / 'ed25519')}")
    release = put(own_home, onnx, keys / "ed25519")
    answers("digits")
    stamp = own_home / "cache" / f"{onnx.digest}.signed"
    assert json.loads(stamp.read_bytes())["signed"]["principal"] == "anna"
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", "/nonexistent")
    answers("digits")  # from the stamp
    with pytest.raises(DeviceError, match="no ssh-keygen"):
        answers("digits", verify="full")
    for change in (
        lambda: allow(own_home, f"anna {public_key(keys / 'ed25519')}", "# a comment"),
        lambda: shutil.copy(keys / "other.pub", own_home / "revoked_keys"),
        lambda: (own_home / "oldest_serials").write_text("digits 1\n"),
        lambda: signature_of(release).write_bytes(signature_of(release).read_bytes() + b"\n"),
        lambda: stamp.write_bytes(b"[]"),
        lambda: stamp.write_bytes(b"{" * 100_000),
    ):
        signature = signature_of(release).read_bytes()
        change()
        with pytest.raises((DeviceError, BundleError)):
            answers("digits")
        monkeypatch.setenv("PATH", path)
        signature_of(release).write_bytes(signature)
        answers("digits")
        monkeypatch.setenv("PATH", "/nonexistent")
        answers("digits")


def test_a_note_is_as_good_as_the_folder_it_lies_in(
    onnx: Bundle, keys: Path, own_home: Path, system: Path, tmp_path: Path
) -> None:
    """Who owns the store can write that its own bundle was found good; who believes only its own notes is not told."""
    allow(system, f"anna {public_key(keys / 'ed25519')}")
    release = put(own_home, onnx, keys / "other")
    wanted = trust.demand(own_home, "digits", "onnx")
    assert wanted is not None
    asked = trust._asked(wanted, onnx.digest, signature_of(release).read_bytes())
    forged = Signed("anna", shown(keys / "ed25519"), 1, 1)
    trust._write_stamp(own_home / "cache" / f"{onnx.digest}.signed", asked, forged)
    answers("digits")
    for elsewhere in ({"cache_dir": tmp_path / "own"}, {"verify": "full"}):
        with pytest.raises(BundleError, match="does not allow"):
            answers("digits", **elsewhere)


def test_a_key_that_ended_leaves_what_was_found_good(onnx: Bundle, keys: Path, own_home: Path) -> None:
    allow(own_home, f'anna valid-before="{date(3)}" {public_key(keys / "ed25519")}')
    put(own_home, onnx, keys / "ed25519")
    answers("digits")
    trust.keep_serial(own_home, "another", "0" * 64, Signed("bob", "SHA256:x", 7, int(time.time()) + 5 * DAY_S))
    answers("digits")
    with pytest.raises(BundleError, match="key has expired"):
        answers("digits", verify="full")


def test_a_key_taken_away_takes_its_models_with_it(onnx: Bundle, keys: Path, own_home: Path) -> None:
    allow(own_home, f"anna {public_key(keys / 'ed25519')}")
    put(own_home, onnx, keys / "ed25519")
    answers("digits")
    allow(own_home, f"bob {public_key(keys / 'other')}")
    with pytest.raises(BundleError, match="does not allow"):
        answers("digits")


def test_a_cache_that_cannot_be_written_costs_a_check_and_nothing_else(
    onnx: Bundle, keys: Path, own_home: Path
) -> None:
    allow(own_home, f"anna {public_key(keys / 'ed25519')}")
    put(own_home, onnx, keys / "ed25519")
    (own_home / "cache").write_bytes(b"a file")
    answers("digits")
    answers("digits")


def test_a_stamp_goes_with_its_release(onnx: Bundle, torchscript: Bundle, keys: Path, own_home: Path) -> None:
    allow(own_home, f"anna {public_key(keys / 'ed25519')}")
    store = Store(own_home)
    put(own_home, onnx, keys / "ed25519")
    answers("digits")
    put(own_home, torchscript, keys / "ed25519")
    shutil.rmtree(store.release("digits", onnx.digest))
    (own_home / "current" / "digits").write_text(f"{torchscript.digest}\n")
    store.collect()
    assert not list((own_home / "cache").glob(f"{onnx.digest}*"))


# -- what people see ---------------------------------------------------------------------------------------------------


def test_info_says_who_signed(make: Make, keys: Path, system: Path) -> None:
    bundle = make()
    assert commands.info(bundle.path)["signed"] is None
    make(key=keys / "ed25519", serial=5)
    key = shown(keys / "ed25519")
    assert commands.info(bundle.path)["signed"] == f"serial 5, key {key}; nothing here says whose it is"
    allow(system, f"anna {public_key(keys / 'ed25519')}")
    assert commands.info(bundle.path)["signed"] == f"anna, serial 5, key {key}"
    allow(system, f"bob {public_key(keys / 'other')}")
    assert commands.info(bundle.path)["signed"].startswith(f"not valid: the signature is by the key {key}, which")
    signature_of(bundle).write_bytes(signature_of(make(2, keys / "other")).read_bytes())
    assert "not valid: the signature is for tiny" in commands.info(bundle.path)["signed"]


def test_the_command_signs_and_checks(make: Make, keys: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, key = make(), keys / "ed25519"
    allow(root, f"anna {public_key(key)}")
    assert main(["sign", str(bundle.path), "--key", str(key), "--serial", "5"]) == 0
    digest = bundle.digest[:12]
    assert capsys.readouterr().out == f"tiny {digest} is signed: serial 5, key {shown(key)}\n"
    asked = ["sign", str(bundle.path), "--allowed-signers", str(root / "allowed_signers")]
    assert main([*asked, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["principal"], answer["serial"], answer["digest"]) == ("anna", 5, bundle.digest)
    shutil.copy(f"{key}.pub", root / "revoked")
    assert main([*asked, "--revoked-keys", str(root / "revoked")]) == 4
    assert "counts no more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected --key FILE to sign with"),
        (["--serial", "5", "--allowed-signers", "x"], "--serial belongs to --key"),
        (["--key", "absent"], "there is no key absent"),
        (["--allowed-signers", "absent"], "there is no file absent"),
        (["--key", "/dev/null"], "there is no key /dev/null"),
    ],
)
def test_a_wrong_request_to_sign_ends_with_status_2(
    make: Make, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["sign", str(make().path), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_damaged_bundle_is_not_signed(make: Make, keys: Path) -> None:
    bundle = make()
    data = bytearray(bundle.file("model.tflite").read_bytes())
    data[0] ^= 1
    bundle.file("model.tflite").write_bytes(data)
    with pytest.raises(BundleError, match="is damaged"):
        signing.sign(bundle, keys / "ed25519")
    assert not signature_of(bundle).exists()


# -- sent along --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trust", "deploy/signers"])
def test_what_a_push_sends_along_is_python_3_8(name: str) -> None:
    ast.parse((ROOT / "edge_infer" / f"{name}.py").read_text(), feature_version=(3, 8))


# -- the page ----------------------------------------------------------------------------------------------------------


def test_each_test_that_the_page_names_is_one() -> None:
    page = (ROOT / "docs" / "trust.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    files = (ROOT / "tests").glob("test_*.py")
    there = {name for path in files for name in re.findall(r"(?m)^def (test_\w+)", path.read_text())}
    assert len(named) > 30
    assert named <= there
