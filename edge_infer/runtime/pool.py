"""Several sessions of one model over one mapping of its weights, fed from a bounded queue."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import numpy as np

from edge_infer.errors import QueueFull, SessionClosed, UsageError
from edge_infer.runtime.session import Session, load
from edge_infer.runtime.threads import default_threads

Array = np.ndarray[Any, Any]
Job = tuple[Mapping[str, Array], "Future[dict[str, Array]]"]


class Pool:
    """``sessions`` of one model, each with a thread of its own that takes requests from one queue.

    Together they use the cores that one session would use (``threads`` for each, by default an equal share). The
    weights are mapped once. ``waiting`` requests may stand in the queue.

        with edge_infer.Pool("digits", sessions=2) as pool:
            futures = [pool.submit({"image": image}) for image in images]
            answers = [future.result() for future in futures]

    Raises what ``load`` raises, which takes the further options.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        sessions: int = 2,
        waiting: int = 64,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("sessions", sessions), ("waiting", waiting)):
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}={value!r}, expected a whole number of at least 1")
        share = max(1, default_threads() // sessions) if threads is None else threads
        self._jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self._closed = False
        self._closing = threading.Lock()
        self.sessions: tuple[Session, ...] = ()
        try:
            for _ in range(sessions):
                self.sessions += (load(source, threads=share, **options),)
        except BaseException:
            for session in self.sessions:
                session.close()
            raise
        self._workers = [threading.Thread(target=self._work, args=(session,), daemon=True) for session in self.sessions]
        for worker in self._workers:
            worker.start()

    def submit(self, inputs: Mapping[str, Array]) -> Future[dict[str, Array]]:
        """Queue one request; gives a future of what ``Session.run`` gives or raises. The arrays must stay as they are
        until then. Raises QueueFull at once when too many are waiting, SessionClosed."""
        future: Future[dict[str, Array]] = Future()
        with self._closing:
            if self._closed:
                raise SessionClosed("the pool is closed; make another")
            try:
                self._jobs.put_nowait((inputs, future))
            except queue.Full:
                raise QueueFull(
                    f"{self._jobs.maxsize} requests are waiting already; send fewer, or make the pool with more "
                    "sessions or waiting="
                ) from None
        return future

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """``submit`` and wait for the answer."""
        return self.submit(inputs).result()

    def close(self) -> None:
        """Answer what is waiting, then release the sessions. May be called twice."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        for _ in self._workers:
            self._jobs.put(None)
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
        while (job := self._jobs.get()) is not None:
            inputs, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                answer = session.run(inputs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(answer)
