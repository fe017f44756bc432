"""The device's environments: whole virtual environments side by side, and one link that says which one serves.

    ROOT/venv                       the link, to venvs/<id>: replaced by a rename, so a power cut leaves one of both
    ROOT/venvs/<id>/                an environment; never changed once it is complete
    ROOT/venvs/<id>/edge-infer.json written last: what it holds, and which one it replaced

A process keeps the environment that it was started with, whatever the link says meanwhile. Standard library only,
Python >= 3.8: a provisioning sends this file along.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from edge_infer.bundle import replace_file, sync_directory
from edge_infer.errors import DeviceError, ReleaseNotFound

MARKER = "edge-infer.json"
#: What a person made, moved here by ``adopt``.
BY_HAND = "by-hand"
#: Started by the link, Python would import from whatever the link says at that moment; this holds it to the first.
PATH_FILE = "edge_infer_environment.pth"
KEEP_PATHS = (
    "import os, sys; "
    "sys.path[:] = [os.path.realpath(p) if p.startswith(sys.prefix + os.sep) else p for p in sys.path]\n"
)


def identify(requirements: str, abi: str) -> str:
    """The name of the environment that these requirements make with that Python."""
    return hashlib.sha256(f"{abi}\n{requirements}".encode()).hexdigest()[:16]


class Venvs:
    """The environments of the store at ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.link = root / "venv"
        self.folder = root / "venvs"

    def path(self, name: str) -> Path:
        return self.folder / name

    def python(self, name: str) -> str:
        return str(self.path(name) / "bin" / "python")

    # -- reading -----------------------------------------------------------------------------------------------

    def current(self) -> Optional[str]:
        """The environment that the link names; None when there is none or it was made by hand."""
        try:
            folder, name = os.path.split(os.readlink(str(self.link)))
        except OSError:
            return None
        return name if folder == self.folder.name else None

    def is_by_hand(self) -> bool:
        """Whether a person put something of their own where the link goes."""
        return os.path.lexists(str(self.link)) and self.current() is None

    def facts(self, name: str) -> Optional[Dict[str, Any]]:
        """What the marker says; None for an environment that is not complete or not ours."""
        try:
            value = json.loads((self.path(name) / MARKER).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def is_usable(self, name: str) -> bool:
        """Whether the environment is complete and the Python that it was made of is still there."""
        complete = name.startswith(BY_HAND) or self.facts(name) is not None
        return complete and os.access(self.python(name), os.X_OK)

    def previous(self) -> Optional[str]:
        """What a rollback goes to."""
        found = self.facts(self.current() or "")
        name = found.get("replaces") if found else None
        return name if isinstance(name, str) and os.sep not in name and self.is_usable(name) else None

    def names(self) -> List[str]:
        """Every environment, in whatever state."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))

    # -- changing; with the store's lock held --------------------------------------------------------------------

    @contextmanager
    def hold(self) -> Iterator[int]:
        """A lock that also the installing program holds: an orphan of a connection that broke keeps others out.

        Raises DeviceError when there is one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(str(self.folder / ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DeviceError(
                    f"an installation that lost its host still runs in {self.folder}; try again when it has ended"
                ) from None
            yield descriptor
        finally:
            os.close(descriptor)

    def complete(self, name: str, facts: Dict[str, Any]) -> None:
        """Say that the environment is whole, after everything in it is on the disk."""
        os.sync()  # thousands of files that pip wrote: one call, where each file's own would take minutes on a card
        replace_file(self.path(name) / MARKER, json.dumps(facts, sort_keys=True).encode())
        sync_directory(self.folder)

    def switch(self, name: str) -> None:
        """Let ``name`` serve. The step that a power cut leaves done or not done."""
        before, facts = self.current(), self.facts(name)
        if before != name:
            if facts is not None and before is not None:
                self.complete(name, {**facts, "replaces": before})
            self._point(name)

    def adopt(self) -> str:
        """Move what a person made among the environments, so that a rollback finds it; gives its name.

        Until the switch that follows, nothing serves: a folder cannot be replaced by a link in one step.
        """
        number = next(number for number in range(1, 1000) if f"{BY_HAND}-{number}" not in self.names())
        name = f"{BY_HAND}-{number}"
        os.rename(str(self.link), str(self.path(name)))
        self._point(name)
        return name

    def rollback(self) -> str:
        """Go back to the environment before; gives its name. Raises ReleaseNotFound when there is none."""
        name = self.to_go_back_to()
        self.switch(name)
        return name

    def to_go_back_to(self) -> str:
        """Raises ReleaseNotFound when there is none."""
        name = self.previous()
        if name is None:
            raise ReleaseNotFound(f"cannot roll back: {self.folder} holds no environment before the one in use")
        return name

    def collect(self) -> int:
        """Remove all but the environment in use and the one before; gives the bytes freed.

        Where a person's own serves, nothing is known to be older, and only what is incomplete goes.
        """
        current = self.current()
        kept = {current, self.previous()}
        freed = 0
        for name in self.names():
            if name not in kept and (current is not None or not self.is_usable(name)):
                freed += self.remove(name)
        return freed

    def remove(self, name: str) -> int:
        """Remove one environment; gives its bytes."""
        path = self.path(name)
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return 0
        size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
        if (path / MARKER).exists():
            (path / MARKER).unlink()  # it must not be seen half removed
        shutil.rmtree(str(path), ignore_errors=True)
        return size

    def _point(self, name: str) -> None:
        aside = self.root / ".venv.new"
        if os.path.lexists(str(aside)):
            aside.unlink()
        os.symlink(os.path.join(self.folder.name, name), str(aside))
        os.replace(str(aside), str(self.link))
        sync_directory(self.root)
