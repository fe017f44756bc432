"""A device whose storage is full or takes no writes: what still works, and what the refusals say. Needs root."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SOURCES, Package
from ssh_client import private_home
from sshd import SshServer

from edge_infer import load
from edge_infer.bundle import Bundle
from edge_infer.deploy import doctor, receiver
from edge_infer.deploy.conversation import open_transport
from edge_infer.deploy.plan import PushOptions
from edge_infer.deploy.push import collect, push, rollback, status
from edge_infer.deploy.sftp import push_by_sftp
from edge_infer.deploy.ssh import SshTransport
from edge_infer.deploy.transport import Transport
from edge_infer.errors import DeviceError
from edge_infer.runtime.golden import self_test
from edge_infer.store import Store


def as_root(*command: str | Path) -> None:
    subprocess.run([*([] if os.getuid() == 0 else ["sudo"]), *map(str, command)], check=True)


class Disk:
    """A file system of its own of 32 MB with a store on it."""

    def __init__(self, path: Path) -> None:
        self.path, self.store = path, Store(path / "store")
        self.filler = path / "filler"

    def transport(self) -> Transport:
        return open_transport(f"local:{self.store.root}")

    def push(self, bundle: Bundle) -> str:
        return push(bundle, self.transport(), PushOptions(python=sys.executable)).digest

    def fill(self) -> None:
        with contextlib.suppress(OSError), self.filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def remount(self, how: str) -> None:
        as_root("mount", "-o", f"remount,{how}", self.path)

    def answers(self) -> str:
        """The digest of the model that is loaded by name and answers its golden questions."""
        with load(self.store.open_current("digits").path) as session:
            self_test(session)
            return session.bundle.digest


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    as_root("mount", "-t", "tmpfs", "-o", "size=32m,mode=1777", "tmpfs", path)
    try:
        yield Disk(path)
    finally:
        as_root("umount", "-l", path)


@pytest.fixture
def releases(packaged: Package, disk: Disk) -> tuple[Bundle, Bundle]:
    """Pushed one after the other."""
    both = tuple(packaged(SOURCES["onnx"], "onnx", precision) for precision in ("float32", "int8"))
    for bundle in both:
        disk.push(bundle)
    return both[0], both[1]


def test_a_disk_without_a_free_byte_can_be_collected_and_says_what_it_lacks(
    disk: Disk, releases: tuple[Bundle, Bundle], packaged: Package
) -> None:
    """The name of who changes the store does not fit into the lock file then."""
    old, new = releases
    left = disk.store.root / "staging" / ("0" * 64)
    left.mkdir()
    (left / "model.onnx").write_bytes(bytes(100_000))
    os.truncate(disk.store.root / "lock", 0)
    disk.fill()
    third = packaged(SOURCES["tflite"], "tflite", "float32")
    with pytest.raises(DeviceError, match=r"needs [\d,]+ bytes, the device has 0 free beyond its reserve; free some"):
        disk.push(third)
    assert disk.answers() == new.digest
    assert collect(disk.transport(), keep=2) >= 100_000 and not left.exists()
    assert status(disk.transport())["models"][0]["digest"] == new.digest
    disk.filler.unlink()
    assert rollback(disk.transport(), "digits") == old.digest == disk.answers()


def test_a_read_only_disk_serves_and_every_change_is_refused_in_one_sentence(
    disk: Disk, releases: tuple[Bundle, Bundle]
) -> None:
    old, new = releases
    disk.remount("ro")
    for change in (
        lambda: disk.push(old),
        lambda: rollback(disk.transport(), "digits"),
        lambda: collect(disk.transport()),
    ):
        with pytest.raises(DeviceError) as caught:
            change()
        sentence = str(caught.value)
        assert f"the device's storage at {disk.store.root} is read-only" in sentence and "Errno" not in sentence
        assert f"there: sudo mount -o remount,rw {disk.path};" in sentence
    assert status(disk.transport())["models"][0]["digest"] == new.digest == disk.answers()
    disk.remount("rw")
    assert rollback(disk.transport(), "digits") == old.digest


def test_a_doctor_tells_a_read_only_disk_from_one_that_belongs_to_somebody_else(
    disk: Disk, releases: tuple[Bundle, Bundle]
) -> None:
    disk.remount("ro")
    lines = {line.topic: line for line in doctor.examine_device(disk.transport(), sys.executable)}
    assert lines["storage"].state == "wrong" and "read-only file system" in lines["storage"].text
    assert f"remount,rw {disk.path};" in lines["storage"].mend
    assert lines["model digits"].state == "ok"


def test_a_push_by_sftp_to_a_read_only_disk_says_so(
    disk: Disk, releases: tuple[Bundle, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private_home(tmp_path, monkeypatch)
    disk.remount("ro")
    with SshServer(tmp_path / "sshd") as server, contextlib.ExitStack() as stack:
        transport = stack.enter_context(contextlib.closing(SshTransport(server.alias, ssh_config=server.ssh_config)))
        with pytest.raises(DeviceError, match=f"the storage at {disk.store.root} is read-only, so what it serves"):
            push_by_sftp(releases[0], transport, store=str(disk.store.root))
    assert disk.answers() == releases[1].digest


def test_storage_that_fails_is_named() -> None:
    """As the kernel says of a worn-out card when what was written is to be synced."""
    sentence = str(receiver._device_error(OSError(errno.EIO, os.strerror(errno.EIO)), Path("/home/pi/.edge-infer")))
    assert sentence.startswith(
        "the device's storage at /home/pi/.edge-infer fails ([Errno 5] Input/output error); what"
    )
    assert sentence.endswith("see dmesg there, and put in another card")
