"""What a rollout did, device by device: a JSON file that is whole at any time, and from which the next one resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_infer.bundle import replace_file
from edge_infer.errors import UsageError

FORMAT = 1
#: A device's state. ``stopped``: the rollout ended in the middle of its push.
WAITING, RUNNING, DONE, FAILED, UNREACHABLE, STOPPED = (
    "not started",
    "running",
    "done",
    "failed",
    "unreachable",
    "stopped",
)
STATES = (DONE, FAILED, UNREACHABLE, STOPPED, RUNNING, WAITING)


@dataclass
class Row:
    """One device. ``digest``: the bundle it is to have. ``group``: 0 for the canary, then the batch. ``pushed``: what
    the push did, as ``Pushed`` has it. ``kept``: an earlier run did it."""

    device: str
    address: str
    digest: str
    group: int = 0
    state: str = WAITING
    seconds: float | None = None
    error: str | None = None
    pushed: dict[str, Any] | None = None
    kept: bool = False


class Report:
    """The rows of a rollout in their order, and why it ended before it was through. ``path`` None keeps no file.

    The file has a line for each row. It is kept as text, and only what ``note`` is told of is made anew: a report
    that is written after every device must not cost more the more devices there are.
    """

    def __init__(self, path: Path | None, rows: Iterable[Row], about: Mapping[str, Any]) -> None:
        self.path = path
        self.rows = {row.device: row for row in rows}
        self.about = dict(about)
        self.reason: str | None = None
        self._started = _now()
        self._ended: str | None = None
        self._lines: dict[str, str] = {}

    def note(self, row: Row) -> None:
        """``row`` has changed."""
        self._lines[row.device] = json.dumps(asdict(row))

    def abort(self, reason: str) -> None:
        """Note why no further device is started; the first reason counts."""
        self.reason = self.reason or reason

    def counts(self) -> dict[str, int]:
        """Devices by state."""
        states = [row.state for row in self.rows.values()]
        return {state: states.count(state) for state in STATES if state in states}

    def finish(self) -> None:
        """Write that it is over."""
        self._ended = _now()
        self._lines.clear()
        self.write(durable=True)

    def write(self, durable: bool = False) -> None:
        """Put the present state in place of the one before, aside and renamed. Raises OSError."""
        if self.path is None:
            return
        for row in self.rows.values():
            if row.device not in self._lines:
                self.note(row)
        rows = ",\n  ".join(self._lines[name] for name in self.rows)
        head = json.dumps(self._head(), indent=1).removesuffix("\n}")
        replace_file(self.path, f'{head},\n "devices": [\n  {rows}\n ]\n}}\n'.encode(), durable)

    def as_dict(self) -> dict[str, Any]:
        """The file's content."""
        return {**self._head(), "devices": [asdict(row) for row in self.rows.values()]}

    def _head(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **self.about,
            "started": self._started,
            "ended": self._ended,
            "reason": self.reason,
            "counts": self.counts(),
        }


def resume(rows: Iterable[Row], path: Path, retry_failed: bool) -> None:
    """Let ``rows`` take over from the report at ``path`` what an earlier rollout of the same bundles did.

    Devices that are done are not tried again, nor those that failed, unless ``retry_failed``. A device that was to
    have another bundle then is. Raises UsageError for a file that is no report.
    """
    earlier = _read(path)
    for row in rows:
        before = earlier.get(row.device)
        if before is None or before["digest"] != row.digest:
            continue
        if before["state"] == DONE or (before["state"] == FAILED and not retry_failed):
            row.state, row.kept = before["state"], True
            row.seconds, row.error, row.pushed = before["seconds"], before["error"], before["pushed"]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        report = json.loads(path.read_bytes())
        if report["format"] != FORMAT:
            raise ValueError(f"its format is {report['format']!r}, expected {FORMAT}")
        rows = {row["device"]: row for row in report["devices"]}
        for row in rows.values():
            Row(**row)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path} is no report of a rollout ({error}); give --resume the file of an earlier one"
        ) from None
    return rows


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
