"""The same work on many devices at once: a thread for each that is under way, and one queue of what they tell."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """``step``: what ``key`` does now. Otherwise its work has ended, with ``value`` or with ``error``. An event
    without a key comes from ``stop``; ``value`` is what that was given."""

    key: str
    step: str | None = None
    value: Any = None
    error: BaseException | None = None


Work = Callable[[Callable[[str], None]], Any]


class FanOut:
    """Starts work and gives the events in the order they happen. All but ``stop`` is for one thread.

    The threads end with the process: what they talk to has to bear that, as a device bears a connection that ends.
    """

    def __init__(self) -> None:
        self.running: set[str] = set()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def start(self, key: str, work: Work) -> None:
        """Run ``work`` in a thread of its own; it is given a function that takes the step it is at."""
        self.running.add(key)
        threading.Thread(target=self._run, args=(key, work), name=f"edge-infer-{key}", daemon=True).start()

    def _run(self, key: str, work: Work) -> None:
        try:
            event = Event(key, value=work(lambda step: self._events.put(Event(key, step))))
        except BaseException as error:
            event = Event(key, error=error)
        self._events.put(event)

    def next(self, timeout_s: float | None = None) -> Event:
        """The next event, however long that takes. Raises queue.Empty after ``timeout_s``."""
        event = self._events.get(timeout=timeout_s)
        if event.step is None:
            self.running.discard(event.key)
        return event

    def stop(self, value: Any) -> None:
        """Let ``next`` give an event with ``value``. May be called by a signal's handler or another thread."""
        self._events.put(Event("", value=value))


def run_all(works: Mapping[str, Work], parallel: int) -> Iterator[Event]:
    """Run all ``works``, so many at once, in their order; gives the events at which each ended."""
    fan_out, waiting = FanOut(), deque(works)
    while waiting or fan_out.running:
        while waiting and len(fan_out.running) < parallel:
            key = waiting.popleft()
            fan_out.start(key, works[key])
        event = fan_out.next()
        if event.step is None:
            yield event
