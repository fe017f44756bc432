"""How a model runs fastest on this device: measured once, and used by every load that does not ask otherwise."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_infer.errors import OutOfMemory
from edge_infer.runtime.engine_cache import EngineCache
from edge_infer.runtime.threads import default_threads

if TYPE_CHECKING:
    from edge_infer.bundle import Bundle

PLAN_NAME = "plan.json"
#: Each setting is measured so often, all of them in turn, and so long each time.
ROUNDS, SECONDS = 3, 0.5
#: A setting that takes more threads or lets them spin has to be so much faster: other programs need cores too.
WORTH = 0.95


@dataclass(frozen=True)
class Setting:
    """``spinning``: idle threads wait in a loop, which answers small models sooner and takes a whole core each."""

    threads: int
    spinning: bool = False

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{threads}, spinning" if self.spinning else threads


@dataclass(frozen=True)
class Measured:
    """Milliseconds of a run, and the largest resident size of the process in bytes."""

    setting: Setting
    p50_ms: float
    p95_ms: float
    peak_bytes: int


def settings(format: str, cores: int) -> list[Setting]:
    """What is tried, the friendliest to other programs first."""
    counts = [count for count in (1, 2, 4, 8, 16, 32) if count < cores] + [cores]
    spins = (False, True) if format == "onnx" else (False,)
    return [Setting(count, spinning) for spinning in spins for count in counts if count > 1 or not spinning]


def choose(rows: Sequence[Measured], max_memory: int | None = None) -> Measured:
    """The setting whose slow runs (p95) are fastest; a later one only where that is worth it. Raises OutOfMemory."""
    fitting = [row for row in rows if max_memory is None or row.peak_bytes <= max_memory]
    if not fitting:
        least = min(row.peak_bytes for row in rows)
        raise OutOfMemory(
            f"no setting keeps the process within {max_memory:,} bytes, the least was {least:,}; allow more, or "
            "package a smaller precision"
        )
    best = fitting[0]
    for row in fitting[1:]:
        if row.p95_ms < best.p95_ms * WORTH:
            best = row
    return best


def measure(
    bundle: Path, tried: Sequence[Setting], progress: Callable[[str], None] = lambda step: None
) -> list[Measured]:
    """Time each setting in children of its own. Raises what opening the bundle raises."""
    import statistics  # here, since its import takes longer than opening a model

    from edge_infer import admission

    answers: dict[Setting, list[dict[str, Any]]] = {setting: [] for setting in tried}
    for number in range(ROUNDS):
        for setting, rows in answers.items():
            progress(f"measuring {setting} ({number + 1} of {ROUNDS})")
            arguments = ["bench", str(bundle.absolute()), "--threads", str(setting.threads), "--seconds", str(SECONDS)]
            rows.append(admission.run_child(sys.executable, [*arguments, *(["--spinning"] * setting.spinning)]))
    return [
        Measured(
            setting,
            statistics.median(row["p50_ms"] for row in rows),
            statistics.median(row["p95_ms"] for row in rows),
            max(row["peak_bytes"] for row in rows),
        )
        for setting, rows in answers.items()
    ]


def keep(bundle: Bundle, cache: Path, chosen: Measured) -> bool:
    """Store the choice for this bundle on this processor with these cores; False where that is not possible."""
    kept = _cache(bundle, cache)
    kept.remove()

    def write(folder: Path) -> str:
        (folder / PLAN_NAME).write_text(json.dumps(asdict(chosen)))
        return ""

    return not kept.build(write).failed


def read(bundle: Bundle, cache: Path) -> Measured | None:
    """What ``keep`` stored, if it did."""
    kept = _cache(bundle, cache)
    if not os.path.isdir(kept.path):  # noqa: PTH112 - half the time of Path's, at each load
        return None
    entry = kept.find()
    if entry is None or entry.failed:
        return None
    try:
        row = json.loads(entry.file(PLAN_NAME).read_bytes())
        setting = Setting(int(row["setting"]["threads"]), bool(row["setting"]["spinning"]))
        return Measured(setting, float(row["p50_ms"]), float(row["p95_ms"]), int(row["peak_bytes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def chosen(bundle: Bundle, cache: Path, threads: int | None, spinning: bool | None) -> Setting:
    """What is asked for; where nothing is, what was kept; else all cores that this process may use."""
    tuned = read(bundle, cache) if threads is None and spinning is None else None
    return tuned.setting if tuned else Setting(threads or default_threads(), bool(spinning))


def _cache(bundle: Bundle, folder: Path) -> EngineCache:
    return EngineCache(folder, bundle.digest, {"what": "plan", "cores": str(default_threads())})
