"""Several sessions of one model over one mapping of its weights, fed from a bounded queue."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from edge_infer.errors import InputError, QueueFull, SessionClosed, UsageError
from edge_infer.runtime import batching, cores, plan
from edge_infer.runtime.plan import PoolSetting
from edge_infer.runtime.session import Session, cache_of, find_bundle, load
from edge_infer.runtime.threads import default_threads

Array = np.ndarray[Any, Any]
Answer = dict[str, Array]

#: More would be a mistake of the unit.
LONGEST_WAIT_MS = 60_000


class _Request(NamedTuple):
    """``shape``: what those have in common that may run as one; None for one that runs alone."""

    inputs: Mapping[str, Array]
    future: Future[Answer]
    shape: batching.Shape | None


class _Queue:
    """A bounded queue from which requests that fit together are taken at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._requests: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, request: _Request) -> None:
        """Raises QueueFull, SessionClosed."""
        with self._changed:
            if self._closed:
                raise SessionClosed("the pool is closed; make another")
            if len(self._requests) >= self.most:
                raise QueueFull(
                    f"{self.most} requests are waiting already; send fewer, or make the pool with more sessions or "
                    "waiting="
                )
            self._requests.append(request)
            self._changed.notify()

    def take(self, most: int, wait_s: float) -> list[_Request]:
        """The next request, and up to ``most`` in all that fit with it; these may come within ``wait_s``.

        Empty when the queue is closed and nothing waits.
        """
        with self._changed:
            while not self._requests:
                if self._closed:
                    return []
                self._changed.wait()
            taken = [self._requests.popleft()]
            end = time.monotonic() + wait_s
            while len(taken) < most and taken[0].shape is not None:
                if self._requests:
                    if self._requests[0].shape != taken[0].shape:
                        break
                    taken.append(self._requests.popleft())
                elif self._closed or not self._changed.wait(end - time.monotonic()):
                    break
            if self._requests:  # the word that they came may have been for this thread alone, which goes
                self._changed.notify()
            return taken

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Pool:
    """``sessions`` of one model, each with a thread of its own that takes requests from one queue.

    Together they use the cores that one session would use (``threads`` for each, by default an equal share). The
    weights are mapped once. ``waiting`` requests may stand in the queue. Where neither ``sessions``, ``threads`` nor
    ``batch`` is given, they are what ``python -m edge_infer tune --throughput`` found best here, else two sessions.

    ``batch`` requests at most are run as one, where the model's first dimension is dynamic and its golden questions
    show that it answers each as if it were alone; a request for which the queue has no company waits ``wait_ms``
    milliseconds for some. A request that fails fails alone. ``python -m edge_infer bench --throughput`` tells whether
    batches pay.

        with edge_infer.Pool("digits", sessions=2) as pool:
            futures = [pool.submit({"image": image}) for image in images]
            answers = [future.result() for future in futures]

    Raises what ``load`` raises, which takes the further options, and UsageError where requests cannot be joined.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        sessions: int | None = None,
        waiting: int = 64,
        batch: int | None = None,
        wait_ms: float = 0.0,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("sessions", sessions), ("waiting", waiting), ("threads", threads), ("batch", batch)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name}={value!r}, expected a whole number of at least 1")
        if not isinstance(wait_ms, (int, float)) or not 0 <= wait_ms <= LONGEST_WAIT_MS:
            raise UsageError(f"wait_ms={wait_ms!r}, expected milliseconds from 0 to {LONGEST_WAIT_MS}")
        setting = _setting(source, options, sessions, threads, batch)
        self._queue = _Queue(waiting)
        self._batch, self._wait_s = setting.batch, wait_ms / 1e3
        self.sessions: tuple[Session, ...] = ()
        try:
            for _ in range(setting.sessions):
                self.sessions += (load(source, threads=setting.threads, **options),)
            if setting.batch > 1:
                batching.check_joins(self.sessions[0])
        except BaseException:
            for session in self.sessions:
                session.close()
            raise
        self._workers = [threading.Thread(target=self._work, args=(session,), daemon=True) for session in self.sessions]
        for worker in self._workers:
            worker.start()

    def submit(self, inputs: Mapping[str, Array]) -> Future[Answer]:
        """Queue one request; gives a future of what ``Session.run`` gives or raises. The arrays must stay as they are
        until then. Raises QueueFull at once when too many are waiting, SessionClosed."""
        request = _Request(inputs, Future(), self._shape(inputs))
        self._queue.put(request)
        return request.future

    def _shape(self, inputs: Mapping[str, Array]) -> batching.Shape | None:
        """None as well for inputs that the session is going to refuse."""
        if self._batch == 1:
            return None
        try:
            return batching.shape_of(inputs, self.sessions[0])
        except InputError:
            return None

    def run(self, inputs: Mapping[str, Array]) -> Answer:
        """``submit`` and wait for the answer."""
        return self.submit(inputs).result()

    def close(self) -> None:
        """Answer what is waiting, then release the sessions. May be called twice."""
        self._queue.close()
        for worker in self._workers:
            worker.join()
        for session in self.sessions:
            session.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, session: Session) -> None:
        if session.setting.cores:
            cores.keep_to(session.setting.cores)
        while requests := self._queue.take(self._batch, self._wait_s):
            _answer(session, [request for request in requests if request.future.set_running_or_notify_cancel()])


def _setting(
    source: str | os.PathLike[str],
    options: Mapping[str, Any],
    sessions: int | None,
    threads: int | None,
    batch: int | None,
) -> PoolSetting:
    """What is asked for; where nothing is, what was found best here."""
    if sessions is threads is batch is None:
        bundle = find_bundle(source)
        verify = "full" if options.get("verify") == "full" else "auto"
        tuned = plan.read_pool(bundle, cache_of(bundle, options.get("cache_dir")), verify)
        if tuned:
            return tuned.setting
    sessions = sessions or 2
    return PoolSetting(sessions, threads or max(1, default_threads() // sessions), batch or 1)


def _answer(session: Session, requests: Sequence[_Request]) -> None:
    if len(requests) > 1:
        try:
            answers = batching.run_joined(session, [request.inputs for request in requests])
        except Exception:
            pass  # one of them may be at fault, whatever it raised, so each is asked alone
        else:
            for request, answer in zip(requests, answers):
                request.future.set_result(answer)
            return
    for request in requests:
        try:
            request.future.set_result(session.run(request.inputs))
        except BaseException as error:
            request.future.set_exception(error)
