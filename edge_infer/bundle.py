"""A bundle on disk: open it, verify it, write it.

A bundle is a directory that is never changed after it was written. ``manifest.json`` holds length and SHA-256 of
every other file; nothing else may lie there but ``manifest.sig``, which says who made it. Standard library only,
Python >= 3.8: a push sends this file along.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Mapping, Optional

from edge_infer.errors import BundleError, UsageError
from edge_infer.manifest import MANIFEST_MAX_BYTES, MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest, parse
from edge_infer.records import Record

#: Reading in pieces of this size keeps the memory of a check flat.
CHUNK_BYTES = 1024 * 1024
#: A file changed more recently than this may change again within one tick of the file system's clock, unseen.
SETTLED_NS = 100_000_000
#: A plain key's signature has half a kilobyte, one with a certificate a few.
SIGNATURE_MAX_BYTES = 64 * 1024
VERIFY_MODES = ("auto", "full")


@dataclass(eq=False, repr=False)
class Bundle(Record):
    """An opened bundle. ``digest`` is its identity."""

    path: Path
    manifest: Manifest
    digest: str

    def file(self, name: str) -> Path:
        return self.path / name


def open_bundle(path: Path) -> Bundle:
    """Read the manifest of the bundle at ``path`` and compare the folder's names and lengths with it.

    No file is hashed yet: see ``verify``. Raises UsageError when nothing is there, BundleError when it is not a
    bundle or is incomplete.
    """
    if not path.exists():
        raise UsageError(f"there is no bundle at {path}")
    if not path.is_dir():
        raise BundleError(f"{path} is a file, expected a bundle directory with a {MANIFEST_NAME} in it")
    data = read_plain_file(path / MANIFEST_NAME, MANIFEST_MAX_BYTES)
    manifest = parse(data)
    check_listing(path, manifest)
    return Bundle(path, manifest, hashlib.sha256(data).hexdigest())


def read_plain_file(path: Path, most: int) -> bytes:
    """The content of a regular file that is no link and holds at most ``most`` bytes; else BundleError."""
    try:
        descriptor = os.open(str(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise BundleError(f"{path.parent} holds no {path.name}, so it is not a bundle") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_size > most:
            raise BundleError(f"{path} is not a plain file of at most {most} bytes")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def check_listing(path: Path, manifest: Manifest) -> None:
    """Raise BundleError unless the folder holds exactly the manifest's files, plain and of the right length."""
    try:  # a store may collect the release while this looks at it
        with os.scandir(path) as entries:
            found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
    except OSError as error:
        raise BundleError(f"{path} cannot be listed: {error.strerror}; package or push the model again") from None
    found.pop(MANIFEST_NAME, None)
    signature = found.pop(SIGNATURE_NAME, None)
    if signature and not (stat.S_ISREG(signature.st_mode) and signature.st_size <= SIGNATURE_MAX_BYTES):
        raise BundleError(f"{path / SIGNATURE_NAME} is not a plain file of at most {SIGNATURE_MAX_BYTES} bytes")
    for name in sorted(found.keys() - manifest.files.keys()):
        raise BundleError(f"{path} holds {name!r}, which its manifest does not list; remove it or package again")
    for name, entry in sorted(manifest.files.items()):
        if name not in found:
            raise BundleError(f"{path} lacks {name!r}, which its manifest lists; package or push the model again")
        info = found[name]
        if not stat.S_ISREG(info.st_mode):
            raise BundleError(f"{path / name} is not a plain file; links and devices are refused")
        if info.st_size != entry.size:
            raise BundleError(
                f"{path / name} has {info.st_size} bytes, expected {entry.size}; package or push the model again"
            )


def hash_file(path: Path) -> str:
    """SHA-256 of a plain file, read in pieces."""
    digest = hashlib.sha256()
    descriptor = os.open(str(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # or a pipe would wait for its writer
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()


def verify(
    bundle: Bundle,
    mode: str = "auto",
    stamp_dir: Optional[Path] = None,
    inspect: Optional[Callable[[Bundle], None]] = None,
) -> bool:
    """Make sure that every file is what the manifest says, before an engine sees it.

    A full check hashes every file, calls ``inspect`` (which may refuse the content), and leaves a stamp (device,
    inode, length and times of each file) in ``stamp_dir``; with ``mode="auto"`` a fitting stamp stands in for both
    until any of these changes. Returns whether the files were hashed. Raises BundleError naming the file, observed
    and expected hash.
    """
    if mode not in VERIFY_MODES:
        raise UsageError(f"verify={mode!r} is not known, expected one of {', '.join(VERIFY_MODES)}")
    stamp = stamp_dir / f"{bundle.digest}.verified" if stamp_dir else None

    def inspect_bundle() -> None:
        if inspect:
            inspect(bundle)

    return verify_files(bundle.path, bundle.manifest.files, mode, stamp, inspect_bundle)


def verify_files(
    folder: Path,
    files: Mapping[str, FileEntry],
    mode: str = "full",
    stamp: Optional[Path] = None,
    inspect: Callable[[], None] = lambda: None,
) -> bool:
    """``verify`` for files of any folder; ``stamp`` is the file that remembers. Raises BundleError, OSError."""
    before = _stamps(folder, files)
    if mode == "auto" and stamp and _read_stamp(stamp) == before:
        return False
    started = time.time_ns()
    for name, entry in sorted(files.items()):
        observed = hash_file(folder / name)
        if observed != entry.sha256:
            raise BundleError(
                f"{folder / name} has SHA-256 {observed[:16]}..., expected {entry.sha256[:16]}...: the file is "
                "damaged; package or push the model again"
            )
    inspect()
    newest = max((max(row[3:]) for row in before.values()), default=0)
    if stamp and _stamps(folder, files) == before and newest < started - SETTLED_NS:
        _write_stamp(stamp, before)
    return True


def _stamps(folder: Path, names: Iterable[str]) -> Dict[str, List[int]]:
    rows = {}
    for name in names:
        info = os.lstat(folder / name)
        rows[name] = [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]
    return rows


def _read_stamp(path: Path) -> object:
    try:
        return json.loads(read_plain_file(path, MANIFEST_MAX_BYTES))
    except (OSError, ValueError, RecursionError):  # BundleError is a ValueError
        return None


def _write_stamp(path: Path, rows: Dict[str, List[int]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(rows).encode(), durable=False)
    except OSError:
        pass  # a read-only or full disk costs a hash at the next load, nothing else


def replace_file(path: Path, data: bytes, durable: bool = True, aside: Optional[Path] = None) -> None:
    """Write ``path`` aside and rename it into place; durably also syncs the file and the directory.

    ``aside`` is a folder on the same file system for what is being written (default: that of ``path``): a process that
    is killed leaves it there.
    """
    import tempfile  # here, since its import takes longer than opening a bundle

    descriptor, temporary = tempfile.mkstemp(dir=str(aside or path.parent), prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            # mkstemp lets nobody else read: the user who pushes and the one who runs models may differ.
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if durable:
        for folder in {path.parent, aside or path.parent}:
            sync_directory(folder)


def sync_directory(path: Path) -> None:
    """Make renames and new names in ``path`` survive a power cut."""
    descriptor = os.open(str(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    descriptor = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_files(folder: Path, names: Iterable[str]) -> Mapping[str, FileEntry]:
    """Length and hash of files in ``folder``, for a manifest."""
    return {name: FileEntry((folder / name).stat().st_size, hash_file(folder / name)) for name in sorted(names)}


def write_bundle(manifest: Manifest, folder: Path, path: Path) -> Bundle:
    """Turn ``folder``, which holds the manifest's files, into the bundle ``path``.

    The bundle is put together beside ``path`` and renamed, so that a half-written one never shows. An older
    bundle at ``path`` is replaced; anything else there is refused with UsageError.
    """
    import shutil
    import tempfile

    refuse_to_overwrite(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=str(path.parent), prefix=f".{path.name}."))
    try:
        fresh = aside / "new"
        fresh.mkdir()
        for name in manifest.files:
            shutil.copyfile(folder / name, fresh / name)
            sync_file(fresh / name)
        (fresh / MANIFEST_NAME).write_bytes(manifest.to_bytes())
        sync_file(fresh / MANIFEST_NAME)
        sync_directory(fresh)
        verify(open_bundle(fresh), mode="full")
        _put_in_place(fresh, path, aside / "old")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return open_bundle(path)


def _put_in_place(fresh: Path, path: Path, old: Path) -> None:
    """Rename ``fresh`` to ``path``; what was there goes to ``old``, and back again when that fails."""
    if path.exists():
        path.rename(old)
    try:
        fresh.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    sync_directory(path.parent)


def refuse_to_overwrite(path: Path) -> None:
    """Raise UsageError when something that is not a bundle lies at ``path``.

    A file called manifest.json does not make a folder a bundle: other programs have those too, and replacing a
    bundle removes the whole folder.
    """
    if not os.path.lexists(str(path)):
        return
    try:
        open_bundle(path)
    except (BundleError, UsageError) as error:
        raise UsageError(
            f"{path} exists and is not a sound bundle ({error}); choose another name with -o or remove it"
        ) from None
