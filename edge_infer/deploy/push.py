"""Put a bundle on a device, look at what is there, go back."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_infer.admission import TIMEOUT_S
from edge_infer.bundle import Bundle, verify
from edge_infer.deploy import deltas
from edge_infer.deploy.conversation import Conversation, myself
from edge_infer.deploy.difference import Difference
from edge_infer.deploy.incoming import PIECE_BYTES, PIECE_DIGITS
from edge_infer.deploy.plan import Delta, PushOptions, Step, make_plan
from edge_infer.deploy.transport import Transport
from edge_infer.store import KEEP
from edge_infer.trust import read_signature

Progress = Callable[[str], None]
#: How often the share of a file that has gone is told.
SHARES_S = 2.0


@dataclass(frozen=True)
class Pushed:
    """What a push did. ``report`` is the self-test's own, empty for a dry run; ``replaced`` the digest before;
    ``tuned`` the setting that tuning chose, or why it chose none, None where it was not asked for; ``pending_s`` the
    seconds within which it must be confirmed, None where it need not be."""

    address: str
    digest: str
    steps: tuple[Step, ...]
    sent_bytes: int
    replaced: str | None
    report: Mapping[str, Any]
    tuned: str | None = None
    pending_s: int | None = None


def push(
    bundle: Bundle,
    transport: Transport,
    options: PushOptions | None = None,
    *,
    dry_run: bool = False,
    progress: Progress = lambda step: None,
) -> Pushed:
    """Send ``bundle``, let the device verify and self-test it, and make it the release in use.

    Raises BundleError when the bundle here is damaged, EngineMissing, SelfTestFailed or another DeviceError when the
    device refuses; in all cases it goes on with the release it had.
    """
    options = options or PushOptions()
    progress("asking the device")
    with ThreadPoolExecutor(1) as beside, Conversation(transport, options.store) as device:
        verified = beside.submit(verify, bundle, mode="full")  # while the device starts the receiver
        answer = _begin(device, bundle, options)
        verified.result()
        starts = sound_starts(bundle, answer["have"])
        steps = make_plan(bundle.manifest, bundle.digest, answer, starts, options)
        found = deltas.find_deltas(bundle, transport.address, answer, steps, options, progress)
        if found.by_name:
            sizes = _sizes(found.by_name, answer["have_deltas"])
            steps = make_plan(bundle.manifest, bundle.digest, answer, starts, options, sizes)
        deltas.require_delta(bundle, answer, steps, options, found.base)
        current = answer["releases"][0] if answer["releases"] else None
        pushed = Pushed(transport.address, bundle.digest, tuple(steps), 0, current, {})
        if dry_run:
            return pushed
        sent = _send(device, bundle, steps, progress, found.by_name)
        progress("; ".join(str(step) for step in steps if step.action in ("self-test", "tune", "await")))
        done = device.ask(
            "finish",
            timeout_s=options.timeout_s,
            tune=options.tune,
            keep=options.keep,
            confirm_within_s=options.confirm_within_s,
            health=options.health,
        )
    deltas.keep(bundle)
    return replace(pushed, sent_bytes=sent, report=done["report"], tuned=done["tuned"], pending_s=done["pending_s"])


def _begin(device: Conversation, bundle: Bundle, options: PushOptions) -> Mapping[str, Any]:
    """What the device answers when it is told of the bundle."""
    signature = read_signature(bundle.path)
    return device.ask(
        "begin",
        manifest=bundle.manifest.to_bytes().decode(),
        signature=None if signature is None else signature.decode("ascii", "replace"),
        allow_older=options.allow_older,
        python=options.python,
        who=myself(),
        wait_s=options.wait_s,
    )


def _sizes(differences: Mapping[str, Difference], staged: Mapping[str, Any]) -> dict[str, Delta]:
    """What the plan needs to know of deltas; ``staged`` is what an interrupted push left of them."""
    found = {}
    for name, made in differences.items():
        left = staged.get(name)
        start = sound_start(made.path, min(left["size"], made.size), left["pieces"]) if left else 0
        found[name] = Delta(made.size, made.base, start)
    return found


def sound_starts(bundle: Bundle, have: Mapping[str, Any]) -> dict[str, int]:
    """How many bytes of each staged file are as they should be, from its start."""
    return {name: sound_start(bundle.file(name), row["size"], row["pieces"]) for name, row in have.items()}


def sound_start(path: Path, size: int, pieces: list[str]) -> int:
    """How many of the ``size`` bytes that are staged of ``path`` are its own, from the start, by hashes of pieces."""
    with path.open("rb") as file:
        for number, piece in enumerate(pieces):
            start = number * PIECE_BYTES
            data = file.read(min(PIECE_BYTES, size - start))
            if hashlib.sha256(data).hexdigest()[:PIECE_DIGITS] != piece:
                return start
    return size


def _send(
    device: Conversation,
    bundle: Bundle,
    steps: list[Step],
    progress: Progress = lambda step: None,
    differences: Mapping[str, Difference] | None = None,
) -> int:
    """Take the steps before the self-test; gives the bytes sent."""
    sent = 0
    for step in steps:
        if step.action == "make room":
            device.send("make-room")
        elif step.action == "send":
            progress(str(step))
            sent += device.send_file(step.subject, bundle.file(step.subject), step.offset, Shares(step, progress))
        elif step.action == "patch" and differences:
            progress(str(step))
            path = differences[step.subject].path
            sent += device.send_file(step.subject, path, step.offset, Shares(step, progress), "delta", base=step.base)
    return sent


class Shares:
    """Tells of a file that takes longer what share of it has gone."""

    def __init__(self, step: Step, progress: Progress) -> None:
        self._step, self._progress = step, progress
        self._gone, self._told = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self._gone += count
        if time.monotonic() - self._told >= SHARES_S:
            self._told = time.monotonic()
            self._progress(f"{self._step}: {self._gone / self._step.size:.0%}")


@contextmanager
def measuring(
    bundle: Bundle, transport: Transport, *, python: str | None = None, timeout_s: float = TIMEOUT_S
) -> Iterator[Callable[[int], Mapping[str, Any]]]:
    """Send ``bundle`` to be self-tested and timed on the device; it is removed there at the end.

    Gives a function that runs it so many times and gives what ``bench`` gives. Raises as ``push`` does. What the
    device serves stays as it is.
    """
    with Conversation(transport) as device:
        options = PushOptions(python=python, timeout_s=timeout_s)
        answer = _begin(device, bundle, options)
        starts = sound_starts(bundle, answer["have"])
        _send(device, bundle, make_plan(bundle.manifest, bundle.digest, answer, starts, options))
        yield lambda runs: device.ask("measure", timeout_s=timeout_s, runs=runs)["measured"]
        device.end()


def status(transport: Transport, python: str | None = None, store: str | None = None) -> Mapping[str, Any]:
    """The device's facts and the models in its store."""
    with Conversation(transport, store) as device:
        return device.ask("status", python=python)


def history(transport: Transport, name: str, store: str | None = None) -> Mapping[str, Any]:
    """``releases``: digests of ``name``, the one in use first; ``events``: what happened to it, oldest first."""
    with Conversation(transport, store) as device:
        return device.ask("history", name=name)


def rollback(
    transport: Transport, name: str, digest: str | None = None, store: str | None = None, wait_s: float = 0.0
) -> str:
    """Go back to the release before, or to the one whose digest begins with ``digest``; gives the digest in use.

    Raises ReleaseNotFound's sentence as a DeviceError.
    """
    with Conversation(transport, store) as device:
        return str(device.ask("rollback", name=name, digest=digest, who=myself(), wait_s=wait_s)["digest"])


def confirm(transport: Transport, name: str, store: str | None = None, wait_s: float = 0.0) -> str:
    """Keep the release on trial; gives its digest. Raises ReleaseNotFound's sentence as a DeviceError."""
    with Conversation(transport, store) as device:
        return str(device.ask("confirm", name=name, who=myself(), wait_s=wait_s)["digest"])


def collect(
    transport: Transport, name: str | None = None, keep: int = KEEP, store: str | None = None, wait_s: float = 0.0
) -> int:
    """Remove all but the ``keep`` newest releases of ``name``, or of every model, and what pushes left behind.

    Gives the bytes freed.
    """
    with Conversation(transport, store) as device:
        return int(device.ask("collect", name=name, keep=keep, who=myself(), wait_s=wait_s)["freed"])
