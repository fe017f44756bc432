#!/usr/bin/env python3
"""Cut the power after every step of real changes of a device's store, and see what is left.

    python scripts/crash_points.py [--scenarios WHAT...] [--seed 1] [--random 4] [--bundles OLD NEW] [--docs]

Each scenario is done once by the real receiver, with the real engine's self-test, while strace records every call that
it and its children make: names, bytes, syncs. After every prefix of these, a model of the disk (crash_disk.py) gives
what a power cut may leave: all that was not synced dropped; everything there; names without bytes; names and lengths
with zeros for bytes; and parts of it at random. On each disk that differs from those before:

* the store must open and give the old release or the new one, sound by every hash; once the host was told of success,
  the new one only; and so must be each release that it could go back to, and another model beside it;
* a sample of them answers its golden questions in the real engine;
* the same bundle is pushed by the ordinary code, which must succeed: so nothing is left locked or in the way;
* a collection must leave nothing but the releases kept.

Torn is what fails any of these. Then the same scenarios, killed by SIGKILL at every call that changes the store; and,
with root, some of those kills on an ext4 image that is shut down at once and mounted anew (--ext4).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import crash_device
import crash_trace
import pages
from crash_device import Killed, Quick, Watched, quick_python
from crash_disk import WAYS, Disk, Said, Synced, Tree, key_of, put_down, tree_of

from edge_infer import pointer
from edge_infer.admission import self_test
from edge_infer.bundle import Bundle, describe_files, open_bundle, verify, write_bundle
from edge_infer.deploy.plan import Wish
from edge_infer.deploy.push import collect, confirm, measuring, push, rollback
from edge_infer.errors import EdgeInferError, ReleaseNotFound
from edge_infer.store import Store

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE = ROOT / "docs" / "crash-points.json", ROOT / "docs" / "crash-points.md"
#: The model that is changed, and one beside it that must stay as it is.
NAME, BYSTANDER = "digits", "bystander"
#: How many disks of a scenario are asked in the real engine.
ENGINE_SAMPLES = 8
#: An application that loads the model; the store is its home.
LOAD = f"from edge_infer.store import Store, default_root; Store(default_root()).open_current({NAME!r})"


# -- bundles -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundles:
    """``old`` and ``new`` have different files; ``renamed`` has those of ``old`` under another version; ``wrong``
    answers its golden questions wrongly."""

    old: Bundle
    new: Bundle
    renamed: Bundle
    wrong: Bundle
    bystander: Bundle

    def digest(self, name: str) -> str | None:
        return None if name == "none" else getattr(self, name).digest


def make_bundles(old: Bundle, new: Bundle, folder: Path) -> Bundles:
    """The others, from two of the same model."""
    return Bundles(
        old,
        new,
        rewritten(old, folder / "renamed.edge", version="2"),
        rewritten(new, folder / "wrong.edge", spoil_answers),
        rewritten(old, folder / "bystander.edge", name=BYSTANDER),
    )


def rewritten(
    bundle: Bundle, path: Path, change: Callable[[Path], None] = lambda folder: None, **fields: str
) -> Bundle:
    """A copy at ``path`` after ``change`` edited its files, with other ``fields`` in the manifest."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "files"
        shutil.copytree(bundle.path, folder)
        (folder / "manifest.json").unlink()
        change(folder)
        files = describe_files(folder, bundle.manifest.files)
        return write_bundle(dataclasses.replace(bundle.manifest, files=files, **fields), folder, path)


def spoil_answers(folder: Path) -> None:
    import numpy as np

    from edge_infer.runtime.arrays import write_npz

    with np.load(folder / "golden.npz") as golden:
        arrays = {name: golden[name] + np.float32(name.startswith("out")) for name in golden.files}
    write_npz(folder / "golden.npz", arrays)


# -- scenarios ---------------------------------------------------------------------------------------------------------

Device = Watched | Quick | Killed
Do = Callable[[Device, Bundles], None]


def pushes(name: str, **wish: object) -> Do:
    def do(device: Device, bundles: Bundles) -> None:
        push(getattr(bundles, name), device, Wish(python=device.python, **wish))  # type: ignore[arg-type]

    return do


def refused(inner: Do) -> Do:
    def do(device: Device, bundles: Bundles) -> None:
        try:
            inner(device, bundles)
        except EdgeInferError:
            return
        raise SystemExit("a push that must fail did not")

    return do


def killed(name: str, call: str, number: int) -> Do:
    """A push whose receiver dies by SIGKILL, with nothing lost that it gave to the kernel."""

    def do(device: Device, bundles: Bundles) -> None:
        assert isinstance(device, Watched)
        with device.killed_at(call, number):
            refused(pushes(name))(device, bundles)

    return do


def rolls_back(device: Device, bundles: Bundles) -> None:
    rollback(device, NAME)


def confirms(device: Device, bundles: Bundles) -> None:
    confirm(device, NAME)


def collects(device: Device, bundles: Bundles) -> None:
    collect(device, NAME, keep=1)


def measures(name: str) -> Do:
    def do(device: Device, bundles: Bundles) -> None:
        with measuring(getattr(bundles, name), device, python=device.python) as run:
            run(3)

    return do


def loads(device: Device, bundles: Bundles) -> None:
    assert isinstance(device, Watched)
    device.run(LOAD)


def waits(device: Device, bundles: Bundles) -> None:
    """Until a deadline of one second is over."""
    time.sleep(2.1)


def leaves_half(device: Device, bundles: Bundles) -> None:
    """What a push of ``new`` that broke off leaves: files that are whole, in part and not there."""
    staged = device.store / "staging" / bundles.new.digest
    staged.mkdir(parents=True)
    whole, part, *_ = sorted(bundles.new.manifest.files)
    shutil.copyfile(bundles.new.file(whole), staged / whole)
    (staged / part).write_bytes(bundles.new.file(part).read_bytes()[:5000])


@dataclass(frozen=True)
class Scenario:
    """``before`` makes the store, all of it on the disk; ``acts`` are recorded, and the power goes during the last.

    ``during`` names the releases that may be in use then ("none": no release), ``after`` those once the host has
    heard of the end. ``again`` is pushed afterwards.
    """

    what: str
    before: Sequence[Do]
    acts: Sequence[Do]
    during: Collection[str]
    after: Collection[str]
    again: str = "new"


OLD = (pushes("bystander"), pushes("old"))
BOTH = (*OLD, pushes("new"))
#: Calls at which a first push dies in the scenarios of one that goes on: while a file is received, right after the
#: release was renamed into place, and right after the pointer was.
FIRST_WRITE, RELEASE_NAMED, POINTER_NAMED = ("ftruncate", 3), ("fsync", 6), ("fsync", 11)

SCENARIOS = {
    row.what: row
    for row in (
        Scenario("push to an empty store", (), (pushes("new"),), ("none", "new"), ("new",)),
        Scenario("push over an older release", OLD, (pushes("new"),), ("old", "new"), ("new",)),
        Scenario("push that goes on", (*OLD, leaves_half), (pushes("new"),), ("old", "new"), ("new",)),
        Scenario(
            "push after one killed in a file",
            OLD,
            (killed("new", *FIRST_WRITE), pushes("new")),
            ("old", "new"),
            ("new",),
        ),
        Scenario(
            "push after one killed at the release's rename",
            OLD,
            (killed("new", *RELEASE_NAMED), pushes("new")),
            ("old", "new"),
            ("new",),
        ),
        Scenario(
            "push after one killed at the pointer's rename",
            OLD,
            (killed("new", *POINTER_NAMED), pushes("new")),
            ("old", "new"),
            ("new",),
        ),
        Scenario(
            "first push after one killed at the store's making",
            (),
            (killed("new", "openat", 1), pushes("new")),
            ("none", "new"),
            ("new",),
        ),
        Scenario(
            "push with files of another release",
            OLD,
            (pushes("renamed"),),
            ("old", "renamed"),
            ("renamed",),
            "renamed",
        ),
        Scenario("push of what is there", BOTH, (pushes("new"),), ("new",), ("new",)),
        Scenario("push of a third release", BOTH, (pushes("renamed"),), ("new", "renamed"), ("renamed",), "renamed"),
        Scenario("failed golden gate", OLD, (refused(pushes("wrong")),), ("old",), ("old",)),
        Scenario("measured and thrown away", OLD, (measures("new"),), ("old",), ("old",)),
        Scenario("rollback", BOTH, (rolls_back,), ("new", "old"), ("old",)),
        Scenario("collection", BOTH, (collects,), ("new",), ("new",)),
        Scenario("push on trial", OLD, (pushes("new", confirm_within_s=600.0),), ("old",), ("old",)),
        Scenario(
            "confirmation",
            (*OLD, pushes("new", confirm_within_s=600.0)),
            (confirms,),
            ("old", "new"),
            ("new",),
        ),
        Scenario(
            "push with a health command",
            OLD,
            (pushes("new", confirm_within_s=600.0, health="true"),),
            ("old", "new"),
            ("new",),
        ),
        Scenario(
            "trial that is not confirmed",
            (*OLD, pushes("new", confirm_within_s=1.0), waits),
            (loads,),
            ("old",),
            ("old",),
        ),
        Scenario(
            "health command that fails",
            OLD,
            (refused(pushes("new", confirm_within_s=1.0, health="false")),),
            ("old",),
            ("old",),
        ),
    )
}


# -- recording ---------------------------------------------------------------------------------------------------------


@dataclass
class Recording:
    """The events of a scenario; the power goes after each from ``first`` on, and ``done`` is the end as the host saw
    it."""

    disk: Disk
    first: int
    done: int


class Workshop:
    """A folder in memory in which stores are made, recorded and checked."""

    def __init__(self, folder: Path, bundles: Bundles) -> None:
        self.folder, self.bundles = folder, bundles
        self.python = quick_python(folder)
        self.boot = folder / "boot_id"
        self.boot.write_text("another boot\n")
        self._made: dict[tuple[Do, ...], Tree] = {}

    def begin(self, scenario: Scenario, folder: Path) -> Path:
        """The scenario's store, in ``folder``, which is the device's own folder; gives the store's."""
        key = tuple(scenario.before)
        if key not in self._made:
            device = Quick(folder / "store", self.python)
            folder.mkdir()
            for do in scenario.before:
                do(device, self.bundles)
            self._made[key] = tree_of(folder)
            shutil.rmtree(folder)
        if waits in scenario.before:  # its deadline is over by then
            del self._made[key]
            return self._fresh(scenario, folder)
        put_down(self._made[key], folder)
        return folder / "store"

    def _fresh(self, scenario: Scenario, folder: Path) -> Path:
        folder.mkdir()
        for do in scenario.before:
            do(Quick(folder / "store", self.python), self.bundles)
        return folder / "store"

    def record(self, scenario: Scenario, before: str = "") -> Recording:
        """Do it once, watched. ``before`` breaks the receiver on purpose."""
        device_folder, records = self.folder / "device", self.folder / "records"
        records.mkdir()
        store = self.begin(scenario, device_folder)
        disk, device = Disk(device_folder), Watched(store, records, before)
        replay, first = crash_trace.Replay(disk), 0
        with environment(EDGE_INFER_HOME=str(store)):
            for act in scenario.acts:
                first = len(disk.events)
                known = len(device.records)
                act(device, self.bundles)
                for record in device.records[known:]:
                    replay.read(record)
        if disk.tree() != tree_of(device_folder):
            raise SystemExit(f"{scenario.what}: the record does not give the store as it is: {_differ(disk)}")
        shutil.rmtree(device_folder)
        shutil.rmtree(records)
        said = [number for number, event in enumerate(disk.events) if isinstance(event, Said) and number >= first]
        return Recording(disk, first, said[-1] + 1 if said else len(disk.events) + 1)

    # -- what is left ------------------------------------------------------------------------------------------

    def problem(self, store: Path, allowed: Collection[str | None], again: str, engine: bool) -> str:
        """What is wrong with a store after a power cut; empty when nothing is."""
        with self.another_boot():
            try:
                return (
                    self._answers(Store(store), allowed, engine)
                    or self._takes_a_push(store, getattr(self.bundles, again))
                    or self._collects(store)
                )
            except (EdgeInferError, OSError) as error:
                return f"{type(error).__name__}: {error}"

    @contextlib.contextmanager
    def another_boot(self) -> Iterator[None]:
        """After a power cut the machine was started anew, which ends every trial."""
        real, pointer.BOOT_ID = pointer.BOOT_ID, self.boot
        try:
            yield
        finally:
            pointer.BOOT_ID = real

    def _answers(self, store: Store, allowed: Collection[str | None], engine: bool) -> str:
        store.status()
        beside = sound(store, BYSTANDER)
        if beside not in (self.bundles.bystander.digest, None):
            return "the model beside it is another"
        if beside is None and (store.root / "releases" / BYSTANDER).exists():
            return "the model beside it is gone"
        for digest in store.digests(NAME):
            verify(open_bundle(store.release(NAME, digest)))
        digest = sound(store, NAME)
        if digest not in allowed:
            return f"the release in use is {self._called(digest)}, expected {' or '.join(map(self._called, allowed))}"
        if engine and digest:
            self_test(store.release(NAME, digest), sys.executable)
        return ""

    def _called(self, digest: str | None) -> str:
        names = [item.name for item in dataclasses.fields(Bundles) if self.bundles.digest(item.name) == digest]
        return names[0] if names else "none" if digest is None else digest[:12]

    def _takes_a_push(self, store: Path, bundle: Bundle) -> str:
        push(bundle, Quick(store, self.python), Wish(python=self.python))
        return "" if sound(Store(store), NAME) == bundle.digest else "a push did not take over"

    def _collects(self, store: Path) -> str:
        collect(Quick(store, self.python))
        known = Store(store)
        kept = {known.release(name, digest) for name in known.names() for digest in known.digests(name)}
        left = [path for path in store.glob("releases/*/*") if path not in kept]
        left += [*store.glob("staging/*"), *store.glob("current/.*")]
        return f"a collection left {left}" if left else ""


def sound(store: Store, name: str) -> str | None:
    """The digest in use, after every hash was compared; None when there is none."""
    try:
        bundle = store.open_current(name)
    except ReleaseNotFound:
        return None
    verify(bundle, mode="full")
    return bundle.digest


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _differ(disk: Disk) -> list[str]:
    one, other = disk.tree(), tree_of(disk.root)
    return sorted(path for path in {*one, *other} if one.get(path, "?") != other.get(path, "?"))


# -- trying ------------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """``points``: power cuts tried, each a prefix and what survived; ``disks``: different ones among them."""

    events: int = 0
    syncs: int = 0
    points: int = 0
    disks: int = 0
    asked: int = 0
    torn: list[str] = field(default_factory=list)


def power_cuts(workshop: Workshop, scenario: Scenario, recording: Recording, seed: int, randoms: int) -> Found:
    """Try every prefix in every way. What is found of a disk once is not asked again."""
    events = recording.disk.events
    found = Found(len(events) - recording.first, sum(isinstance(event, Synced) for event in events[recording.first :]))
    disks: dict[bytes, tuple[Tree, list[str | None], str]] = {}
    for count in range(recording.first, len(events) + 1):
        allowed = [workshop.bundles.digest(name) for name in
                   (scenario.after if count >= recording.done else scenario.during)]  # fmt: skip
        for way, number in [(way, k) for way in WAYS for k in range(randoms if way == "random" else 1)]:
            rng = random.Random(f"{seed} {scenario.what} {count} {way} {number}")
            tree = recording.disk.after(count, WAYS[way], rng)
            found.points += 1
            disks.setdefault(key_of(tree) + repr(allowed).encode(), (tree, allowed, f"after {count}, {way} {number}"))
    found.disks = len(disks)
    sampled = max(1, len(disks) // ENGINE_SAMPLES)
    for number, (tree, allowed, where) in enumerate(disks.values()):
        engine = number % sampled == sampled // 2
        found.asked += engine
        put_down(tree, workshop.folder / "cut")
        problem = workshop.problem(workshop.folder / "cut" / "store", allowed, scenario.again, engine)
        if problem:
            found.torn.append(f"{where}: {problem}")
        shutil.rmtree(workshop.folder / "cut")
    return found
