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
import contextlib
import dataclasses
import json
import os
import platform
import random
import shutil
import subprocess
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

from edge_infer import pointer, trust
from edge_infer.admission import self_test
from edge_infer.bundle import Bundle, describe_files, open_bundle, verify, write_bundle
from edge_infer.deploy.plan import PushOptions
from edge_infer.deploy.push import collect, confirm, measuring, push, rollback
from edge_infer.deploy.signing import sign
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
    answers its golden questions wrongly; ``nudged`` has the weights of ``new``, some of them a little changed. Two are
    signed as well, the old one twice, by whom ``signers`` names."""

    old: Bundle
    new: Bundle
    renamed: Bundle
    wrong: Bundle
    bystander: Bundle
    signed_old: Bundle
    signed_new: Bundle
    signed_again: Bundle
    nudged: Bundle
    signers: str

    def digest(self, name: str) -> str | None:
        return None if name == "none" else getattr(self, name).digest


def make_bundles(old: Bundle, new: Bundle, folder: Path) -> Bundles:
    """The others, from two of the same model, whatever name it was packaged under."""
    old, new = (rewritten(each, folder / f"{each.digest}.edge", name=NAME) for each in (old, new))
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    return Bundles(
        old,
        new,
        rewritten(old, folder / "renamed.edge", version="2"),
        rewritten(new, folder / "wrong.edge", spoil_answers),
        rewritten(old, folder / "bystander.edge", name=BYSTANDER),
        signed(old, folder / "signed-old.edge", key, 1),
        signed(new, folder / "signed-new.edge", key, 2),
        signed(old, folder / "signed-again.edge", key, 3),
        rewritten(new, folder / "nudged.edge", nudge, version="3"),
        f"somebody {key.with_suffix('.pub').read_text()}",
    )


def signed(bundle: Bundle, path: Path, key: Path, serial: int) -> Bundle:
    copy = rewritten(bundle, path)
    sign(copy, key, serial)
    return copy


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


def nudge(folder: Path) -> None:
    """As training moves weights: the lowest bit of a thousand of them, which no answer shows."""
    data = bytearray((folder / "weights.bin").read_bytes())
    for place in range(0, 4000, 4):
        data[place] ^= 1
    (folder / "weights.bin").write_bytes(data)


# -- scenarios ---------------------------------------------------------------------------------------------------------

Device = Watched | Quick | Killed
Do = Callable[[Device, Bundles], None]


def pushes(name: str, **wish: object) -> Do:
    def do(device: Device, bundles: Bundles) -> None:
        push(getattr(bundles, name), device, PushOptions(python=device.python, **wish))  # type: ignore[arg-type]

    return do


def pushes_differences(device: Device, bundles: Bundles) -> None:
    """``nudged``, as what changed since ``new``."""
    options = PushOptions(python=device.python, delta="only", base=bundles.new)
    if not any(step.action == "patch" for step in push(bundles.nudged, device, options).steps):
        raise SystemExit("a push of differences sent none")


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


def believes(device: Device, bundles: Bundles) -> None:
    """From now on the device takes only what is signed."""
    (device.store / trust.KEYS_NAME).write_text(bundles.signers)


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
    engine: bool = False  # whether its end needs the engine's answer


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
        Scenario(
            "push of differences",
            BOTH,
            (pushes_differences,),
            ("new", "nudged"),
            ("nudged",),
            "nudged",
        ),
        Scenario(
            "signed push over a signed release",
            (pushes("bystander"), believes, pushes("signed_old")),
            (pushes("signed_new"),),
            ("old", "new"),
            ("new",),
            "signed_new",
        ),
        Scenario(
            "another signature for what is there",
            (pushes("bystander"), believes, pushes("signed_old")),
            (pushes("signed_again"),),
            ("old",),
            ("old",),
            "signed_again",
        ),
        Scenario("push of what is there", BOTH, (pushes("new"),), ("new",), ("new",)),
        Scenario("push of a third release", BOTH, (pushes("renamed"),), ("new", "renamed"), ("renamed",), "renamed"),
        Scenario("failed golden gate", OLD, (refused(pushes("wrong")),), ("old",), ("old",), engine=True),
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
    it. ``steps`` are the calls of its last process at which that can be killed."""

    disk: Disk
    first: int
    done: int
    steps: list[tuple[str, int]]


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
        if key in self._made:
            put_down(self._made[key], folder)
            return folder / "store"
        folder.mkdir()
        for do in key:
            do(Quick(folder / "store", self.python), self.bundles)
        if waits not in key:  # its deadline is of this moment
            self._made[key] = tree_of(folder)
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
        steps = crash_trace.steps(device.records[-1], device_folder)
        shutil.rmtree(device_folder)
        shutil.rmtree(records)
        said = [number for number, event in enumerate(disk.events) if isinstance(event, Said) and number >= first]
        return Recording(disk, first, said[-1] + 1 if said else len(disk.events) + 1, steps)

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
        names = [name for name in ("old", "new", "renamed", "wrong", "nudged") if self.bundles.digest(name) == digest]
        return names[0] if names else "none" if digest is None else digest[:12]

    def _takes_a_push(self, store: Path, bundle: Bundle) -> str:
        push(bundle, Quick(store, self.python), PushOptions(python=self.python))
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
    if name == NAME:
        trust.require_signed(bundle)
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


def power_cuts(
    workshop: Workshop,
    scenario: Scenario,
    recording: Recording,
    seed: int,
    randoms: int,
    engine_samples: int = ENGINE_SAMPLES,
    enough: int | None = None,
) -> Found:
    """Try every prefix in every way, but no more than ``enough`` torn ones. No disk is tried twice."""
    events = recording.disk.events
    found = Found(len(events) - recording.first, sum(isinstance(event, Synced) for event in events[recording.first :]))
    tries = [(way, number) for way in WAYS for number in range(randoms if way == "random" else 1)]
    disks: dict[bytes, tuple[Tree, list[str | None], str]] = {}
    for count in range(recording.first, len(events) + 1):
        allowed = [workshop.bundles.digest(name) for name in
                   (scenario.after if count >= recording.done else scenario.during)]  # fmt: skip
        for way, number in tries:
            rng = random.Random(f"{seed} {scenario.what} {count} {way} {number}")
            tree = recording.disk.after(count, WAYS[way], rng)
            found.points += 1
            disks.setdefault(key_of(tree) + repr(allowed).encode(), (tree, allowed, f"after {count}, {way} {number}"))
    found.disks = len(disks)
    asked = {(2 * k + 1) * len(disks) // (2 * engine_samples) for k in range(engine_samples)}
    for number, (tree, allowed, where) in enumerate(disks.values()):
        engine = number in asked
        found.asked += engine
        put_down(tree, workshop.folder / "cut")
        problem = workshop.problem(workshop.folder / "cut" / "store", allowed, scenario.again, engine)
        if problem:
            found.torn.append(f"{where}: {problem}")
        shutil.rmtree(workshop.folder / "cut")
        if len(found.torn) == enough:
            break
    return found


# -- killed ------------------------------------------------------------------------------------------------------------

#: A receiver that dies while others hold on to what it began: each is killed at each of its calls.
KILLED = (
    "push to an empty store", "push over an older release", "push that goes on", "push with files of another release",
    "push of differences", "signed push over a signed release", "another signature for what is there",
    "failed golden gate", "measured and thrown away", "rollback", "collection", "push on trial", "confirmation",
    "push with a health command",
)  # fmt: skip
#: And these on a file system of their own, which is shut down right after that.
ON_EXT4 = ("push to an empty store", "push over an older release", "rollback")


def kills(workshop: Workshop, scenario: Scenario, steps: Sequence[tuple[str, int]]) -> Found:
    """Kill the receiver at each of ``steps``; nothing that it gave to the kernel is lost."""
    found = Found()
    for call, number in steps:
        store = workshop.begin(scenario, workshop.folder / "device")
        found.points += die(workshop, scenario, store, call, number)
        judge(workshop, scenario, store, f"killed at {call} {number}", found)
        shutil.rmtree(workshop.folder / "device")
    if found.points < 0.7 * len(steps):  # files come in pieces, now more and now fewer
        raise SystemExit(f"{scenario.what}: killed {found.points} times only, expected some {len(steps)}")
    return found


def die(workshop: Workshop, scenario: Scenario, store: Path, call: str, number: int) -> bool:
    """Do the scenario with a receiver that dies there; gives whether it did."""
    device = Killed(store, sys.executable if scenario.engine else workshop.python, call, number)
    with environment(EDGE_INFER_HOME=str(store)), contextlib.suppress(EdgeInferError):
        scenario.acts[-1](device, workshop.bundles)
    return device.died


def judge(workshop: Workshop, scenario: Scenario, store: Path, where: str, found: Found) -> None:
    allowed = [workshop.bundles.digest(name) for name in {*scenario.during, *scenario.after}]
    problem = workshop.problem(store, allowed, scenario.again, engine=False)
    if problem:
        found.torn.append(f"{where}: {problem}")


def cuts_on_ext4(workshop: Workshop, scenario: Scenario, steps: Sequence[tuple[str, int]], folder: Path) -> Found:
    """Kill the receiver at ``steps``, and stop the ext4 file system at once as a power cut does. Needs root."""
    found = Found()
    image, place = folder / "image", folder / "mounted"
    for call, number in steps:
        crash_device.make_image(image)
        with crash_device.mounted(image, place):
            store = workshop.begin(scenario, place / "device")
            crash_device.sync_all(place)
            found.points += die(workshop, scenario, store, call, number)
            (place / "unsynced").write_bytes(bytes(10_000))
            crash_device.cut_power(place)
        with crash_device.mounted(image, place):
            if (place / "unsynced").exists() and (place / "unsynced").stat().st_size:
                raise SystemExit("what was not synced outlasts the shut down here, so that it shows nothing")
            judge(workshop, scenario, place / "device" / "store", f"ext4, killed at {call} {number}", found)
    return found


# -- broken on purpose -------------------------------------------------------------------------------------------------

#: What a receiver that is broken that way runs first. Each must be found out.
BROKEN = {
    "nothing is synced": "os.fsync = lambda d: None",
    "files are not synced": "os.fsync = lambda d: stat.S_ISREG(os.fstat(d).st_mode) or sync(d)",
    "folders are not synced": "os.fsync = lambda d: stat.S_ISDIR(os.fstat(d).st_mode) or sync(d)",
    "the pointer is written in place": "os.replace = lambda a, b: os.unlink(a) if shutil.copyfile(a, b) else None",
}
BEFORE = "import os, shutil, stat; sync = os.fsync; "


# -- docs/crash-points.md ----------------------------------------------------------------------------------------------

Report = dict[str, list[dict[str, object]]]
COLUMNS = {
    "cuts": ("scenario", "events>", "syncs>", "power cuts tried>", "different disks>", "run by the engine>", "torn>"),
    "kills": ("scenario", "killed at>", "torn>"),
    "ext4": ("scenario", "shut down at>", "torn>"),
    "broken": ("receiver", "power cuts tried>", "different disks>", "torn>"),
}  # fmt: skip
FIELDS = {
    "cuts": ("events", "syncs", "points", "disks", "asked"),
    "kills": ("points",),
    "ext4": ("points",),
    "broken": ("points", "disks"),
}


def row_of(part: str, what: str, found: Found) -> dict[str, object]:
    return {"what": what, **{name: getattr(found, name) for name in FIELDS[part]}, "torn": len(found.torn)}


def table(part: str, rows: Sequence[Mapping[str, object]]) -> list[str]:
    names = (*FIELDS[part], "torn")
    cells = [[str(row["what"]), *(f"{row[name]:,}" for name in names)] for row in rows]
    if len(rows) > 1 and part != "broken":
        sums = {name: sum(int(str(row[name])) for row in rows) for name in names}
        cells.append(["**all**", *(f"**{sums[name]:,}**" for name in names)])
    return pages.markdown(COLUMNS[part], cells)


def write_docs(report: dict[str, object]) -> None:
    DATA.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(page(report, PAGE.read_text()))


def page(report: dict[str, object], text: str) -> str:
    """``text`` with the tables that ``report`` gives."""
    parts: Report = report["parts"]  # type: ignore[assignment]
    for part in COLUMNS:
        made = f"Seed {report['seed']}, {report['randoms']} at random; {report['machine']}."
        text = pages.between(text, part, [*([made, ""] if part == "cuts" else []), *table(part, parts[part])])
    return text


def machine() -> str:
    from importlib.metadata import version

    return f"Linux {platform.release()}, Python {platform.python_version()}, onnxruntime {version('onnxruntime')}"


# -- the command -------------------------------------------------------------------------------------------------------


def run(workshop: Workshop, args: argparse.Namespace, folder: Path) -> tuple[Report, list[str]]:
    """Everything that was asked for; the rows of the tables, and what was torn."""
    report: Report = {part: [] for part in COLUMNS}
    torn: list[str] = []

    def tell(part: str, what: str, found: Found) -> None:
        report[part].append(row_of(part, what, found))
        counts = ", ".join(f"{name} {getattr(found, name)}" for name in FIELDS[part])
        print(f"{part}: {what}: {counts}, torn {len(found.torn)}", flush=True)
        if part != "broken":
            torn.extend(f"{what}, {line}" for line in found.torn)

    for what in args.scenarios:
        recording = workshop.record(SCENARIOS[what])
        if "cuts" in args.parts:
            tell("cuts", what, power_cuts(workshop, SCENARIOS[what], recording, args.seed, args.randoms))
        if "kills" in args.parts and what in KILLED:
            tell("kills", what, kills(workshop, SCENARIOS[what], recording.steps))
        if "ext4" in args.parts and what in ON_EXT4:
            tell("ext4", what, cuts_on_ext4(workshop, SCENARIOS[what], recording.steps[::3], folder))
    if "broken" in args.parts:
        scenario = SCENARIOS["push over an older release"]
        for what, code in BROKEN.items():
            recording = workshop.record(scenario, f"{BEFORE}{code}\n")
            tell("broken", what, power_cuts(workshop, scenario, recording, args.seed, 1, engine_samples=0))
    return report, torn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="WHAT")
    parser.add_argument("--parts", nargs="+", choices=COLUMNS, help="all of them; ext4 with root only")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--random", type=int, default=4, dest="randoms", help="disks at random after each event")
    parser.add_argument("--bundles", nargs=2, type=Path, metavar=("OLD", "NEW"), help="ONNX bundles of one model")
    parser.add_argument("--docs", action="store_true", help="put all into docs/crash-points.json and its page")
    args = parser.parse_args()
    if args.docs and (args.parts or len(args.scenarios) < len(SCENARIOS)):
        parser.error("--docs takes all parts of all scenarios")
    args.parts = args.parts or [part for part in COLUMNS if part != "ext4" or os.getuid() == 0]
    old, new = map(open_bundle, args.bundles or (digits("int8"), digits("float32")))
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch,
        tempfile.TemporaryDirectory() as folder,
        environment(EDGE_INFER_CACHE=f"{scratch}/cache"),  # where a host keeps what it has pushed
    ):
        workshop = Workshop(Path(scratch).resolve(), make_bundles(old, new, Path(scratch)))
        report, torn = run(workshop, args, Path(folder))
    if args.docs:
        write_docs({"seed": args.seed, "randoms": args.randoms, "machine": machine(), "parts": report})
    for line in torn:
        print(f"TORN: {line}")
    tried = sum(int(str(row["points"])) for part in ("cuts", "kills", "ext4") for row in report[part])
    missed = [row["what"] for row in report["broken"] if not row["torn"]]
    print(f"points tried: {tried:,}, torn: {len(torn)}" + "".join(f"; NOT FOUND OUT: {what}" for what in missed))
    return 1 if torn or missed else 0


def in_memory() -> Path | None:
    """Where temporary files need no disk, so that a sync costs nothing; None where there is no such place."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else None


def digits(precision: str) -> Path:
    """The trained digits network, packaged when it is not there."""
    from fuzz_cases import bundle_of

    return bundle_of(f"digits-onnx-{precision}")


if __name__ == "__main__":
    raise SystemExit(main())
