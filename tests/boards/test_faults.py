"""A full card, one that takes no writes, a wrong clock, a board that starts anew in a self-test, two hosts at once.

Each time the model that was there answers, the message says what was found and what helps, and the next push arrives.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SOURCES
from lab.network import Link
from sshd import make_key, public_key

from boards.board import TestBoard
from boards.record import note
from boards.serving import STAGED, Started, release, serving, staged, wait_for
from edge_infer.bundle import Bundle

TARGET = "raspberry-pi-zero-2w"
ATTACHED_BYTES = 300_000
#: On it such a release is under way for some seconds,
SLOW = Link(bandwidth=200_000)
#: and one with so many bytes for longer than another host takes to log in.
LONG_BYTES = 1_000_000
PATIENT = ("--self-test-timeout", "600")


class Releases:
    """What was pushed to the board, one release after the other."""

    def __init__(self, board: TestBoard, first: Bundle, folder: Path) -> None:
        self.board, self.first, self.folder = board, first, folder
        self.made = 0
        self.serving = first.digest
        board.edge_infer("push", first.path, board.name, *PATIENT)

    def next(self, size: int = ATTACHED_BYTES) -> Bundle:
        self.made += 1
        return release(self.first, self.folder, self.made, size)

    def push(self, bundle: Bundle, *words: str) -> int:
        """It arrives and serves; gives how many bytes of it were sent."""
        said = self.board.answer("push", bundle.path, self.board.name, *PATIENT, *words)["devices"][0]
        assert said["digest"] == bundle.digest and said["replaced"] in (self.serving, bundle.digest)
        self.serving = bundle.digest
        self.check()
        return int(said["sent_bytes"])

    def refused(self, bundle: Bundle, *words: str) -> str:
        """It does not, and what was there answers."""
        said = self.board.edge_infer("push", bundle.path, self.board.name, *PATIENT, *words, status=5)
        assert "Traceback" not in said.stderr
        self.check()
        return said.stderr.splitlines()[-1]

    def check(self) -> None:
        assert serving(self.board) == self.serving


@pytest.fixture(scope="module")
def releases(
    zero: TestBoard, packaged: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Releases]:
    first = packaged(SOURCES["tflite"], "tflite", "int8", TARGET)
    yield Releases(zero, first, tmp_path_factory.mktemp("releases"))


# -- the card ----------------------------------------------------------------------------------------------------------

#: All but so many bytes of what the user may have; less than none is what is kept back for root.
FILL = "fallocate -l $(($(stat -f -c '%a * %S' /) - {})) /filler"
RESERVE_BYTES = 16 * 2**20
NOTHING = -(2**20)


def test_a_full_card_is_refused_before_a_byte_is_sent(releases: Releases) -> None:
    board, bundle = releases.board, releases.next()
    board.shell(FILL.format(RESERVE_BYTES + ATTACHED_BYTES // 2), user="root")
    said = releases.refused(bundle)
    untouched = board.shell(f"test -e .edge-infer/staging/{bundle.digest}", check=False).returncode
    board.shell(f"rm /filler; {FILL.format(NOTHING)}", user="root")
    fuller = releases.refused(bundle)
    board.edge_infer("gc", board.name)  # takes a lock, and finds no room to say who does
    board.shell("rm /filler", user="root")
    note("faults", "full card", said=said)
    assert "the push needs " in said and "free beyond its reserve; free some space there" in said and untouched
    assert "the device has 0 free beyond its reserve" in fuller
    releases.push(bundle)


@pytest.mark.long
def test_a_card_that_fills_up_in_a_push_keeps_what_arrived(releases: Releases) -> None:
    board, bundle = releases.board, releases.next()
    board.link(SLOW)
    script = f"{STAGED.format(bundle.digest, 40_000)}; {FILL.format(NOTHING)}"
    filling = subprocess.Popen(board.emulator.ssh("root", script), stdout=subprocess.PIPE)
    status, said = Started(board, "push", bundle.path, board.name, *PATIENT).end()
    arrived = int(filling.communicate()[0])
    board.link(Link())
    assert (
        status == 5 and "storage at /home/pi/.edge-infer is full; free some space there and run the same again" in said
    )
    releases.check()
    board.shell("rm /filler", user="root")
    note("faults", "card that fills up in a push", said=said.splitlines()[-1])
    assert releases.push(bundle) <= bundle.manifest.size - arrived


@pytest.mark.long
def test_a_card_that_is_mounted_read_only_serves_and_takes_no_push(releases: Releases) -> None:
    board, bundle = releases.board, releases.next()
    board.shell("mount -o remount,ro /", user="root")
    said = releases.refused(bundle)
    lines = board.answer("doctor", board.name, *PATIENT, status=5)["lines"]
    board.shell("mount -o remount,rw /", user="root")
    assert "storage at /home/pi/.edge-infer is read-only" in said and "there: sudo mount -o remount,rw /;" in said
    assert {line["topic"] for line in lines if line["state"] == "wrong"} == {"storage"}
    note("faults", "card mounted read-only", said=said)
    releases.push(bundle)


@pytest.mark.long
def test_a_card_with_its_write_protection_on_serves_and_takes_no_push(releases: Releases) -> None:
    board, bundle = releases.board, releases.next()
    board.emulator.stop()
    board.start(read_only=True)
    said = releases.refused(bundle)
    locked = board.shell("mount -o remount,rw /", user="root", check=False).returncode
    board.emulator.stop()
    board.start()
    assert "storage at /home/pi/.edge-infer is read-only" in said and locked != 0
    note("faults", "card with write protection", said=said)
    releases.push(bundle)


@pytest.mark.long
def test_a_card_whose_writes_fail_serves_what_it_has(releases: Releases) -> None:
    """Its file system stops at the first error that it meets, as Raspberry Pi OS mounts it."""
    board, bundle = releases.board, releases.next()
    board.restart(volatile=True)
    board.shell("mount -o remount,errors=remount-ro /", user="root")
    board.emulator.wear_out()
    said = releases.refused(bundle)
    later = releases.refused(bundle)
    board.emulator.cut_power()
    board.start()
    note("faults", "card that fails", said=said, later=later)
    assert "the device's storage at /home/pi/.edge-infer " in said
    assert "the device's storage at /home/pi/.edge-infer is read-only" in later
    releases.push(bundle)


# -- the clock ---------------------------------------------------------------------------------------------------------

PAST, FUTURE = "2016-01-01T00:00:00", "2038-02-01T00:00:00"
DATES = 'valid-after="20240101",valid-before="20370101"'
SIGNERS = ".edge-infer/allowed_signers"
TRIAL_S = 30


@pytest.fixture(
    scope="module", params=[pytest.param(PAST, id="2016"), pytest.param(FUTURE, id="2038", marks=pytest.mark.long)]
)
def year(request: pytest.FixtureRequest, releases: Releases) -> Iterator[int]:
    """What the board's clock shows since its start."""
    releases.board.restart(clock=request.param)
    year = int(releases.board.shell("date -u +%Y").stdout)
    assert str(year) == request.param[:4]
    yield year
    releases.board.restart()


def test_a_doctor_sees_a_wrong_clock(releases: Releases, year: int) -> None:
    board = releases.board
    lines = board.answer("doctor", board.name, *PATIENT, status=5)["lines"]
    (line,) = [line for line in lines if line["state"] == "wrong"]
    assert line["topic"] == "clock"
    assert f"{'behind' if year == 2016 else 'ahead of'} this machine's" in line["text"] and "set-ntp" in line["mend"]
    note("faults", f"clock in {year}", said=line["text"])


@pytest.mark.long
def test_a_key_with_dates_counts_by_the_boards_clock_and_one_without_always(
    releases: Releases, year: int, tmp_path: Path
) -> None:
    board, key, signed = releases.board, tmp_path / "key", releases.next()
    make_key(key)
    board.edge_infer("sign", signed.path, "--key", key)
    board.put(f"anna {DATES} {public_key(key)}\n".encode(), SIGNERS)
    said = board.edge_infer("push", signed.path, board.name, status=5).stderr
    board.shell(f"rm {SIGNERS}")  # what is there is not signed
    releases.check()
    assert f"verify time {year}" in said and "set this device's clock" in said
    note("faults", f"key with dates in {year}", said=said.splitlines()[-1])
    board.put(f"anna {public_key(key)}\n".encode(), SIGNERS)
    releases.push(signed)
    board.shell(f"rm {SIGNERS}")


@pytest.mark.long
def test_a_trial_ends_by_the_time_since_the_start(releases: Releases, year: int) -> None:
    board, tried = releases.board, releases.next()
    words = ("push", tried.path, board.name, "--confirm-within", str(TRIAL_S), *PATIENT)
    (said,) = board.answer(*words)["devices"]
    assert 0 < said["pending_s"] <= TRIAL_S and said["replaced"] == releases.serving
    wait_for(lambda: "pending_s" not in board.answer("status", board.name)["models"][0])
    releases.check()
    releases.push(tried)
    board.edge_infer("rollback", board.name, "digits")
    releases.serving = said["replaced"]
    releases.check()
    times = [event["time"] for event in board.answer("history", board.name, "digits")["events"][-3:]]
    assert {time.gmtime(each).tm_year for each in times} == {year}


@pytest.mark.long
@pytest.mark.parametrize("year", [PAST], ids=["2016"], indirect=True)
def test_an_environment_is_made_offline_by_a_board_that_is_years_behind(releases: Releases, year: int) -> None:
    board = releases.board
    board.edge_infer("provision", board.name, "--offline", "--engine", "tflite-runtime", "--store", "/home/pi/other")
    assert board.python("import tflite_runtime; print(1)", python="other/venv/bin/python") == 1
    board.shell("rm -rf other")


# -- the board starts anew ---------------------------------------------------------------------------------------------

#: Returns when the child that asks the golden questions is there.
SELF_TEST = "until pgrep -f '[e]dge_infer selftest' >/dev/null; do sleep 0.1; done"
BOOT = "cat /proc/sys/kernel/random/boot_id"


@pytest.mark.parametrize("how", ["reboot", pytest.param("power cut", marks=pytest.mark.long)])
def test_a_board_that_starts_anew_in_a_self_test_serves_the_old_model(releases: Releases, how: str) -> None:
    board, bundle = releases.board, releases.next()
    boot = board.shell(BOOT).stdout
    script = f"{SELF_TEST}; busybox reboot" if how == "reboot" else SELF_TEST
    seen = subprocess.Popen(board.emulator.ssh("root", script), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    push = Started(board, "push", bundle.path, board.name, *PATIENT)
    seen.wait()
    if how == "reboot":
        status, said = push.end()
        wait_for(lambda: board.shell(BOOT, check=False).stdout not in (b"", boot))
    else:
        board.emulator.cut_power()
        status, said = push.end()
        board.start()
    note("faults", f"{how} in the self-test", said=said.splitlines()[-1])
    assert status == 5 and "is lost; check that the device is on, and run the same again" in said
    releases.check()
    events = board.answer("history", board.name, "digits")["events"]
    assert not any(event["event"] == "refused" and event["digest"] == bundle.digest for event in events)
    releases.push(bundle)


# -- two hosts ---------------------------------------------------------------------------------------------------------

WHOLE = """
import json
from edge_infer.store import Store, default_root
store = Store(default_root())
digests = store.digests("digits")
assert all(store.has("digits", digest) for digest in digests)
print(json.dumps([digests, [path.name for path in (store.root / "staging").iterdir()]]))
"""


@pytest.fixture
def anna(releases: Releases, tmp_path: Path) -> Path:
    """The home of somebody else, on whose machine nothing was pushed before."""
    shutil.copytree(releases.board.home / ".ssh", tmp_path / ".ssh")
    return tmp_path


@pytest.mark.parametrize("first", [pytest.param("here", marks=pytest.mark.long), "anna"])
def test_of_two_hosts_one_waits_or_is_refused_and_both_arrive(releases: Releases, anna: Path, first: str) -> None:
    board, one, two = releases.board, releases.next(LONG_BYTES), releases.next()
    homes = (None, anna) if first == "here" else (anna, None)
    board.link(SLOW)
    begun = Started(board, "push", one.path, board.name, *PATIENT, home=homes[0])
    staged(board, one)
    status, said = Started(board, "push", two.path, board.name, home=homes[1]).end()
    assert status == 5 and "is busy with a push of digits by " in said and "wait for it (--wait)" in said
    waiting = Started(board, "push", two.path, board.name, *PATIENT, "--wait", "900", home=homes[1])
    ended = [push.end() for push in (begun, waiting)]
    board.link(Link())
    assert [status for status, _ in ended] == [0, 0], ended
    note("faults", f"two hosts, {first} first", said=said.splitlines()[-1])
    assert board.python(WHOLE) == [[two.digest, one.digest], []]
    releases.serving = two.digest
    releases.check()


#: What a host's system goes on sending when the process that pushes is gone is less.
BEYOND_BUFFERS = 20_000_000


@pytest.mark.long
def test_a_host_that_vanishes_in_a_push_leaves_no_lock(releases: Releases, anna: Path) -> None:
    board, one, two = releases.board, releases.next(BEYOND_BUFFERS), releases.next()
    board.link(SLOW)
    begun = Started(board, "push", one.path, board.name, *PATIENT, home=anna)
    staged(board, one)
    begun.kill()
    board.link(Link())
    releases.push(two, "--wait", "150")
    again = board.answer("push", one.path, board.name, *PATIENT)["devices"][0]
    assert any("attached.bin" in step and "from" in step for step in again["steps"]), again["steps"]
    assert board.python(WHOLE) == [[one.digest, two.digest], []]
    releases.serving = one.digest
