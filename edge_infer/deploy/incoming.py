"""Files on their way into a store: those of a bundle are received, or copied from a release that has the same.

They gather in the store's ``staging`` folder, from where an interrupted push goes on. Standard library only, Python
>= 3.8: a push sends this file along.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

from edge_infer import delta
from edge_infer.bundle import CHUNK_BYTES, hash_file, open_bundle, replace_file
from edge_infer.errors import BundleError, DeviceError, UsageError
from edge_infer.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest
from edge_infer.store import Store

#: Of what an interrupted push left, each piece of so many bytes is compared with the host's.
PIECE_BYTES = 1024 * 1024
#: How much of a piece's SHA-256 is compared, in hexadecimal digits. The whole file's is checked in full later.
PIECE_DIGITS = 16


class Arrivals:
    """Files on their way into ``store``; ``digest`` is the SHA-256 of what lists them."""

    def __init__(self, store: Store, files: Mapping[str, FileEntry], digest: str) -> None:
        self.store, self.files, self.digest = store, files, digest
        self._folder = store.root / "staging" / digest
        self._right: Set[str] = set()  # files whose hash was found right while they arrived

    def have(self) -> Dict[str, Dict[str, Any]]:
        """Of each file that is staged in part or whole: its bytes, and the hash of each piece of them."""
        found = {}
        for name, entry in self.files.items():
            size = min(_size(self._folder / name), entry.size)
            if size >= 0:
                found[name] = {"size": size, "pieces": piece_hashes(self._folder / name, size)}
        return found

    def receive(self, name: str, offset: int, size: int, source: Any) -> None:
        """Put the next ``size`` bytes of ``source``, a stream with ``read1``, into the staged file ``name``.

        They go to ``offset``; what was there beyond it goes. Raises DeviceError for bytes that the manifest has no
        place for, and when ``source`` ends before.
        """
        entry = self.files.get(name)
        if entry is None or offset < 0 or size < 0 or offset + size > entry.size:
            raise DeviceError(
                f"the host sent bytes {offset} to {offset + size} of {name!r}, which are not in the manifest"
            )
        self._right.discard(name)
        if _append(self.store.staging(self.digest) / name, offset, size, source) == entry.sha256:
            self._right.add(name)


class Incoming(Arrivals):
    """The bundle with this manifest, digest and ``manifest.sig``, on its way into ``store``."""

    def __init__(self, store: Store, manifest: Manifest, digest: str, signature: Optional[bytes] = None) -> None:
        super().__init__(store, manifest.files, digest)
        self.manifest, self.signature = manifest, signature
        self._elsewhere: Optional[List[Tuple[FileEntry, Path]]] = None

    def copies(self) -> List[str]:
        """Files that need not be sent since another release has the same."""
        return [name for name, entry in self.files.items() if self._same_file(entry) is not None]

    def _same_file(self, wanted: FileEntry) -> Optional[Path]:
        """A file of another release that is what ``wanted`` says, by hash."""
        if self._elsewhere is None:
            self._elsewhere = self._files_elsewhere()
        same = (path for entry, path in self._elsewhere if entry == wanted)
        return next((path for path in same if hash_file(path) == wanted.sha256), None)

    def _files_elsewhere(self) -> List[Tuple[FileEntry, Path]]:
        """What the manifests of the model's other releases list."""
        found = []
        for digest in known_digests(self.store, self.manifest.name):
            try:
                bundle = open_bundle(self.store.release(self.manifest.name, digest))
            except (OSError, BundleError, UsageError):
                continue
            found += [(entry, bundle.file(name)) for name, entry in bundle.manifest.files.items()]
        return found

    def have_deltas(self) -> Dict[str, Dict[str, Any]]:
        """As ``have``, of the deltas that an interrupted push left."""
        found = {}
        for name in self.files:
            size = _size(self._deltas / name)
            if size >= 0:
                found[name] = {"size": size, "pieces": piece_hashes(self._deltas / name, size)}
        return found

    @property
    def _deltas(self) -> Path:
        return self.store.root / "staging" / f"{self.digest}.deltas"

    def receive_delta(self, name: str, base: str, offset: int, size: int, source: Any) -> None:
        """Make the staged file ``name`` of the one in the release ``base`` and a delta, of which ``size`` bytes come.

        They go to ``offset`` of the delta, which ends with them. Raises DeviceError for what the manifest has no place
        for, BundleError when the delta does not make the file.
        """
        entry = self.files.get(name)
        if entry is None or offset < 0 or size < 0 or offset + size > entry.size:
            raise DeviceError(f"the host sent a delta of {offset + size} bytes for {name!r}, which the bundle has not")
        if base not in known_digests(self.store, self.manifest.name):
            raise DeviceError(f"the host sent a delta from {base[:12]!r}, which is no release of this model here")
        self._right.discard(name)
        part, staged = self.store.staging(self._deltas.name) / name, self.store.staging(self.digest) / name
        _append(part, offset, size, source)
        old = open_bundle(self.store.release(self.manifest.name, base))
        _remove_file(staged)
        try:
            delta.apply(old.file(name), old.manifest.files.get(name, entry), part, staged, entry)
        finally:
            _remove_file(part)
        self._right.add(name)

    def admit(self) -> None:
        """Complete the staged folder and move it among the releases. Raises BundleError when a file is damaged.

        Files found damaged are removed, so that the next push sends them anew, and the others not.
        """
        staged = self.store.staging(self.digest)
        for name, entry in self.files.items():
            if name in self._right or _is_whole(staged / name, entry):
                self._right.add(name)
                continue
            same = self._same_file(entry)  # a power cut may have left a copy of the right length and no content
            if same is not None:
                _remove_file(staged / name)
                shutil.copyfile(str(same), str(staged / name))
        _remove_file(staged / MANIFEST_NAME)
        (staged / MANIFEST_NAME).write_bytes(self.manifest.to_bytes())
        _remove_file(staged / SIGNATURE_NAME)
        if self.signature is not None:
            (staged / SIGNATURE_NAME).write_bytes(self.signature)
        if self._deltas.is_dir():  # rmtree waits for ever at a pipe
            shutil.rmtree(str(self._deltas), ignore_errors=True)
        try:
            self.store.admit(staged, self.manifest.name, self.digest, self._right)
        except BundleError:
            self._remove_damaged(staged)
            raise

    def replace_signature(self) -> None:
        """Give the release that is here already the signature which came now."""
        path = self.store.release(self.manifest.name, self.digest) / SIGNATURE_NAME
        if self.signature is not None and not (path.exists() and path.read_bytes() == self.signature):
            # Not written aside within the release: what a kill left there would make it no bundle any more.
            aside = self.store.root / "staging"
            aside.mkdir(exist_ok=True)
            replace_file(path, self.signature, aside=aside)

    def _remove_damaged(self, staged: Path) -> None:
        wanted = self.files
        for path in staged.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(str(path), ignore_errors=True)
            elif path.is_symlink() or path.name not in wanted or not _is_part(path, wanted[path.name]):
                path.unlink()


def _append(path: Path, offset: int, size: int, source: Any) -> str:
    """Put the next ``size`` bytes of ``source`` behind the first ``offset`` of the file; gives its SHA-256 then."""
    descriptor = os.open(str(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        hashed = _hash_start(file, offset)
        file.truncate(offset)
        file.seek(offset)
        while size:
            # What has come so far, and not a whole chunk: what is written is not lost with the connection.
            data = source.read1(min(CHUNK_BYTES, size))
            if not data:
                raise DeviceError("the connection ended in the middle of a file; push again, it goes on from here")
            _write_all(file, data)
            hashed.update(data)
            size -= len(data)
    return str(hashed.hexdigest())


def piece_hashes(path: Path, size: int) -> List[str]:
    """The beginning of the SHA-256 of each piece of the first ``size`` bytes of a file."""
    found = []
    descriptor = os.open(str(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        for start in range(0, size, PIECE_BYTES):
            data = file.read(min(PIECE_BYTES, size - start))
            found.append(hashlib.sha256(data).hexdigest()[:PIECE_DIGITS])
    return found


def known_digests(store: Store, name: str) -> List[str]:
    """As the store has it; none when the pointer is damaged, which a push mends."""
    try:
        return store.digests(name)
    except BundleError:
        return []


def _is_part(path: Path, entry: FileEntry) -> bool:
    """Whether a staged file may still become what the manifest wants."""
    return 0 <= _size(path) < entry.size or _is_whole(path, entry)


def _is_whole(path: Path, entry: FileEntry) -> bool:
    """Whether a staged file is what the manifest wants."""
    return _size(path) == entry.size and hash_file(path) == entry.sha256


def _hash_start(file: Any, size: int) -> Any:
    """The SHA-256 of the first ``size`` bytes, ready for more. Raises DeviceError when there are fewer."""
    hashed = hashlib.sha256()
    while size:
        data = file.read(min(CHUNK_BYTES, size))
        if not data:
            raise DeviceError("the host goes on where nothing was received yet; push again")
        hashed.update(data)
        size -= len(data)
    return hashed


def _write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _remove_file(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _size(path: Path) -> int:
    """Bytes of a plain file that is no link, else -1."""
    return path.stat().st_size if path.is_file() and not path.is_symlink() else -1
