"""Code of the user's own: found by name, called, and listed, so that a cache knows what an answer hangs on."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import site
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_infer.errors import UsageError


def names_callable(text: str) -> bool:
    """Whether ``text`` has the form ``module:callable`` or ``file.py:callable``."""
    where, _, name = text.rpartition(":")
    module = all(part.isidentifier() for part in where.split("."))
    return name.isidentifier() and (where.endswith(".py") or module)


def resolve(text: str, option: str) -> Callable[..., Any]:
    """The callable that ``module:callable`` or ``file.py:callable`` names; ``option`` is who asked, for messages.

    The file's own folder becomes part of the import path, as when Python runs the file. Raises UsageError.
    """
    where, _, name = text.rpartition(":")
    if not where or not name:
        raise UsageError(f"{option} {text!r}, expected module:callable or file.py:callable")
    function = getattr(_import(where, f"{option} {text}"), name, None)
    if not callable(function):
        raise UsageError(f"{option} {text}: {where} has no callable {name!r}")
    result: Callable[..., Any] = function
    return result


def _import(where: str, asked: str) -> Any:
    path = Path(where)
    try:
        if path.suffix != ".py":
            return importlib.import_module(where)
        sys.path.insert(0, str(path.resolve().parent))
        name = _module_name(path)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # a .py suffix always has a loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    except Exception as error:
        raise UsageError(f"{asked}: cannot import {where} ({type(error).__name__}: {first_line(error)})") from error


def _module_name(path: Path) -> str:
    """The file's own, so that what it pickles is found again; not that of another module already in use."""
    loaded = sys.modules.get(path.stem)
    taken = loaded is not None and _file(loaded) != path.resolve()
    return f"{path.stem}_of_{hashlib.sha256(bytes(path.resolve())).hexdigest()[:8]}" if taken else path.stem


def first_line(error: BaseException) -> str:
    """What the error says, without colours and pages of more."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return (text.splitlines() or [type(error).__name__])[0][:300]


def imported_files() -> dict[str, str]:
    """SHA-256 by absolute path of the Python files imported so far that are the user's own.

    Those of the standard library, of installed packages and of edge_infer are not: their versions name them.
    """
    installed = _installed()
    found = {_file(module) for module in list(sys.modules.values())}
    own = sorted(
        path
        for path in found
        if path is not None and path.is_file() and not any(path.is_relative_to(folder) for folder in installed)
    )
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in own}


def _file(module: Any) -> Path | None:
    """A module's source; ``None`` for one without, or of a binary."""
    name = getattr(module, "__file__", None)
    return Path(name).resolve() if isinstance(name, str) and name.endswith(".py") else None


def _installed() -> list[Path]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    paths = [*(sysconfig.get_path(name) for name in names), *site.getsitepackages(), site.getusersitepackages()]
    # Links are followed, as modules' own paths are; a virtual environment has its standard library elsewhere.
    return [*{Path(path).resolve() for path in paths}, Path(__file__).resolve().parent]
