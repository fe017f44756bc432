"""Put a bundle on a device, look at what is there, go back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edge_infer.admission import TIMEOUT_S
from edge_infer.bundle import Bundle, verify
from edge_infer.deploy.conversation import Conversation
from edge_infer.deploy.plan import Step, make_plan
from edge_infer.deploy.transport import Transport


@dataclass(frozen=True)
class Pushed:
    """What a push did. ``report`` is the self-test's own, empty for a dry run; ``replaced`` the digest before;
    ``tuned`` the setting that tuning chose, or why it chose none, None where it was not asked for."""

    address: str
    digest: str
    steps: tuple[Step, ...]
    sent_bytes: int
    replaced: str | None
    report: Mapping[str, Any]
    tuned: str | None = None


def push(
    bundle: Bundle,
    transport: Transport,
    *,
    python: str | None = None,
    dry_run: bool = False,
    tune: bool = False,
    timeout_s: float = TIMEOUT_S,
    progress: Callable[[str], None] = lambda step: None,
) -> Pushed:
    """Send ``bundle``, let the device verify and self-test it, and make it the release in use.

    ``tune``: it also measures how the model runs fastest there, before it serves; some ten seconds on a fast machine.
    ``python`` is the device's Python with edge-infer and an engine (default: the store's ``venv``, else
    ``python3``). Raises BundleError when the bundle here is damaged, EngineMissing, SelfTestFailed or another
    DeviceError when the device refuses; in all cases it goes on with the release it had.
    """
    verify(bundle, mode="full")
    text = bundle.manifest.to_bytes().decode()
    progress("asking the device")
    with Conversation(transport) as device:
        answer = device.ask("begin", manifest=text, python=python)
        steps = make_plan(bundle.manifest, bundle.digest, answer, tune)
        current = answer["current"][0] if answer["current"] else None
        if dry_run:
            return Pushed(transport.address, bundle.digest, tuple(steps), 0, current, {})
        sent = 0
        for step in steps:
            if step.action == "send":
                progress(str(step))
                sent += device.send_file(step.subject, bundle.file(step.subject), step.offset)
        progress("self-test and tuning on the device" if tune else "self-test on the device")
        done = device.ask("finish", timeout_s=timeout_s, tune=tune)
    return Pushed(transport.address, bundle.digest, tuple(steps), sent, current, done["report"], done["tuned"])


@contextmanager
def measuring(
    bundle: Bundle, transport: Transport, *, python: str | None = None, timeout_s: float = TIMEOUT_S
) -> Iterator[Callable[[int], Mapping[str, Any]]]:
    """Send ``bundle`` to be self-tested and timed on the device; it is removed there at the end.

    Gives a function that runs it so many times and gives what ``bench`` gives. Raises as ``push`` does. What the
    device serves stays as it is.
    """
    with Conversation(transport) as device:
        answer = device.ask("begin", manifest=bundle.manifest.to_bytes().decode(), python=python)
        for step in make_plan(bundle.manifest, bundle.digest, answer):
            if step.action == "send":
                device.send_file(step.subject, bundle.file(step.subject), step.offset)
        yield lambda runs: device.ask("measure", timeout_s=timeout_s, runs=runs)["measured"]
        device.end()


def status(transport: Transport, python: str | None = None) -> Mapping[str, Any]:
    """The device's facts and the models in its store."""
    with Conversation(transport) as device:
        return device.ask("status", python=python)


def rollback(transport: Transport, name: str) -> str:
    """Go back to the release before; gives its digest. Raises ReleaseNotFound's sentence as a DeviceError."""
    with Conversation(transport) as device:
        return str(device.ask("rollback", name=name)["digest"])
