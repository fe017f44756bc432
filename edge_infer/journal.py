"""What happened to a model in a store, for people: which release came into use when, and why another did not.

``journal/<name>`` holds a line of JSON for each event. Nothing is decided by it, so it is not synced, and a line cut
off by a power cut is passed over. Times are the device's own. Standard library only, Python >= 3.8: a push sends
this file along.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Dict, List

from edge_infer.bundle import read_plain_file, replace_file
from edge_infer.errors import BundleError

#: The older half goes when the file grows beyond this: some 300 events.
JOURNAL_BYTES = 64 * 1024
#: The longest reason kept with an event, and the longest name of who brought it about.
REASON_CHARS, WHO_CHARS = 1000, 200


def note(path: Path, event: str, digest: str, reason: str = "", who: str = "") -> None:
    """Add an event to the journal at ``path``; a full or read-only disk costs the note and nothing else."""
    row = {"time": int(time.time()), "event": event, "digest": digest, "reason": reason[:REASON_CHARS]}
    row["who"] = who[:WHO_CHARS]
    line = json.dumps({name: value for name, value in row.items() if value != ""}).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A pipe that lies there would wait for its reader, and a link may lead anywhere.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(str(path), flags, 0o644), "ab") as file:
            file.write(line)
            long = file.tell() > JOURNAL_BYTES
        if long:
            lines = path.read_bytes().splitlines(keepends=True)
            replace_file(path, b"".join(lines[len(lines) // 2 :]), durable=False)
    except OSError:
        pass


def events(path: Path) -> List[Dict[str, Any]]:
    """The events in ``path``, oldest first: time (seconds since 1970), event, digest, and reason and who if known."""
    try:
        lines = read_plain_file(path, 2 * JOURNAL_BYTES).splitlines()
    except (OSError, BundleError):
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("time"), int):
            found.append(row)
    return found
