"""A short run of scripts/crash_points.py: a power cut or a kill at any step leaves the old model or the new one."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_infer.bundle import Bundle
from edge_infer.deploy.plan import PushOptions
from edge_infer.deploy.push import push
from edge_infer.errors import DeviceError

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
#: One with all that a push does, what was found to be torn once, and the ways back.
CUT = (
    "first push after one killed at the store's making",
    "push after one killed at the release's rename",
    "another signature for what is there",
    "rollback",
    "trial that is not confirmed",
)


@pytest.fixture(scope="module")
def crash() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("crash_points")


@pytest.fixture(scope="module")
def workshop(crash: Any, packaged: Callable[..., Bundle]) -> Iterator[Any]:
    old, new = (packaged("torch.onnx", "onnx", precision) for precision in ("int8", "float32"))
    with tempfile.TemporaryDirectory(dir=crash.in_memory()) as scratch:
        folder = Path(scratch).resolve()
        yield crash.Workshop(folder, crash.make_bundles(old, new, folder))


# -- power cuts and kills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", CUT)
def test_a_power_cut_after_any_step_leaves_the_old_or_the_new_release(crash: Any, workshop: Any, what: str) -> None:
    scenario = crash.SCENARIOS[what]
    recording = workshop.record(scenario)
    found = crash.power_cuts(workshop, scenario, recording, seed=2, randoms=1, engine_samples=1)
    assert found.torn == []
    assert found.asked == 1 and found.syncs >= 3
    assert found.points == 5 * (found.events + 1) and found.disks > found.events * 0.9


def test_a_receiver_killed_at_any_call_leaves_the_old_or_the_new_release(crash: Any, workshop: Any) -> None:
    scenario = crash.SCENARIOS["push over an older release"]
    steps = workshop.record(scenario).steps
    assert {"write", "openat", "rename", "fsync", "mkdir", "ftruncate"} <= {call for call, _ in steps}
    found = crash.kills(workshop, scenario, steps[::5])
    assert found.torn == [] and found.points >= 8


@pytest.mark.parametrize("what", ["files are not synced", "folders are not synced", "the pointer is written in place"])
def test_a_receiver_that_is_broken_is_found_out(crash: Any, workshop: Any, what: str) -> None:
    scenario = crash.SCENARIOS["rollback" if "pointer" in what else "push over an older release"]
    recording = workshop.record(scenario, f"{crash.BEFORE}{crash.BROKEN[what]}\n")
    found = crash.power_cuts(workshop, scenario, recording, seed=2, randoms=1, engine_samples=0, enough=1)
    assert found.torn


def test_what_is_wrong_with_a_store_is_said(crash: Any, workshop: Any, tmp_path: Path) -> None:
    bundles = workshop.bundles
    scenario = crash.SCENARIOS["push over an older release"]

    def problem(name: str, change: Callable[[Path], object], allowed: tuple[str, ...] = ("old", "new")) -> str:
        store = workshop.begin(scenario, tmp_path / name)
        change(store)
        return workshop.problem(store, [bundles.digest(item) for item in allowed], "new", engine=False)

    assert problem("sound", lambda store: None) == ""
    assert problem("lost", lambda store: None, ("new",)) == "the release in use is old, expected new"
    release = Path("releases") / "digits" / bundles.old.digest
    assert "SHA-256" in problem("mixed", lambda store: (store / release / "weights.bin").write_bytes(bytes(83968)))
    assert "there is no bundle" in problem("gone", lambda store: (store / release).rename(store / "elsewhere"))
    assert "no digests" in problem("pointer", lambda store: (store / "current" / "digits").write_bytes(b""))
    assert "is gone" in problem("beside", lambda store: (store / "current" / "bystander").unlink())


def test_a_copy_that_a_power_cut_emptied_is_made_again(crash: Any, workshop: Any, tmp_path: Path) -> None:
    store = workshop.begin(crash.SCENARIOS["push with files of another release"], tmp_path / "emptied")
    staged = store / "staging" / workshop.bundles.renamed.digest
    staged.mkdir(parents=True)
    for name, entry in workshop.bundles.renamed.manifest.files.items():
        (staged / name).write_bytes(bytes(entry.size))
    assert workshop.problem(store, [workshop.bundles.digest("old")], "renamed", engine=False) == ""


def test_a_lock_that_stays_is_said(crash: Any, workshop: Any, tmp_path: Path) -> None:
    store = workshop.begin(crash.SCENARIOS["rollback"], tmp_path / "locked")
    allowed = [workshop.bundles.digest("new")]
    with crash.Store(store).lock(who="somebody"):
        assert "busy with somebody" in workshop.problem(store, allowed, "new", engine=False)


def test_the_forked_receiver_is_a_receiver(crash: Any, workshop: Any, tmp_path: Path) -> None:
    """The one that takes the push after a power cut: it refuses what the real one refuses."""
    device = crash.Quick(tmp_path / "store", "/no/python")
    with pytest.raises(DeviceError, match="cannot start /no/python"):
        push(workshop.bundles.new, device, PushOptions(python="/no/python"))


# -- the model of a disk -----------------------------------------------------------------------------------------------


class Played:
    """A disk on which a test does things; ``left`` gives what each way may leave after all of them."""

    def __init__(self, crash: Any, folder: Path) -> None:
        self.disks = importlib.import_module("crash_disk")
        (folder / "kept").write_bytes(b"old")
        (folder / "inner").mkdir()
        self.disk = self.disks.Disk(folder)
        self.top = self.disk.top

    def make(self, name: str, data: bytes) -> Any:
        node = self.disks.Node("file")
        self.disk.name(((self.top, name), node))
        self.disk.write(node, 0, data)
        return node

    def left(self, way: str, seed: int = 0) -> dict[str, object]:
        tree = self.disk.after(len(self.disk.events), self.disks.WAYS[way], random.Random(seed))
        return {name: content for name, content in tree.items() if content is not None}

    def all_left(self) -> list[dict[str, object]]:
        return [self.left("random", seed) for seed in range(300)]


@pytest.fixture
def played(crash: Any, tmp_path: Path) -> Played:
    return Played(crash, tmp_path)


def test_nothing_is_certain_before_a_sync(played: Played) -> None:
    played.make("new", b"data")
    assert played.left("dropped") == {"kept": b"old"}
    assert played.left("survived") == {"kept": b"old", "new": b"data"}
    assert played.left("empty") == {"kept": b"old", "new": b""}
    assert played.left("zeros") == {"kept": b"old", "new": bytes(4)}
    found = {row.get("new") for row in played.all_left()}
    assert {None, b"", bytes(4), b"data", b"da", b"da\0\0"} <= found


def test_a_synced_file_has_its_bytes_and_a_synced_folder_its_names(played: Played) -> None:
    played.disk.sync(played.make("new", b"data"))
    assert played.left("dropped") == {"kept": b"old"}
    assert played.left("empty") == {"kept": b"old", "new": b"data"}
    played.disk.sync(played.top)
    played.make("newer", b"x")
    assert played.left("dropped") == {"kept": b"old", "new": b"data"}


def test_a_rename_over_a_file_is_done_or_not(played: Played) -> None:
    node = played.make("aside", b"new")
    played.disk.sync(node)
    played.disk.name(((played.top, "aside"), None), ((played.top, "kept"), node))
    assert played.left("dropped") == {"kept": b"old"}
    assert played.left("survived") == {"kept": b"new"}
    found = [tuple(sorted(row.items())) for row in played.all_left()]
    assert set(found) == {(("kept", b"old"),), (("aside", b"new"), ("kept", b"old")), (("kept", b"new"),)}


def test_a_rename_between_folders_is_certain_once_both_are_synced(played: Played) -> None:
    inner, kept = played.top.names["inner"], played.top.names["kept"]
    played.disk.name(((played.top, "kept"), None), ((inner, "kept"), kept))
    assert set(map(str, played.all_left())) == {"{'kept': b'old'}", "{'inner/kept': b'old'}"}
    played.disk.sync(inner)
    assert played.left("dropped") == {"kept": b"old"}
    played.disk.sync(played.top)
    assert played.left("dropped") == {"inner/kept": b"old"}


def test_a_file_cut_and_written_over_may_be_either(played: Played) -> None:
    kept = played.top.names["kept"]
    played.disk.cut(kept, 0)
    played.disk.write(kept, 0, b"newer")
    assert {row["kept"] for row in played.all_left()} > {b"old", b"newer", b"", b"newer"[:2], bytes(5)}
    played.disk.sync(None)
    assert {row["kept"] for row in played.all_left()} == {b"newer"}


# -- the record --------------------------------------------------------------------------------------------------------

BUSY = """
import os, shutil, subprocess, sys, tempfile, threading
root = sys.argv[1] + "/"
odd = root + 'a/b/odd "name", <x>\\n\\u00e9'
os.makedirs(root + "a/b")
with open(odd, "wb") as file:
    file.write(bytes(range(256)) * 3)
shutil.copyfile(odd, root + "copy")
with open(root + "copy", "r+b", buffering=0) as file:
    file.seek(5)
    file.write(b"there")
    file.truncate(100)
    os.pwrite(file.fileno(), b"!", 200)
    os.writev(file.fileno(), [b"one", b"two"])
    other = os.dup(file.fileno())
    os.write(other, b"three")
    os.close(other)
    os.fsync(file.fileno())
def thread():
    with open(root + "log", "a") as file:
        file.write("in a thread\\n")
for _ in range(2):
    worker = threading.Thread(target=thread)
    worker.start()
    worker.join()
subprocess.run(["/bin/sh", "-c", "cd $0; echo child >> log; cat copy > d; rm d", root], check=True)
os.symlink("copy", root + "link")
os.rename(root + "copy", root + "moved")
os.mkdir(root + "gone")
os.rmdir(root + "gone")
descriptor, name = tempfile.mkstemp(dir=root)
os.write(descriptor, b"x")
os.replace(name, root + "log")
shutil.copytree(root + "a", root + "tree")
shutil.rmtree(root + "a")
os.sync()
print("said")
"""


def test_a_record_gives_the_folder_as_it_is(crash: Any, tmp_path: Path) -> None:
    disks, traces = importlib.import_module("crash_disk"), importlib.import_module("crash_trace")
    folder = tmp_path / "watched"
    folder.mkdir()
    (folder / "log").write_bytes(b"before\n")
    disk = disks.Disk(folder)
    record = tmp_path / "record"
    subprocess.run([*traces.strace(record), sys.executable, "-c", BUSY, str(folder)], check=True)
    traces.Replay(disk).read(record)
    assert disk.tree() == disks.tree_of(folder)
    copy = tmp_path / "copy"
    disks.put_down(disk.tree(), copy)
    assert disks.tree_of(copy) == disk.tree()
    kinds = [type(event).__name__ for event in disk.events]
    assert kinds.count("Synced") == 2 and kinds.count("Cut") >= 1
    assert b"".join(event.data for event in disk.events if isinstance(event, disks.Said)) == b"said\n"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.posix_fallocate(os.open(root + 'x', os.O_RDWR | os.O_CREAT), 0, 99)", "fallocate.* is not modelled"),
        ("os.chdir(root); os.mkdir('x')", "mkdir of 'x' is relative"),
        ("mmap.mmap(os.open(root + 'x', os.O_RDWR | os.O_CREAT), 4096)", "writes past the record"),
    ],
)
def test_a_call_that_the_record_cannot_give_is_not_passed_over(
    crash: Any, tmp_path: Path, code: str, said: str
) -> None:
    disks, traces = importlib.import_module("crash_disk"), importlib.import_module("crash_trace")
    folder, record = tmp_path / "watched", tmp_path / "record"
    folder.mkdir()
    (folder / "x").write_bytes(bytes(4096)) if "mmap" in code else None
    program = f"import mmap, os, sys; root = sys.argv[1] + '/'; {code}"
    subprocess.run([*traces.strace(record), sys.executable, "-c", program, str(folder)], check=True)
    with pytest.raises(ValueError, match=said):
        traces.Replay(disks.Disk(folder)).read(record)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_is_what_its_figures_give_and_nothing_is_torn(crash: Any) -> None:
    report, text = json.loads(crash.DATA.read_text()), crash.PAGE.read_text()
    assert crash.page(report, text) == text
    parts = report["parts"]
    assert [row["what"] for row in parts["cuts"]] == list(crash.SCENARIOS)
    assert [row["what"] for row in parts["kills"]] == [what for what in crash.SCENARIOS if what in crash.KILLED]
    assert [row["what"] for row in parts["ext4"]] == [what for what in crash.SCENARIOS if what in crash.ON_EXT4]
    assert not any(row["torn"] for part in ("cuts", "kills", "ext4") for row in parts[part])
    assert [row["what"] for row in parts["broken"]] == list(crash.BROKEN)
    assert all(row["torn"] for row in parts["broken"])
