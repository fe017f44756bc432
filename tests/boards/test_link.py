"""A bad link: far, lossy and narrow by the board's own kernel, and cut again and again in the middle of a push.

The link's faults are those of the board's kernel. A proxy without a delay (tests/link.py) stands before the board's
port, counts what passes and cuts the connection: what it has passed on still arrives, what it has not is lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
from conftest import SOURCES
from lab.boards import Lab
from lab.emulator import Emulator
from lab.network import Link
from link import Link as Proxy

from boards.board import TestBoard
from boards.record import note
from boards.serving import STAGED, Started, release, serving, staged
from edge_infer.bundle import Bundle

TARGET = "raspberry-pi-zero-2w"
#: 200 ms there and back, 2 % of the packets lost each way, 2 Mbit/s.
BAD = Link(latency_ms=200, loss=0.02, bandwidth=2_000_000)
#: A link that is gone. TCP tries again ever more seldom, so that it comes back later than the link does.
DEAD, DEAD_S = Link(latency_ms=200, loss=1.0), 8
ATTACHED_BYTES = 300_000
#: What comes with the release whose connection is reset, and of it what is there then: more than what buffers hold.
RESET_BYTES, RESETS = 1_500_000, (100_000, 900_000)
#: Bytes of each connection after which it is cut: in the login, in what a push starts with, and in the files.
CUTS = (1_500, 20_000, 110_000, 160_000, 130_000)
#: Files are sent whole. And a cut is noticed over there when what was under way has arrived, or after two minutes.
WHOLE = ("--no-delta", "--wait", "150", "--self-test-timeout", "600")
#: How much of a channel's data OpenSSH takes in one packet.
PACKET_BYTES = 32 * 1024


@pytest.fixture(scope="module")
def releases(packaged: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """What is there before, and what comes over the bad link: a network of 8 bit beside random bytes of its own."""
    folder = tmp_path_factory.mktemp("link")

    old = packaged(SOURCES["tflite"], "tflite", "float32", TARGET)
    new = packaged(SOURCES["tflite"], "tflite", "int8", TARGET)
    sizes = (ATTACHED_BYTES, RESET_BYTES, ATTACHED_BYTES)
    return [old, *(release(new, folder, number, size) for number, size in enumerate(sizes))]


@pytest.fixture(scope="module")
def board(zero: TestBoard, releases: list[Bundle]) -> Iterator[TestBoard]:
    """A board that serves the old release, at the end of a bad link."""
    zero.edge_infer("push", releases[0].path, zero.name, *WHOLE)
    zero.link(BAD)
    yield zero


@pytest.fixture(scope="module")
def proxy(board: TestBoard) -> Iterator[Proxy]:
    """What stands before the board's port; ``edge-infer`` reaches it as ``cut``."""
    port = board.emulator.port()
    with Proxy(port) as proxy:
        config = board.board.ssh_config(proxy.port).replace(f"Host {board.name}\n", "Host cut\n")
        (board.home / ".ssh" / "config.d" / "cut").write_text(f"{config}  HostKeyAlias [127.0.0.1]:{port}\n")
        yield proxy


def test_a_push_that_is_cut_again_and_again_arrives_and_sends_little_twice(
    board: TestBoard, proxy: Proxy, releases: list[Bundle]
) -> None:
    """What had passed still arrives; the packet in the middle of which the cut came is lost with the connection."""
    old, new = releases[:2]
    said = []
    for cut in CUTS:
        proxy.cut_after(up=cut)
        tried = board.edge_infer("push", new.path, "cut", *WHOLE, status=5)
        said.append(tried.stderr.splitlines()[-1])
    assert proxy.counts()["cuts"] == len(CUTS) and serving(board) == old.digest
    arrived = board.answer("push", new.path, "cut", *WHOLE)["devices"][0]
    passed = proxy.counts()["up"]
    nothing = board.answer("push", new.path, "cut", *WHOLE)["devices"][0]
    plain = proxy.counts()["up"] - passed
    # A connection that came as far as to the files took what a push of nothing takes.
    early = [cut for cut in CUTS if cut < plain]
    twice = passed - sum(early) - (len(CUTS) - len(early) + 1) * plain - new.manifest.size
    note(
        "link",
        "push",
        **dataclasses.asdict(BAD),
        cuts=len(CUTS),
        file_bytes=new.manifest.size,
        passed_bytes=passed,
        plain_bytes=plain,
        twice_bytes=twice,
        said=sorted(set(said)),
    )
    assert nothing["sent_bytes"] == 0 and not any(step.startswith("copy") for step in arrived["steps"])
    assert all("is lost" in line or "did not start a command" in line for line in said), said
    assert twice <= (len(CUTS) - len(early)) * PACKET_BYTES
    assert arrived["replaced"] == old.digest and serving(board) == new.digest


@pytest.mark.long
def test_what_was_written_there_is_not_sent_again_however_the_connection_ends(
    board: TestBoard, proxy: Proxy, releases: list[Bundle]
) -> None:
    """Both ends get a reset, and what was under way is lost."""
    new, written, before = releases[2], 0, proxy.counts()["up"]
    for enough in RESETS:
        push = Started(board, "push", new.path, "cut", *WHOLE)
        written = staged(board, new, enough)
        proxy.cut()
        status, said = push.end()
        assert status == 5 and "is lost" in said, said
    arrived = board.answer("push", new.path, "cut", *WHOLE)["devices"][0]
    passed = proxy.counts()["up"] - before
    again = max(0, written + arrived["sent_bytes"] - new.manifest.size)
    note("link", "reset", cuts=len(RESETS), file_bytes=new.manifest.size, passed_bytes=passed, again_bytes=again)
    assert again == 0 and serving(board) == new.digest


@pytest.mark.long
def test_status_and_doctor_answer_over_it(board: TestBoard) -> None:
    assert board.answer("status", board.name)["models"][0]["digest"] == serving(board)
    lines = board.answer("doctor", board.name, "--self-test-timeout", "600")["lines"]
    assert [line for line in lines if line["state"] == "wrong"] == []


@pytest.mark.long
def test_a_link_that_is_gone_for_a_while_ends_no_push(board: TestBoard, releases: list[Bundle]) -> None:
    """While files are sent. It is less than the host's and the board's patience with one that says nothing."""
    new = releases[3]
    gone = f"{STAGED.format(new.digest, 40_000)}\n({DEAD.commands()}); sleep {DEAD_S}; ({BAD.commands()})"
    board.put(gone.encode(), "/root/gone", user="root")
    board.shell("nohup sh gone >/dev/null 2>&1 </dev/null &", user="root")
    push = Started(board, "push", new.path, board.name, *WHOLE)
    status, said = push.end()
    assert status == 0, said
    assert serving(board) == new.digest
    assert board.shell("pgrep -f '[s]h gone'", user="root", check=False).stdout == b"", "it was never gone"


@pytest.mark.long
def test_another_board_in_its_place_is_refused(board: TestBoard, lab: Lab, releases: list[Bundle]) -> None:
    """With a host key of its own at the same port."""
    port = board.emulator.port()
    board.emulator.cut_power()
    other = Emulator(lab.new_board("pi-zero-2w", "in-its-place"))
    try:
        other.start(port=port)
        other.wait()
        said = board.edge_infer("push", releases[0].path, board.name, status=5).stderr
    finally:
        other.cut_power()
    assert f"the host key of 127.0.0.1 port {port} has changed" in said and "ssh-keygen -R" in said
