"""How a model runs fastest on this device, as measured: kept, and used by every load that does not ask otherwise.

``tuning`` and ``throughput`` measure; this file keeps what they find.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_infer.records import Record
from edge_infer.runtime.engine_cache import EngineCache
from edge_infer.runtime.threads import default_threads

if TYPE_CHECKING:
    from edge_infer.bundle import Bundle

PLAN_NAME = "plan.json"


@dataclass(eq=False, repr=False)
class Setting(Record):
    """How one session runs.

    ``spinning``: idle threads of ONNX Runtime wait in a loop, which answers small models sooner and takes a whole core
    each. ``cores``: the engine's threads stay on these; none means all that the process may use. ``prepack``: whether
    ONNX Runtime repacks weights, None as the bundle says.
    """

    threads: int
    spinning: bool = False
    cores: tuple[int, ...] = ()
    prepack: bool | None = None

    def __str__(self) -> str:
        said = ["1 thread" if self.threads == 1 else f"{self.threads} threads"]
        if self.cores:
            said.append(f"on cores {', '.join(map(str, self.cores))}")
        if self.spinning:
            said.append("spinning")
        if self.prepack is not None:
            said.append("weights repacked" if self.prepack else "weights as they are")
        return ", ".join(said)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_row(cls, row: Any) -> Setting:
        """From what ``to_json`` says, parsed. Raises ValueError."""
        try:
            cores, prepack = row["cores"], row["prepack"]
            return cls(
                int(row["threads"]),
                bool(row["spinning"]),
                tuple(int(core) for core in cores),
                None if prepack is None else bool(prepack),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{row!r} is no setting") from error


@dataclass(eq=False, repr=False)
class Measured(Record):
    """Milliseconds of a run, and the largest resident size of the process in bytes. ``emulated``: what emulates the
    machine that a kept choice was made on; empty where nothing shows that anything does."""

    setting: Setting
    p50_ms: float
    p95_ms: float
    peak_bytes: int
    emulated: str = ""


@dataclass(eq=False, repr=False)
class PoolSetting(Record):
    """How a ``Pool`` runs: ``threads`` are those of each session, ``batch`` the requests that may run as one."""

    sessions: int
    threads: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.sessions} x {self.threads}, batch {self.batch}"


@dataclass(eq=False, repr=False)
class PoolMeasured(Record):
    """Answers a second under full load, the median milliseconds of a request then, the largest resident size;
    ``emulated`` as for ``Measured``."""

    setting: PoolSetting
    per_second: float
    p50_ms: float
    peak_bytes: int
    emulated: str = ""


def keep(bundle: Bundle, cache: Path, chosen: Measured) -> bool:
    """Store the choice for this bundle on this processor with these cores; False where that is not possible."""
    return _keep(bundle, cache, "plan", asdict(chosen))


def read(bundle: Bundle, cache: Path, verify: str = "auto") -> Measured | None:
    """What ``keep`` stored, if it did."""
    row = _read(bundle, cache, "plan", verify)
    try:
        return row and Measured(
            Setting.from_row(row["setting"]),
            float(row["p50_ms"]),
            float(row["p95_ms"]),
            int(row["peak_bytes"]),
            row["emulated"],
        )
    except (ValueError, KeyError, TypeError):
        return None


def keep_pool(bundle: Bundle, cache: Path, chosen: PoolMeasured) -> bool:
    """``keep`` for what a ``Pool`` does best."""
    return _keep(bundle, cache, "pool plan", asdict(chosen))


def read_pool(bundle: Bundle, cache: Path, verify: str = "auto") -> PoolMeasured | None:
    """What ``keep_pool`` stored, if it did."""
    row = _read(bundle, cache, "pool plan", verify)
    try:
        return row and PoolMeasured(
            PoolSetting(*(int(row["setting"][name]) for name in ("sessions", "threads", "batch"))),
            float(row["per_second"]),
            float(row["p50_ms"]),
            int(row["peak_bytes"]),
            row["emulated"],
        )
    except (ValueError, KeyError, TypeError):
        return None


def chosen(bundle: Bundle, cache: Path, threads: int | None, spinning: bool | None, verify: str = "auto") -> Setting:
    """What is asked for; where nothing is, what was kept; else all cores that this process may use."""
    tuned = read(bundle, cache, verify) if threads is None and spinning is None else None
    return tuned.setting if tuned else Setting(threads or default_threads(), bool(spinning))


def _keep(bundle: Bundle, cache: Path, what: str, row: Mapping[str, Any]) -> bool:
    from edge_infer import emulation  # here, since a load that finds nothing marked has no need of it

    kept = _cache(bundle, cache, what)
    kept.remove()

    def write(folder: Path) -> str:
        (folder / PLAN_NAME).write_text(json.dumps({**row, **emulation.mark()}))
        return ""

    return not kept.build(write).failed


def _read(bundle: Bundle, cache: Path, what: str, verify: str) -> Any:
    entry = _cache(bundle, cache, what).find(verify)
    if entry is None or entry.failed:
        return None
    try:
        row = {"emulated": "", **json.loads(entry.file(PLAN_NAME).read_bytes())}
    except (OSError, ValueError, TypeError):
        return None
    if not row["emulated"]:
        return row
    from edge_infer import emulation

    # A card may have been in an emulator before it came into a board whose processor looks the same.
    return row if row["emulated"] == emulation.here() else None


def _cache(bundle: Bundle, folder: Path, what: str) -> EngineCache:
    return EngineCache(folder, bundle, {"what": what, "cores": str(default_threads())})
