"""Who may sign on a device: shown and changed, and never so that what serves there stops by accident."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handmade import FILES, make_bundle
from sshd import make_key, public_key

from edge_infer import trust
from edge_infer.bundle import Bundle, open_bundle
from edge_infer.deploy import signers, signing
from edge_infer.errors import BundleError, DeviceError, UsageError
from edge_infer.store import Store

ANNA = "anna@example.com"


@pytest.fixture(autouse=True)
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /etc/edge-infer, which is not there until a test makes it."""
    folder = tmp_path / "etc"
    monkeypatch.setattr(trust, "SYSTEM", folder)
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("anna", "bob", "authority"):
        make_key(folder / name)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store").mkdir()
    return Store(tmp_path / "store")


def ask(store: Store, verb: str = "show", text: str | None = None, **more: Any) -> dict[str, Any]:
    return signers.trust_request(store, {"verb": verb, "text": text, **more})


def line(keys: Path, name: str, principal: str = "") -> str:
    return signing.signer_line(keys / f"{name}.pub", principal or f"{name}@example.com")


def shown(key: Path) -> str:
    done = subprocess.run(["ssh-keygen", "-lf", f"{key}.pub"], check=True, capture_output=True, text=True)
    return done.stdout.split()[1]


def principals(answer: dict[str, Any]) -> list[str]:
    return [row["principals"] for file in answer["signers"] for row in file["keys"]]


@pytest.fixture
def serving(store: Store, tmp_path: Path) -> Callable[..., Bundle]:
    """``serving(key, serial)``: a model is in use on the device, signed where a key is given."""

    def serve(key: Path | None = None, serial: int = 1) -> Bundle:
        bundle = make_bundle(tmp_path / "tiny.edge", {**FILES, "labels.txt": b"%d" % serial})
        release = store.release("tiny", bundle.digest)
        shutil.copytree(bundle.path, release)
        if key:
            signing.sign(open_bundle(release), key, serial)
        store.activate("tiny", bundle.digest)
        return open_bundle(release)

    return serve


# -- a device and its list ---------------------------------------------------------------------------------------------


def test_a_new_device_trusts_nobody_in_particular(store: Store) -> None:
    assert ask(store) == {"signers": [], "revoked": [], "oldest": [], "models": []}
    assert list(store.root.iterdir()) == []


def test_keys_are_added_shown_and_removed(store: Store, keys: Path) -> None:
    ask(store, "add", line(keys, "anna"))
    answer = ask(store, "add", line(keys, "bob"))
    assert answer["signers"] == [
        {
            "path": str(store.root / "allowed_signers"),
            "format": None,
            "keys": [
                {
                    "principals": f"{name}@example.com",
                    "options": 'namespaces="edge-infer"',
                    "type": "ssh-ed25519",
                    "key": shown(keys / name),
                    "comment": name,
                }
                for name in ("anna", "bob")
            ],
        }
    ]
    assert ask(store, "add", line(keys, "bob")) == answer
    assert principals(ask(store, "remove", shown(keys / "anna"))) == ["bob@example.com"]
    assert principals(ask(store, "remove", "bob@example.com")) == []
    with pytest.raises(UsageError, match=r"no key at .* has the fingerprint or the principals 'bob@example\.com'"):
        ask(store, "remove", "bob@example.com")
    assert ask(store)["signers"][0]["keys"] == []  # a list of nobody: nothing is taken
    assert ask(store, "clear")["signers"] == []
    assert ask(store, "clear")["signers"] == []


def test_the_whole_list_is_replaced_and_comments_stay(store: Store, keys: Path) -> None:
    ask(store, "add", line(keys, "bob"))
    text = f"# the workshop\n\n*@example.com cert-authority {public_key(keys / 'authority')} ours\n"
    assert principals(ask(store, "set", text)) == ["*@example.com"]
    ask(store, "add", line(keys, "anna"))
    ask(store, "remove", ANNA)
    assert (store.root / "allowed_signers").read_text() == text


def test_what_is_added_is_what_ssh_keygen_takes(
    store: Store, keys: Path, serving: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = serving(keys / "anna", 5)
    answer = ask(store, "add", line(keys, "anna"))
    signed = f"{ANNA}, serial 5, key {shown(keys / 'anna')}"
    assert answer["models"] == [{"name": "tiny", "digest": bundle.digest, "signed": signed, "refused": None}]


def test_an_authority_is_added_as_one(store: Store, keys: Path) -> None:
    text = signing.signer_line(keys / "authority.pub", "*@example.com", authority=True)
    (row,) = ask(store, "add", text)["signers"][0]["keys"]
    assert row["options"] == 'cert-authority,namespaces="edge-infer"'


def test_a_format_has_a_list_of_its_own(store: Store, keys: Path) -> None:
    ask(store, "add", line(keys, "anna"))
    answer = ask(store, "add", line(keys, "bob"), format="torchscript")
    assert [(file["format"], principals({"signers": [file]})) for file in answer["signers"]] == [
        ("torchscript", ["bob@example.com"]),
        (None, [ANNA]),
    ]
    assert [file["format"] for file in ask(store, "clear")["signers"]] == ["torchscript"]


def test_revoked_keys_are_added_to(store: Store, keys: Path, serving: Callable[..., Bundle]) -> None:
    serving(keys / "anna")
    ask(store, "add", line(keys, "anna"))
    ask(store, "revoke", signing.public_key(keys / "bob.pub"))
    with pytest.raises(UsageError, match=r"tiny would not load any more \(the key .* counts no more"):
        ask(store, "revoke", signing.public_key(keys / "anna.pub"))
    answer = ask(store, "revoke", signing.public_key(keys / "anna.pub"), force=True)
    assert [row["key"] for row in answer["revoked"]] == [shown(keys / "bob"), shown(keys / "anna")]
    assert "counts no more" in answer["models"][0]["refused"]


def test_a_revocation_list_of_ssh_keygen_is_shown_and_left_alone(store: Store, keys: Path) -> None:
    path = store.root / "revoked_keys"
    subprocess.run(["ssh-keygen", "-q", "-k", "-f", path, keys / "bob.pub"], check=True, capture_output=True)
    before = path.read_bytes()
    assert "a list made by ssh-keygen -k" in ask(store)["revoked"][0]["key"]
    with pytest.raises(UsageError, match="is a key revocation list"):
        ask(store, "revoke", signing.public_key(keys / "anna.pub"))
    assert path.read_bytes() == before


# -- what serves goes on serving ---------------------------------------------------------------------------------------


def test_a_list_after_which_a_model_would_not_load_is_refused(
    store: Store, keys: Path, serving: Callable[..., Bundle]
) -> None:
    bundle = serving()
    with pytest.raises(UsageError, match=r"tiny would not load any more \(tiny \w+ is not signed.*insist with --force"):
        ask(store, "add", line(keys, "anna"))
    assert ask(store)["signers"] == []
    assert trust.require_signed(bundle) is None
    assert "is not signed" in ask(store, "add", line(keys, "anna"), force=True)["models"][0]["refused"]
    ask(store, "add", line(keys, "bob"))  # it does not load before this change either
    ask(store, "clear")
    assert trust.require_signed(bundle) is None


def test_the_key_of_a_model_in_use_is_removed_by_force_only(
    store: Store, keys: Path, serving: Callable[..., Bundle]
) -> None:
    bundle = serving(keys / "anna")
    ask(store, "set", f"{line(keys, 'anna')}\n{line(keys, 'bob')}\n")
    with pytest.raises(UsageError, match="tiny would not load any more"):
        ask(store, "remove", ANNA)
    assert trust.require_signed(bundle) is not None
    ask(store, "remove", ANNA, force=True)
    with pytest.raises(BundleError, match="does not allow"):
        trust.require_signed(bundle)


def test_a_list_for_another_format_does_not_touch_what_is_in_use(
    store: Store, keys: Path, serving: Callable[..., Bundle]
) -> None:
    bundle = serving()
    ask(store, "add", line(keys, "anna"), format="torchscript")
    assert trust.require_signed(bundle) is None


def test_serials_begin_with_what_is_in_use(store: Store, keys: Path, serving: Callable[..., Bundle]) -> None:
    serving(keys / "anna", 20)
    ask(store, "add", line(keys, "anna"))
    older = trust.Signed(ANNA, "SHA256:x", 19, 19)
    with pytest.raises(BundleError, match="is older than"):
        trust.check_serial(store.root, "tiny", "0" * 64, older, ())


def test_a_device_that_cannot_check_signatures_does_not_come_to_demand_them(
    store: Store, keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="no ssh-keygen"):
        ask(store, "add", line(keys, "anna"))
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize(("leaf", "format"), [("", None), ("", "torchscript"), (".torchscript", "torchscript")])
def test_what_the_administrator_set_is_not_changed_from_here(
    store: Store, keys: Path, system: Path, leaf: str, format: str | None
) -> None:
    system.mkdir()
    (system / f"allowed_signers{leaf}").write_text(line(keys, "bob") + "\n")
    with pytest.raises(DeviceError, match="the device's administrator changes it"):
        ask(store, "add", line(keys, "anna"), format=format)
    assert list(store.root.iterdir()) == []
    assert principals(ask(store)) == ["bob@example.com"]
    ask(store, "revoke", signing.public_key(keys / "bob.pub"))  # it can only take away
    assert [row["key"] for row in ask(store)["revoked"]] == [shown(keys / "bob")]


def test_the_administrators_list_for_one_format_leaves_the_others(store: Store, keys: Path, system: Path) -> None:
    system.mkdir()
    (system / "allowed_signers.torchscript").write_text(line(keys, "bob") + "\n")
    (system / "oldest_serials").write_text("# since the theft\ntiny 20\n")
    answer = ask(store, "add", line(keys, "anna"))
    assert [file["format"] for file in answer["signers"]] == ["torchscript", None]
    assert answer["oldest"] == ["tiny 20"]


# -- what is no list ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "anna",
        "anna ssh-ed25519",
        "anna ssh-ed25519 AAAA!",
        "anna ssh-ed25519 AAAA",
        "ssh-ed25519 {blob} anna",
        "anna ssh-rsa {blob}",
        "# fine\nanna ssh-ed25519 {blob}\nbob ssh-ed25519",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)
def test_a_line_without_a_key_is_refused(store: Store, keys: Path, text: str) -> None:
    ask(store, "add", line(keys, "bob"))
    text = text.format(blob=public_key(keys / "anna").split()[1])
    for verb in ("add", "set"):
        with pytest.raises(UsageError, match=r"line \d is .*, expected a public key: PRINCIPALS"):
            ask(store, verb, text)
    assert principals(ask(store)) == ["bob@example.com"]


def test_a_list_that_no_device_would_read_is_refused(store: Store, keys: Path) -> None:
    with pytest.raises(UsageError, match="at most 262144 are read"):
        ask(store, "set", "# a comment\n" * 30_000)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("request_", [{"verb": "forget"}, {"verb": "add", "format": "../x"}])
def test_an_unknown_request_is_refused(store: Store, request_: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected one of"):
        signers.trust_request(store, request_)


def test_a_private_key_goes_nowhere(keys: Path) -> None:
    with pytest.raises(UsageError, match=r"is a private key, which stays where it is; expected the public one"):
        signing.public_key(keys / "anna")


@pytest.mark.parametrize("principal", ["", "anna bob", 'anna"', "anna\nbob", "#anna"])
def test_a_principal_that_would_be_read_otherwise_is_refused(keys: Path, principal: str) -> None:
    with pytest.raises(UsageError, match="expected a name such as"):
        signing.signer_line(keys / "anna.pub", principal)


def test_a_file_of_two_keys_is_not_one(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "two.pub").write_text(f"{public_key(keys / 'anna')}\n{public_key(keys / 'bob')}\n")
    with pytest.raises(UsageError, match="holds 2 keys, expected one"):
        signing.public_key(tmp_path / "two.pub")
