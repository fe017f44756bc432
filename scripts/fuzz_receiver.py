#!/usr/bin/env python3
"""Talk to the receiver of a push as no host does, and read manifests that no packager writes.

    python scripts/fuzz_receiver.py [--parts receiver manifests] [--count NUMBER] [--seed 1] [--only NUMBER] [--docs]

Conversations (fuzz_conversations.py) are held by the real receiver in a forked child with limits of time and private
memory (128 MiB), on a store that has one release. Failed is: an answer that is not a line of JSON, more than one error
or anything after it, an error of a type that edge_infer has not or without a word, a word on standard error, a status
other than 0, a crash, a hang, a lack of memory; a file written, made, renamed or removed outside the store; a store
that does not serve a sound release, or stays locked, afterwards.

Manifests are read by ``manifest.parse`` in a forked child: fields replaced and sealed again, text damaged, and what
JSON readers stumble on. Failed is anything but a manifest or a BundleError, more than ten seconds, or the limit of
memory.
A case is made again from its seed and number.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import mmap
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations
import pages
from crash_device import Quick, quick_python
from crash_disk import Tree, put_down, tree_of
from crash_points import digits, environment, in_memory, rewritten
from fuzz_conversations import ODD_JSON, Case, Host, case

from edge_infer import errors
from edge_infer.bundle import Bundle, open_bundle, verify
from edge_infer.delta import codecs
from edge_infer.deploy import installer, receiver
from edge_infer.deploy.difference import make
from edge_infer.deploy.plan import PushOptions
from edge_infer.deploy.push import push
from edge_infer.errors import BundleError, EdgeInferError
from edge_infer.manifest import MANIFEST_MAX_BYTES, parse, seal
from edge_infer.store import Store

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE = ROOT / "docs" / "fuzzing.json", ROOT / "docs" / "fuzzing.md"
COUNTS = {"receiver": 10_000, "manifests": 100_000}
#: What a conversation may take: private memory over that of the start, and time.
MEMORY_BYTES, SECONDS = 128 * 2**20, 30.0
#: What reading a manifest may take: one of 4 MiB takes a second.
SLOW_S = 10.0
#: How long a silent host is waited for here; two minutes on a device.
SILENCE_S = 0.2
#: No error is longer.
ERROR_BYTES = 32 * 1024
#: How a receiver begins to say what nobody had thought of, and what it must not say then: these are our mistakes.
UNFORESEEN = "the device cannot do that: "
MISTAKES = ("KeyError", "TypeError", "AttributeError", "IndexError", "AssertionError", "StopIteration", "MemoryError")
#: What a device's folder holds beside the store; files outside the store and these are nobody's to write.
CANARY, OWN = "canary", ("store", "cwd", "home", "tmp")


# -- the receiver ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a conversation ended."""

    said: bytes
    words: str
    status: int | None
    wrote: str
    memory_bytes: int


class Device:
    """A folder with a store, and things beside it that must stay as they are."""

    def __init__(self, folder: Path, old: Bundle, new: Bundle) -> None:
        self.folder, self.new = folder / "device", new
        self.store = self.folder / "store"
        self.old, self.host = old, Host(new, old, deltas_of(old, new, folder), quick_python(folder))
        self.folder.mkdir()
        push(old, Quick(self.store, self.host.values["python"]), PushOptions(python=self.host.values["python"]))
        (self.folder / CANARY / "inner").mkdir(parents=True)
        for path in (self.folder / CANARY / "file", self.folder / CANARY / "inner" / "file"):
            path.write_bytes(b"mine")
        for name in OWN[1:]:
            (self.folder / name / "a" / "b").mkdir(parents=True)
        self.fresh: Tree = tree_of(self.folder)
        shutil.rmtree(self.folder)

    def hold(self, case: Case) -> str:
        """What comes of a conversation, on a fresh device."""
        put_down(self.fresh, self.folder)
        try:
            case.plant(self.store)
            outcome = talk(self.folder, case)
            return self._outside() or judge(outcome, case) or self._store(case) or called(outcome)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _outside(self) -> str:
        beside = {path.name for path in self.folder.iterdir()} - set(OWN)
        wanted = {name: content for name, content in self.fresh.items() if name.split("/")[0] == CANARY}
        if beside != {CANARY} or {f"{CANARY}/{name}": item for name, item in tree_of(self.folder / CANARY).items()} != {
            name: item for name, item in wanted.items() if name != CANARY
        }:
            return "FAILED: something outside the store was changed"
        return ""

    def _store(self, case: Case) -> str:
        """Whether the store serves one of the two, unless something was planted in it. A host may roll back."""
        if case.planted:
            return ""
        store = Store(self.store)
        try:
            with store.lock():
                bundle = store.open_current(self.old.manifest.name)
                verify(bundle, mode="full")
        except EdgeInferError as error:
            return f"FAILED: the store afterwards: {type(error).__name__}: {error}"
        return ""


def deltas_of(old: Bundle, new: Bundle, folder: Path) -> dict[str, bytes]:
    """What makes files of ``new`` from those of ``old``, by name."""
    made = {name: make(old, new, name, codecs(), folder / f"{name}.delta") for name in new.manifest.files}
    return {name: difference.path.read_bytes() for name, difference in made.items() if difference is not None}


def talk(folder: Path, case: Case) -> Outcome:
    """Let a forked receiver hold the conversation. It has ``folder`` and nothing else to write in."""
    names = ("asked", "told", "words", "wrote")
    files = {name: tempfile.TemporaryFile() for name in names}  # noqa: SIM115  closed below
    try:
        asked = _line_kept_open(case.data) if case.silent else _as_file(files["asked"], case.data)
        child = os.fork()
        if child == 0:
            try:
                for number, descriptor in enumerate((asked[0], files["told"].fileno(), files["words"].fileno())):
                    os.dup2(descriptor, number)
                be_the_receiver(folder, files["wrote"].fileno(), installs(case))
            finally:
                os._exit(9)  # a second copy of the caller must not go on
        status, usage = wait(child)
        for descriptor in asked if case.silent else ():
            os.close(descriptor)
        said, words, wrote = (read(files[name]) for name in names[1:])
        return Outcome(said, words.decode("utf-8", "replace"), status, wrote.decode(errors="replace"), usage)
    finally:
        for file in files.values():
            file.close()


def installs(case: Case) -> bool:
    """Whether a request is among it that only the installer's receiver has."""
    return any(f'"op": "{op}"'.encode() in case.data for op in installer.FIELDS)


def _as_file(file: Any, data: bytes) -> tuple[int]:
    file.write(data)
    file.flush()
    file.seek(0)
    return (file.fileno(),)


def _line_kept_open(data: bytes) -> tuple[int, int]:
    """A pipe with as much of ``data`` as fits, whose other end stays open."""
    ends = os.pipe()
    os.set_blocking(ends[1], False)
    os.write(ends[1], data[:60_000])
    return ends


def read(file: Any) -> bytes:
    file.seek(0)
    data: bytes = file.read()
    return data


def wait(child: int) -> tuple[int | None, int]:
    """Exit status, None for one that had to be ended, and the most private memory in bytes."""
    descriptor = os.pidfd_open(child)
    ready, _, _ = select.select([descriptor], [], [], SECONDS)
    os.close(descriptor)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return (os.waitstatus_to_exitcode(status) if ready else None), usage.ru_maxrss * 1024


def be_the_receiver(folder: Path, wrote: int, installing: bool) -> None:
    """In a child: limits, then the receiver, or the one of installations, on descriptors 0 to 2. Never returns."""
    os.environ.update(EDGE_INFER_HOME=str(folder / "store"), HOME=str(folder / "home"), TMPDIR=str(folder / "tmp"))
    tempfile.tempdir = None
    os.chdir(folder / "cwd" / "a" / "b")
    faulthandler.disable()
    receiver.SILENCE_S = installer.SILENCE_S = SILENCE_S
    limit_memory()
    watch_writes([folder / name for name in OWN], wrote)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    status = 0
    try:
        (installer if installing else receiver).main()
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def limit_memory() -> None:
    """No more than MEMORY_BYTES over what is there now."""
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


#: Audit events with which Python tells that it changes files -> which of their arguments are paths.
CHANGES = {
    "os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.link": (1,), "os.symlink": (1,),
    "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "shutil.rmtree": (0,),
}  # fmt: skip


def watch_writes(own: Sequence[Path], wrote: int) -> None:
    """Let this process change nothing outside the folders ``own``, and write what it tried to ``wrote``."""
    allowed = tuple(str(path) for path in own)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            paths = arguments[:1] if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) else ()
        else:
            paths = tuple(arguments[place] for place in CHANGES.get(event, ()))
        relative = event in ("os.remove", "os.rmdir") and arguments[-1] != -1  # below a folder that is held open
        for path in paths:
            if isinstance(path, int) or relative:
                continue
            name = os.fsdecode(path)
            where = os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))  # noqa: PTH118, PTH120, PTH119
            if event == "open" and not arguments[2] & os.O_NOFOLLOW:
                where = os.path.realpath(where)
            if where != "/dev/null" and not any(where == root or where.startswith(root + "/") for root in allowed):
                os.write(wrote, f"{event} {where}\n".encode("utf-8", "replace"))
                raise PermissionError(f"{where} is outside the store")

    sys.addaudithook(watch)


def judge(outcome: Outcome, case: Case) -> str:
    """What is wrong with an outcome; empty when nothing is."""
    if outcome.wrote:
        return f"FAILED: outside the store: {outcome.wrote.splitlines()[0]}"
    if outcome.status is None:
        return f"FAILED: no end within {SECONDS:g} s"
    if outcome.words:
        return f"FAILED: {outcome.words.strip().splitlines()[-1][:300]}"
    if outcome.status:
        return f"FAILED: ended with {outcome.status}"
    lines = outcome.said.splitlines()
    if outcome.said and not outcome.said.endswith(b"\n"):
        return "FAILED: a line without an end"
    for number, line in enumerate(lines):
        problem = _line(line, number == len(lines) - 1)
        if problem:
            return f"FAILED: {problem}"
    if case.silent and not (lines and lines[-1].startswith(b'{"error"')):
        return "FAILED: a host that went silent was not told so"
    return ""


def _line(line: bytes, last: bool) -> str:
    """What is wrong with a line of an answer."""
    try:
        value = json.loads(line)
    except ValueError:
        return f"not JSON: {line[:100]!r}"
    if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= {"ok", "error"}:
        return f"neither ok nor an error: {line[:100]!r}"
    if "ok" in value:
        return ""
    for kind in MISTAKES:
        if f"{UNFORESEEN}{kind}(" in value["error"]["message"]:
            return str(value["error"]["message"])[:200]
    if len(line) > ERROR_BYTES:
        return f"an error of {len(line)} bytes"
    if not last:
        return "more after an error"
    kind = getattr(errors, str(value["error"]["type"]), None)
    if not (isinstance(kind, type) and issubclass(kind, EdgeInferError)):
        return f"an error of the type {value['error']['type']}"
    return "" if value["error"]["message"].strip() else "an error without a word"


def called(outcome: Outcome) -> str:
    """How a conversation that nothing is wrong with went."""
    lines = outcome.said.splitlines()
    if lines and b'"error"' in lines[-1][:12]:
        error = json.loads(lines[-1])["error"]
        unforeseen = error["message"].startswith(UNFORESEEN)
        return "refused: unforeseen" if unforeseen else f"refused: {error['type']}"
    return "answered" if lines else "said nothing"


# -- manifests ---------------------------------------------------------------------------------------------------------


def manifest_case(true: bytes, seed: int, number: int) -> bytes:
    """A manifest that no packager writes, or at least did not."""
    rng = random.Random(f"{seed} manifest {number}")
    if number % 2000 == 0:
        return large_manifest(true, rng)
    kind = rng.randrange(10)
    if kind < 5:
        content = json.loads(true)
        mutations.replace_fields(content, mutations.ODDER_VALUES, rng)
        return sealed(content)
    if kind < 7:
        return mutations.damage(true, rng)
    if kind == 7:  # anything for a value, in text that is sealed by hand
        content = json.loads(true)
        name = rng.choice(sorted(content))
        content[name] = "@@"
        return seal_text(sealed(content).replace(b'"@@"', rng.choice(ODD_JSON).encode("utf-8", "surrogatepass")))
    if kind == 8:  # a key twice
        lines = true.splitlines(keepends=True)
        place = rng.randrange(1, len(lines) - 1)
        return seal_text(b"".join([*lines[:place], rng.choice(lines[1:-1]), *lines[place:]]))
    return seal_text(mutations.damage(true, rng))


def sealed(content: Any) -> bytes:
    try:
        return seal(content)
    except (ValueError, RecursionError):  # what JSON can say and a manifest cannot
        return json.dumps(content).encode("utf-8", "surrogatepass")


def seal_text(data: bytes) -> bytes:
    """Text, whatever it is, with the hash of itself in it."""
    import hashlib

    from edge_infer.manifest import SEAL_LINE

    found = SEAL_LINE.search(data)
    if found is None:
        return data
    rest = data[: found.start()] + data[found.end() :]
    return data[: found.start(1)] + hashlib.sha256(rest).hexdigest().encode() + data[found.end(1) :]


def large_manifest(true: bytes, rng: random.Random) -> bytes:
    content = json.loads(true)
    room = MANIFEST_MAX_BYTES - len(true) - 1000 + rng.choice((0, 0, 2000))
    content["provenance"]["more"] = rng.choice(
        (
            "x" * room,
            [[]] * (room // 7),
            [0] * (room // 6),
            ["\u00e9"] * (room // 9),
            {str(n): n for n in range(room // 20)},
        )
    )
    return seal(content)


def read_manifests(true: bytes, seed: int, numbers: Sequence[int]) -> dict[str, int]:
    """How often each outcome came, all in one forked child."""
    reading, writing = os.pipe()
    place = mmap.mmap(-1, 8)  # shared: which one it is at
    child = os.fork()
    if child == 0:
        try:
            limit_memory()
            found: collections.Counter[str] = collections.Counter()
            for number in numbers:
                place[:] = number.to_bytes(8, "little")
                count(found, read_one(manifest_case(true, seed, number)), number)
            os.write(writing, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(writing)
    before = None
    with os.fdopen(reading, "rb") as told:
        while not select.select([told], [], [], SECONDS)[0] and place[:] != before:
            before = place[:]
        if place[:] == before:
            os.kill(child, signal.SIGKILL)
        said = told.read()
    os.waitpid(child, 0)
    number = int.from_bytes(place[:], "little")
    return json.loads(said) if said else {f"FAILED: crashed or hung (number {number})": 1}


def count(found: collections.Counter[str], outcome: str, number: int) -> None:
    found[f"{outcome} (number {number})" if outcome.startswith("FAILED") else outcome] += 1


def read_one(data: bytes) -> str:
    started = time.perf_counter()
    try:
        parse(data)
        outcome = "read"
    except BundleError as error:
        outcome = "refused: BundleError" if str(error).strip() else "FAILED: an error without a word"
    except BaseException as error:
        outcome = f"FAILED: {type(error).__name__}: {str(error)[:200]!r}"
    seconds = time.perf_counter() - started
    return f"FAILED: took {seconds:.1f} s" if seconds > SLOW_S else outcome


# -- many of them ------------------------------------------------------------------------------------------------------

Found = dict[str, dict[str, int]]


def conversations(device: Device, seed: int, numbers: Sequence[int]) -> Found:
    """How often each outcome came, by family; failures with their number."""
    found: dict[str, collections.Counter[str]] = {}
    for number in numbers:
        one = case(device.host, seed, number)
        count(found.setdefault(one.family, collections.Counter()), device.hold(one), number)
    return {family: dict(sorted(outcomes.items())) for family, outcomes in sorted(found.items())}


@contextmanager
def device(bundle: Bundle) -> Iterator[Device]:
    """A device that has an older version of ``bundle``."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as scratch, environment(EDGE_INFER_CACHE=f"{scratch}/cache"):
        folder = Path(scratch).resolve()
        yield Device(folder, rewritten(bundle, folder / "old.edge", version="0"), bundle)


def run(bundle: Bundle, parts: Sequence[str], seed: int, numbers: Callable[[str], range]) -> Found:
    found: Found = {}
    if "receiver" in parts:
        with device(bundle) as there:
            found |= conversations(there, seed, numbers("receiver"))
    if "manifests" in parts:
        found["read alone"] = read_manifests(bundle.manifest.to_bytes(), seed, numbers("manifests"))
    return found


# -- docs/fuzzing.md ---------------------------------------------------------------------------------------------------

#: Heading -> how an outcome that counts there begins.
COLUMNS = {
    "answered or read>": ("answered", "read"),
    "said nothing>": ("said nothing",),
    "DeviceError>": ("refused: DeviceError",),
    "BundleError>": ("refused: BundleError",),
    "another error>": ("refused: UsageError", "refused: ReleaseNotFound", "refused: SelfTestFailed"),
    "unforeseen>": ("refused: unforeseen",),
    "failed>": ("FAILED",),
}


def page(report: dict[str, Any], text: str) -> str:
    """``text`` with the table that ``report`` gives."""
    rows = []
    for family, outcomes in report["families"].items():
        counts = [sum(n for said, n in outcomes.items() if said.startswith(begins)) for begins in COLUMNS.values()]
        total = sum(outcomes.values())
        if total != sum(counts):
            raise SystemExit(f"{family}: {outcomes} do not fit the columns")
        rows.append([f"`{family}`", *(f"{count:,}" if count else "" for count in (total, *counts))])
    lines = [f"Seed {report['seed']}, Python {report['python']}.", ""]
    return pages.between(text, "cases", [*lines, *pages.markdown(["family", "tried>", *COLUMNS], rows)])


def write_docs(found: Found, seed: int) -> None:
    import platform

    report = {"seed": seed, "python": platform.python_version(), "families": found}
    DATA.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(page(report, PAGE.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--bundle", type=Path, help="an ONNX bundle to push; the digits network where nothing is said")
    parser.add_argument("--count", type=int, help=", ".join(f"{part}: {n:,}" for part, n in COUNTS.items()))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case alone")
    parser.add_argument("--docs", action="store_true", help="put all into docs/fuzzing.json and its page")
    args = parser.parse_args()
    if args.docs and (args.only is not None or len(args.parts) < len(COUNTS)):
        parser.error("--docs takes all parts")

    def numbers(part: str) -> range:
        return range(args.count or COUNTS[part]) if args.only is None else range(args.only, args.only + 1)

    found = run(open_bundle(args.bundle or digits("int8")), args.parts, args.seed, numbers)
    for family, outcomes in found.items():
        print(f"{family}: {sum(outcomes.values())}")
        for outcome, times in sorted(outcomes.items(), key=lambda row: -row[1]):
            print(f"  {times:6}  {outcome}", flush=True)
    if args.docs:
        write_docs(found, args.seed)
    failed = sum(n for outcomes in found.values() for said, n in outcomes.items() if said.startswith("FAILED"))
    print(f"failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
