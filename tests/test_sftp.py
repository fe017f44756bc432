"""The plain way: a push by SFTP alone to a real OpenSSH server that runs nothing, and what it leaves on the device."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import paramiko
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from handmade import FILES, make_bundle
from ssh_client import connect_to, private_home
from sshd import SshServer

from edge_infer.bundle import Bundle, verify
from edge_infer.cli import main
from edge_infer.deploy import sftp
from edge_infer.deploy.push import push
from edge_infer.deploy.sftp import PushedBySftp, push_by_sftp
from edge_infer.errors import BundleError, DeviceError
from edge_infer.store import Store

MIB = 1 << 20
LARGE = {**FILES, "model.tflite": random.Random(9).randbytes(24 * MIB + 12345)}


class Device:
    """A server that offers SFTP and nothing else, and the folder that SFTP begins in."""

    def __init__(self, folder: Path, internal: str = "internal-sftp") -> None:
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.server = SshServer(folder / "sshd", options=[f"ForceCommand {internal} -d {self.home}"])
        self.store = Store(self.home / ".edge-infer")

    def push(self, bundle: Bundle, **options: Any) -> PushedBySftp:
        with closing(connect_to(self.server)) as transport:
            return push_by_sftp(bundle, transport, **options)

    def refusal(self, bundle: Bundle, **options: Any) -> str:
        with pytest.raises(DeviceError) as caught:
            self.push(bundle, **options)
        assert str(caught.value).startswith(f"{self.server.address}: ")
        return str(caught.value)

    def staged(self, bundle: Bundle, name: str = "model.tflite") -> Path:
        return self.store.root / "staging" / bundle.digest / name

    def answers(self, name: str = "tiny") -> str:
        """The digest in use, whose every byte is right."""
        bundle = self.store.open_current(name)
        verify(bundle, mode="full")
        return bundle.digest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return private_home(tmp_path, monkeypatch)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path / "device")
    with made.server:
        yield made


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "tiny.edge")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("large") / "tiny.edge", LARGE)


def versions(tmp_path: Path, count: int) -> list[Bundle]:
    return [make_bundle(tmp_path / f"tiny-{number}.edge", version=str(number)) for number in range(count)]


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# -- what it does ------------------------------------------------------------------------------------------------------


def test_a_bundle_arrives_as_an_ordinary_push_would_leave_it(device: Device, bundle: Bundle) -> None:
    said: list[str] = []
    pushed = device.push(bundle, progress=said.append)
    release = f"releases/tiny/{bundle.digest}"
    assert tree(device.store.root) == sorted(
        ["current/tiny", *(f"{release}/{name}" for name in ("manifest.json", *FILES))]
    )
    assert (device.store.root / "current" / "tiny").read_bytes() == f"{bundle.digest}\n".encode()
    assert device.answers() == bundle.digest
    assert (device.store.root / release / "manifest.json").read_bytes() == bundle.manifest.to_bytes()
    assert pushed.digest == bundle.digest and pushed.replaced is None
    assert pushed.sent_bytes == sum(map(len, FILES.values()))
    assert said[1:] == [str(step) for step in pushed.steps]
    assert [step.action for step in pushed.steps] == ["send"] * 3 + ["read back", "activate"]
    assert pushed.not_promised == sftp.PROMISES


def test_large_files_arrive_whole(device: Device, large: Bundle) -> None:
    assert device.push(large).sent_bytes == sum(map(len, LARGE.values()))
    assert device.answers() == large.digest


@pytest.mark.parametrize("size", [0, 1, 255 * 1024, 255 * 1024 + 1, 510 * 1024])
def test_sizes_about_that_of_a_request(device: Device, tmp_path: Path, size: int) -> None:
    bundle = make_bundle(tmp_path / "tiny.edge", {**FILES, "more.bin": random.Random(1).randbytes(size)})
    device.push(bundle)
    assert device.answers() == bundle.digest


def test_a_server_without_extensions_is_served_in_small_requests(tmp_path: Path, large: Bundle) -> None:
    device = Device(tmp_path / "device", "internal-sftp -P fsync,limits,statvfs")
    with device.server:
        pushed = device.push(large)
        assert device.answers() == large.digest
        assert pushed.not_promised == (*sftp.PROMISES, sftp.UNSYNCED)


def test_a_server_that_cannot_rename_in_one_step_is_refused_before_anything_is_sent(
    tmp_path: Path, bundle: Bundle
) -> None:
    device = Device(tmp_path / "device", "internal-sftp -P posix-rename")
    with device.server:
        assert "has no posix-rename@openssh.com" in device.refusal(bundle)
    assert tree(device.home) == []


def test_what_is_there_is_not_sent_again(device: Device, bundle: Bundle) -> None:
    device.push(bundle)
    again = device.push(bundle)
    assert again.sent_bytes == 0 and again.replaced == bundle.digest
    assert [str(step) for step in again.steps] == [f"keep release {bundle.digest[:12]}", "activate tiny"]
    assert (device.store.root / "current" / "tiny").read_text().split() == [bundle.digest]


def test_two_releases_are_kept_and_the_store_can_go_back(device: Device, tmp_path: Path) -> None:
    first, second, third = versions(tmp_path, 3)
    other = make_bundle(tmp_path / "other.edge", name="other")
    for bundle in (other, first, second, third):
        pushed = device.push(bundle)
    assert pushed.replaced == second.digest
    assert device.store.digests("tiny") == [third.digest, second.digest]
    assert sorted(os.listdir(device.store.root / "releases" / "tiny")) == sorted([third.digest, second.digest])
    assert tree(device.store.root / "staging") == []
    assert device.store.rollback("tiny") == second.digest
    assert device.answers() == second.digest and device.answers("other") == other.digest
    device.push(third)
    assert device.store.digests("tiny") == [third.digest, second.digest]


def test_a_damaged_release_and_a_damaged_pointer_are_mended(device: Device, bundle: Bundle) -> None:
    device.push(bundle)
    model = device.store.release("tiny", bundle.digest) / "model.tflite"
    model.write_bytes(b"A" + model.read_bytes()[1:])
    (device.store.root / "current" / "tiny").write_text("nonsense\n")
    assert device.push(bundle, read_back=False).sent_bytes == 0
    with pytest.raises(BundleError):
        device.answers()
    assert device.push(bundle).sent_bytes > 0
    assert device.answers() == bundle.digest


def test_a_plan_is_printed_and_nothing_done(device: Device, bundle: Bundle) -> None:
    planned = device.push(bundle, dry_run=True)
    assert tree(device.home) == [] and planned.sent_bytes == 0
    assert planned.steps == device.push(bundle).steps


def test_another_store(device: Device, bundle: Bundle, tmp_path: Path) -> None:
    device.push(bundle, store="models/of mine")
    assert Store(device.home / "models" / "of mine").open_current("tiny").digest == bundle.digest
    device.push(bundle, store=f"{tmp_path}/elsewhere/")
    assert Store(tmp_path / "elsewhere").open_current("tiny").digest == bundle.digest


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_an_interrupted_push_goes_on_where_it_stopped(device: Device, large: Bundle) -> None:
    def cut() -> None:
        while not (device.staged(large).exists() and device.staged(large).stat().st_size > 2 * MIB):
            time.sleep(0.001)
        device.server.drop_connections()

    cutting = threading.Thread(target=cut, daemon=True)
    cutting.start()
    assert "the connection is lost" in device.refusal(large)
    cutting.join()
    have = device.staged(large).stat().st_size
    assert 2 * MIB < have < len(LARGE["model.tflite"])
    assert device.staged(large).read_bytes() == LARGE["model.tflite"][:have]
    pushed = device.push(large)
    assert [step.offset for step in pushed.steps if step.subject == "model.tflite"] == [have]
    assert pushed.sent_bytes + have <= sum(map(len, LARGE.values()))
    assert device.answers() == large.digest


@pytest.mark.parametrize("extra", [-100, 0, 5])
def test_what_lies_there_damaged_is_found_by_reading_back(device: Device, bundle: Bundle, extra: int) -> None:
    device.staged(bundle).parent.mkdir(parents=True)
    device.staged(bundle).write_bytes(b"x" * (len(FILES["model.tflite"]) + extra))
    (device.staged(bundle).parent / "stranger").write_bytes(b"x")
    if extra <= 0:
        sentence = device.refusal(bundle)
        observed = hashlib.sha256(b"x" * (700 + extra) + FILES["model.tflite"][700 + extra :]).hexdigest()
        assert f"model.tflite reads back with SHA-256 {observed[:16]}..., expected " in sentence
        assert not device.staged(bundle).exists() and device.store.digests("tiny") == []
    device.push(bundle)
    assert device.answers() == bundle.digest


def test_without_reading_back_that_is_said(device: Device, bundle: Bundle) -> None:
    pushed = device.push(bundle, read_back=False)
    assert pushed.not_promised == (*sftp.PROMISES, sftp.UNREAD)
    assert "read back" not in [step.action for step in pushed.steps]
    assert device.answers() == bundle.digest


def test_cut_off_at_any_request_the_old_or_the_new_model_answers(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oldest, old, new = versions(tmp_path, 3)
    ask = paramiko.SFTPClient._async_request
    left = 0

    def counted(self: paramiko.SFTPClient, *arguments: object) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            self.sock.close()
            raise EOFError
        return int(ask(self, *arguments))

    monkeypatch.setattr(paramiko.SFTPClient, "_async_request", counted)
    seen: dict[str, int] = {}
    left = 10**9
    for bundle in (oldest, old):
        device.push(bundle)
    shutil.copytree(device.store.root, tmp_path / "before")
    for request in range(500):
        shutil.rmtree(device.store.root)
        shutil.copytree(tmp_path / "before", device.store.root)
        left = request
        try:
            device.push(new)
        except DeviceError:
            pass
        else:
            break
        answer = device.answers()
        assert answer in (old.digest, new.digest)
        assert device.store.digests("tiny")[1] == (oldest.digest if answer == old.digest else old.digest)
        seen[answer] = seen.get(answer, 0) + 1
    assert request > 30 and set(seen) == {old.digest, new.digest}
    assert device.answers() == new.digest


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told(device: Device, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sftp, "RESERVE_BYTES", 1 << 60)
    assert "the push needs 730 bytes, the device has 0 free beyond its reserve" in device.refusal(bundle)
    assert tree(device.home) == []


@pytest.mark.parametrize("number", [0, 3])
def test_a_write_that_fails_is_no_success(device: Device, large: Bundle, number: int) -> None:
    name = sorted(LARGE)[0] if number == 0 else "model.tflite"
    device.staged(large).parent.mkdir(parents=True)
    device.staged(large, name).symlink_to("/dev/full")
    assert f"writing .edge-infer/staging/{large.digest}/{name} failed by SFTP (" in device.refusal(large)
    assert device.store.digests("tiny") == []


def test_a_store_that_cannot_be_made(device: Device, bundle: Bundle) -> None:
    (device.home / ".edge-infer").write_text("")
    sentence = device.refusal(bundle)
    assert ".edge-infer" in sentence and "failed by SFTP" in sentence


def test_a_damaged_bundle_is_not_sent(device: Device, bundle: Bundle) -> None:
    bundle.file("labels.txt").write_bytes(b"zero\ntwo\n")
    with pytest.raises(BundleError):
        device.push(bundle)
    assert tree(device.home) == []


def test_a_server_without_sftp(tmp_path: Path, bundle: Bundle) -> None:
    with (
        SshServer(tmp_path / "sshd", options=["ForceCommand true"]) as server,
        closing(connect_to(server)) as transport,
        pytest.raises(DeviceError, match="offers no SFTP"),
    ):
        push_by_sftp(bundle, transport)


def test_nothing_is_left_after_a_push(device: Device, bundle: Bundle) -> None:
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    device.push(bundle)
    device.store.root.rename(device.home / "away")
    (device.home / ".edge-infer").write_text("")
    device.refusal(bundle)
    assert set(threading.enumerate()) == threads
    assert set(os.listdir("/proc/self/fd")) == descriptors


# -- the command -------------------------------------------------------------------------------------------------------


def arguments(device: Device, *more: str) -> list[str]:
    return [device.server.alias, "--ssh-config", str(device.server.ssh_config), *more]


def test_the_command_says_what_this_way_cannot_promise(
    device: Device, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(bundle.path), *arguments(device, "--sftp", "--dry-run")]) == 0
    shown = capsys.readouterr().out
    assert "kitchen-pi: would\n  send golden.npz (21 bytes)\n" in shown and "activate tiny" in shown
    assert main(["push", str(bundle.path), *arguments(device, "--sftp", "--no-read-back")]) == 0
    shown = capsys.readouterr().out
    assert f"kitchen-pi: tiny is {bundle.digest[:12]}; sent 730 B by SFTP, which promises less" in shown
    assert "\n  no self-test: " in shown and "\n  no look at what arrived: " in shown
    assert main(["push", str(bundle.path), *arguments(device, "--sftp", "--json")]) == 0
    row = json.loads(capsys.readouterr().out)["devices"][0]
    assert row["replaced"] == bundle.digest and len(row["not_promised"]) == len(sftp.PROMISES)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--sftp", "--tune"], "cannot heed --tune;"),
        (["--sftp", "--python", "python3", "--self-test-timeout", "9"], "cannot heed --python, --self-test-timeout;"),
        (["--no-read-back"], "--no-read-back is for --sftp only"),
    ],
)
def test_what_cannot_be_heeded_is_refused(
    device: Device, bundle: Bundle, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    assert main(["push", *options, str(bundle.path), *arguments(device)]) == 2
    assert expected in capsys.readouterr().err
    assert main(["push", "--sftp", str(bundle.path), "local:store", *arguments(device)]) == 2
    assert "local:store is this machine" in capsys.readouterr().err
    assert tree(device.home) == []


def test_one_device_that_refuses_keeps_no_other_from_its_push(
    device: Device, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(bundle.path), "127.0.0.1:1", *arguments(device, "--sftp")]) == 5
    assert "nothing listens at 127.0.0.1 port 1" in capsys.readouterr().err
    assert device.answers() == bundle.digest


def test_an_ordinary_push_to_such_a_device_leaves_nothing(device: Device, bundle: Bundle) -> None:
    with closing(connect_to(device.server)) as transport, pytest.raises(DeviceError):
        push(bundle, transport)
    assert tree(device.home) == []
