"""The link that other tests measure with: order, delay, counts, cuts, and the number of round trips."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from link import HOST, Link, LinkProcess


@contextmanager
def serving(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that has ``talk`` with each client; gives its port."""

    def run() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    def answer(client: socket.socket) -> None:
        with client:
            talk(client)

    listener = socket.create_server((HOST, 0), backlog=512)
    threading.Thread(target=run, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def echo(client: socket.socket) -> None:
    try:
        while data := client.recv(1 << 16):
            client.sendall(data)
    except ConnectionError:
        pass


def digest(client: socket.socket) -> None:
    """Answers the end of what it gets with a hash of it."""
    seen = hashlib.sha256()
    while data := client.recv(1 << 20):
        seen.update(data)
    client.sendall(seen.digest())


def exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return data


@pytest.mark.parametrize("delay_s", [0.0, 0.02])
def test_bytes_arrive_whole_and_in_order_and_are_counted(delay_s: float) -> None:
    data = os.urandom(20_000_000)
    with serving(digest) as port, Link(port, delay_s=delay_s) as link:
        with socket.create_connection((HOST, link.port)) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            assert exactly(client, 32) == hashlib.sha256(data).digest()
            assert client.recv(1) == b""
        assert (link.counts()["up"], link.counts()["down"]) == (len(data), 32)


def test_many_connections_at_once() -> None:
    with serving(digest) as port, Link(port, delay_s=0.01) as link:
        clients = [socket.create_connection((HOST, link.port)) for _ in range(200)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number * 1000)
            client.shutdown(socket.SHUT_WR)
        for number, client in enumerate(clients):
            assert exactly(client, 32) == hashlib.sha256(b"%d" % number * 1000).digest()
            client.close()
        assert link.counts()["connections"] == 200


def test_nothing_arrives_before_its_delay() -> None:
    with serving(echo) as port, Link(port, delay_s=0.05) as link:
        begin = time.monotonic()
        with socket.create_connection((HOST, link.port)) as client:
            for turns in (2, 3, 4):  # the handshake's and its own
                client.sendall(b"x")
                client.recv(1)
                assert time.monotonic() - begin >= turns * 0.1
                assert link.counts()["trips"] == turns


def test_bandwidth_limits_what_passes() -> None:
    with serving(digest) as port, Link(port, bytes_per_s=4e6) as link:
        begin = time.monotonic()
        with socket.create_connection((HOST, link.port)) as client:
            client.sendall(bytes(2_000_000))
            client.shutdown(socket.SHUT_WR)
            exactly(client, 32)
        assert time.monotonic() - begin >= 0.5


def test_what_waits_for_no_answer_takes_no_round_trip() -> None:
    with serving(echo) as port, Link(port, delay_s=0.2) as link:
        with socket.create_connection((HOST, link.port)) as client:
            for _ in range(50):
                client.sendall(b"x")
            exactly(client, 50)
            assert link.counts()["trips"] == 2
            client.sendall(b"x")
            exactly(client, 1)
        assert link.counts()["trips"] == 3


@pytest.mark.parametrize("size", [1, 1000, 777_777])
def test_a_cut_comes_after_exactly_so_many_bytes(size: int) -> None:
    seen: list[int] = []
    ended = threading.Event()

    def count(client: socket.socket) -> None:
        try:
            while data := client.recv(1 << 20):
                seen.append(len(data))
        finally:
            ended.set()

    with serving(count) as port, Link(port, delay_s=0.01) as link:
        link.cut_after(up=size)
        with socket.create_connection((HOST, link.port)) as client, pytest.raises(ConnectionError):
            client.sendall(bytes(1_000_000))
            client.recv(1)
            raise ConnectionError  # the end came between the two
        assert ended.wait(5)
        counts = link.counts()
        assert (sum(seen), counts["up"], counts["cuts"]) == (size, size, 1)


def test_a_cut_of_the_answer_and_the_next_connection_lives() -> None:
    with serving(echo) as port, Link(port) as link:
        link.cut_after(down=10)
        with socket.create_connection((HOST, link.port)) as client:
            client.sendall(bytes(1000))
            received = 0
            with pytest.raises(ConnectionResetError):
                while data := client.recv(1000):
                    received += len(data)
        assert received <= 10 == link.counts()["down"]
        with socket.create_connection((HOST, link.port)) as client:
            client.sendall(bytes(1000))
            assert exactly(client, 1000) == bytes(1000)
        assert (link.counts()["cuts"], link.counts()["connections"]) == (1, 2)


def test_a_cut_at_once_resets_both_sides() -> None:
    reset = threading.Event()

    def wait(client: socket.socket) -> None:
        try:
            while client.recv(1000):
                pass
        except ConnectionResetError:
            reset.set()

    with serving(wait) as port, Link(port) as link, socket.create_connection((HOST, link.port)) as client:
        client.sendall(b"hello")
        while not link.counts()["up"]:
            time.sleep(0.01)
        link.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert reset.wait(5) and link.counts()["cuts"] == 1


def test_a_server_that_is_not_there_ends_the_connection() -> None:
    with serving(echo) as port:
        pass
    with Link(port) as link, socket.create_connection((HOST, link.port)) as client, pytest.raises(ConnectionError):
        client.sendall(b"x")
        client.recv(1)
        raise ConnectionError("ended without a reset")


def test_a_process_of_its_own() -> None:
    with serving(echo) as port, LinkProcess(port, delay_s=0.01) as link:
        with socket.create_connection((HOST, link.port)) as client:
            client.sendall(b"hello")
            assert exactly(client, 5) == b"hello"
        expected = {"connections": 1, "cuts": 0, "trips": 2, "up": 5, "down": 5, "bulk_ns": 0}
        assert link.counts() == expected
