"""The user's ssh_config, read as ssh reads it where paramiko does not: ``Include`` and ``CertificateFile``.

``Include`` is expanded before paramiko sees the text. A block of an included file counts only where the block around
the ``Include`` does too, so each ``Host`` becomes a ``Match`` with the conditions of both.
"""

from __future__ import annotations

import contextlib
import glob
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_infer.errors import DeviceError, UsageError

try:
    import paramiko
except ImportError as missing:
    raise UsageError(
        f"SSH devices need paramiko ({missing}); install it with python3 -m pip install 'edge-infer[ssh]'"
    ) from missing

#: As in ssh, which stops there too.
MAX_DEPTH = 16
#: Before the value of an IdentityFile that was a CertificateFile: paramiko knows only of the former that it may be
#: given several times and has tokens in it.
CERTIFICATE_MARK = "certificate:"

_LINE = re.compile(r"(\w+)(?:\s*=\s*|\s+)(.+)")


def read_config(path: Path | None) -> paramiko.SSHConfig:
    """The ssh_config at ``path``, by default ``~/.ssh/config``, which may be missing. Raises DeviceError."""
    path = path or Path.home() / ".ssh" / "config"
    try:
        text = "\n".join(_expand(path, "", 0))
    except FileNotFoundError:
        return paramiko.SSHConfig()
    try:
        return paramiko.SSHConfig.from_text(text)
    except (ValueError, paramiko.SSHException) as error:
        raise _unreadable(path, error) from error


def look_up(config: paramiko.SSHConfig, host: str) -> Mapping[str, Any]:
    """What the config says of ``host``; keys in lower case, ``identityfile`` and ``certificatefile`` are lists.

    Raises DeviceError.
    """
    try:
        found: dict[str, Any] = config.lookup(host)
    except (OSError, ImportError, LookupError, ValueError, paramiko.SSHException) as error:
        raise DeviceError(f"the ssh_config entry for {host} cannot be followed: {error}") from error
    named = found.get("identityfile", [])
    return {
        **found,
        "identityfile": [name for name in named if not name.startswith(CERTIFICATE_MARK)],
        "certificatefile": [name.removeprefix(CERTIFICATE_MARK) for name in named if name.startswith(CERTIFICATE_MARK)],
    }


def _expand(path: Path, outer: str, depth: int) -> Iterator[str]:
    """The lines of ``path`` with what they include; ``outer`` are the conditions of the block they stand in, if any."""
    if depth > MAX_DEPTH:
        raise DeviceError(f"{path}: files that include each other are more than {MAX_DEPTH} deep; end the circle")
    block = outer
    for line in _lines(path):
        found = _LINE.fullmatch(line)
        key, value = (found[1].lower(), found[2]) if found else ("", "")
        if key in ("host", "match"):
            block = f"{outer} {_conditions(path, key, value)}".strip()
            yield f"Match {block or 'all'}"
        elif key == "include":
            for included in _included(path, value):
                with contextlib.suppress(FileNotFoundError):  # a link that leads nowhere
                    yield from _expand(included, block, depth + 1)
            yield f"Match {block or 'all'}"
        elif key == "certificatefile":
            yield f"IdentityFile {CERTIFICATE_MARK}{_unquoted(value)}"
        else:
            yield line


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return [line for line in lines if line and not line.startswith("#")]


def _conditions(path: Path, key: str, value: str) -> str:
    """A ``Host`` or ``Match`` as the conditions of a ``Match``; empty for one that always holds."""
    words = _words(path, value)
    if key == "host":
        return f"originalhost {shlex.quote(','.join(words))}"
    return shlex.join(word for word in words if word.lower() != "all")


def _included(path: Path, value: str) -> Iterator[Path]:
    """The files that an ``Include`` names, by patterns; relative ones are in ``~/.ssh``. None is no error."""
    for pattern in _words(path, value):
        where = Path.home() / ".ssh" / Path(pattern).expanduser()
        yield from map(Path, sorted(glob.glob(str(where))))  # noqa: PTH207 - as in a shell, * covers no dot file


def _words(path: Path, value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError as error:
        raise _unreadable(path, error) from error


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value


def _unreadable(path: Path, error: Exception) -> DeviceError:
    reason = error.strerror if isinstance(error, OSError) else error
    return DeviceError(f"{path} cannot be read as an ssh_config: {reason}")
