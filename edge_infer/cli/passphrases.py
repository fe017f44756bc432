"""Passphrases of SSH keys: asked for on the terminal, once for all devices of a command, and never kept elsewhere."""

from __future__ import annotations

import threading
from pathlib import Path

from edge_infer.cli import console


class Passphrases:
    """Asks for the passphrase of a key file and remembers the answer. May be called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given: dict[Path, str | None] = {}

    def __call__(self, path: Path, wrong: bool) -> str | None:
        """The passphrase of ``path``, None when the user gives none. ``wrong``: the last one did not open it."""
        with self._lock:
            if wrong or path not in self._given:
                before = "wrong, once more: " if wrong else ""
                self._given[path] = console.ask_secret(f"{before}passphrase for {path} (empty: do without the key): ")
            return self._given[path]
