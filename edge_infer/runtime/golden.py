"""Golden questions: inputs stored with the answers the packager got, asked again wherever the bundle goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_infer.bundle import Bundle
from edge_infer.errors import BundleError, SelfTestFailed
from edge_infer.manifest import TensorSpec
from edge_infer.runtime.arrays import read_npz, write_npz

if TYPE_CHECKING:
    from edge_infer.runtime.session import Session

Arrays = Mapping[str, np.ndarray[Any, Any]]
Case = tuple[Arrays, Arrays]


def write_golden(
    path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], cases: Sequence[Case]
) -> None:
    """Store cases of (inputs by name, outputs by name). The same cases give the same bytes."""
    arrays = {}
    for number, (asked, answered) in enumerate(cases):
        arrays.update({f"in.{index}.{number}": asked[spec.name] for index, spec in enumerate(inputs)})
        arrays.update({f"out.{index}.{number}": answered[spec.name] for index, spec in enumerate(outputs)})
    write_npz(path, arrays)


def read_golden(bundle: Bundle) -> list[Case]:
    """The cases of a bundle. Raises BundleError when the file is not what the manifest says."""
    manifest = bundle.manifest
    path = bundle.file(manifest.golden.file)
    try:
        arrays = read_npz(path)
        return [
            (
                {spec.name: arrays[f"in.{index}.{number}"] for index, spec in enumerate(manifest.inputs)},
                {spec.name: arrays[f"out.{index}.{number}"] for index, spec in enumerate(manifest.outputs)},
            )
            for number in range(manifest.golden.cases)
        ]
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(
            f"{path} does not hold the golden cases its manifest lists ({error}); package again"
        ) from None


def self_test(session: Session) -> dict[str, float]:
    """Ask all golden questions; gives the largest absolute difference of each output.

    Raises SelfTestFailed naming case, output, observed and allowed difference.
    """
    worst = {spec.name: 0.0 for spec in session.outputs}
    for number, (asked, expected) in enumerate(read_golden(session.bundle)):
        answered = session.run(asked)
        for name, allowed in sorted(session.bundle.manifest.golden.tolerance.items()):
            difference = largest_difference(expected[name], answered[name])
            if not difference <= allowed:
                raise SelfTestFailed(
                    f"golden case {number}: output {name!r} differs by {difference:.3g}, allowed is {allowed:.3g} "
                    f"({session.info.package} {session.info.version}); this engine does not compute what was packaged"
                )
            worst[name] = max(worst[name], difference)
    return worst


def largest_difference(expected: np.ndarray[Any, Any], observed: np.ndarray[Any, Any]) -> float:
    """Largest absolute difference; infinite when shape, dtype or the places of NaN and infinity differ."""
    if expected.shape != observed.shape or expected.dtype != observed.dtype:
        return float("inf")
    if expected.size == 0:
        return 0.0
    a, b = expected.astype(np.float64), observed.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf")
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0))
