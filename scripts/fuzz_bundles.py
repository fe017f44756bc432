#!/usr/bin/env python3
"""Damage bundles in thousands of ways and see that each is refused with a typed error or still answers rightly.

    python scripts/fuzz_bundles.py [--cases CASE...] [--count NUMBER] [--seed 1] [--only NUMBER] [--docs]
    python scripts/fuzz_bundles.py BUNDLE... [--cache-of OTHER] ...

Four families take turns on the files of a bundle. `lying`: as it might lie on a bad card, a file flipped, cut,
spliced, swapped, missing, or something else than a file; half of them after the bundle was checked, so that a stamp
says that all is well. `manifest`: fields replaced or removed, its own hash made right again. `contents`: the golden
questions, labels or anchors damaged and the manifest's hashes made right again, as only a faulty or evil packager
does. `sealed`: the same with an engine's own file; so the engine sees it. A fifth one, `cache`, has cases of its own,
and with --cache-of takes a bundle's engine cache, made by a first open: its files and stamps damaged, fields of its
entries replaced, files of another model's entry put in their place.

Each is opened in a forked child with a limit of time and private memory, which asks the true golden questions and
shows the model a picture. Failed is: an answer outside tolerance that was accepted, an error that is none of
edge_infer's own, and, but for `sealed`, a crash, a hang or a lack of memory. Engines do crash on sealed damage, which
is what `edge_infer.verify` is for: every 50th of them goes through it as well. A damaged cache must not even be an
error, and the open after that must answer rightly too. A mutation is made again from its seed and number.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pages
from fuzz_cases import CACHE_CASES, FILE_CASES, ROOT, bundle_of, other_of

from edge_infer import Session, load, verify
from edge_infer import bundle as bundles
from edge_infer.bundle import Bundle, open_bundle
from edge_infer.errors import EdgeInferError
from edge_infer.manifest import MANIFEST_NAME
from edge_infer.runtime import plan
from edge_infer.runtime.engine_cache import ENTRY_NAME
from edge_infer.runtime.golden import Case, largest_difference, read_golden, self_test

FAMILIES = {
    "lying": mutations.lying,
    "manifest": mutations.manifest,
    "contents": mutations.contents,
    "sealed": mutations.sealed,
}
#: What a child may take before it is ended.
SECONDS, MEMORY_BYTES = 20, 2**30
#: Every so many sealed bundles go through ``verify`` too.
VERIFIED = 50
#: How many are tried, of the files of a bundle (there are two of each format) and of its engine cache, which a child
#: makes anew about every other time.
COUNT, CACHE_COUNT = 5_000, 1_000
#: A file changed within one tick of the kernel's clock after a check would look as it did; see ``bundle.SETTLED_NS``.
TICK_S = 0.012
#: What is known of a cache once a bundle was opened with it.
AS_IT_WAS, ANEW, PLAIN = (
    "answers rightly, entry as it was",
    "answers rightly, entry made anew",
    "answers rightly, plain way",
)
IMAGE = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)


@dataclass(frozen=True)
class Truth:
    """A sound bundle, its golden questions, and what it says of a picture, where it says anything of pictures.

    ``caches``: where it has an engine cache that is to be damaged, that and the one of another model.
    """

    bundle: Bundle
    golden: list[Case]
    prediction: Any = None
    caches: tuple[Path, Path] | None = None


@dataclass(frozen=True)
class Damaged:
    """What is to be opened: a bundle, an engine cache, and whether stamps count (``auto``).

    ``made``: the state of the entry in the cache before the open, see ``_made``."""

    family: str
    path: Path
    cache: Path
    mode: str
    made: tuple[int, int] | None = None


# -- what comes of it --------------------------------------------------------------------------------------------------


def opened(damaged: Damaged, true: Truth) -> str:
    """Open what is damaged and ask it the questions of the ``true`` bundle; gives what came of it."""
    try:
        threads = None if damaged.family == "cache" else 1  # none: as the tuned plan in the cache says
        with load(damaged.path, threads=threads, verify=damaged.mode, cache_dir=damaged.cache) as session:
            self_test(session)
            return _wrong(session, damaged, true) or _way(session, damaged, true)
    except EdgeInferError as error:
        kind = "FAILED: " if damaged.family == "cache" else ""
        return f"{kind}refused: {type(error).__name__}" if str(error).strip() else "FAILED: an error without a word"
    except BaseException as error:
        return f"FAILED: {type(error).__name__}: {error}"


def _wrong(session: Session, damaged: Damaged, true: Truth) -> str:
    tolerance = true.bundle.manifest.golden.tolerance
    for asked, expected in true.golden:
        answered = session.run(asked)
        if any(not largest_difference(expected[name], answered[name]) <= tolerance[name] for name in expected):
            return "FAILED: a wrong answer"
    # Labels and thresholds of another manifest are another bundle's; then it is enough that nothing breaks.
    if true.prediction is not None and session.predict(IMAGE) != true.prediction and damaged.family == "lying":
        return "FAILED: another prediction"
    return ""


def _way(session: Session, damaged: Damaged, true: Truth) -> str:
    """How the engine cache was used; whatever was used must be what a sound open made."""
    if damaged.family != "cache":
        return "answers rightly"
    if session.info.notes:
        return PLAIN
    assert true.caches is not None
    entry = _entry(true.caches[0])
    if _made(damaged.cache / entry.name) != damaged.made:
        return ANEW
    names = {path.name for path in entry.iterdir()} - {ENTRY_NAME}
    if any((damaged.cache / entry.name / name).read_bytes() != (entry / name).read_bytes() for name in names):
        return "FAILED: damaged files of the cache were used"
    return AS_IT_WAS


def in_child(call: Callable[[], str]) -> str:
    """What ``call`` gives in a forked child with limits, or how that ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            _limit()
            os.write(write, call().encode()[:4000])
        finally:
            os._exit(0)  # whatever happens, a second copy of the caller must not go on
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return said or f"ended with status {os.waitstatus_to_exitcode(status)}"


def _limit() -> None:
    """Limits on this process, and its standard output to nowhere."""
    faulthandler.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a caller may have a handler of its own
    signal.alarm(SECONDS)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)


def verified(bundle: Path) -> str:
    try:
        verify(bundle, timeout_s=3 * SECONDS)  # it imports the engine as well
    except EdgeInferError as error:
        return f"refused: {type(error).__name__}"
    return "answers rightly"


# -- one mutation ------------------------------------------------------------------------------------------------------


def mutation(true: Truth, seed: int, number: int, folder: Path) -> Damaged:
    """Damage a copy of the ``true`` bundle, or of its engine cache, in ``folder``."""
    artifact = true.bundle.manifest.artifact
    rng = random.Random(f"{seed} {artifact.format} {artifact.precision} {number}")
    return _damaged_cache(true, rng, folder) if true.caches else _damaged_bundle(true, rng, number, folder)


def _damaged_bundle(true: Truth, rng: random.Random, number: int, folder: Path) -> Damaged:
    copy, cache = folder / f"{number}.edge", folder / "cache"
    copy.mkdir()
    for name in (MANIFEST_NAME, *true.bundle.manifest.files):
        shutil.copyfile(true.bundle.path / name, copy / name)
    family = list(FAMILIES)[number % len(FAMILIES)]
    mode = "full"
    if family == "lying" and rng.random() < 0.5:
        mode = "auto"
        _stamp(copy, true.bundle.manifest.files, cache / f"{true.bundle.digest}.verified")
        time.sleep(TICK_S)
    FAMILIES[family](copy, rng)
    return Damaged(family, copy, cache, mode)


def _damaged_cache(true: Truth, rng: random.Random, folder: Path) -> Damaged:
    assert true.caches is not None
    cache = folder / "cache"
    shutil.copytree(true.caches[0], cache)
    stamps = rng.choice(("fitting", "fitting", "of other files", "none", "forged"))
    if stamps == "none":
        for path in cache.glob("*.verified"):
            path.unlink()
    elif stamps == "fitting":
        _stamp_entries(cache)
        time.sleep(TICK_S)
    mutations.cache(cache, true.caches[1], rng)
    if stamps == "forged":  # whoever writes stamps is believed, unless all is hashed anyway
        _stamp_entries(cache)
    made = _made(cache / _entry(true.caches[0]).name)
    return Damaged("cache", true.bundle.path, cache, "full" if stamps == "forged" else "auto", made)


def _stamp_entries(cache: Path) -> None:
    for entry in cache.iterdir():
        if entry.is_dir():
            names = sorted(path.name for path in entry.iterdir() if path.name != ENTRY_NAME)
            _stamp(entry, names, cache / f"{entry.name}.verified")


def _stamp(folder: Path, names: Iterable[str], stamp: Path) -> None:
    """What a check leaves behind that found the files of ``folder`` sound some time ago."""
    if stamp.is_file() or not os.path.lexists(stamp):
        bundles._write_stamp(stamp, bundles._stamps(folder, names))


def _entry(cache: Path) -> Path:
    """What the engine made, not the tuned plan beside it."""
    (entry,) = (path for path in cache.iterdir() if path.is_dir() and not (path / plan.PLAN_NAME).exists())
    return entry


def _made(entry: Path) -> tuple[int, int] | None:
    """Changes when an entry is made anew."""
    return (entry.stat().st_ino, entry.stat().st_mtime_ns) if entry.is_dir() else None


def try_one(true: Truth, seed: int, number: int) -> list[tuple[str, str]]:
    """One mutation: its family and what came of it, and that of each further way to open it."""
    with tempfile.TemporaryDirectory() as scratch:
        damaged = mutation(true, seed, number, Path(scratch))
        family = damaged.family
        outcomes = [(family, in_child(functools.partial(opened, damaged, true)))]
        if family == "cache":
            outcomes.append(("next open", in_child(functools.partial(opened, damaged, true))))
        if family == "sealed" and number // len(FAMILIES) % VERIFIED == 0:
            outcomes.append(("sealed, by verify", verified(damaged.path)))
    return [
        (kind, f"FAILED: {outcome}" if kind != "sealed" and outcome.startswith("ended") else outcome)
        for kind, outcome in outcomes
    ]


# -- many of them ------------------------------------------------------------------------------------------------------


def truth(path: Path, other: Path | None = None, scratch: Path | None = None) -> Truth:
    """What is right for the bundle at ``path``, by opening it, which also warms the engine up for the children.

    With one thread no engine starts any of its own, which forking would not survive. With ``other``, a bundle, engine
    caches of both are made in ``scratch``.
    """
    bundle = open_bundle(path)
    with tempfile.TemporaryDirectory() as cache, load(path, threads=1, cache_dir=cache) as session:
        self_test(session)
        prediction = session.predict(IMAGE) if session.inputs[0].preprocessing else None
    caches = None
    if other is not None and scratch is not None:
        caches = (scratch / "cache", scratch / "other")
        for name, folder in zip((path, other), caches, strict=True):
            make_cache(open_bundle(name), folder)
    return Truth(bundle, read_golden(bundle), prediction, caches)


def make_cache(bundle: Bundle, folder: Path) -> None:
    """The engine cache that a device has after two opens, with a tuned plan."""

    def fill() -> str:
        kept = plan.keep(bundle, folder, plan.Measured(plan.Setting(1), 1.0, 1.0, 1))
        for _ in range(2):
            with load(bundle.path, cache_dir=folder) as session:
                notes = session.info.notes
            time.sleep(2 * bundles.SETTLED_NS / 1e9)
        return "" if notes or not kept else "made"

    said = in_child(fill)
    if said != "made" or len(list(folder.glob("*.verified"))) != 3:
        raise SystemExit(f"{bundle.path} keeps no engine cache ({said}); give one of at least 1 MB, not TorchScript")


def run(true: Truth, seed: int, numbers: Iterable[int]) -> dict[str, dict[str, int]]:
    """How often each outcome came, by family; failures with their number."""
    found: dict[str, collections.Counter[str]] = {}
    for number in numbers:
        for family, outcome in try_one(true, seed, number):
            words = f"{outcome} (number {number})" if outcome.startswith("FAILED") else outcome
            found.setdefault(family, collections.Counter())[words] += 1
    return {family: dict(sorted(outcomes.items())) for family, outcomes in sorted(found.items())}


# -- docs/mutations.md -------------------------------------------------------------------------------------------------

DATA, PAGE = ROOT / "docs" / "mutations.json", ROOT / "docs" / "mutations.md"
Report = dict[str, dict[str, Any]]


def report_of(found: dict[str, dict[str, int]], seed: int) -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("ai-edge-litert", "onnxruntime", "torch", "numpy")
    return {"seed": seed, "versions": {name: version(name) for name in packages}, "families": found}


def write_docs(new: Report) -> None:
    """Put these cases into docs/: mutations.json keeps the others, mutations.md gets the tables of all."""
    report = {**(json.loads(DATA.read_text()) if DATA.exists() else {}), **new}
    report = {case: report[case] for case in (*FILE_CASES, *CACHE_CASES) if case in report}
    DATA.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(page(report, PAGE.read_text()))


def page(report: Report, text: str) -> str:
    """``text`` with the tables that ``report`` gives."""
    files = {case: row for case, row in report.items() if case in FILE_CASES}
    cached = {case: row for case, row in report.items() if case in CACHE_CASES}
    text = pages.between(text, "files", _table(files, FILE_COLUMNS))
    return pages.between(text, "cache", _table(cached, CACHE_COLUMNS))


#: Heading -> how an outcome that counts there begins.
FILE_COLUMNS = {
    "answers rightly>": ("answers rightly",),
    "BundleError>": ("refused: BundleError",),
    "by engine or self-test>": ("refused: EngineError", "refused: InputError", "refused: SelfTestFailed"),
    "UsageError>": ("refused: UsageError",),
    "OutOfMemory>": ("refused: OutOfMemory",),
    "process died>": ("ended",),
    "failed>": ("FAILED",),
}
CACHE_COLUMNS = {
    "entry as it was>": (AS_IT_WAS,),
    "made anew>": (ANEW,),
    "plain way>": (PLAIN,),
    "failed>": ("FAILED",),
}


def _table(report: Report, columns: dict[str, tuple[str, ...]]) -> list[str]:
    """Seed and versions, and a row for each family of each case."""
    rows = []
    for case, entry in report.items():
        for family, outcomes in entry["families"].items():
            counts = [sum(n for said, n in outcomes.items() if said.startswith(begins)) for begins in columns.values()]
            total = sum(outcomes.values())
            if total != sum(counts):
                raise SystemExit(f"{case}, {family}: {outcomes} do not fit the columns")
            rows.append([case, family, *(f"{count:,}" if count else "" for count in (total, *counts))])
    made = {f"Seed {entry['seed']}; {_versions(entry)}." for entry in report.values()}
    return [*sorted(made), "", *pages.markdown(["bundle", "damage", "tried>", *columns], rows)]


def _versions(entry: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in entry["versions"].items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE", help="instead of the cases")
    cases = [*FILE_CASES, *CACHE_CASES]
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, metavar="CASE")
    parser.add_argument("--cache-of", type=Path, metavar="OTHER", help="damage the engine cache, with files of OTHER's")
    parser.add_argument("--count", type=int, help=f"{COUNT:,} where nothing is said, of engine caches {CACHE_COUNT:,}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this mutation alone")
    parser.add_argument("--docs", action="store_true", help="put these cases into docs/mutations.json and its page")
    args = parser.parse_args()
    if args.docs and (args.bundles or args.only is not None):
        parser.error("--docs takes whole cases")
    np.seterr(all="ignore")
    jobs = {path.name: (path, args.cache_of) for path in args.bundles} or {
        case: (bundle_of(case), bundle_of(other_of(case)) if case in CACHE_CASES else None) for case in args.cases
    }
    report = {}
    home = tempfile.TemporaryDirectory()
    os.environ["EDGE_INFER_HOME"] = home.name  # where verify's children keep what they learn
    for name, (path, other) in jobs.items():
        count = args.count or (COUNT if other is None else CACHE_COUNT)
        numbers = range(count) if args.only is None else range(args.only, args.only + 1)
        with tempfile.TemporaryDirectory() as scratch:
            report[name] = report_of(run(truth(path, other, Path(scratch)), args.seed, numbers), args.seed)
        for family, outcomes in report[name]["families"].items():
            print(f"{name}, {family}: {sum(outcomes.values())}")
            for outcome, times in sorted(outcomes.items(), key=lambda row: -row[1]):
                print(f"  {times:6}  {outcome}", flush=True)
    if args.docs:
        write_docs(report)
    families = [outcomes for row in report.values() for outcomes in row["families"].values()]
    failed = sum(n for outcomes in families for said, n in outcomes.items() if said.startswith("FAILED"))
    print(f"failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
