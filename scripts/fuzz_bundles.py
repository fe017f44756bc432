#!/usr/bin/env python3
"""Damage bundles in thousands of ways and see that each is refused with a typed error or still answers rightly.

    python scripts/fuzz_bundles.py BUNDLE... [--count 10000] [--seed 1] [--only NUMBER]

Three families take turns. `lying`: a bundle as it might lie on a bad card, a file flipped, cut, spliced, swapped,
missing, or something else than a file. `manifest`: fields replaced or removed, in canonical form again. `sealed`: an
engine's own file is damaged and the manifest's hashes are made right again, as only a faulty or evil packager does; so
the engine sees it.

Each is opened in a forked child with a limit of time and private memory, which asks the true golden questions. Failed
is: an answer outside tolerance that was accepted, an error that is none of edge_infer's own, and, but for `sealed`, a
crash, a hang or a lack of memory. Engines do crash on sealed damage, which is what `edge_infer.verify` is for: every
50th of them goes through it as well. A mutation is made again from its seed and number.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import functools
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_infer import load, verify
from edge_infer.bundle import Bundle, open_bundle
from edge_infer.errors import EdgeInferError
from edge_infer.manifest import MANIFEST_NAME, canonical_json
from edge_infer.runtime.engines import engine_module
from edge_infer.runtime.golden import largest_difference, read_golden, self_test

FAMILIES = ("lying", "manifest", "sealed")
#: What a child may take before it is ended.
SECONDS, MEMORY_BYTES = 20, 2**30
#: Every so many sealed bundles go through ``verify`` too.
VERIFIED = 50
ODD_VALUES = (None, True, -1, 0, 1, 2**63, 1e308, "", "x", "../../etc/passwd", "model.bin", [], {}, [[]] * 50, "\u0000")


# -- damage ------------------------------------------------------------------------------------------------------------


def damage(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, cut, inserted, copied elsewhere or zeroed."""
    if not data:
        return b"\x00"
    place, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64, 1024))
    kind = rng.randrange(6)
    if kind <= 1:
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 16))):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return data[:place]
    if kind == 3:
        return data[:place] + rng.randbytes(length) + data[place:]
    if kind == 4:
        source = rng.randrange(len(data))
        piece = data[source : source + length]
        return data[:place] + piece + data[place + len(piece) :]
    return data[:place] + rng.choice((b"\x00", b"\xff")) * min(length, len(data) - place) + data[place + length :]


def lying(folder: Path, rng: random.Random) -> None:
    names = sorted(path.name for path in folder.iterdir())
    path = folder / rng.choice(names)
    kind = rng.randrange(10)
    if kind < 6:
        path.write_bytes(damage(path.read_bytes(), rng))
        return
    data = path.read_bytes()
    path.unlink()
    if kind == 6:
        path.mkdir()
    elif kind == 7:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/full", path.name, "/nowhere", "..")))
    elif kind == 8:
        other = folder / rng.choice([name for name in names if name != path.name])
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)


def manifest(folder: Path, rng: random.Random) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_bytes())
    places = list(_places(content))
    for _ in range(rng.choice((1, 1, 1, 2))):
        holder, key = rng.choice(places)
        if rng.random() < 0.2 and isinstance(holder, dict):
            holder.pop(key, None)
        elif rng.random() < 0.3:
            other, its = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[its])) if _has(other, its) else 0
        else:
            holder[key] = rng.choice(ODD_VALUES)
    (folder / MANIFEST_NAME).write_bytes(canonical_json(content))


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def sealed(folder: Path, rng: random.Random) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_bytes())
    name = rng.choice([n for n in (content["artifact"]["model"], content["artifact"].get("weights")) if n])
    data = damage((folder / name).read_bytes(), rng)
    (folder / name).write_bytes(data)
    content["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST_NAME).write_bytes(canonical_json(content))


# -- what comes of it --------------------------------------------------------------------------------------------------


def opened(bundle: Path, true: Bundle, mode: str = "full") -> str:
    """Open a damaged bundle and ask it the questions of the ``true`` one; gives what came of it."""
    try:
        with load(bundle, threads=1, verify=mode, cache_dir=bundle.parent / "cache") as session:
            self_test(session)
            tolerance = true.manifest.golden.tolerance
            for asked, expected in read_golden(true):
                answered = session.run(asked)
                if any(not largest_difference(expected[name], answered[name]) <= tolerance[name] for name in expected):
                    return "FAILED: a wrong answer"
    except EdgeInferError as error:
        return f"refused: {type(error).__name__}" if str(error).strip() else "FAILED: an error without a word"
    except BaseException as error:
        return f"FAILED: {type(error).__name__}: {error}"
    return "answers rightly"


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
        verify(bundle, timeout_s=SECONDS)
    except EdgeInferError as error:
        return f"verify refused: {type(error).__name__}"
    return "verify: answers rightly"


def mutation(true: Bundle, seed: int, number: int, folder: Path) -> tuple[str, Path]:
    """Damage a copy of ``true`` in ``folder``; gives the family and the copy."""
    rng = random.Random(f"{seed} {true.manifest.artifact.format} {true.manifest.artifact.precision} {number}")
    copy = folder / f"{number}.edge"
    copy.mkdir()
    for name in (MANIFEST_NAME, *true.manifest.files):
        shutil.copyfile(true.path / name, copy / name)
    family = FAMILIES[number % len(FAMILIES)]
    {"lying": lying, "manifest": manifest, "sealed": sealed}[family](copy, rng)
    return family, copy


def try_one(true: Bundle, seed: int, number: int, mode: str = "full") -> tuple[str, list[str]]:
    """One mutation: its family, and what came of it."""
    with tempfile.TemporaryDirectory() as scratch:
        family, copy = mutation(true, seed, number, Path(scratch))
        outcome = in_child(functools.partial(opened, copy, true, mode))
        if family != "sealed" and outcome.startswith("ended"):
            outcome = f"FAILED: {outcome}"
        more = [verified(copy)] if family == "sealed" and number // len(FAMILIES) % VERIFIED == 0 else []
    return family, [outcome, *more]


def run(true: Bundle, seed: int, numbers: range) -> dict[str, collections.Counter[str]]:
    """Outcomes by family; failures with their number."""
    engine_module(true).import_engine(true)
    found: dict[str, collections.Counter[str]] = {family: collections.Counter() for family in FAMILIES}
    for number in numbers:
        family, outcomes = try_one(true, seed, number)
        found[family].update(f"{item} (number {number})" if item.startswith("FAILED") else item for item in outcomes)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this mutation alone")
    args = parser.parse_args()
    numbers = range(args.count) if args.only is None else range(args.only, args.only + 1)
    failed = 0
    for path in args.bundles:
        found = run(open_bundle(path), args.seed, numbers)
        for family, outcomes in found.items():
            print(f"{path.name}, {family}: {sum(outcomes.values())}")
            for outcome, count in outcomes.most_common():
                print(f"  {count:6}  {outcome}")
                failed += count if outcome.startswith("FAILED") else 0
    print(f"failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())
