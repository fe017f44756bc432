"""Steps of packaging, each run once: a child process makes files, and they are kept by what they were made from.

    steps = Steps(cache_root(), log, progress)
    made = steps.run("edge_infer.quantize.onnx:build", {...}, "building onnx int8")
    made.folder, made.answer

The key of a step is a hash of the function, its request, this package's own code and the versions of the frameworks;
where the request names a file, the file's content counts and not its path. So the same request in another folder,
or on another day, finds what was made, and a change redoes only what depends on it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edge_infer import worker
from edge_infer.admission import describe, rebuild
from edge_infer.bundle import hash_file
from edge_infer.errors import ConversionError, ConverterMissing
from edge_infer.manifest import canonical_json

ANSWER = "answer.json"
#: A cache larger than this loses what was not used for longest, after each packaging.
MAX_BYTES = 20 * 10**9
#: A scratch folder older than this was left by a packaging that was killed.
ABANDONED_S = 24 * 3600.0
#: Folder in the same cache that is no step: what pushes keep (``edge_infer.deploy.bases``).
BASES = "bases"
#: Their versions are part of every key: another version may convert in another way.
TOOLS = (
    "ai-edge-litert",
    "ai-edge-quantizer",
    "keras",
    "litert-torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnxslim",
    "tensorflow",
    "tf2onnx",
    "torch",
)


def cache_root() -> Path:
    """``$EDGE_INFER_CACHE``, else ``edge-infer`` in the user's folder for caches."""
    given = os.environ.get("EDGE_INFER_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-infer"


@dataclass(frozen=True)
class Made:
    """What a step left: its files below ``folder`` and the JSON answer. Never changed afterwards."""

    key: str
    folder: Path
    answer: dict[str, Any]


class Steps:
    """Runs steps, or finds what they made before. ``progress`` hears of those that run; ``log`` has their output."""

    def __init__(self, root: Path, log: Path, progress: Callable[[str], None]) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.log, self.progress = root.resolve(), log, progress
        self.used: set[str] = set()
        self.ran = 0

    def run(self, call: str, request: Mapping[str, Any], title: str, identity: Mapping[str, str] | None = None) -> Made:
        """The step's files and answer; its function finds the folder to write to as ``request["out"]``.

        ``identity`` says what stands for a path in the key: the hash of what is there. Paths inside the cache are
        known by the keys in them. Raises what the function raised; a conversion that failed for a reason that it
        explained fails again without being tried.
        """
        key = self._key(call, request, identity or {})
        self.used.add(key)
        made = self._find(key)
        if made is None:
            self.progress(title)
            self.ran += 1
            made = self._make(key, call, request)
        if "error" in made.answer:
            raise rebuild(made.answer["error"])
        return made

    def _key(self, call: str, request: Mapping[str, Any], identity: Mapping[str, str]) -> str:
        named = {"call": call, "request": _renamed(request, {str(self.root): "", **identity}), "with": _environment()}
        return hashlib.sha256(canonical_json(named)).hexdigest()[:32]

    def _find(self, key: str) -> Made | None:
        folder = self.root / key
        try:
            kept = json.loads((folder / ANSWER).read_bytes())
        except (OSError, ValueError):
            return None
        whole = all(_size(folder / name) == size for name, size in kept["files"].items())
        current = all(_hash(Path(path)) == digest for path, digest in kept["answer"].get("depends_on", {}).items())
        if not whole or not current:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        os.utime(folder)
        return Made(key, folder, kept["answer"])

    def _make(self, key: str, call: str, request: Mapping[str, Any]) -> Made:
        aside = Path(tempfile.mkdtemp(prefix=".", dir=self.root))
        try:
            answer = self._answer(call, {**request, "out": str(aside)})
            # Answers name their files where they were made.
            answer = _renamed(answer, {str(aside): str(self.root / key)})
            files = {str(file.relative_to(aside)): file.stat().st_size for file in _files(aside)}
            (aside / ANSWER).write_bytes(canonical_json({"answer": answer, "files": files}))
            self._keep(aside, self.root / key)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return Made(key, self.root / key, answer)

    def _answer(self, call: str, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return worker.run(call, request, self.log)
        except ConverterMissing:
            raise
        except ConversionError as error:
            if not error.lasting:
                raise
            return {"error": describe(error)}

    def _keep(self, aside: Path, final: Path) -> None:
        try:
            aside.rename(final)
        except OSError:  # another process made the same meanwhile
            if not (final / ANSWER).is_file():
                raise


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """``value`` with paths replaced: those equal to a key of ``names`` and those below one."""
    if isinstance(value, str):
        for path in sorted(names, key=len, reverse=True):
            if value == path or value.startswith(f"{path}/"):
                return names[path] + value[len(path) :]
        return value
    if isinstance(value, Mapping):
        return {name: _renamed(item, names) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_renamed(item, names) for item in value]
    return value


@functools.cache
def _environment() -> dict[str, str]:
    """What a step's result depends on besides its request: this package's code, Python, the frameworks."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".py", ".txt", ".json"):
            digest.update(str(file.relative_to(folder)).encode() + b"\0" + hash_file(file).encode())
    found = {"edge-infer": digest.hexdigest(), "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _hash(path: Path) -> str | None:
    try:
        return hash_file(path)
    except OSError:
        return None


def _files(folder: Path) -> Iterable[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


@dataclass(frozen=True)
class Usage:
    """What a cache holds: finished steps and the bytes of all their files."""

    root: Path
    steps: int
    size: int


def usage(root: Path) -> Usage:
    found = folders(root)
    finished = [folder for folder in found if (folder / ANSWER).is_file()]
    return Usage(root, len(finished), size_of(found))


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of files, and of all files below folders."""
    return sum(map(_size_below, paths))


def trim(root: Path, most: int, keep: Iterable[str] = ()) -> int:
    """Remove the steps that were not used for longest until at most ``most`` bytes are left; gives the bytes removed.

    Those in ``keep`` stay.
    """
    return remove_oldest(folders(root), most, keep)


def remove_oldest(paths: Iterable[Path], most: int, keep: Iterable[str] = ()) -> int:
    """Remove the files and folders that were not used for longest until at most ``most`` bytes of them are left.

    Those named in ``keep`` stay, and so do the scratch folders (``.NAME``) of a process that may be running beside this
    one. Gives the bytes removed.
    """
    kept = set(keep)
    youngest = time.time() - ABANDONED_S
    sizes = {path: _size_below(path) for path in paths}
    total, removed = sum(sizes.values()), 0
    for path in sorted(sizes, key=_last_use):
        if total - removed <= most:
            break
        running = path.name.startswith(".") and _last_use(path) > youngest
        if path.name not in kept and not running:
            _remove(path)
            removed += sizes[path]
    return removed


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _last_use(folder: Path) -> float:
    """Seconds since the epoch; long ago for one that another process has just removed."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def folders(root: Path) -> list[Path]:
    """The finished steps and those being made."""
    found = root.iterdir() if root.is_dir() else ()
    return [folder for folder in found if folder.is_dir() and folder.name != BASES]


def _size_below(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(_size(file) or 0 for file in files if file.is_file())
