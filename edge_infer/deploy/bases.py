"""What this machine pushed, kept so that the next release can be sent as what changed since.

    bases = Bases(bases_root())
    bases.keep(bundle)                                   # after a push
    base = bases.choose(digests_on_device, given=None)   # before the next
    found = bases.differences(base, bundle, names, codecs)

Below the cache folder: ``bases/releases/DIGEST/`` (blocks shared with the bundle where the file system can) and
``bases/deltas/KEY`` (one without a header stands for a delta that is not worth it). Nothing in it is needed: without,
files are sent whole. What was not used for longest goes first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from edge_infer import steps
from edge_infer.bundle import Bundle, open_bundle, verify
from edge_infer.delta import HEADER
from edge_infer.deploy import difference
from edge_infer.deploy.difference import Difference
from edge_infer.errors import BundleError, UsageError
from edge_infer.manifest import MANIFEST_NAME, canonical_json

#: A folder larger than this loses what was not used for longest, after each push.
MAX_BYTES = 10 * 10**9
#: ``_IOW(0x94, 9, int)``: share the blocks of another file until one of the two is written to.
#: https://man7.org/linux/man-pages/man2/ioctl_ficlone.2.html
FICLONE = 0x40049409
#: Part of the key of a delta: another version of the maker may make another.
VERSION = 1
NOT_WORTH_IT = b"not worth it\n"


def bases_root() -> Path:
    """In the folder that packaging keeps its steps in."""
    return steps.cache_root() / steps.BASES


class Bases:
    """The releases and deltas kept below ``root``; several processes and threads may use it at once."""

    def __init__(self, root: Path, most: int = MAX_BYTES) -> None:
        self.root, self.most = root, most
        self._releases, self._deltas = root / "releases", root / "deltas"

    # -- releases ------------------------------------------------------------------------------------------------------

    def keep(self, bundle: Bundle) -> None:
        """Keep the bundle's files under its digest, then make room. Raises OSError."""
        final = self._releases / bundle.digest
        if final.is_dir():
            os.utime(final)
            return
        self._releases.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root, prefix=".") as folder:
            aside = Path(folder) / "release"
            aside.mkdir()
            for name in [*bundle.manifest.files, MANIFEST_NAME]:
                _copy(bundle.file(name), aside / name)
            with contextlib.suppress(FileExistsError, OSError):  # another push kept the same meanwhile
                aside.rename(final)
        self.trim(self.most, [bundle.digest])

    def find(self, digest: str) -> Bundle | None:
        """The release, verified by hash; one that was damaged meanwhile is removed."""
        folder = self._releases / digest
        if not folder.is_dir():
            return None
        try:
            bundle = open_bundle(folder)
            verify(bundle, mode="full")
            if bundle.digest != digest:
                raise BundleError(f"{folder} holds {bundle.digest}")
        except (BundleError, UsageError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            return None
        os.utime(folder)
        return bundle

    def choose(self, digests: Iterable[str], given: Bundle | None = None) -> Bundle | None:
        """The first of a device's releases (newest first) that is here; ``given`` is the user's own ``--base``.

        Raises UsageError when the device does not have ``given``, BundleError when that is damaged.
        """
        wanted = list(digests)
        if given is None:
            return next((found for digest in wanted if (found := self.find(digest)) is not None), None)
        if given.digest not in wanted:
            have = ", ".join(digest[:12] for digest in wanted) or "none"
            raise UsageError(
                f"--base {given.path} is the release {given.digest[:12]}, which the device does not have (it has: "
                f"{have}); name the bundle of one that it has, or leave --base out"
            )
        verify(given, mode="full")
        return given

    # -- deltas --------------------------------------------------------------------------------------------------------

    def differences(
        self, base: Bundle, new: Bundle, names: Sequence[str], codecs: Collection[str]
    ) -> Mapping[str, Difference]:
        """Deltas of those of the files ``names`` where one is worth it, made once: a push that goes on after an
        interruption, and the next device, get the same bytes. Raises OSError."""
        self._deltas.mkdir(parents=True, exist_ok=True)
        found = {}
        for name in names:
            with self._making():
                made = self._difference(base, new, name, codecs)
            if made is not None:
                found[name] = made
        self.trim(self.most, [base.digest, new.digest, *(made.path.name for made in found.values())])
        return found

    def _difference(self, base: Bundle, new: Bundle, name: str, codecs: Collection[str]) -> Difference | None:
        identity = [VERSION, base.digest, new.digest, name, sorted(codecs)]
        path = self._deltas / hashlib.sha256(canonical_json(identity)).hexdigest()[:32]
        if path.is_file():
            os.utime(path)
            size, full = path.stat().st_size, new.manifest.files[name].size
            return Difference(path, name, base.digest, size, full) if size > HEADER.size else None
        made = difference.make(base, new, name, codecs, path)
        if made is None:
            path.write_bytes(NOT_WORTH_IT)
        return made

    @contextlib.contextmanager
    def _making(self) -> Iterator[None]:
        """One delta is made at a time, so that a fleet's first one serves the others; making uses all cores."""
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    # -- room ----------------------------------------------------------------------------------------------------------

    def entries(self) -> list[Path]:
        """All that is kept: folders of releases and files of deltas, and what a killed push left."""
        return [path for folder in (self._releases, self._deltas, self.root) for path in _entries(folder)]

    def trim(self, most: int, keep: Iterable[str] = ()) -> int:
        """Remove what was not used for longest until at most ``most`` bytes are left; gives the bytes removed."""
        return steps.remove_oldest(self.entries(), most, keep)


def _entries(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.name not in ("releases", "deltas", "lock"))


def _copy(source: Path, target: Path) -> None:
    """A copy, which takes no space where the file system can share blocks.

    Not a second name of the file: the onnx package refuses a bundle's weights that have one.
    """
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
        except OSError:
            shutil.copyfileobj(old, new, 1024 * 1024)
