"""Signatures over the whole way: what a device with keys takes from a push, and what it says to the rest."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import SOURCES
from handmade import rebuild
from sshd import SshServer, make_key

from edge_infer import trust
from edge_infer.bundle import Bundle, open_bundle
from edge_infer.cli import main
from edge_infer.deploy import signing
from edge_infer.deploy.conversation import open_transport
from edge_infer.deploy.plan import PushOptions
from edge_infer.deploy.push import measuring, push, rollback
from edge_infer.errors import DeviceError
from edge_infer.runtime.session import load
from edge_infer.store import Store


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("anna", "bob"):
        make_key(folder / name)
    return folder


@pytest.fixture
def versions(packaged, tmp_path: Path) -> list[Bundle]:  # type: ignore[no-untyped-def]
    """Three states of one model, in the order in which they are signed."""
    plain = packaged(SOURCES["onnx"], "onnx", "float32")
    return [rebuild(plain, tmp_path / f"{number}.edge", version=str(number)) for number in range(3)]


class Device:
    def __init__(self, store: Path, address: str, *options: object) -> None:
        self.root, self.address = store, address
        self.options = [str(option) for option in options]
        self.ssh_config = Path(str(options[1])) if options else None

    def transport(self):  # type: ignore[no-untyped-def]
        options = {"ssh_config": self.ssh_config} if self.ssh_config else {}
        return contextlib.closing(open_transport(self.address, **options))

    def push(self, bundle: Bundle, **options: object) -> None:
        with self.transport() as transport:
            push(open_bundle(bundle.path), transport, PushOptions(python=sys.executable, **options))  # type: ignore[arg-type]

    def run(self, *arguments: object) -> int:
        return main([*map(str, arguments), *self.options])

    def trust(self, keys: Path, name: str = "anna") -> None:
        key = ("--key", keys / f"{name}.pub", "--principal", name)
        assert self.run("trust", self.address, *key) == 0

    def in_use(self) -> list[str]:
        return Store(self.root).digests("digits")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SshServer, Path]]:
    store = tmp_path_factory.mktemp("ssh-device") / "store"
    with SshServer(tmp_path_factory.mktemp("sshd"), options=[f"SetEnv EDGE_INFER_HOME={store}"]) as server:
        yield server, store


@pytest.fixture(params=["local", "ssh"])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Device]:
    if request.param == "local":
        yield Device(tmp_path / "store", f"local:{tmp_path / 'store'}")
        return
    server, store = request.getfixturevalue("server")
    yield Device(store, server.alias, "--ssh-config", server.ssh_config)
    shutil.rmtree(store, ignore_errors=True)


def test_a_device_with_keys_takes_signed_models_in_their_order(
    device: Device, versions: list[Bundle], keys: Path
) -> None:
    one, two, three = versions
    device.trust(keys)
    with pytest.raises(DeviceError, match=r"is not signed, and .*allowed_signers takes only what its keys signed"):
        device.push(one)
    signing.sign(one, keys / "bob", 1)
    with pytest.raises(DeviceError, match="does not allow"):
        device.push(one)
    assert not list(device.root.glob("staging/*")) + list(device.root.glob("releases/*/*"))  # nothing was sent
    for number, bundle in enumerate((one, two, three), 1):
        signing.sign(bundle, keys / "anna", number)
    device.push(two)
    device.push(three)
    with load(device.root / "releases" / "digits" / three.digest) as session:
        assert session(np.zeros((1, 1, 8, 8), np.float32)).shape == (1, 10)
    with pytest.raises(DeviceError, match=r"has serial 1, and is older than \w{12} with 3"):
        device.push(one)
    assert device.in_use() == [three.digest, two.digest]
    device.push(one, allow_older=True)
    assert device.in_use()[0] == one.digest


def test_a_rollback_goes_to_what_was_accepted_and_a_push_of_it_too(
    device: Device, versions: list[Bundle], keys: Path
) -> None:
    one, two, _ = versions
    device.trust(keys)
    for number, bundle in enumerate((one, two), 1):
        signing.sign(bundle, keys / "anna", number)
        device.push(bundle)
    device.push(one)
    assert device.in_use() == [one.digest, two.digest]
    with device.transport() as transport:
        assert rollback(transport, "digits") == two.digest


def test_a_rollback_to_what_would_not_load_is_refused(device: Device, versions: list[Bundle], keys: Path) -> None:
    one, two, _ = versions
    device.push(one)
    signing.sign(two, keys / "anna", 1)
    device.push(two)
    device.trust(keys)
    with device.transport() as transport, pytest.raises(DeviceError, match="is not signed"):
        rollback(transport, "digits")
    assert device.in_use() == [two.digest, one.digest]


def test_a_release_in_use_gets_its_signature_later(device: Device, versions: list[Bundle], keys: Path) -> None:
    one = versions[0]
    device.push(one)
    assert device.run("trust", device.address, "--key", keys / "anna.pub", "--principal", "anna") == 5
    signing.sign(one, keys / "anna")
    device.push(one)
    device.trust(keys)
    assert trust.require_signed(Store(device.root).open_current("digits")) is not None


def test_candidates_are_not_measured_on_a_device_with_keys(device: Device, versions: list[Bundle], keys: Path) -> None:
    device.trust(keys)
    with (
        device.transport() as transport,
        pytest.raises(DeviceError, match="is not signed"),
        measuring(versions[0], transport, python=sys.executable),
    ):
        pytest.fail("a model that nobody signed was taken to be measured")
    assert not list(device.root.glob("releases/*/*"))


def test_trust_shows_what_is_so(
    device: Device, versions: list[Bundle], keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert device.run("trust", device.address) == 0
    assert capsys.readouterr().out == "this device asks for no signature\n"
    signing.sign(versions[0], keys / "anna", 7)
    device.push(versions[0])
    device.trust(keys)
    lines = capsys.readouterr().out.splitlines()
    key = subprocess.run(["ssh-keygen", "-lf", keys / "anna.pub"], check=True, capture_output=True, text=True)
    fingerprint = key.stdout.split()[1]
    assert lines[0] == f"{device.root}/allowed_signers says who may sign what has no list of its own"
    assert lines[1] == f'  anna  namespaces="edge-infer"  {fingerprint}  anna'
    assert "digits" in lines[-1] and f"anna, serial 7, key {fingerprint}" in lines[-1]
    assert device.run("trust", device.address, "--remove", "anna", "--force", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["signers"][0]["keys"] == [] and "does not allow" in answer["models"][0]["refused"]
    assert device.run("trust", device.address, "--clear") == 0
    assert device.run("trust", device.address, "--key", keys / "anna.pub") == 2
    assert device.run("trust", device.address, "--key", keys / "anna", "--principal", "anna") == 2


def test_torchscript_alone_may_be_held_to_signatures(device: Device, packaged, keys: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    plain = packaged(SOURCES["onnx"], "onnx", "float32")
    script = rebuild(packaged(SOURCES["torchscript"], "torchscript", "float32"), tmp_path / "script.edge")
    key = ("--key", keys / "anna.pub", "--principal", "anna")
    assert device.run("trust", device.address, *key, "--format", "torchscript") == 0
    device.push(plain)
    with pytest.raises(DeviceError, match="is not signed"):
        device.push(script)
    signing.sign(script, keys / "anna", 1)
    device.push(script)
    assert device.in_use() == [script.digest, plain.digest]


def test_two_bundles_of_one_serial_are_refused_whatever_is_said(
    device: Device, versions: list[Bundle], keys: Path
) -> None:
    one, two, _ = versions
    device.trust(keys)
    for bundle in (one, two):
        signing.sign(bundle, keys / "anna", 5)
    device.push(one)
    with pytest.raises(DeviceError, match="two bundles of one serial are mixed up"):
        device.push(two, allow_older=True)


def test_the_signature_of_another_bundle_is_refused(device: Device, versions: list[Bundle], keys: Path) -> None:
    one, two, _ = versions
    device.trust(keys)
    signing.sign(one, keys / "anna", 5)
    shutil.copy(one.path / "manifest.sig", two.path / "manifest.sig")
    with pytest.raises(DeviceError, match="a signature does not pass from one bundle to another"):
        device.push(two)
