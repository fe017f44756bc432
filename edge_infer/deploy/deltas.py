"""Which files of a push are sent as what changed since a release that the device has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_infer.bundle import Bundle
from edge_infer.deploy.bases import Bases, bases_root
from edge_infer.deploy.difference import Difference, refusal
from edge_infer.deploy.local import PREFIX
from edge_infer.deploy.plan import PushOptions, Step
from edge_infer.errors import DeviceError

#: Larger files are compared only when asked to: at 2 to 5 MB a second, it takes longer than to send them on most links.
AUTO_BYTES = 10**7


@dataclass(frozen=True)
class Deltas:
    """What was found: deltas by file name, all from the release ``base``, which is None where this machine has none."""

    base: Bundle | None = None
    by_name: Mapping[str, Difference] = field(default_factory=dict)


def find_deltas(
    bundle: Bundle,
    address: str,
    answer: Mapping[str, Any],
    steps: Sequence[Step],
    options: PushOptions,
    progress: Callable[[str], None],
) -> Deltas:
    """Deltas of the files that ``steps`` send, where they are worth it.

    ``answer`` is the receiver's to ``begin``. Raises UsageError when ``options.base`` is no release of the device.
    """
    sends = [step for step in steps if step.action == "send"]
    if options.delta == "auto" and options.base is None:
        sends = [step for step in sends if step.size <= AUTO_BYTES and not address.startswith(PREFIX)]
    if not sends or options.delta == "never":
        return Deltas()
    bases = Bases(bases_root())
    try:
        base = bases.choose(answer["releases"], options.base)
        if base is None:
            return Deltas()
        progress(f"comparing with {base.digest[:12]}")
        return Deltas(base, bases.differences(base, bundle, [step.subject for step in sends], answer["codecs"]))
    except OSError:
        if options.delta == "only" or options.base is not None:
            raise
        return Deltas()  # a cache that cannot be written costs the delta


def require_delta(
    bundle: Bundle, answer: Mapping[str, Any], steps: Sequence[Step], options: PushOptions, base: Bundle | None
) -> None:
    """Raise DeviceError for ``--delta-only`` where what changed since ``base`` is not less than the files."""
    sends = [step for step in steps if step.action in ("send", "patch")]
    if options.delta != "only" or not sends:
        return
    full = sum(bundle.manifest.files[step.subject].size for step in sends)
    words = refusal(base, answer["codecs"], sum(step.size for step in sends), full)
    if words:
        raise DeviceError(words)


def keep(bundle: Bundle) -> None:
    """Remember what was pushed, so that the next release can be compared with it."""
    with contextlib.suppress(OSError):  # a full or read-only disk costs the next push its delta
        Bases(bases_root()).keep(bundle)
