"""A push to many devices: a few first, then batches, and an end to it when too many fail.

The words are hawkBit's. The devices are cut into groups: the canary, then batches. A group that is through without too
many failures starts the next. The error threshold ends the rollout as soon as more of a group's devices have failed
than it allows: none is started any more, and those under way come to their end. The canary must succeed wholly.

A device that cannot be reached has not failed: it counts for no threshold, except that an unreachable canary proves
nothing. It is tried again by a rollout that resumes from this one's report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_infer.bundle import Bundle
from edge_infer.deploy.fan_out import Event, FanOut
from edge_infer.deploy.inventory import Device
from edge_infer.deploy.push import Pushed
from edge_infer.deploy.rollout_report import DONE, FAILED, RUNNING, STOPPED, UNREACHABLE, WAITING, Report, Row
from edge_infer.deploy.transport import Transport
from edge_infer.errors import EdgeInferError, Unreachable, UsageError

#: How many pushes are under way at once. Enough that the link is never idle, not so many that the host counts: a push
#: of 4 MB to a small board takes some 10 s, most of it connecting and the self-test; at 100 Mbit/s the link sends for
#: 0.3 s of them, so that about 30 pushes keep it busy. Each costs the host two threads and about 1 MB.
PARALLEL = 32
#: How many there are at first; one more for each device that is through. Pushes that start together share the link, end
#: together, and leave it idle during their self-tests; and a fault of the release shows while few devices have it.
AT_FIRST = 4
#: The number of the first group.
CANARY = 0
#: Seconds that connections have to end when the rollout is stopped.
END_S = 3.0


@dataclass(frozen=True)
class Amount:
    """So many devices, or so many percent of them."""

    value: float
    percent: bool

    @classmethod
    def parse(cls, text: str) -> Amount:
        """Read ``3`` or ``10%``. Raises UsageError."""
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", text.strip())
        if match is None or (match[2] and float(match[2]) > 100):
            raise UsageError(f"{text!r} is no amount of devices, expected a whole number or a percentage such as 10%")
        return cls(float(match[1] or match[2]), match[2] is not None)

    def of(self, total: int) -> int:
        """Devices out of ``total``, rounded up."""
        return math.ceil(total * self.value / 100) if self.percent else int(self.value)

    def is_exceeded(self, count: int, total: int) -> bool:
        """Whether ``count`` devices out of ``total`` are more than this."""
        return count * 100 > self.value * total if self.percent else count > self.value

    def __str__(self) -> str:
        return f"{self.value:g}%" if self.percent else f"{self.value:g}"


@dataclass(frozen=True)
class Policy:
    """How a rollout goes on: the size of the canary, the size of a batch (of all devices), the share of a group's
    devices that may fail, and how many pushes run at once."""

    canary: Amount = Amount(1, False)
    batch: Amount = Amount(100, True)
    abort_after: Amount = Amount(5, True)
    parallel: int = PARALLEL

    def __post_init__(self) -> None:
        """Raises UsageError for a number that means nothing."""
        if self.parallel < 1:
            raise UsageError(f"parallel is {self.parallel}, expected at least 1")
        if not self.batch.value:
            raise UsageError("a batch of no devices would never end, expected at least 1 or 1%")

    def groups(self, count: int) -> list[range]:
        """The places of the canary, which may be empty, and of each batch, in a list of ``count`` devices."""
        canary = min(self.canary.of(count), count)
        size = self.batch.of(count)
        return [range(canary), *(range(start, min(start + size, count)) for start in range(canary, count, size))]


@dataclass(frozen=True)
class Job:
    """A device and the bundle that was built for it."""

    device: Device
    bundle: Bundle


def assign(devices: Sequence[Device], bundles: Sequence[Bundle]) -> list[Job]:
    """Give each device the bundle for its target. Raises UsageError when the bundles are not one model, each for a
    target of its own, or leave a device without."""
    by_target: dict[str, Bundle] = {}
    for bundle in bundles:
        other = by_target.setdefault(bundle.manifest.target.name, bundle)
        if bundle.manifest.name != bundles[0].manifest.name:
            raise UsageError(
                f"{bundles[0].path} is the model {bundles[0].manifest.name} and {bundle.path} is "
                f"{bundle.manifest.name}, expected one model; push them one after the other"
            )
        if other is not bundle and other.digest != bundle.digest:
            raise UsageError(
                f"{other.path} and {bundle.path} are both for {bundle.manifest.target.name}, expected one bundle for "
                "each target"
            )
    return [Job(device, _bundle_for(device, by_target)) for device in devices]


def _bundle_for(device: Device, by_target: Mapping[str, Bundle]) -> Bundle:
    if device.target is None and len(by_target) == 1:
        return next(iter(by_target.values()))
    built = ", ".join(sorted(by_target))
    if device.target is None:
        raise UsageError(f"device {device.name} has no target and the bundles are for {built}; say which it is")
    if device.target not in by_target:
        raise UsageError(
            f"device {device.name} is a {device.target}, and the bundles are for {built}; package the model for "
            f"{device.target} as well, or leave the device out; nothing was sent"
        )
    return by_target[device.target]


class Watch(Protocol):
    """Is told of a rollout's progress."""

    def step(self, row: Row, step: str) -> None:
        """What a device does now."""

    def ended(self, row: Row) -> None:
        """A device is through."""


Send = Callable[[Job, Transport, Callable[[str], None]], Pushed]


class Rollout:
    """One run over ``jobs``. ``open_way`` gives the way to a device, ``send`` pushes to it. Use it from one thread."""

    def __init__(
        self,
        jobs: Sequence[Job],
        policy: Policy,
        report: Report,
        open_way: Callable[[Device], Transport],
        send: Send,
        watch: Watch,
    ) -> None:
        self._jobs = {job.device.name: job for job in jobs}
        self._policy, self._report, self._watch = policy, report, watch
        self._open_way, self._send = open_way, send
        self._fan_out = FanOut()
        self._ways: dict[str, Transport] = {}
        self._started: dict[str, float] = {}
        self._through = 0
        self._broken: BaseException | None = None

    def stop(self, reason: str) -> None:
        """End it at once, pushes under way included. For a signal's handler or another thread.

        Each device goes on with the release it had or, where its self-test had passed, with the new one.
        """
        self._fan_out.stop(reason)

    def run(self) -> None:
        """Push to every device whose row waits, until all are through or the policy says no. The report says how
        it went; it is written after every device."""
        rows = list(self._report.rows.values())
        groups = [[rows[place] for place in places] for places in self._policy.groups(len(rows))]
        for number, group in enumerate(groups):
            for row in group:
                row.group = number
        self._report.write()
        try:
            for number, group in enumerate(groups):
                self._run_group(number, group)
                if self._report.reason:
                    break
        finally:
            self._report.finish()
        if self._broken is not None:
            raise self._broken

    def _run_group(self, number: int, group: list[Row]) -> None:
        waiting = deque(row for row in group if row.state == WAITING)
        failed, allowed = 0, Amount(0, False) if number == CANARY else self._policy.abort_after
        while (waiting and not self._report.reason) or self._fan_out.running:
            while waiting and not self._report.reason and len(self._fan_out.running) < self._limit():
                self._start(waiting.popleft())
            event = self._fan_out.next()
            if not event.key:
                self._end(str(event.value))
                return
            row = self._report.rows[event.key]
            if event.step is not None:
                self._watch.step(row, event.step)
                continue
            self._record(row, event)
            failed += row.state == FAILED
            if allowed.is_exceeded(failed, len(group)):
                self._report.abort(
                    f"{failed} of the {len(group)} devices of {_name(number)} failed, allowed are {allowed}"
                )
        if number == CANARY:
            self._judge_canary(group)

    def _limit(self) -> int:
        return min(self._policy.parallel, AT_FIRST + self._through)

    def _judge_canary(self, group: list[Row]) -> None:
        for row in group:
            if row.state == FAILED:  # in an earlier run, or the reason is known already
                self._report.abort(f"the canary {row.device} failed before; try it again with --retry-failed")
            elif row.state != DONE:
                self._report.abort(f"the canary {row.device} is {row.state}, so that nothing is known of the release")

    def _start(self, row: Row) -> None:
        job = self._jobs[row.device]
        way = self._ways[row.device] = self._open_way(job.device)
        row.state = RUNNING
        self._report.note(row)
        self._started[row.device] = time.monotonic()

        def work(progress: Callable[[str], None]) -> Pushed:
            with contextlib.closing(way):
                return self._send(job, way, progress)

        self._fan_out.start(row.device, work)

    def _record(self, row: Row, event: Event) -> None:
        row.seconds = round(time.monotonic() - self._started.pop(row.device), 3)
        del self._ways[row.device]
        self._through += 1
        if event.error is None:
            row.state, row.error = DONE, None
            row.pushed = dataclasses.asdict(event.value)
            row.pushed["steps"] = [str(step) for step in event.value.steps]
        else:
            row.state = UNREACHABLE if is_unreachable(event.error) else FAILED
            row.error = str(event.error).removeprefix(f"{row.address}: ")
            if not isinstance(event.error, EdgeInferError):  # a fault of our own is not one of the device's
                row.error = repr(event.error)
                self._broken = self._broken or event.error
                self._report.abort(f"an unexpected error: {row.error}")
        self._report.note(row)
        self._report.write()
        self._watch.ended(row)

    def _end(self, reason: str) -> None:
        """End the connections of all pushes under way, note those that came to an end by then, and give up the rest."""
        self._report.abort(reason)
        ends = [threading.Thread(target=way.close, daemon=True) for way in self._ways.values()]
        for end in ends:
            end.start()
        deadline = time.monotonic() + END_S
        for end in ends:
            end.join(max(0.0, deadline - time.monotonic()))
        for name in list(self._ways):
            self._report.rows[name].state = STOPPED
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._fan_out.next(timeout_s=0)
                if event.key and event.step is None and event.error is None:
                    self._record(self._report.rows[event.key], event)


def _name(group: int) -> str:
    return f"batch {group}" if group else "the canary"


def is_unreachable(error: BaseException | None) -> bool:
    """Whether ``error``, or the one that it was made from, is a connection that could not be made or was lost."""
    while error is not None and not isinstance(error, Unreachable):
        error = error.__context__
    return error is not None
