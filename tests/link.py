"""A link to a server on this machine: a TCP proxy on a loopback port with a delay, a bandwidth, and an end on demand.

    with Link(server.port, delay_s=0.02) as link:     # 40 ms there and back
        connect to 127.0.0.1, link.port
        link.counts()["trips"]

Every byte is passed on ``delay_s`` after it was read, in order. A connection is asked for, answered and confirmed
before its first byte, as by TCP's handshake: what a client sends at once reaches the server after three delays, though
its own ``connect`` returns immediately. Bytes are read ahead as far as a fast link would have them under way, so that a
delay alone limits no throughput; what is beyond that waits with the sender. There is no loss and no slow start.

``with LinkProcess(port, ...)`` is the same in a process of its own, which takes no turns with the sender's Python.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import heapq
import itertools
import json
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

HOST = "127.0.0.1"
READ_BYTES = 1 << 19
#: What a link without a bandwidth is taken to carry, for the bytes under way on it.
FAST_BYTES_PER_S = 1e9
#: Bytes of a connection that may be under way however slow the link and however many share it.
LEAST_BYTES = 16 * 1024
#: A chunk of this size belongs to a file.
BULK_BYTES = 4096
#: What the buffers of a link with a bandwidth hold besides, in seconds of it.
BUFFER_S = 0.02

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Line:
    """One direction of the link, shared by its connections."""

    def __init__(self, delay_s: float, bytes_per_s: float | None) -> None:
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        #: Bytes that have arrived at the other side.
        self.passed = 0
        #: When the last of them did that came in numbers, and not with a mere request, in ns of the monotonic clock.
        self.bulk_ns = 0
        #: Bytes that may still pass before the connection that carries the next one is cut; None: no end.
        self.left: int | None = None
        self._free_at = 0.0

    def arrival(self, size: int, sent_at: float) -> float:
        """When ``size`` bytes sent now have arrived."""
        if self.bytes_per_s:
            sent_at = self._free_at = max(sent_at, self._free_at) + size / self.bytes_per_s
        return sent_at + self.delay_s

    def capacity(self) -> int:
        """Bytes that may be under way."""
        if self.bytes_per_s:
            return int(self.bytes_per_s * (self.delay_s + BUFFER_S))
        return READ_BYTES + int(FAST_BYTES_PER_S * self.delay_s)


class Link:
    """A link to ``port`` of this machine. Use it as a context manager; it then listens on ``self.port``."""

    def __init__(self, port: int, *, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        self.target = port
        self.delay_s = delay_s
        self.up, self.down = Line(delay_s, bytes_per_s), Line(delay_s, bytes_per_s)
        self.connections, self.cuts, self.trips = 0, 0, 0
        self.open: set[Connection] = set()
        self.selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # held while anything is passed on, so that counts belong together
        self._listener = socket.create_server((HOST, 0), backlog=512)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def cut_after(self, *, up: int | None = None, down: int | None = None) -> None:
        """Cut a connection, once, when so many bytes from now on have passed in that direction."""
        with self._lock:
            self.up.left, self.down.left = up, down

    def cut(self) -> None:
        """Cut all connections now. Both sides get a reset, so what a server has not taken yet it may lose."""
        with self._lock:
            for connection in list(self.open):
                self.cuts += 1
                connection.abort(to_server=True)

    def counts(self) -> dict[str, int]:
        """What there was so far.

        ``up`` and ``down`` are bytes that have arrived, from and to clients; ``connections``, and ``cuts`` of them;
        ``trips`` the round trips of the connection that took the most, see Connection; ``bulk_ns`` when the last bytes
        of a file had arrived from a client, by ``time.monotonic_ns``.
        """
        with self._lock:
            counts = {name: getattr(self, name) for name in ("connections", "cuts", "trips")}
            return {**counts, "up": self.up.passed, "down": self.down.passed, "bulk_ns": self.up.bulk_ns}

    def __enter__(self) -> Link:
        self.selector.register(self._listener, READ, self._accept)
        self.selector.register(self._woken, READ, lambda mask, now: None)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._wake.close()
        self._thread.join()
        for connection in list(self.open):
            connection.abort()
        for closing in (self._listener, self._woken, self.selector):
            closing.close()  # type: ignore[attr-defined]

    def at(self, when: float, call: Callable[[float], None]) -> None:
        heapq.heappush(self._timers, (when, next(self._numbers), call))

    def _run(self) -> None:
        while self._wake.fileno() != -1:
            timeout = self._timers[0][0] - time.monotonic() if self._timers else None
            ready = self.selector.select(timeout)
            now = time.monotonic()
            with self._lock:
                for key, mask in ready:
                    key.data(mask, now)
                while self._timers and self._timers[0][0] <= now:
                    heapq.heappop(self._timers)[2](now)

    def _accept(self, mask: int, now: float) -> None:
        with contextlib.suppress(BlockingIOError):
            client, _ = self._listener.accept()
            self.connections += 1
            Connection(self, client, now)


class Connection:
    """One connection through a link, with the round trips that it has taken.

    Each chunk of bytes bears a number: 1 is TCP's handshake; a chunk from the client is one more than the highest that
    had reached the client when it was sent, a chunk from the server bears the highest that had reached the server. So
    whoever waits for an answer before sending again raises the number, whatever the times are. What goes out while
    something else is under way does not, as long as it is sent within the delay: a machine that is too slow for the
    delay can make the number too high, never too low.
    """

    def __init__(self, link: Link, client: socket.socket, now: float) -> None:
        self.link = link
        self.client, self.server = client, socket.socket()
        for each in (self.client, self.server):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.established_at = now + 2 * link.delay_s
        self.seen = {self.client: 1, self.server: 2}
        self.pipes = (Pipe(self, link.up, client, self.server), Pipe(self, link.down, self.server, client))
        self.pipes[0].blocked = True  # until the server is connected
        self.watched = {self.client: 0, self.server: 0}
        link.open.add(self)
        link.at(now + 3 * link.delay_s, self._connect)
        self.watch()

    def _connect(self, now: float) -> None:
        if self not in self.link.open:
            return
        self.server.connect_ex((HOST, self.link.target))
        self.pipes[1].started = True
        self.watch()

    def number(self, source: socket.socket) -> int:
        return self.seen[source] + (source is self.client)

    def arrived(self, sink: socket.socket, number: int) -> None:
        self.seen[sink] = max(self.seen[sink], number)
        if sink is self.client:
            self.link.trips = max(self.link.trips, number)

    def watch(self) -> None:
        """Ask for the events that can be made use of now."""
        up, down = self.pipes
        self._watch(self.client, READ * up.wants() | WRITE * down.blocked)
        if down.started:
            self._watch(self.server, READ * down.wants() | WRITE * up.blocked)

    def _watch(self, each: socket.socket, mask: int) -> None:
        before, self.watched[each] = self.watched[each], mask
        if mask == before:
            return
        if not mask:
            self.link.selector.unregister(each)
        elif not before:
            self.link.selector.register(each, mask, self._ready_client if each is self.client else self._ready_server)
        else:
            self.link.selector.modify(each, mask, self.link.selector.get_key(each).data)

    def _ready_client(self, mask: int, now: float) -> None:
        self._ready(mask, now, reads=self.pipes[0], writes=self.pipes[1])

    def _ready_server(self, mask: int, now: float) -> None:
        self._ready(mask, now, reads=self.pipes[1], writes=self.pipes[0])

    def _ready(self, mask: int, now: float, *, reads: Pipe, writes: Pipe) -> None:
        if self not in self.link.open:
            return
        if mask & WRITE:
            writes.blocked = False
            writes.deliver(now)
        if mask & READ and self in self.link.open:
            reads.read(now)
        if self in self.link.open:
            self.watch()

    def finish(self) -> None:
        """Close once both directions have ended."""
        if all(pipe.delivered_end for pipe in self.pipes):
            self._close()

    def abort(self, *, to_server: bool = False) -> None:
        """End it at once. The server gets what has passed and then an end, the client (and the server) a reset."""
        for each in (self.client, self.server) if to_server else (self.client,):
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close()

    def _close(self) -> None:
        self.link.open.discard(self)
        for each, mask in self.watched.items():
            if mask:
                self.link.selector.unregister(each)
            self.watched[each] = 0
            each.close()


class Pipe:
    """One direction of one connection: what was read from ``source`` and is on its way to ``sink``."""

    def __init__(self, connection: Connection, line: Line, source: socket.socket, sink: socket.socket) -> None:
        self.connection, self.line, self.source, self.sink = connection, line, source, sink
        self.under_way: collections.deque[tuple[float, memoryview, int]] = collections.deque()
        self.size = 0
        self.started = line is connection.link.up
        self.blocked = False  # the sink takes no more for now
        self.timed = False  # a timer is set for the first chunk
        self.read_end = self.delivered_end = False

    def wants(self) -> bool:
        return self.started and not self.read_end and self.room() > 0

    def room(self) -> int:
        share = self.line.capacity() // max(1, len(self.connection.link.open))
        return max(LEAST_BYTES, share) - self.size

    def read(self, now: float) -> None:
        try:
            data = self.source.recv(min(READ_BYTES, max(1, self.room())))
        except BlockingIOError:
            return
        except OSError:
            self.connection.abort()
            return
        self.read_end = not data
        self.size += len(data)
        sent_at = max(now, self.connection.established_at)
        arrival = self.line.arrival(len(data), sent_at)
        self.under_way.append((arrival, memoryview(data), self.connection.number(self.source)))
        if not self.blocked and not self.timed:
            self.deliver(now)

    def deliver(self, now: float) -> None:
        """Pass on what has arrived by now; an empty chunk is the end."""
        while self.under_way and not self.blocked:
            arrival, data, number = self.under_way[0]
            if arrival > now:
                self._set_timer(arrival)
                return
            if not data:
                self._end()
                return
            left = self.line.left
            try:
                sent = self.sink.send(data if left is None else data[:left])
            except BlockingIOError:
                self.blocked = True
                return
            except OSError:
                self.connection.abort()
                return
            self.size -= sent
            self.line.passed += sent
            if sent >= BULK_BYTES:
                self.line.bulk_ns = time.monotonic_ns()
            self.connection.arrived(self.sink, number)
            if sent == len(data):
                self.under_way.popleft()
            else:
                self.under_way[0] = arrival, data[sent:], number
            if left is not None:
                self.line.left = left - sent
                if not self.line.left:
                    self._cut()
                    return

    def _set_timer(self, when: float) -> None:
        if not self.timed:
            self.timed = True
            self.connection.link.at(when, self._due)

    def _due(self, now: float) -> None:
        self.timed = False
        if self.connection in self.connection.link.open:
            self.deliver(now)
        if self.connection in self.connection.link.open:
            self.connection.watch()

    def _cut(self) -> None:
        link = self.connection.link
        link.up.left = link.down.left = None
        link.cuts += 1
        self.connection.abort()

    def _end(self) -> None:
        self.under_way.clear()
        self.delivered_end = True
        with contextlib.suppress(OSError):
            self.sink.shutdown(socket.SHUT_WR)
        self.connection.finish()


class LinkProcess:
    """A Link in a process of its own. ``port`` is where it listens; use it as a context manager."""

    def __init__(self, port: int, *, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        command = [sys.executable, str(Path(__file__)), str(port), repr(delay_s), repr(bytes_per_s or 0.0)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._child.stdin is not None and self._child.stdout is not None
        self.pid = self._child.pid
        self._asked, self._told = self._child.stdin, self._child.stdout
        self.port = int(self._told.readline())

    def counts(self) -> dict[str, int]:
        """As of Link."""
        self._asked.write("\n")
        self._asked.flush()
        counts: dict[str, int] = json.loads(self._told.readline())
        return counts

    def __enter__(self) -> LinkProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self._asked.close()
        self._child.wait()
        self._told.close()


def main() -> None:
    """Serve until standard input ends; a line there is answered by the counts."""
    parser = argparse.ArgumentParser(description=LinkProcess.__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("delay_s", type=float)
    parser.add_argument("bytes_per_s", type=float)
    args = parser.parse_args()
    with Link(args.port, delay_s=args.delay_s, bytes_per_s=args.bytes_per_s or None) as link:
        print(link.port, flush=True)
        for _ in sys.stdin:
            print(json.dumps(link.counts()), flush=True)


if __name__ == "__main__":
    main()
