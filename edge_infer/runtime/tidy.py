"""What of an engine cache nobody needs any more.

A store's own collection removes what belongs to no release; bundles that lie elsewhere have only this.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path

from edge_infer.bundle import Bundle, open_bundle
from edge_infer.errors import BundleError, UsageError
from edge_infer.runtime.engine_cache import ENTRY_NAME

#: An entry that no load used for so long goes, and is made anew if it is wanted after all.
UNUSED_S = 30 * 24 * 3600.0
#: What is made aside takes a minute: after an hour whoever made it is dead. Nor is an entry removed under a load that
#: is about to map it.
RECENT_S = 3600.0
ENTRY = re.compile(r"([0-9a-f]{64})\.[0-9a-f]{16}\Z")
ASIDE = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.")


def tidy(folder: Path, keep: str) -> None:
    """Remove from ``folder`` entries whose bundle is gone or that were not used for a month, and what died half made.

    Not ``keep``, none used in the last hour, and none that a process has mapped. Raises OSError.
    """
    doomed = [path for path in folder.iterdir() if path.name != keep and path.is_dir() and _unneeded(path)]
    mapped = _all_mappings() if doomed else ""
    for path in doomed:
        if f"{path.resolve()}/" not in mapped:
            _remove(path)


def _unneeded(path: Path) -> bool:
    if ASIDE.match(path.name):
        return _older(path, RECENT_S)
    entry, noted = ENTRY.match(path.name), path / ENTRY_NAME
    if not entry or not _older(noted, RECENT_S):
        return False
    return _older(noted, UNUSED_S) or not _has_source(path, entry[1])


def _older(path: Path, seconds: float) -> bool:
    try:
        return path.stat().st_mtime < time.time() - seconds
    except OSError:
        return False


def _has_source(path: Path, digest: str) -> bool:
    """Whether the bundle is still where it was when the entry was made."""
    try:
        bundle: Bundle = open_bundle(Path(json.loads((path / ENTRY_NAME).read_bytes())["source"]))
    except (BundleError, UsageError):
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return True  # nobody knows; whoever wants the entry finds it damaged
    return bundle.digest == digest


def _all_mappings() -> str:
    """What processes have mapped, as far as this one may see."""
    texts = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            texts.append(maps.read_text("utf-8", "surrogateescape"))
    return "".join(texts)


def _remove(path: Path) -> None:
    """In one step, so that nobody sees it half removed; then what was renamed, and the stamp."""
    doomed = path if ASIDE.match(path.name) else path.with_name(f".{path.name}.{os.getpid()}.removed")
    with contextlib.suppress(OSError):
        path.rename(doomed)
        path.with_name(f"{path.name}.verified").unlink(missing_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
