"""A push over a link that is slow or breaks: how many round trips it takes, and what is sent twice after a cut.

The number of round trips is counted and not timed: tests/link.py numbers what passes by what it can be an answer to.
A machine that is too slow for the link's delay can make the count too high, never too low, so the least of three
tries counts. All that is sent fits into the 2 MiB that OpenSSH takes unasked; more waits for its leave, however sent.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SOURCES
from handmade import rebuild
from link import Link
from sshd import SshServer, make_key

from edge_infer.bundle import Bundle
from edge_infer.deploy.plan import PushOptions
from edge_infer.deploy.push import Pushed, push
from edge_infer.deploy.ssh import SshTransport
from edge_infer.deploy.transport import SLICE_BYTES
from edge_infer.errors import DeviceError
from edge_infer.store import Store

#: TCP, versions, key exchange, login, channel, command, what the device has, what it made of it. Promised are nine.
TRIPS = 8
DELAY_S = 0.1
TRIES = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device") / "store"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("sshd"), options=[f"SetEnv EDGE_INFER_HOME={store}"]) as server:
        yield server


@pytest.fixture(autouse=True)
def empty_store(store: Path) -> Iterator[None]:
    yield
    shutil.rmtree(store, ignore_errors=True)


@pytest.fixture
def digits(packaged) -> Bundle:  # type: ignore[no-untyped-def]
    """Two files, the fewest that a bundle has."""
    return packaged(SOURCES["tflite"], "tflite", "float32")


def with_attachments(bundle: Bundle, path: Path, count: int, size: int) -> Bundle:
    """The bundle with ``count`` more files of ``size`` bytes that no two have in common."""
    source = random.Random(5)

    def attach(folder: Path) -> None:
        for number in range(count):
            (folder / f"attached-{number:03}").write_bytes(source.randbytes(size))

    return rebuild(bundle, path, attach)


def push_over(link: Link, server: SshServer, bundle: Bundle, *lines: str) -> Pushed:
    """Push through ``link``; ``lines`` are more of its ssh_config."""
    config = server.directory / "link_config"
    config.write_text(server.alias_block(*lines, f"Port {link.port}", f"HostKeyAlias {server.known_name}"), "utf-8")
    with contextlib.closing(SshTransport(server.alias, ssh_config=config)) as transport:
        return push(bundle, transport, PushOptions(python=sys.executable, wait_s=10))


def wait_until_free(store: Path) -> None:
    """Until the receiver that was cut off has put down the store's lock."""
    for _ in range(100):
        try:
            with Store(store).lock():
                return
        except DeviceError:
            time.sleep(0.05)


def round_trips(
    server: SshServer, store: Path, bundle: Bundle, *lines: str, goal: int = TRIPS, anew: bool = True
) -> int:
    """Of a whole push, from the connection's first packet to the push's result; up to three tries to reach ``goal``."""
    trips = []
    for _ in range(TRIES):
        if anew:
            shutil.rmtree(store, ignore_errors=True)
        with Link(server.port, delay_s=DELAY_S) as link:
            pushed = push_over(link, server, bundle, *lines)
            trips.append(link.counts()["trips"])
        assert pushed.sent_bytes == (bundle.manifest.size if anew else 0)
        if trips[-1] <= goal:
            break
    return min(trips)


@pytest.mark.parametrize("files", [2, 200])
def test_round_trips_of_a_push(server: SshServer, store: Path, digits: Bundle, tmp_path: Path, files: int) -> None:
    bundle = with_attachments(digits, tmp_path / "many.edge", files - len(digits.manifest.files), 1000)
    assert len(bundle.manifest.files) == files
    assert round_trips(server, store, bundle) == TRIPS


def test_what_is_there_already_is_not_sent_and_takes_no_more_trips(
    server: SshServer, store: Path, digits: Bundle
) -> None:
    with Link(server.port) as link:
        push_over(link, server, digits)
    assert round_trips(server, store, digits, anew=False) == TRIPS


def test_each_key_that_is_refused_takes_one_trip(
    server: SshServer, store: Path, digits: Bundle, tmp_path: Path
) -> None:
    refused = [tmp_path / "refused-1", tmp_path / "refused-2"]
    for path in refused:
        make_key(path)
    lines = [f"IdentityFile {path}" for path in refused]
    goal = TRIPS + len(refused)
    assert round_trips(server, store, digits, *lines, goal=goal) == goal


@pytest.mark.parametrize(
    ("cuts", "size", "delay_s", "bytes_per_s"),
    [(20, 1_000_000, 0.0, 4e6), (5, 3_000_000, 0.02, 8e6)],
    ids=["one channel", "lanes"],
)
def test_a_cut_push_goes_on_and_sends_at_most_one_slice_twice(
    server: SshServer,
    store: Path,
    digits: Bundle,
    tmp_path: Path,
    cuts: int,
    size: int,
    delay_s: float,
    bytes_per_s: float,
) -> None:
    """Cut at random bytes of either direction, it is pushed again.

    What passed the link in both tries, less what a push of all and a push of nothing take, was sent twice. The link is
    slower than the device, as links are: with the connection goes what the SSH server has taken and not yet handed on,
    up to its window. A machine too busy to hand it on can make the number too high, never too low, so the least of
    three tries counts here, too.
    """
    bundle = with_attachments(digits, tmp_path / "padded.edge", 3, size)

    def slow_link() -> Link:
        return Link(server.port, delay_s=delay_s, bytes_per_s=bytes_per_s)

    def passed() -> dict[str, int]:
        with slow_link() as link:
            push_over(link, server, bundle)
            return link.counts()

    def sent_twice(way: str, at: int) -> int:
        shutil.rmtree(store, ignore_errors=True)
        with slow_link() as link:
            link.cut_after(**{way: at})
            with pytest.raises(DeviceError):
                push_over(link, server, bundle)
            cut = link.counts()
            assert (cut["cuts"], cut[way]) == (1, at)
            wait_until_free(store)
            again = push_over(link, server, bundle)
            total = link.counts()["up"]
        assert again.sent_bytes <= bundle.manifest.size
        assert Store(store).open_current(bundle.manifest.name).digest == bundle.digest
        return total - whole["up"] - nothing["up"]

    whole, nothing = passed(), passed()
    assert whole["up"] - nothing["up"] > bundle.manifest.size
    # Before the last answer, which comes after as much as this however the server groups its own messages.
    ends = {"up": bundle.manifest.size, "down": nothing["down"] * 9 // 10}
    source, twice = random.Random(2), []
    for number in range(cuts):
        way = "down" if number % 5 == 0 else "up"
        at = source.randrange(1, ends[way])
        tries: list[int] = []
        while len(tries) < TRIES and (not tries or tries[-1] > SLICE_BYTES):
            tries.append(sent_twice(way, at))
        twice.append(min(tries))
    print("bytes sent twice:", sorted(twice))
    assert max(twice) <= SLICE_BYTES
