"""Find how a model runs fastest on this device: one thing after the other is tried, the best so far beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edge_infer.errors import OutOfMemory
from edge_infer.runtime import cores, engine_cache
from edge_infer.runtime.plan import Measured, Setting
from edge_infer.runtime.threads import default_threads

if TYPE_CHECKING:
    from edge_infer.bundle import Bundle

    Measure = Callable[[Sequence[Setting]], list[Measured]]

Row = dict[str, Any]

#: Each setting is measured so often, all of a step in turn, and so long each time.
ROUNDS, SECONDS = 3, 0.5
#: A setting that takes more threads, lets them spin or takes more memory has to be so much faster: others need them.
WORTH = 0.95


def tune(
    bundle: Bundle,
    max_memory: int | None = None,
    by: str = "p95",
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[Measured, list[Measured]]:
    """The best setting, and all that were measured, each as it was when it was last compared.

    ``by``: what counts, ``p95`` the slow runs or ``p50`` the median. More threads often bring the median down and slow
    runs up: they wait for each other. Raises OutOfMemory, and what opening the bundle raises.
    """
    rows = measure(bundle, thread_settings(default_threads(), cores.strongest()), progress)
    measured = {row.setting: row for row in rows}
    best = choose(rows, max_memory, by)
    for further in further_settings(bundle):
        rows = measure(bundle, [best.setting, further(best.setting)], progress)
        measured.update({row.setting: row for row in rows})
        best = choose(rows, max_memory, by)
    return best, list(measured.values())


def thread_settings(usable: int, strong: Sequence[int] = ()) -> list[Setting]:
    """Threads on any core, and on the ``strong`` ones alone where there are such; few before many."""
    settings = [Setting(count) for count in counts(usable)]
    if strong:
        settings += [Setting(count, cores=tuple(strong)) for count in counts(min(len(strong), usable))]
    return sorted(settings, key=lambda setting: setting.threads)


def counts(most: int) -> list[int]:
    """How many threads or sessions are tried, up to ``most``: each time twice as many."""
    return [count for count in (1, 2, 4, 8, 16, 32) if count < most] + [most]


def further_settings(bundle: Bundle) -> Iterator[Callable[[Setting], Setting]]:
    """What is changed of the best setting, one after the other."""
    artifact = bundle.manifest.artifact
    if artifact.format != "onnx":
        return
    if default_threads() > 1:
        yield lambda best: replace(best, threads=max(best.threads, 2), spinning=True)
    if engine_cache.worth_it(bundle):
        yield lambda best: replace(best, prepack=not artifact.prepack)


def choose(rows: Sequence[Measured], max_memory: int | None = None, by: str = "p95") -> Measured:
    """The setting that is fastest ``by`` its p95 or p50; a later one only where it is worth it. Raises OutOfMemory."""
    fitting = [row for row in rows if max_memory is None or row.peak_bytes <= max_memory]
    if not fitting:
        least = min(row.peak_bytes for row in rows)
        raise OutOfMemory(
            f"no setting keeps the process within {max_memory:,} bytes, the least was {least:,}; allow more, or "
            "package a smaller precision"
        )
    best = fitting[0]
    for row in fitting[1:]:
        if getattr(row, f"{by}_ms") < getattr(best, f"{by}_ms") * WORTH:
            best = row
    return best


def measure(
    bundle: Bundle, tried: Sequence[Setting], progress: Callable[[str], None] = lambda step: None
) -> list[Measured]:
    """Time each setting in children of its own. Raises what opening the bundle raises."""
    options = {setting: ["--setting", setting.to_json()] for setting in tried}
    return [
        Measured(setting, median(rows, "p50_ms"), median(rows, "p95_ms"), max(row["peak_bytes"] for row in rows))
        for setting, rows in in_turn(bundle, options, progress).items()
    ]


def in_turn(bundle: Bundle, options: Mapping[Any, list[str]], progress: Callable[[str], None]) -> dict[Any, list[Row]]:
    """What ``bench`` with each setting's options gave, in ROUNDS children that take turns with the others'."""
    from edge_infer import admission

    path = str(bundle.path.absolute())
    answers: dict[Any, list[Row]] = {setting: [] for setting in options}
    for number in range(ROUNDS):
        for setting, rows in answers.items():
            progress(f"measuring {setting} ({number + 1} of {ROUNDS})")
            arguments = ["bench", path, *options[setting], "--seconds", str(SECONDS)]
            rows.append(admission.run_child(sys.executable, arguments))
    return answers


def median(rows: Sequence[Row], name: str) -> float:
    import statistics  # here, since its import takes longer than opening a model

    return float(statistics.median(row[name] for row in rows))
