"""The device's releases: stage, admit, activate, confirm, roll back, collect garbage.

    releases/<name>/<digest>/   immutable bundle directories
    current/<name>              the pointer: the release in use, then what to go back to (pointer.py)
    journal/<name>              what happened, for people (journal.py)
    cache/                      what engines may keep; never required
    staging/<digest>/           a push on its way; survives an interruption so that the next push goes on
    staging/<digest>.deltas/    what it sends instead of files, likewise
    lock                        held while something changes the store; says who holds it

The pointer file is replaced by a rename, so a power cut leaves the old or the new model. The store knows nothing
of SSH. Standard library only, Python >= 3.8: a push sends this file along.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import Collection, Dict, Iterator, List, Optional, Tuple

from edge_infer import journal
from edge_infer.bundle import (
    Bundle,
    check_listing,
    open_bundle,
    read_plain_file,
    replace_file,
    sync_directory,
    sync_file,
    verify_files,
)
from edge_infer.errors import BundleError, DeviceError, ReleaseNotFound, UsageError
from edge_infer.manifest import PLAIN_NAME, SHA256
from edge_infer.pointer import Pointer, parse_pointer, pending_for

#: How many releases of a model are kept: the one in use and the one to go back to.
KEEP = 2
#: What a store keeps below its root.
FOLDERS = ("releases", "current", "journal", "cache", "staging")
#: Two digests take 130 bytes; a pointer is small however many are kept.
POINTER_MAX_BYTES = 64 * 1024
#: What an interrupted push left is kept for so long, so that it can go on.
STAGING_KEPT_S = 7 * 24 * 3600
#: How often a change that waits for another tries again.
RETRY_S = 0.1


def default_root() -> Path:
    """``$EDGE_INFER_HOME`` or ``~/.edge-infer``."""
    return Path(os.environ.get("EDGE_INFER_HOME") or "~/.edge-infer").expanduser()


def is_model_name(text: str) -> bool:
    """Whether ``text`` can name a model in a store, and so is not meant as a path."""
    return bool(PLAIN_NAME.match(text)) and not text.endswith(".edge")


class Store:
    """One device's releases below ``root``. Methods that change it are called with ``lock()`` held."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = root / "cache"

    # -- reading -----------------------------------------------------------------------------------------------

    def names(self) -> List[str]:
        """Models that have a release in use."""
        folder = self.root / "current"
        return sorted(entry.name for entry in folder.iterdir() if is_model_name(entry.name)) if folder.is_dir() else []

    def pointer(self, name: str) -> Pointer:
        """What holds now of ``current/<name>``: a pending release whose time is over is left out. Empty if none.

        Raises UsageError for what cannot be a name, BundleError when the file is damaged.
        """
        return self._read_pointer(name).settled()

    def digests(self, name: str) -> List[str]:
        """Digests of ``name``: the one in use first, then what a rollback goes to. Empty when there is none."""
        return list(self.pointer(name).digests)

    def _read_pointer(self, name: str) -> Pointer:
        if not is_model_name(name):
            raise UsageError(f"{name!r} is not a model name: letters, digits and ._+- only, at most 100")
        path = self.root / "current" / name
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return Pointer(())
        if not stat.S_ISREG(mode):
            raise BundleError(f"{path} cannot be read (it is not a plain file); push the model again")
        return parse_pointer(read_plain_file(path, POINTER_MAX_BYTES), path)

    def release(self, name: str, digest: str) -> Path:
        return self.root / "releases" / name / digest

    def open_current(self, name: str) -> Bundle:
        """The bundle in use. Raises ReleaseNotFound when ``name`` has none, BundleError when it is damaged.

        Goes back for good from a release that was not confirmed in time.
        """
        found = self._read_pointer(name)
        if found.settled() is not found:
            self._go_back(name)
        digests = self.digests(name)
        while digests:
            try:
                return self._open_release(name, digests[0])
            except (UsageError, BundleError):
                # A push may have moved on and collected this release between our two looks.
                latest = self.digests(name)
                if latest[:1] == digests[:1]:
                    raise
                digests = latest
        if found.digests:
            raise ReleaseNotFound(
                f"the release {found.digests[0][:12]} of {name!r} was not confirmed in time and there is none before "
                "it; push it again, and confirm it (edge_infer.confirm)"
            )
        known = ", ".join(self.names()) or "none"
        raise ReleaseNotFound(f"no model {name!r} in the store {self.root} (it holds: {known}); push it first")

    def _go_back(self, name: str) -> None:
        """Write down that the time of a pending release is over; where that is impossible, it is over all the same."""
        with contextlib.suppress(DeviceError, OSError), self.lock():
            self.settle(name)

    def _open_release(self, name: str, digest: str) -> Bundle:
        path = self.release(name, digest)
        if not path.is_dir():
            raise BundleError(f"the release {path} is gone though it is in use; push the model again")
        bundle = open_bundle(path)
        if bundle.digest != digest:
            raise BundleError(f"{path} holds the bundle {bundle.digest[:12]}, expected {digest[:12]}; push it again")
        return bundle

    def status(self) -> List[Dict[str, object]]:
        """One row a model: name, version, format, precision, digest, what a rollback goes to, bytes.

        ``pending_s`` is there for a release that waits to be confirmed: the seconds that are left.
        """
        rows: List[Dict[str, object]] = []
        for name in self.names():
            row: Dict[str, object] = {"name": name, "digest": "", "previous": []}
            try:
                pointer = self.pointer(name)
                if not pointer.digests:
                    raise ReleaseNotFound("its only release was not confirmed in time; push it again")
                row.update(digest=pointer.digests[0], previous=list(pointer.digests[1:]))
                if pointer.pending:
                    row["pending_s"] = int(pointer.pending.left_s())
                manifest = self._open_release(name, pointer.digests[0]).manifest
            except (BundleError, ReleaseNotFound) as error:
                row["error"] = str(error)
            else:
                artifact = manifest.artifact
                row.update(
                    version=manifest.version,
                    target=manifest.target.name,
                    format=artifact.format,
                    precision=artifact.precision,
                    size=manifest.size,
                )
            rows.append(row)
        return rows

    def events(self, name: str) -> List[Dict[str, object]]:
        """What happened to ``name``, oldest first; see ``journal.events``."""
        if not is_model_name(name):
            raise UsageError(f"{name!r} is not a model name: letters, digits and ._+- only, at most 100")
        return journal.events(self.root / "journal" / name)

    # -- changing ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, wait_s: float = 0.0, who: str = "") -> Iterator[None]:
        """Hold the store for one change; the kernel lets go of it when the process ends, however it ends.

        Waits ``wait_s`` seconds for another change to end. ``who`` is told to those who find it busy. Raises
        DeviceError when it stays busy, or is no store to write in.
        """
        if not (self.root / "lock").exists():
            self._make_root()
        self._refuse_links()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(str(self.root / "lock"), flags, 0o644)
        try:
            self._wait_for_lock(descriptor, wait_s)
            with contextlib.suppress(OSError):  # a full disk has no room for the name, and needs a collection
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, who.encode("utf-8", "replace")[:200], 0)
            yield
        finally:
            os.close(descriptor)

    def _make_root(self) -> None:
        """Make the store's own folder, so that it outlasts a power cut as what is put into it does."""
        self.root.mkdir(parents=True, exist_ok=True)
        for folder in self.root.absolute().parents:
            with contextlib.suppress(OSError):  # not every folder above it may be read
                sync_directory(folder)

    def _refuse_links(self) -> None:
        """Raise DeviceError where a link stands for a folder: a push would write and a collection empty what it
        leads to."""
        folders = [self.root / name for name in FOLDERS] + sorted((self.root / "releases").glob("*"))
        for path in folders:
            if path.is_symlink():
                raise DeviceError(f"{path} is a link, expected a folder of the store's own; remove the link")

    def _wait_for_lock(self, descriptor: int, wait_s: float) -> None:
        end = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if time.monotonic() >= end:
                raise DeviceError(self._busy(os.pread(descriptor, 200, 0).decode("utf-8", "replace"), wait_s))
            time.sleep(RETRY_S)

    def _busy(self, owner: str, waited_s: float) -> str:
        busy = f"still busy after {waited_s:g} s" if waited_s else "busy"
        return (
            f"the store {self.root} is {busy} with {owner or 'another push or rollback'}; try again when that has "
            "ended, or wait for it (--wait)"
        )

    def staging(self, digest: str) -> Path:
        """The folder in which a push of ``digest`` gathers files; made when missing."""
        path = self.root / "staging" / digest
        if path.is_symlink():
            path.unlink()
        path.mkdir(parents=True, exist_ok=True)
        return path

    def admit(self, staged: Path, name: str, digest: str, hashed: Collection[str] = ()) -> Bundle:
        """Verify the staged bundle by hash, sync its files and move it among the releases; nothing uses it yet.

        ``hashed`` names files whose hash was found right while they arrived.
        """
        bundle = open_bundle(staged)
        if bundle.digest != digest or bundle.manifest.name != name:
            raise BundleError(
                f"{staged} holds {bundle.manifest.name} {bundle.digest[:12]}, expected {name} {digest[:12]}"
            )
        unknown = {file: entry for file, entry in bundle.manifest.files.items() if file not in hashed}
        verify_files(staged, unknown)
        for path in staged.iterdir():  # the manifest's files, itself and its signature: nothing else lies there
            sync_file(path)
        sync_directory(staged)
        path = self.release(name, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._remove(path)  # a damaged copy: a sound one would not have been sent again
        staged.rename(path)
        return open_bundle(path)

    def has(self, name: str, digest: str) -> bool:
        """Whether a sound copy of the release is here, by hash."""
        path = self.release(name, digest)
        if not path.is_dir():
            return False
        try:
            verify_files(path, self._open_release(name, digest).manifest.files)
        except (BundleError, OSError):
            return False
        return True

    def activate(
        self, name: str, digest: str, keep: int = KEEP, confirm_within_s: Optional[float] = None, who: str = ""
    ) -> None:
        """Make a release the one in use. The step that a power cut leaves done or not done.

        ``keep``: how many releases of the model are kept, this one included. ``confirm_within_s``: it is in use on
        trial until ``confirm``, for so many seconds. The release in use already is not put on trial again.
        """
        check_listing(self.release(name, digest), open_bundle(self.release(name, digest)).manifest)
        self._sync_names(name)
        try:
            before = self.pointer(name)
        except BundleError:
            before = Pointer(())  # a damaged pointer is mended by pushing again, as its error says
        # Nobody goes back to a release that was itself still on trial.
        older = [other for other in before.digests[1 if before.pending else 0 :] if other != digest]
        trial = confirm_within_s is not None and (before.digests[:1] != (digest,) or before.pending is not None)
        pending = pending_for(confirm_within_s) if trial and confirm_within_s is not None else None
        self._point(name, Pointer((digest, *older)[: max(1, keep)], pending))
        self.note(name, "on trial" if pending else "activated", digest, who=who)

    def _sync_names(self, name: str) -> None:
        """Let the names that lead to a release reach the disk before the pointer that says them.

        Also where this process did not make them: the one that did may have been killed before it could.
        """
        releases = self.root / "releases"
        for folder in (releases / name, releases, self.root / "staging", self.root):
            if folder.is_dir():
                sync_directory(folder)

    def confirm(self, name: str, digest: Optional[str] = None, who: str = "") -> str:
        """Keep the release in use, which was on trial; gives its digest. ``digest``: it must be that one.

        Raises ReleaseNotFound when it is not in use, or no more.
        """
        found = self._read_pointer(name)
        now = found.settled()
        if not found.digests:
            raise ReleaseNotFound(f"no release of {name!r} is in use, so none can be confirmed; push it first")
        wanted = digest or found.digests[0]
        if now.digests[:1] != (wanted,):
            raise ReleaseNotFound(
                f"the release {wanted[:12]} of {name!r} cannot be confirmed: {self._serving(now)}; its time may be "
                "over, push it again"
            )
        if now.pending:
            self._point(name, Pointer(now.digests))
            self.note(name, "confirmed", now.digests[0], who=who)
        return now.digests[0]

    def settle(self, name: str) -> None:
        """Go back for good where the time of a pending release is over."""
        found = self._read_pointer(name)
        now = found.settled()
        if now is not found:
            self._point(name, now)
            self.note(name, "not confirmed", found.digests[0], self._serving(now))

    def reject(self, name: str, digest: str, reason: str) -> None:
        """Go back at once from a release on trial."""
        found = self._read_pointer(name)
        if found.pending and found.digests[0] == digest:
            self._point(name, Pointer(found.digests[1:]))
        self.note(name, "refused", digest, reason)

    def _serving(self, pointer: Pointer) -> str:
        return f"the release {pointer.digests[0][:12]} is in use" if pointer.digests else "none is in use"

    def rollback(self, name: str, digest: Optional[str] = None, who: str = "") -> str:
        """Go back to the release before, or to ``digest``; gives the digest in use then. Raises ReleaseNotFound."""
        wanted, digests = self.older(name, digest), self.digests(name)
        path = self.release(name, wanted)
        verify_files(path, self._open_release(name, wanted).manifest.files)
        self._point(name, Pointer(tuple(digests[digests.index(wanted) :])))
        self.note(name, "rolled back", wanted, who=who)
        return wanted

    def older(self, name: str, digest: Optional[str] = None) -> str:
        """The release that a rollback goes to: the one before, or the one whose digest begins with ``digest``.

        Raises ReleaseNotFound when it is not kept.
        """
        digests = self.digests(name)
        if len(digests) < 2:
            what = "has only the release in use" if digests else "is not in this store"
            raise ReleaseNotFound(f"cannot roll back: {name!r} {what} ({self.root})")
        older = [known for known in digests[1:] if known.startswith(digest or "")]
        if not older:
            kept = ", ".join(known[:12] for known in digests[1:])
            raise ReleaseNotFound(f"cannot roll back: {name!r} has no older release {digest}, only {kept}")
        return older[0]

    def keep_only(self, name: str, keep: int) -> None:
        """Forget all but the ``keep`` newest releases of ``name``; ``collect`` then removes them.

        Raises ReleaseNotFound when it has none.
        """
        self.settle(name)
        found = self._read_pointer(name)
        if not found.digests:
            raise ReleaseNotFound(f"no model {name!r} in the store {self.root}; `status` lists those that are there")
        if len(found.digests) > max(1, keep):
            self._point(name, Pointer(found.digests[: max(1, keep)], found.pending))

    def note(self, name: str, event: str, digest: str, reason: str = "", who: str = "") -> None:
        """Add to the journal of ``name``."""
        journal.note(self.root / "journal" / name, event, digest, reason, who)

    def discard(self, name: str, digest: str) -> None:
        """Remove a release unless it is in use or kept to go back to."""
        if digest not in self.digests(name):
            self._remove(self.release(name, digest))

    def collect(self, all_staging: bool = False, spare: str = "") -> int:
        """Remove what nothing refers to: old releases, staging left behind, stamps. Returns the bytes freed.

        What a push left behind stays for a week, or goes with ``all_staging`` but for that of the digest ``spare``.
        Of a model whose pointer is damaged every release is kept: nobody knows which one it means.
        """
        freed = 0
        kept = set(self._kept())
        for path in sorted((self.root / "releases").glob("*/*")):
            if (path.parent.name, path.name) not in kept:
                freed += self._remove(path)
        for path in self._left_behind(all_staging, spare):
            freed += self._remove(path)
        for path in sorted((self.root / "current").glob(".*")):
            freed += self._remove(path)  # a pointer whose writer died before the rename
        digests = {digest for _, digest in kept}
        for path in sorted(self.cache.glob("*")):
            if path.name.split(".")[0] not in digests:
                freed += self._remove(path)
        return freed

    def reclaimable_bytes(self, spare: str) -> int:
        """What ``collect(all_staging=True, spare=spare)`` would free at least."""
        return sum(_size_of(path) for path in self._left_behind(True, spare))

    def _left_behind(self, all_staging: bool, spare: str) -> List[Path]:
        """What lies in ``staging`` and is to be collected."""
        oldest = time.time() - STAGING_KEPT_S
        found = []
        for path in sorted((self.root / "staging").glob("*")):
            digest = path.name.split(".")[0]  # of a bundle's files, or with a suffix of its deltas
            fresh = bool(SHA256.match(digest)) and path.lstat().st_mtime > oldest
            if digest != spare if all_staging else not fresh:
                found.append(path)
        return found

    def _kept(self) -> Iterator[Tuple[str, str]]:
        for name in self.names():
            try:
                digests = list(self._read_pointer(name).digests)
            except BundleError:
                digests = [path.name for path in (self.root / "releases" / name).glob("*")]
            yield from ((name, digest) for digest in digests)

    def _point(self, name: str, pointer: Pointer) -> None:
        """Replace the pointer of ``name``; an empty one is removed."""
        folder = self.root / "current"
        folder.mkdir(parents=True, exist_ok=True)
        if pointer.digests:
            replace_file(folder / name, pointer.to_bytes())
        else:
            (folder / name).unlink()
            sync_directory(folder)
        sync_directory(self.root)

    def _remove(self, path: Path) -> int:
        """Remove a file or folder below the store and return its bytes; a folder is renamed away first."""
        if not path.is_dir() or path.is_symlink():
            try:
                size = path.lstat().st_size
                path.unlink()
            except FileNotFoundError:
                return 0  # a session that takes no lock renamed its stamp meanwhile
            return size
        doomed = self._doomed(path)
        size = _size_of(doomed)
        _remove_folder(doomed)
        return size

    def _doomed(self, path: Path) -> Path:
        """A release must not be seen half removed: it leaves its place in one step."""
        trash = self.root / "staging"
        trash.mkdir(parents=True, exist_ok=True)
        target = trash / f"removed-{path.name}"
        _remove_folder(target)
        if path != target:
            path.rename(target)
        return target


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if file.is_file())


def _remove_folder(path: Path) -> None:
    import shutil  # it brings four kinds of compression, which no load needs

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(str(path)):
        path.unlink()  # rmtree waits for ever at a pipe


def store_of(path: Path) -> Optional[Store]:
    """The store that a release directory belongs to, if it lies in one."""
    folder = path.resolve()
    if SHA256.match(folder.name) and folder.parent.parent.name == "releases":
        return Store(folder.parent.parent.parent)
    return None
