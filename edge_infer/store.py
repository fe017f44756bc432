"""The device's releases: stage, admit, activate, roll back, collect garbage.

    releases/<name>/<digest>/   immutable bundle directories
    current/<name>              digests, one a line: the one in use, then what to go back to, newest first
    cache/                      what engines may keep; never required
    staging/<digest>/           a push on its way; survives an interruption so that the next push goes on
    lock                        held while a push, a rollback or a collection runs

The pointer file is replaced by a rename, so a power cut leaves the old or the new model. The store knows nothing
of SSH. Standard library only, Python >= 3.8: a push sends this file along.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import Dict, Iterator, List, Optional

from edge_infer.bundle import Bundle, check_listing, open_bundle, replace_file, sync_directory, sync_file, verify
from edge_infer.errors import BundleError, DeviceError, ReleaseNotFound, UsageError
from edge_infer.manifest import MANIFEST_NAME, PLAIN_NAME, SHA256

#: How many releases of a model are kept: the one in use and the one to go back to.
KEEP = 2


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

    def history(self, name: str) -> List[str]:
        """Digests of ``name``: the one in use first, then what a rollback goes to. Empty when there is none."""
        if not is_model_name(name):
            raise UsageError(f"{name!r} is not a model name: letters, digits and ._+- only, at most 100")
        try:
            lines = (self.root / "current" / name).read_text("ascii").split()
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{self.root / 'current' / name} cannot be read ({error}); push the model again"
            ) from None
        if not lines or not all(SHA256.match(line) for line in lines):
            raise BundleError(f"{self.root / 'current' / name} holds no digests; push the model again")
        return lines

    def release(self, name: str, digest: str) -> Path:
        return self.root / "releases" / name / digest

    def open_current(self, name: str) -> Bundle:
        """The bundle in use. Raises ReleaseNotFound when ``name`` has none, BundleError when it is damaged."""
        digests = self.history(name)
        while digests:
            try:
                return self._open_release(name, digests[0])
            except (UsageError, BundleError):
                # A push may have moved on and collected this release between our two looks.
                latest = self.history(name)
                if latest[:1] == digests[:1]:
                    raise
                digests = latest
        known = ", ".join(self.names()) or "none"
        raise ReleaseNotFound(f"no model {name!r} in the store {self.root} (it holds: {known}); push it first")

    def _open_release(self, name: str, digest: str) -> Bundle:
        path = self.release(name, digest)
        if not path.is_dir():
            raise BundleError(f"the release {path} is gone though it is in use; push the model again")
        bundle = open_bundle(path)
        if bundle.digest != digest:
            raise BundleError(f"{path} holds the bundle {bundle.digest[:12]}, expected {digest[:12]}; push it again")
        return bundle

    def status(self) -> List[Dict[str, object]]:
        """One row a model: name, version, format, precision, digest, what a rollback goes to, bytes."""
        rows: List[Dict[str, object]] = []
        for name in self.names():
            row: Dict[str, object] = {"name": name, "digest": "", "previous": []}
            try:
                digests = self.history(name)
                row.update(digest=digests[0], previous=digests[1:])
                manifest = self._open_release(name, digests[0]).manifest
            except BundleError as error:
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

    # -- changing ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for one change; the kernel lets go of it when the process ends, however it ends."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(str(self.root / "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise DeviceError(
                    f"the store {self.root} is busy with another push or rollback; try again when it has ended"
                ) from None
            yield
        finally:
            os.close(descriptor)

    def staging(self, digest: str) -> Path:
        """The folder in which a push of ``digest`` gathers files; made when missing."""
        path = self.root / "staging" / digest
        path.mkdir(parents=True, exist_ok=True)
        return path

    def admit(self, staged: Path, name: str, digest: str) -> Bundle:
        """Verify the staged bundle by hash, make it durable and move it among the releases; nothing uses it yet."""
        bundle = open_bundle(staged)
        if bundle.digest != digest or bundle.manifest.name != name:
            raise BundleError(
                f"{staged} holds {bundle.manifest.name} {bundle.digest[:12]}, expected {name} {digest[:12]}"
            )
        verify(bundle, mode="full")
        for file in [*bundle.manifest.files, MANIFEST_NAME]:
            sync_file(staged / file)
        sync_directory(staged)
        path = self.release(name, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._remove(path)  # a damaged copy: a sound one would not have been sent again
        staged.rename(path)
        for folder in (path.parent, path.parent.parent, staged.parent, self.root):
            sync_directory(folder)
        return open_bundle(path)

    def has(self, name: str, digest: str) -> bool:
        """Whether a sound copy of the release is here, by hash."""
        path = self.release(name, digest)
        if not path.is_dir():
            return False
        try:
            bundle = self._open_release(name, digest)
            verify(bundle, mode="full")
        except (BundleError, OSError):
            return False
        return True

    def activate(self, name: str, digest: str) -> None:
        """Make a release the one in use. The step that a power cut leaves done or not done."""
        check_listing(self.release(name, digest), open_bundle(self.release(name, digest)).manifest)
        try:
            older = [other for other in self.history(name) if other != digest]
        except BundleError:
            older = []  # a damaged pointer is mended by pushing again, as its error says
        self._point(name, [digest, *older][:KEEP])

    def rollback(self, name: str) -> str:
        """Go back to the release before; returns its digest. Raises ReleaseNotFound when there is none."""
        digests = self.history(name)
        if len(digests) < 2:
            what = "has only the release in use" if digests else "is not in this store"
            raise ReleaseNotFound(f"cannot roll back: {name!r} {what} ({self.root})")
        verify(self._open_release(name, digests[1]), mode="full")
        self._point(name, digests[1:])
        return digests[1]

    def discard(self, name: str, digest: str) -> None:
        """Remove a release unless it is in use or kept to go back to."""
        if digest not in self.history(name):
            self._remove(self.release(name, digest))

    def collect(self) -> int:
        """Remove what nothing refers to: old releases, staging left behind, stamps. Returns the bytes freed.

        Of a model whose pointer is damaged every release is kept: nobody knows which one it means.
        """
        freed = 0
        kept = {(name, digest) for name in self.names() for digest in self._referred(name)}
        for path in sorted((self.root / "releases").glob("*/*")):
            if (path.parent.name, path.name) not in kept:
                freed += self._remove(path)
        for path in sorted((self.root / "staging").glob("*")):
            freed += self._remove(path)
        for path in sorted((self.root / "current").glob(".*")):
            freed += self._remove(path)  # a pointer whose writer died before the rename
        digests = {digest for _, digest in kept}
        for path in sorted(self.cache.glob("*")):
            if path.name.split(".")[0] not in digests:
                freed += self._remove(path)
        return freed

    def _referred(self, name: str) -> List[str]:
        try:
            return self.history(name)
        except BundleError:
            return [path.name for path in (self.root / "releases" / name).glob("*")]

    def _point(self, name: str, digests: List[str]) -> None:
        folder = self.root / "current"
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / name, ("\n".join(digests) + "\n").encode("ascii"))
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
        size = sum(file.lstat().st_size for file in doomed.rglob("*") if file.is_file())
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


def _remove_folder(path: Path) -> None:
    import shutil  # it brings four kinds of compression, which no load needs

    shutil.rmtree(path, ignore_errors=True)


def store_of(path: Path) -> Optional[Store]:
    """The store that a release directory belongs to, if it lies in one."""
    folder = path.resolve()
    if SHA256.match(folder.name) and folder.parent.parent.name == "releases":
        return Store(folder.parent.parent.parent)
    return None
