"""Three disjoint sets of samples: one to calibrate with, one to choose with, one that is only reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_infer.errors import UsageError
from edge_infer.samples import Samples, halves, overlap, split

#: Fewer different samples cannot be split in three.
SMALLEST_SPLIT = 3


@dataclass(frozen=True)
class Sets:
    """Indices of samples. ``search`` and ``holdout`` are of the data that ``kind`` names, ``calibration`` of its own.

    ``kind`` is ``evaluation`` or ``calibration``; without samples to judge by, ``search`` and ``holdout`` are empty.
    """

    kind: str = "calibration"
    calibration: tuple[int, ...] = ()
    search: tuple[int, ...] = ()
    holdout: tuple[int, ...] = ()


def choose_sets(calibration: Samples | None, evaluation: Samples | None, spooled: Mapping[str, Any]) -> Sets:
    """Evaluation data is halved for search and hold-out; calibration data alone serves all three, in parts.

    Raises UsageError when samples to judge by are among those to calibrate with.
    """
    if evaluation is not None:
        _refuse_overlap(evaluation, calibration)
        search, holdout = halves(evaluation.count, evaluation.labels, keys=evaluation.all_keys())
        everything = () if calibration is None else tuple(range(calibration.count))
        return Sets("evaluation", everything, search, holdout)
    if calibration is None:
        return Sets()
    if spooled["calibration"].get("random"):
        return Sets(calibration=tuple(range(calibration.count)))
    if len(set(calibration.all_keys())) < SMALLEST_SPLIT:  # nothing to judge by, but enough to calibrate with
        return Sets(calibration=tuple(range(calibration.count)))
    parts = split(calibration.count, keys=calibration.all_keys())
    return Sets("calibration", parts.calibration, parts.search, parts.holdout)


def _refuse_overlap(evaluation: Samples, calibration: Samples | None) -> None:
    if calibration is None:
        return
    common = overlap(evaluation, calibration)
    if common:
        raise UsageError(
            f"{common} of {evaluation.count} samples of --evaluate are in --calibration too, so the figure would "
            "flatter; give samples that the calibration has not seen"
        )
