"""What a push will do, as a pure function of the bundle and the device's facts: decided before a byte is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_infer.admission import TIMEOUT_S
from edge_infer.bundle import Bundle
from edge_infer.deploy.receiver import LONGEST_S
from edge_infer.errors import DeviceError, EngineMissing, UsageError
from edge_infer.manifest import Manifest
from edge_infer.runtime.engines import EXTRAS, at_least, release_numbers
from edge_infer.store import KEEP

#: A kernel keeps part of the memory that is on the box to itself; a 512 MB board shows 416 MB.
RAM_SHARE_SHOWN = 0.75
#: The device half's own oldest Python.
OLDEST_PYTHON = "3.10"
#: How long a health command has, where nothing else is said.
HEALTH_S = 60.0


@dataclass(frozen=True)
class PushOptions:
    """What is asked of a push beside the bundle.

    ``python``: the device's Python with edge-infer and an engine (default: the store's ``venv``, else ``python3``).
    ``store``: the folder of its store. ``keep``: how many releases of the model stay. ``wait_s``: how long to wait for
    another push to end. ``timeout_s``: for the self-test. ``tune``: measure how the model runs fastest before it
    serves. ``confirm_within_s``: it serves on trial until it is confirmed, for so long. ``health``: a shell command
    there that confirms it by succeeding, within 60 s where nothing else is said. ``allow_older``: a signed bundle may
    have a smaller serial than one that was in use there. ``delta``: send what changed since an older release,
    where that is less: of small files ("auto"), of all files ("all"), "never", or "only" that and nothing else.
    ``base``: the bundle of that older release, where this machine did not push it.
    """

    python: str | None = None
    store: str | None = None
    keep: int = KEEP
    wait_s: float = 0.0
    timeout_s: float = TIMEOUT_S
    tune: bool = False
    confirm_within_s: float | None = None
    health: str | None = None
    allow_older: bool = False
    delta: str = "auto"
    base: Bundle | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for a number that means nothing."""
        for name in ("wait_s", "timeout_s", "confirm_within_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= LONGEST_S:
                option = name.removesuffix("_s").replace("_", " ")
                raise UsageError(f"the time for {option} is {value:g} s, expected 0 to {LONGEST_S} (a week)")
        if self.keep < 1:
            raise UsageError(f"keep is {self.keep}, expected at least 1: the release in use")
        if self.base is not None and self.delta == "never":
            raise UsageError("a base was given for deltas that were ruled out; leave out --base or --no-delta")
        if self.health is not None and self.confirm_within_s is None:
            object.__setattr__(self, "confirm_within_s", HEALTH_S)


@dataclass(frozen=True)
class Step:
    """``action``: make room, send, patch, copy, keep, self-test, tune, activate, try or await. ``size``: the bytes sent
    from ``offset``, or to be freed. ``base``: the release that a file is patched from."""

    action: str
    subject: str
    size: int = 0
    offset: int = 0
    base: str = ""

    def __str__(self) -> str:
        amount = f" ({self.size:,} bytes{f' from {self.offset:,}' if self.offset else ''})" if self.size else ""
        return f"{self.action} {self.subject}{f' from {self.base[:12]}' if self.base else ''}{amount}"


@dataclass(frozen=True)
class Delta:
    """A file as what changed since the one in the release ``base``: ``size`` bytes, of which ``start`` are there."""

    size: int
    base: str
    start: int = 0


def make_plan(
    manifest: Manifest,
    digest: str,
    answer: Mapping[str, Any],
    starts: Mapping[str, int],
    options: PushOptions,
    deltas: Mapping[str, Delta] | None = None,
) -> list[Step]:
    """The steps of a push, given the receiver's answer to ``begin``.

    ``starts``: how much of each staged file the host found right. ``deltas``: what it would send instead of files.
    Raises DeviceError when the device is not what the bundle was made for or has too little space, EngineMissing when
    no engine there can run it.
    """
    facts = answer["facts"]
    check_device(manifest, facts)
    check_engine(manifest, facts)
    names = [] if answer["present"] else sorted(manifest.files)
    files = [_file_step(manifest, name, answer, starts, (deltas or {}).get(name)) for name in names]
    # A delta lies beside the file that is made of it.
    room = _make_room(manifest, answer, sum(step.size + step.offset for step in files if step.action == "patch"))
    steps = [Step("keep", f"release {digest[:12]}")] if answer["present"] else [*room, *files]
    steps.append(Step("self-test", f"{digest[:12]} with {facts['serving_python']}"))
    if options.tune:
        steps.append(Step("tune", digest[:12]))
    # What serves already is not put on trial again.
    serves = answer["releases"][:1] == [digest] and not answer["on_trial"]
    return [*steps, *([Step("activate", manifest.name)] if serves else _activation(manifest.name, options))]


def _file_step(
    manifest: Manifest, name: str, answer: Mapping[str, Any], starts: Mapping[str, int], delta: Delta | None
) -> Step:
    size, have = manifest.files[name].size, starts.get(name, 0)
    if have == size and name in answer["have"]:
        return Step("keep", name)
    if name in answer["copies"]:
        return Step("copy", f"{name} from another release")
    if delta is not None and delta.size - delta.start < size - have:
        return Step("patch", name, delta.size - delta.start, delta.start, delta.base)
    return Step("send", name, size - have, have)


def _make_room(manifest: Manifest, answer: Mapping[str, Any], more: int = 0) -> list[Step]:
    """What other pushes left behind goes when its space is needed; DeviceError when that is not enough."""
    # What is copied on the device takes space as well as what is sent.
    needed = more + manifest.size - sum(int(row["size"]) for row in answer["have"].values())
    free, reclaimable = answer["facts"]["free_bytes"], answer["reclaimable_bytes"]
    if answer["present"] or needed <= free:
        return []
    if needed > free + reclaimable:
        raise DeviceError(
            f"the push needs {needed:,} bytes, the device has {free:,} free beyond its reserve; free some space there"
        )
    return [Step("make room", "by removing what other pushes left behind", reclaimable)]


def _activation(name: str, options: PushOptions) -> list[Step]:
    if options.confirm_within_s is None:
        return [Step("activate", name)]
    steps = [Step("try", f"{name} for {options.confirm_within_s:g} s")]
    return steps if options.health is None else [*steps, Step("await", f"success of `{options.health}`")]


def check_device(manifest: Manifest, facts: Mapping[str, Any]) -> None:
    """Raise DeviceError for the first fact that the bundle's target does not admit."""
    target = manifest.target
    hint = f"package the model for this device instead (the bundle is for {target.name})"
    if facts["architecture"] != target.architecture:
        raise DeviceError(f"the device is {facts['architecture']}, the bundle is for {target.architecture}; {hint}")
    lacking = sorted(set(target.cpu_features) - set(facts["cpu_features"]))
    if lacking:
        raise DeviceError(f"the device's processor lacks {', '.join(lacking)}; {hint}")
    if facts["ram_bytes"] < target.ram_bytes * RAM_SHARE_SHOWN:
        raise DeviceError(
            f"the device has {facts['ram_bytes']:,} bytes of memory, {target.name} has {target.ram_bytes:,}; {hint}"
        )
    if facts["page_size_bytes"] > target.page_size_bytes:
        raise DeviceError(
            f"the device's pages have {facts['page_size_bytes']} bytes, the weights are aligned to "
            f"{target.page_size_bytes}; {hint}"
        )
    oldest = max(target.python, OLDEST_PYTHON, key=release_numbers)
    if not at_least(facts["python"], oldest):
        raise DeviceError(
            f"{facts['serving_python']} is Python {facts['python']}, expected {oldest} or later; "
            "name a newer one with --python"
        )


def check_engine(manifest: Manifest, facts: Mapping[str, Any]) -> None:
    """Raise EngineMissing unless the serving Python has edge-infer and an engine that can run the bundle."""
    packages = facts["packages"]
    wanted = manifest.artifact.requires
    extra = EXTRAS.get(wanted[0].package, manifest.artifact.format)
    pip = f"{facts['serving_python']} -m pip install"
    command = f"edge-infer provision DEVICE --engine {extra}, or there {pip} 'edge-infer[{extra}]'"
    if "edge-infer" not in packages:
        raise EngineMissing(f"edge-infer is not installed for {facts['serving_python']}; {command}")
    have = [item for item in wanted if item.package in packages]
    if not have:
        raise EngineMissing(
            f"the bundle needs {' or '.join(map(str, wanted))}, and {facts['serving_python']} has no such engine; "
            f"{command}"
        )
    if not any(at_least(packages[item.package], item.version) for item in have):
        raise EngineMissing(
            f"the bundle needs {have[0]}, and {facts['serving_python']} has {packages[have[0].package]}; "
            f"edge-infer provision DEVICE --upgrade, or there {pip} --upgrade {have[0].package}"
        )
