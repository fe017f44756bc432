"""Converters that cannot share the host's environment: each in a virtual environment of its own, from a lock.

    $EDGE_INFER_HOME/converters/<name>-<hash of the lock>/

A lock is a file beside this one, ``<name>-py312.txt`` for one Python or ``<name>.txt`` for any: pip's requirements
with exact versions and hashes, and above them what people are told (``# does:``, ``# takes:``). A lock with
``# last:`` is taken when no other fits. Nothing is installed unasked: ``edge-infer converters install NAME``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_infer.convert.environments import child
from edge_infer.errors import ConversionError, ConverterMissing, UsageError
from edge_infer.store import default_root

#: Where the locks lie, unless a call names another folder.
LOCKS = Path(__file__).parent
LOCK_FILE = re.compile(r"([a-z0-9_]+?)(?:-py(3)(\d+))?\.txt")
#: What a broken interpreter on the path gets to answer.
START_TIMEOUT_S = 20.0

Progress = Callable[[str], None]
Version = tuple[int, int]


@dataclass(frozen=True)
class Lock:
    """One lock file. ``python`` is the version it is for, None for any; ``last``: only where no other fits."""

    name: str
    path: Path
    python: Version | None
    does: str
    takes: str
    last: bool

    @property
    def folder(self) -> Path:
        """Where its environment lies once it is installed."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]
        return root() / f"{self.name}-{digest}"


def root() -> Path:
    return default_root() / "converters"


def names(locks: Path | None = None) -> list[str]:
    """The converters there are locks for."""
    return sorted({match[1] for path in (locks or LOCKS).glob("*.txt") if (match := LOCK_FILE.fullmatch(path.name))})


def locks_of(name: str, locks: Path | None = None) -> list[Lock]:
    """The locks of a converter, the best first: newest Python. Raises UsageError for a name without any."""
    found = []
    for path in sorted((locks or LOCKS).glob("*.txt")):
        match = LOCK_FILE.fullmatch(path.name)
        if match and match[1] == name:
            said = dict(re.findall(r"^# (\w+): (.+)$", path.read_text("utf-8"), re.MULTILINE))
            python = (int(match[2]), int(match[3])) if match[2] else None
            found.append(Lock(name, path, python, said.get("does", ""), said.get("takes", ""), "last" in said))
    if not found:
        raise UsageError(f"no converter is called {name!r}, there are: {', '.join(names(locks)) or 'none'}")
    return sorted(found, key=lambda lock: (not lock.last, lock.python or (0, 0)), reverse=True)


# -- what is there ----------------------------------------------------------------------------------------------------


def python_of(name: str, locks: Path | None = None) -> Path:
    """The interpreter of an installed converter. Raises ConversionError that says how to install it."""
    return _python(_home(name, locks))


def library_of(name: str, locks: Path | None = None) -> Path:
    """The folder of an installed converter's packages, for one that runs in the host's Python. Raises as above."""
    return next((_home(name, locks) / "lib").glob("python3*/site-packages"))


def version_of(name: str, locks: Path | None = None) -> str:
    """The version that the lock pins for the package of the converter's name."""
    pinned = re.search(rf"^{re.escape(name)}==(\S+)", locks_of(name, locks)[0].path.read_text("utf-8"), re.MULTILINE)
    return pinned[1] if pinned else ""


def _home(name: str, locks: Path | None) -> Path:
    known = locks_of(name, locks)
    for lock in known:
        if _works(lock.folder):
            return lock.folder
    raise ConverterMissing(
        f"the converter {name} ({known[0].does}) is not installed in {root()}; install it: "
        f"edge-infer converters install {name} (takes {known[0].takes})"
    )


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _works(folder: Path) -> bool:
    """Whether an environment is there, and the Python it was made of as well."""
    return os.access(_python(folder), os.X_OK)


def installed(locks: Path | None = None) -> list[dict[str, Any]]:
    """One row an environment: name, path, python, bytes, and whether today's locks use it."""
    rows = []
    for name in names(locks):
        current = {lock.folder for lock in locks_of(name, locks)}
        for folder in _environments(name):
            files = [entry.lstat() for entry in folder.rglob("*")]
            rows.append(
                {
                    "name": name,
                    "path": str(folder),
                    "python": next(
                        (path.name.removeprefix("python") for path in (folder / "lib").glob("python3*")), ""
                    ),
                    "bytes": sum(status.st_size for status in files),
                    "current": folder in current and _works(folder),
                }
            )
    return rows


def _environments(name: str) -> list[Path]:
    folders = root().glob(f"{name}-*")
    return sorted(path for path in folders if re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{12}}", path.name))


# -- changing it ------------------------------------------------------------------------------------------------------


def install(name: str, progress: Progress, locks: Path | None = None) -> Path:
    """Install a converter from its lock, unless it is there; gives its folder. A second process waits.

    Everything goes aside first and is renamed when it is complete; what an interruption leaves of it is removed.
    Raises UsageError for an unknown name, ConversionError when no Python fits or pip fails.
    """
    known = locks_of(name, locks)
    with _alone(name, progress) as hold:
        for lock in known:
            if _works(lock.folder):
                progress(f"{name} is installed already")
                return lock.folder
        interpreter, lock = find_python(known)
        aside = root() / f".{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)  # of an installation that was killed
        try:
            _fill(aside, interpreter, lock, progress, hold)
            shutil.rmtree(lock.folder, ignore_errors=True)  # one whose Python is gone
            aside.rename(lock.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return lock.folder


def remove(name: str, locks: Path | None = None) -> int:
    """Remove a converter's environments, those of older locks too; gives the bytes freed."""
    locks_of(name, locks)
    freed: int = sum(row["bytes"] for row in installed(locks) if row["name"] == name)
    if root().is_dir():
        with _alone(name, lambda step: None):
            for folder in _environments(name):
                aside = root() / f".{name}.partial"
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)  # gone in one step, whoever looks
                shutil.rmtree(aside)
    return freed


@contextlib.contextmanager
def _alone(name: str, progress: Progress) -> Iterator[int]:
    """Hold one converter's lock file and give it; the kernel lets go of it when all who hold it have ended."""
    root().mkdir(parents=True, exist_ok=True)
    with (root() / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that installs or removes {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _fill(folder: Path, interpreter: Path, lock: Lock, progress: Progress, hold: int) -> None:
    progress(f"{lock.name}: making an environment with {interpreter} (takes {lock.takes})")
    _pip([str(interpreter), "-I", "-m", "venv", str(folder)], lock, progress, hold)
    # The lock names every package, so pip need not look for more; what a package says of Python the lock knows better.
    options = ["--require-hashes", "--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-input"]
    options += ["--disable-pip-version-check", "--no-warn-script-location", "-r", str(lock.path)]
    _pip([str(_python(folder)), "-I", "-m", "pip", "install", *options], lock, progress, hold)


def _pip(command: list[str], lock: Lock, progress: Progress, hold: int) -> None:
    """Run a step of the installation, with pip's own settings from the environment. Raises ConversionError.

    It holds the lock file as well: if this process is killed, nobody else starts before it has ended.
    """
    words: list[str] = []
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=child.clean_environment(),
        start_new_session=True,
        pass_fds=(hold,),
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            words.append(line)
            if line.startswith(("Collecting ", "Installing ")):
                progress(f"{lock.name}: {line.split(' (from')[0].strip()[:100]}")
        process.wait()
    finally:
        status = child.end(process)
    if status:
        reasons = [line.strip() for line in words if "ERROR" in line or "Error" in line] or words[-1:] or ["no reason"]
        raise ConversionError(
            f"{lock.name} cannot be installed: {reasons[-1].strip()[:300]}; is the package index within reach?",
            "".join(words)[-20_000:],
        )


# -- which Python -----------------------------------------------------------------------------------------------------


def find_python(known: list[Lock]) -> tuple[Path, Lock]:
    """An interpreter that starts and the lock for it: the running one if it fits, else one found on this machine.

    Raises ConversionError when there is none.
    """
    found = [(path, version) for path in _interpreters(known) if (version := _version(path))]
    for lasting in (False, True):
        for path, version in found:
            for lock in known:
                if lock.last == lasting and lock.python in (None, version):
                    return path, lock
    wanted = ", ".join(f"{lock.python[0]}.{lock.python[1]}" for lock in known if lock.python)
    raise ConversionError(
        f"{known[0].name} needs Python {wanted} with venv and pip, and none of them was found here; install one"
    )


def _interpreters(known: list[Lock]) -> list[Path]:
    """Interpreters that may or may not start, each once: the running one, those on PATH, pyenv's, the system's."""
    running = Path(getattr(sys, "_base_executable", sys.executable))
    if any(lock.python is None for lock in known):
        return [running]
    versions = [f"3.{lock.python[1]}" for lock in known if lock.python]
    paths = [running, *(Path(path) for version in versions if (path := shutil.which(f"python{version}")))]
    for version in versions:
        paths += sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"), reverse=True)
    paths += [Path(f"/usr/bin/python{version}") for version in versions]
    return list(dict.fromkeys(paths))


def _version(path: Path) -> Version | None:
    """The version of an interpreter that starts and can make environments; None for one that does not."""
    question = "import ensurepip, sys, venv; print(*sys.version_info[:2])"
    try:
        done = subprocess.run(
            [str(path), "-I", "-c", question],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            env=child.clean_environment(),
            check=True,
        )
        major, minor = map(int, done.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None  # a stand-in for a version that is not there, or a system's Python without its venv package
    return major, minor


# -- running it -------------------------------------------------------------------------------------------------------


def run(
    name: str,
    main_file: Path,
    request: Mapping[str, Any],
    log: Path,
    limits: child.Limits | None = None,
    locks: Path | None = None,
) -> dict[str, Any]:
    """Let an installed converter's Python run ``main_file``; see ``child.run``. Raises ConversionError."""
    return child.run(name, python_of(name, locks), main_file, request, log, limits or child.limits())
