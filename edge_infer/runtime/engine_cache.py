"""What an engine makes of a model once and maps from then on: weights in the order that its kernels read.

    <cache>/<bundle digest>.<key>/      made aside and renamed, never changed afterwards
      <files of the engine>
      entry.json                        their lengths and hashes, what the key was made from, what went wrong, and
                                        a hash of all that
    <cache>/<bundle digest>.<key>.verified

An engine does not notice that such a file was made of another model, by another version or for another processor, and
answers wrongly without a word. So the key is made from all of these, and the files are hashed like those of a bundle
before an engine sees them. Nothing here is required: without it a model is opened the plain way. Whoever makes an entry
removes those that nobody needs any more (``tidy``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_infer.bundle import Bundle, describe_files, read_plain_file, sync_directory, sync_file, verify_files
from edge_infer.errors import EdgeInferError, EngineError, InputError, OutOfMemory, SelfTestFailed
from edge_infer.manifest import FileEntry, seal
from edge_infer.records import Record
from edge_infer.runtime import memory

ENTRY_NAME = "entry.json"
#: Changes when what is made, or how, changes in a way that the key does not show.
FORMAT = 2
#: An entry lists a few files; one that is larger is refused unread.
ENTRY_MAX_BYTES = 64 * 1024
#: Of /proc/cpuinfo: all of a board's, the first processors of a server's. Reading it is slow where there are many.
CPUINFO_BYTES = 16384
#: For a smaller bundle there is nothing to save that would be worth a child.
SMALLEST_BYTES = 2**20
#: What an engine may write, as a multiple of the bundle's size: ONNX Runtime keeps its weights raw and packed.
MOST_TIMES = 2
#: An entry's last use is noted no more often than that.
NOTED_S = 600.0
#: A child that has not opened a small model and asked its golden questions by then hangs. Half of what a self-test may
#: take (``admission.TIMEOUT_S``), which goes on with the plain way after that.
CHILD_S = 60.0

#: Private memory of a child beside that for the model: Python, numpy and an engine.
CHILD_BYTES = 64 * 2**20


@dataclass(eq=False, repr=False)
class Entry(Record):
    """What was made. ``failed``: the sentence why nothing was; ``lacks_memory``: because of memory, this time."""

    path: Path
    files: Mapping[str, FileEntry]
    failed: str = ""
    lacks_memory: bool = False

    def file(self, name: str) -> Path:
        return self.path / name


@dataclass(eq=False, repr=False)
class Build(Record):
    """How a child is asked to make an entry: more arguments of ``prepare``, and how long it may take if not CHILD_S
    beside what a slow card needs for the bundle.

    ``private_bytes``: the private memory that it takes for the model. It is not tried where there is less.
    """

    arguments: tuple[str, ...] = ()
    seconds: float | None = None
    private_bytes: int = 0


AS_USUAL = Build()


class EngineCache:
    """The entry of one bundle for one engine in ``folder``."""

    def __init__(self, folder: Path, bundle: Bundle, facts: Mapping[str, str]) -> None:
        self.facts = {"format": str(FORMAT), "bundle": bundle.digest, **machine(), **facts}
        key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"{bundle.digest}.{key}"
        self._source = bundle.path

    def find(self, verify: str = "auto") -> Entry | None:
        """The entry, its files verified; None where there is none, and where it is damaged, which removes it."""
        if not os.path.lexists(self.path):
            return None
        try:
            entry = self._read()
            verify_files(entry.path, entry.files, verify, self._stamp, lambda: None) if entry.files else None
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ):  # BundleError is a ValueError
            self.remove()
            return None
        self._note_use()
        return entry

    def build(self, make: Callable[[Path], str]) -> Entry:
        """Let ``make`` fill a folder, and keep it.

        ``make`` gives an empty text, or the sentence why this model has no such files, which is kept in their place so
        that it is not tried at each load. It raises OSError or OutOfMemory for what may pass, such as a full disk; so
        does a folder that cannot be written, and nothing is kept then. Of two processes that build the same, the first
        one's stays.
        """
        import shutil  # here, since their import takes longer than opening a model
        import tempfile

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}."))
        except OSError as error:
            return Entry(self.path, {}, str(error))
        try:
            aside.chmod(0o755)  # whoever pushes and whoever runs models may differ
            failed = make(aside)
            self._seal(aside, failed)
            with contextlib.suppress(OSError):  # not empty: another process was faster
                aside.rename(self.path)
            sync_directory(self.path.parent)
            self._tidy()
        except (OSError, OutOfMemory) as error:
            return Entry(self.path, {}, str(error), isinstance(error, OutOfMemory))
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return self.find() or Entry(self.path, {}, f"what was built in {self.path} is gone again")

    def remove(self) -> None:
        """Forget the entry; a damaged one must not be seen half removed either."""
        import shutil

        doomed = self.path.with_name(f".{self.path.name}.{os.getpid()}.removed")
        with contextlib.suppress(OSError):
            self.path.rename(doomed)
            doomed.unlink()  # what is no folder: rmtree would leave it there, and wait for a pipe's writer
        shutil.rmtree(doomed, ignore_errors=True)

    def _note_use(self) -> None:
        """The time of ``entry.json`` is that of the last use, ten minutes more or less."""
        path = self.path / ENTRY_NAME
        with contextlib.suppress(OSError):  # a read-only disk has no need of it
            if path.stat().st_mtime < time.time() - NOTED_S:
                os.utime(path)

    def _tidy(self) -> None:
        from edge_infer.runtime.tidy import tidy

        with contextlib.suppress(OSError):
            tidy(self.path.parent, keep=self.path.name)

    @property
    def _stamp(self) -> Path:
        return self.path.with_name(f"{self.path.name}.verified")

    def _read(self) -> Entry:
        data = read_plain_file(self.path / ENTRY_NAME, ENTRY_MAX_BYTES)
        row = json.loads(data)
        if seal(row) != data or row["facts"] != self.facts:
            raise ValueError("damaged, or made from something else")
        files = {name: FileEntry(int(size), str(sha256)) for name, (size, sha256) in row["files"].items()}
        return Entry(self.path, files, str(row["failed"]))

    def _seal(self, folder: Path, failed: str) -> None:
        if failed:
            _empty(folder)
        names = sorted(os.listdir(folder))
        files = describe_files(folder, names)
        row = {
            "facts": self.facts,
            "source": str(self._source.absolute()),
            "failed": failed,
            "files": {name: [entry.size, entry.sha256] for name, entry in files.items()},
        }
        (folder / ENTRY_NAME).write_bytes(seal(row))
        for name in [*names, ENTRY_NAME]:
            sync_file(folder / name)
        sync_directory(folder)


def worth_it(bundle: Bundle) -> bool:
    """Whether a bundle is so large that an entry saves time and memory."""
    return bundle.manifest.size >= SMALLEST_BYTES


def entry(bundle: Bundle, folder: Path, facts: Mapping[str, str], verify: str, build: Build = AS_USUAL) -> Entry:
    """The entry of ``bundle`` in ``folder`` for an engine with these ``facts``, made when it is not there."""
    cache = EngineCache(folder, bundle, facts)
    return cache.find(verify) or cache.build(lambda aside: prepare_in_child(bundle, aside, build))


def prepare_in_child(bundle: Bundle, folder: Path, build: Build) -> str:
    """Let a child open the bundle with an engine that fills ``folder``, and ask it the golden questions.

    Gives an empty text, or the sentence why it must not be tried again. Raises OSError or OutOfMemory for what may
    pass.
    """
    from edge_infer import admission

    _require_memory(build)
    try:
        # Absolute, since the child's current folder is another one.
        arguments = ["prepare", str(bundle.path.absolute()), str(folder.absolute()), *build.arguments]
        limit_s = (build.seconds or CHILD_S) + admission.slow_s(bundle.path)
        admission.run_child(sys.executable, arguments, max(limit_s, admission.patience_s() / 2))
    except (EngineError, InputError, SelfTestFailed) as error:
        if isinstance(error, OutOfMemory):
            raise
        _require_room(folder, MOST_TIMES * bundle.manifest.size)  # engines have many words for a full disk
        return str(error)
    except EdgeInferError as error:
        raise OSError(str(error)) from error
    return ""


def _require_memory(build: Build) -> None:
    """Raise OutOfMemory rather than have the system look for someone to kill."""
    if not build.private_bytes:
        return
    takes, has = build.private_bytes + CHILD_BYTES, memory.available_bytes()
    if takes > has:
        raise OutOfMemory(f"it takes {takes:,} bytes of private memory in a child, the system has {has:,}")


def _require_room(folder: Path, size: int) -> None:
    """Raise OSError unless ``folder`` has room for a file of ``size`` bytes once it is empty, which it is then."""
    _empty(folder)
    with (folder / "room").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    _empty(folder)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def machine() -> dict[str, str]:
    """What of this machine decides which kernels an engine picks."""
    return {"machine": os.uname().machine, "processor": _processor()}


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open("rb", buffering=0) as file:
            text = file.read(CPUINFO_BYTES)
    except OSError:
        return ""
    # What changes from moment to moment, as the clock does, is no part of it.
    kinds = (b"flags", b"Features", b"model name", b"CPU part", b"CPU implementer", b"CPU variant", b"isa")
    lines = sorted({line for line in text.splitlines() if line.startswith(kinds)})
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def engine_build(library: Path) -> str:
    """Tells builds of the same version apart: length and time of an engine's library."""
    info = library.stat()
    return f"{info.st_size} {info.st_mtime_ns}"
