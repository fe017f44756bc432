"""The device's releases: what is in use after pushes, rollbacks, crashes and damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import FILES, make_bundle

from edge_infer import bundle as bundles
from edge_infer import pointer
from edge_infer.bundle import Bundle
from edge_infer.errors import BundleError, DeviceError, ReleaseNotFound, UsageError
from edge_infer.manifest import MANIFEST_NAME, Manifest
from edge_infer.pointer import parse_pointer
from edge_infer.store import STAGING_KEPT_S, Store, default_root, is_model_name, store_of

Make = Callable[..., Bundle]
ABSENT = "0" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "device" / "store")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(number, name="tiny")``: bundles that differ."""

    def make(number: int, name: str = "tiny") -> Bundle:
        path = tmp_path / f"{name}-{number}.edge"
        return make_bundle(path, {**FILES, "labels.txt": b"%d" % number}, name=name, version=str(number))

    return make


def admit(store: Store, bundle: Bundle) -> str:
    """What a push does before the self-test; gives the digest."""
    staged = store.staging(bundle.digest)
    shutil.copytree(bundle.path, staged, dirs_exist_ok=True)
    assert store.admit(staged, bundle.manifest.name, bundle.digest).digest == bundle.digest
    return bundle.digest


def push(store: Store, bundle: Bundle) -> str:
    with store.lock():
        digest = admit(store, bundle)
        store.activate(bundle.manifest.name, digest)
        store.collect()
    return digest


def releases(store: Store) -> set[str]:
    return {path.name for path in store.root.glob("releases/*/*")}


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


# -- the ordinary way --------------------------------------------------------------------------------------------


def test_an_empty_store_says_so(store: Store) -> None:
    assert (store.names(), store.status(), store.digests("tiny")) == ([], [], [])
    with pytest.raises(ReleaseNotFound, match=r"no model 'tiny' .* \(it holds: none\); push it first"):
        store.open_current("tiny")
    assert not store.root.exists()


def test_a_release_is_used_once_it_is_activated(store: Store, make: Make) -> None:
    bundle = make(1)
    digest = admit(store, bundle)
    assert store.names() == []
    store.activate("tiny", digest)
    assert store.open_current("tiny").digest == digest
    assert store.open_current("tiny").path == store.root / "releases" / "tiny" / digest
    assert (store.root / "current" / "tiny").read_text() == digest + "\n"
    assert list((store.root / "staging").iterdir()) == []


def test_status_has_one_row_a_model(store: Store, make: Make) -> None:
    one, two, other = push(store, make(1)), push(store, make(2)), push(store, make(1, "another"))
    assert [(row["name"], row["digest"], row["previous"], row["version"]) for row in store.status()] == [
        ("another", other, [], "1"),
        ("tiny", two, [one], "2"),
    ]
    assert store.status()[0]["size"] == make(3, "another").manifest.size
    json.dumps(store.status())


def test_the_release_in_use_and_the_one_before_are_kept(store: Store, make: Make) -> None:
    digests = [push(store, make(number)) for number in range(4)]
    assert store.digests("tiny") == [digests[3], digests[2]]
    assert releases(store) == {digests[3], digests[2]}


def test_activating_the_release_in_use_again_keeps_the_one_before(store: Store, make: Make) -> None:
    one, two = push(store, make(1)), push(store, make(2))
    store.activate("tiny", two)
    assert store.digests("tiny") == [two, one]


def test_activating_the_release_before_swaps_the_two(store: Store, make: Make) -> None:
    one, two = push(store, make(1)), push(store, make(2))
    store.activate("tiny", one)
    assert store.digests("tiny") == [one, two]


def test_a_release_that_is_not_there_cannot_be_activated(store: Store, make: Make) -> None:
    one = push(store, make(1))
    with pytest.raises(UsageError):
        store.activate("tiny", ABSENT)
    assert store.digests("tiny") == [one]


def test_an_incomplete_release_cannot_be_activated(store: Store, make: Make) -> None:
    one, two = push(store, make(1)), admit(store, make(2))
    (store.release("tiny", two) / "labels.txt").unlink()
    with pytest.raises(BundleError, match=r"lacks 'labels\.txt'"):
        store.activate("tiny", two)
    assert store.digests("tiny") == [one]


def test_rollback_goes_back_once(store: Store, make: Make) -> None:
    one = push(store, make(1))
    push(store, make(2))
    assert store.rollback("tiny") == one
    assert store.open_current("tiny").digest == one
    with pytest.raises(ReleaseNotFound, match="has only the release in use"):
        store.rollback("tiny")
    assert store.digests("tiny") == [one]


def test_rollback_of_an_unknown_model_is_refused(store: Store) -> None:
    with pytest.raises(ReleaseNotFound, match="'tiny' is not in this store"):
        store.rollback("tiny")


def test_rollback_to_a_damaged_release_is_refused(store: Store, make: Make) -> None:
    one, two = push(store, make(1)), push(store, make(2))
    spoil(store.release("tiny", one) / "model.tflite")
    with pytest.raises(BundleError, match="damaged"):
        store.rollback("tiny")
    assert store.digests("tiny") == [two, one]


def test_a_push_after_a_rollback_drops_the_release_rolled_back(store: Store, make: Make) -> None:
    one = push(store, make(1))
    push(store, make(2))
    store.rollback("tiny")
    three = push(store, make(3))
    assert store.digests("tiny") == [three, one]
    assert releases(store) == {one, three}


@pytest.mark.parametrize("field", ["name", "digest"])
def test_a_staged_bundle_that_is_another_is_not_admitted(store: Store, make: Make, field: str) -> None:
    bundle = make(1)
    staged = store.staging(bundle.digest)
    shutil.copytree(bundle.path, staged, dirs_exist_ok=True)
    wanted = {"name": "tiny", "digest": bundle.digest, field: ABSENT}
    with pytest.raises(BundleError, match="expected"):
        store.admit(staged, **wanted)
    assert releases(store) == set()


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_staged_bundle_is_not_admitted(store: Store, make: Make, name: str) -> None:
    bundle = make(1)
    staged = store.staging(bundle.digest)
    shutil.copytree(bundle.path, staged, dirs_exist_ok=True)
    spoil(staged / name)
    with pytest.raises(BundleError, match=name):
        store.admit(staged, "tiny", bundle.digest)
    assert releases(store) == set()


def test_admitting_again_mends_a_damaged_release(store: Store, make: Make) -> None:
    bundle = make(1)
    digest = push(store, bundle)
    assert store.has("tiny", digest)
    spoil(store.release("tiny", digest) / "model.tflite")
    assert not store.has("tiny", digest)
    admit(store, bundle)
    assert store.has("tiny", digest)
    assert not store.has("tiny", ABSENT)
    assert not store.has("other", digest)


def test_discard_removes_only_what_is_not_in_use(store: Store, make: Make) -> None:
    one, two, three = push(store, make(1)), push(store, make(2)), admit(store, make(3))
    for digest in (one, two, three, ABSENT):
        store.discard("tiny", digest)
    assert releases(store) == {one, two}


def test_collect_removes_what_nothing_refers_to_and_nothing_else(store: Store, make: Make) -> None:
    one, two, unused = push(store, make(1)), push(store, make(2)), admit(store, make(3))
    bundle = make(4)
    shutil.copytree(bundle.path, store.staging(bundle.digest), dirs_exist_ok=True)
    store.cache.mkdir()
    for name in (f"{one}.verified", f"{two}.verified", f"{unused}.verified", f".{two}.verified.half"):
        (store.cache / name).write_bytes(b"12345")
    (store.root / "current" / ".tiny.half").write_bytes(b"123")
    (store.root / "venv").mkdir()
    size = sum(file.stat().st_size for file in store.release("tiny", unused).iterdir())
    assert store.collect() == size + 10 + 3
    assert releases(store) == {one, two}
    assert {path.name for path in store.cache.iterdir()} == {f"{one}.verified", f"{two}.verified"}
    assert [path.name for path in (store.root / "current").iterdir()] == ["tiny"]
    assert [path.name for path in (store.root / "staging").iterdir()] == [bundle.digest]
    assert (store.root / "venv").is_dir()
    assert store.collect() == 0


def test_what_an_interrupted_push_left_stays_for_a_week_or_until_the_space_is_needed(store: Store, make: Make) -> None:
    push(store, make(1))
    fresh, old, other = ("f" * 64, "0" * 64, "1" * 64)
    for digest in (fresh, old, other):
        (store.staging(digest) / "weights.bin").write_bytes(b"12345")
    week_ago = time.time() - STAGING_KEPT_S - 60
    os.utime(store.root / "staging" / old, (week_ago, week_ago))
    assert store.reclaimable_bytes(spare=fresh) == 10
    assert store.collect() == 5
    assert store.collect(all_staging=True, spare=fresh) == 5
    assert [path.name for path in (store.root / "staging").iterdir()] == [fresh]


# -- a release on trial ------------------------------------------------------------------------------------------


def try_out(store: Store, bundle: Bundle, seconds: float = 60) -> str:
    """Push on trial."""
    digest = admit(store, bundle)
    with store.lock():
        store.activate("tiny", digest, confirm_within_s=seconds)
    return digest


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    monkeypatch.setattr(pointer, "_since_boot_s", lambda: now + seconds)


def test_a_release_on_trial_is_in_use_until_its_time_is_over(store: Store, make: Make, monkeypatch) -> None:
    one = push(store, make(1))
    two = try_out(store, make(2))
    assert store.open_current("tiny").digest == two
    assert 0 < store.status()[0]["pending_s"] <= 61
    later(monkeypatch, 62)
    assert store.digests("tiny") == [one]
    assert store.open_current("tiny").digest == one
    assert (store.root / "current" / "tiny").read_text() == f"{one}\n"  # written down by the load
    assert [row["event"] for row in store.events("tiny")] == ["activated", "on trial", "not confirmed"]


def test_a_confirmed_release_stays(store: Store, make: Make, monkeypatch) -> None:
    one = push(store, make(1))
    two = try_out(store, make(2))
    assert store.confirm("tiny") == store.confirm("tiny", two) == two
    later(monkeypatch, 62)
    assert store.digests("tiny") == [two, one]
    assert "pending_s" not in store.status()[0]


def test_a_release_is_not_confirmed_when_its_time_is_over_or_another_is_in_use(store, make, monkeypatch) -> None:
    one = push(store, make(1))
    two = try_out(store, make(2))
    with pytest.raises(ReleaseNotFound, match=f"{one[:12]} of 'tiny' cannot be confirmed: the release {two[:12]}"):
        store.confirm("tiny", one)
    later(monkeypatch, 62)
    with pytest.raises(ReleaseNotFound, match="its time may be over"):
        store.confirm("tiny")
    with pytest.raises(ReleaseNotFound, match="no release of 'other' is in use"):
        store.confirm("other")
    with pytest.raises(ReleaseNotFound, match="no model 'other'"):
        store.keep_only("other", 1)


def test_a_reboot_ends_a_trial(store: Store, make: Make, monkeypatch) -> None:
    one = push(store, make(1))
    try_out(store, make(2))
    monkeypatch.setattr(pointer, "_boot", lambda: "another")
    assert store.open_current("tiny").digest == one


def test_a_first_release_on_trial_leaves_nothing_when_it_is_not_confirmed(store, make, monkeypatch) -> None:
    digest = try_out(store, make(1))
    later(monkeypatch, 62)
    assert "not confirmed in time" in str(store.status()[0]["error"])
    with pytest.raises(ReleaseNotFound, match="not confirmed in time and there is none before"):
        store.open_current("tiny")
    assert store.names() == []
    with store.lock():
        store.collect()
    assert not store.release("tiny", digest).exists()


def test_a_push_over_a_trial_goes_back_to_the_one_before_both(store: Store, make: Make) -> None:
    one = push(store, make(1))
    try_out(store, make(2))
    three = push(store, make(3))
    assert store.digests("tiny") == [three, one]


def test_the_release_in_use_is_not_put_on_trial_and_one_on_trial_gets_new_time(store: Store, make: Make) -> None:
    first, second = make(1), make(2)
    one = push(store, first)
    try_out(store, first)
    assert store.pointer("tiny").pending is None
    try_out(store, second, 60)
    try_out(store, second, 600)
    pending = store.pointer("tiny").pending
    assert pending is not None and pending.left_s() > 500 and store.digests("tiny")[1:] == [one]


def test_rejecting_goes_back_at_once(store: Store, make: Make) -> None:
    one = push(store, make(1))
    two = try_out(store, make(2))
    store.reject("tiny", two, "it answered nothing")
    assert store.digests("tiny") == [one]
    assert store.events("tiny")[-1] | {"time": 0} == {
        "time": 0, "event": "refused", "digest": two, "reason": "it answered nothing",
    }  # fmt: skip


def test_a_store_that_cannot_be_written_goes_back_all_the_same(store: Store, make: Make, monkeypatch) -> None:
    one = push(store, make(1))
    try_out(store, make(2))
    later(monkeypatch, 62)
    with store.lock():  # another change holds the store
        assert store.open_current("tiny").digest == one
    assert len(parse_pointer((store.root / "current" / "tiny").read_bytes(), Path("x")).digests) == 2


@pytest.mark.parametrize("words", ["pending", "pending boot", "pending boot -1", "pending boot 1 2", "tried boot 1"])
def test_a_pointer_with_a_damaged_trial_is_refused(store: Store, make: Make, words: str) -> None:
    digest = push(store, make(1))
    (store.root / "current" / "tiny").write_text(f"{digest} {words}\n")
    with pytest.raises(BundleError, match="holds no digests"):
        store.digests("tiny")


def test_more_releases_are_kept_when_asked_for_and_rolled_back_to(store: Store, make: Make) -> None:
    digests = []
    for number in range(1, 6):
        digests.insert(0, admit(store, make(number)))
        store.activate("tiny", digests[0], keep=4)
    assert store.digests("tiny") == digests[:4]
    assert store.rollback("tiny", digests[2][:12]) == digests[2]
    with pytest.raises(ReleaseNotFound, match=f"no older release ffff, only {digests[3][:12]}"):
        store.rollback("tiny", "ffff")
    store.keep_only("tiny", 1)
    assert store.digests("tiny") == [digests[2]]


def test_the_journal_stays_small_and_a_cut_off_line_is_passed_over(store: Store, make: Make) -> None:
    push(store, make(1))
    path = store.root / "journal" / "tiny"
    with path.open("ab") as file:
        file.write(b'{"time": 17, "ev\n')
    for number in range(400):
        store.note("tiny", "refused", "0" * 64, f"reason {number} " + "x" * 300)
    rows = store.events("tiny")
    assert path.stat().st_size <= 64 * 1024 + 1000
    assert rows[-1]["reason"].startswith("reason 399") and len(rows) > 50


def test_who_holds_the_store_is_told_and_waited_for(store: Store) -> None:
    words = "busy with the push of tiny by me; try again"
    with store.lock(who="the push of tiny by me"), pytest.raises(DeviceError, match=words), store.lock():
        pass
    held = store.lock(who="another")
    held.__enter__()
    threading.Timer(0.3, held.__exit__, (None, None, None)).start()
    with store.lock(wait_s=10):
        pass


def test_the_same_bundle_may_serve_two_names_apart(store: Store, make: Make) -> None:
    push(store, make(1))
    other = push(store, make(1, "another"))
    push(store, make(2))
    push(store, make(3))
    assert store.open_current("another").digest == other


# -- damage ------------------------------------------------------------------------------------------------------


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half_a_digest(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:30])


def path_trick(path: Path) -> None:
    path.write_bytes(b"../../../etc\n")


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [empty, half_a_digest, path_trick, binary])
def test_a_damaged_pointer_is_named_and_mended_by_a_push(
    store: Store, make: Make, damage: Callable[[Path], None]
) -> None:
    one = push(store, make(1))
    other = push(store, make(1, "another"))
    damage(store.root / "current" / "tiny")
    for use in (store.digests, store.open_current, store.rollback):
        with pytest.raises(BundleError, match=r"current/tiny .* push the model again"):
            use("tiny")
    rows = store.status()
    assert [(row["name"], row["digest"], "error" in row) for row in rows] == [
        ("another", other, False),
        ("tiny", "", True),
    ]
    store.collect()
    assert releases(store) == {one, other}  # nobody knows whether it was in use
    two = push(store, make(2))
    assert store.digests("tiny") == [two]


def test_a_pointer_that_is_a_folder_is_refused(store: Store, make: Make) -> None:
    push(store, make(1))
    folder(store.root / "current" / "tiny")
    with pytest.raises(BundleError, match="cannot be read"):
        store.open_current("tiny")


def test_a_release_that_is_gone_is_named(store: Store, make: Make) -> None:
    digest = push(store, make(1))
    shutil.rmtree(store.release("tiny", digest))
    with pytest.raises(BundleError, match="is gone though it is in use; push the model again"):
        store.open_current("tiny")
    assert "gone" in str(store.status()[0]["error"])


def test_a_release_with_a_lost_manifest_is_refused(store: Store, make: Make) -> None:
    digest = push(store, make(1))
    (store.release("tiny", digest) / MANIFEST_NAME).unlink()
    with pytest.raises(BundleError, match=MANIFEST_NAME):
        store.open_current("tiny")
    assert "error" in store.status()[0]


def test_a_release_that_is_another_bundle_is_refused(store: Store, make: Make) -> None:
    digest, other = push(store, make(1)), make(2)
    shutil.rmtree(store.release("tiny", digest))
    shutil.copytree(other.path, store.release("tiny", digest))
    with pytest.raises(BundleError, match=f"holds the bundle {other.digest[:12]}, expected {digest[:12]}"):
        store.open_current("tiny")


# -- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "Tiny-2.0", "_x", "a+b", "x" * 100])
def test_model_names(name: str) -> None:
    assert is_model_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".x", "-x", "a b", "a\n", "a\0", "x" * 101, "a.edge"])
def test_what_is_no_model_name(store: Store, name: str) -> None:
    assert not is_model_name(name)
    for use in (store.digests, store.open_current, store.rollback):
        with pytest.raises(UsageError, match="is not a model name"):
            use(name)


def test_the_root_comes_from_the_environment_or_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_INFER_HOME", str(tmp_path / "own"))
    assert default_root() == tmp_path / "own"
    monkeypatch.setenv("EDGE_INFER_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".edge-infer"


def test_a_release_knows_its_store(store: Store, make: Make, tmp_path: Path) -> None:
    bundle = make(1)
    push(store, bundle)
    owner = store_of(store.open_current("tiny").path)
    assert owner is not None
    assert owner.root == store.root.resolve()
    assert store_of(bundle.path) is None
    assert store_of(tmp_path / "other" / "tiny" / bundle.digest) is None


# -- several processes -------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from edge_infer.store import Store
with Store(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_is_held_by_one_process_and_free_when_it_dies(store: Store) -> None:
    command = [sys.executable, "-c", HOLD, str(store.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(DeviceError, match="is busy with another push"), store.lock():
            pass
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    with store.lock():
        pass


def test_the_lock_is_free_after_an_error_and_not_before(store: Store) -> None:
    with pytest.raises(KeyError), store.lock():
        with pytest.raises(DeviceError), store.lock():
            pass
        raise KeyError
    with store.lock():
        pass


def test_open_current_follows_a_push_that_collects_the_release_it_looks_for(
    store: Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = push(store, make(1))
    real, opened = store._open_release, []

    def open_late(name: str, digest: str) -> Bundle:
        opened.append(digest)
        if len(opened) == 1:  # between the look at the pointer and the look at the release
            push(Store(store.root), make(2))
            push(Store(store.root), make(3))
        return real(name, digest)

    monkeypatch.setattr(store, "_open_release", open_late)
    current = store.open_current("tiny")
    assert opened == [one, current.digest]
    assert current.manifest.version == "3"


READ = """
import sys
from pathlib import Path
from edge_infer.store import Store
store, seen = Store(Path(sys.argv[1])), set()
print("ready", flush=True)
while "9" not in seen:
    seen.add(store.open_current("tiny").manifest.version)
print(len(seen))
"""


def test_a_reader_never_sees_a_store_without_its_model(store: Store, make: Make) -> None:
    push(store, make(0))
    command = [sys.executable, "-c", READ, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd="/") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        for number in range(1, 10):
            push(store, make(number))
        assert int(child.stdout.read()) >= 1
    assert child.returncode == 0


def test_a_release_collected_while_it_is_opened_is_looked_for_again(
    store: Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading the manifest and listing the folder, the moment at which readers were once lost."""
    push(store, make(0))
    plain = bundles.check_listing

    def late(path: Path, manifest: Manifest) -> None:
        monkeypatch.setattr(bundles, "check_listing", plain)
        for number in (1, 2, 3):
            push(store, make(number))
        assert not path.exists()
        plain(path, manifest)

    monkeypatch.setattr(bundles, "check_listing", late)
    assert store.open_current("tiny").manifest.version == "3"


# -- power cuts --------------------------------------------------------------------------------------------------

#: Runs one change of the store and dies at the N-th call that touches what is durable, before or after it.
CRASH = """
import json, os, shutil, sys
from pathlib import Path
from edge_infer.store import Store

root, what, number, moment, digest, source = sys.argv[1:]
calls = 0

def dying(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == int(number) and moment == "before":
            os._exit(9)
        result = function(*arguments, **options)
        if calls == int(number):
            os._exit(9)
        return result
    return call

for name in ("replace", "rename", "fsync", "unlink", "rmdir"):
    setattr(os, name, dying(getattr(os, name)))
store = Store(Path(root))
with store.lock():
    if what == "rollback":
        store.rollback("tiny")
    if what == "push":
        staged = store.staging(digest)
        shutil.copytree(source, staged, dirs_exist_ok=True)
        store.admit(staged, "tiny", digest)
        store.activate("tiny", digest)
        store.collect()
"""


def crash(store: Store, what: str, number: int, moment: str, bundle: Bundle) -> bool:
    """Whether the child died at that step; False when the change has fewer steps."""
    arguments = [str(store.root), what, str(number), moment, bundle.digest, str(bundle.path)]
    done = subprocess.run([sys.executable, "-S", "-c", CRASH, *arguments], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode in (0, 9)
    return done.returncode == 9


def copy_of(store: Store, path: Path) -> Store:
    shutil.copytree(store.root, path)
    return Store(path)


@pytest.mark.parametrize("what", ["push", "rollback"])
def test_a_power_cut_at_any_step_leaves_the_old_or_the_new_model(
    store: Store, make: Make, tmp_path: Path, what: str
) -> None:
    one, two, bundle = push(store, make(1)), push(store, make(2)), make(3)
    old, new = two, bundle.digest if what == "push" else one
    found: list[str] = []
    for number in range(1, 100):
        after = []
        for moment in ("before", "after"):
            cut = copy_of(store, tmp_path / f"{moment}-{number}")
            died = crash(cut, what, number, moment, bundle)
            after.append(cut.open_current("tiny").digest)
            # The store goes on from there: what was begun can be done again, and nothing stays behind.
            push(cut, bundle)
            assert cut.open_current("tiny").digest == bundle.digest
            assert releases(cut) == set(cut.digests("tiny"))
            assert os.listdir(cut.root / "current") == ["tiny"]
            assert os.listdir(cut.root / "staging") == []
        found += after
        if not died:
            break
    assert set(found) == {old, new}
    # Once the new one shows it stays.
    assert found == sorted(found, key=[old, new].index)
    assert len(found) >= 2 * (20 if what == "push" else 4)
