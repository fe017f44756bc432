"""The card that boards begin with: as Debian's own tools want it, though they did not unpack it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from lab.emulator import BOOT_S

from boards.board import TestBoard
from boards.conftest import NewBoard

#: Set-user-id and set-group-id programs with their owners, as the packages have them and mke2fs was told by fakeroot.
SPECIAL = {
    "/usr/bin/su": "4755 root:root",
    "/usr/bin/chage": "2755 root:shadow",
    "/usr/bin/ssh-agent": "2755 root:_ssh",
}


@pytest.fixture(scope="module")
def board(new_board: NewBoard) -> Iterator[TestBoard]:
    board = new_board("pi-zero-2w", "debian")
    yield board
    board.emulator.cut_power()


def said(board: TestBoard, script: str) -> list[str]:
    return board.shell(script, user="root").stdout.decode().splitlines()


def test_every_package_is_installed_and_nothing_is_left_to_do(board: TestBoard) -> None:
    states = said(board, "dpkg-query -W -f '${db:Status-Abbrev}|${Architecture}\\n'")
    assert len(states) > 100
    assert set(states) == {"ii |arm64", "ii |all"}
    assert said(board, "dpkg --audit; dpkg --print-foreign-architectures; dpkg --print-architecture") == ["arm64"]
    assert "Reading package lists..." in said(board, "apt-get check")


def test_every_file_is_as_its_package_has_it(board: TestBoard) -> None:
    assert said(board, "dpkg --verify") == []
    assert said(board, "find / -xdev -nouser -o -xdev -nogroup") == []


def test_owners_and_special_modes_survive_the_way_onto_the_card(board: TestBoard) -> None:
    modes = said(board, f"stat -c '%n=%a %U:%G' {' '.join(SPECIAL)}")
    assert dict(line.split("=") for line in modes) == SPECIAL


def test_scripts_of_packages_have_run(board: TestBoard) -> None:
    assert said(board, "getent passwd sshd root | cut -d: -f1,6,7") == [
        "sshd:/run/sshd:/usr/sbin/nologin",
        "root:/root:/bin/bash",
    ]
    assert said(board, "readlink -f /usr/bin/awk /etc/localtime") == ["/usr/bin/mawk", "/usr/share/zoneinfo/Etc/UTC"]
    assert said(board, "ls /usr/lib/python3.11/json/__pycache__ | grep -c '[.]pyc$'") == ["5"]


def test_an_environment_is_made_there(board: TestBoard) -> None:
    board.shell("python3 -m venv --without-pip venv && venv/bin/python -c 'import ssl, sqlite3, ctypes, lzma'")


def boots(board: TestBoard) -> str:
    """Which boot this is, or nothing while there is none."""
    done = board.shell("cat /proc/sys/kernel/random/boot_id", check=False)
    return done.stdout.decode().strip()


def played_back(board: TestBoard) -> bool:
    return any("recovery complete" in line for line in said(board, "dmesg"))


def test_it_reboots_in_order(board: TestBoard) -> None:
    before = boots(board)
    board.shell("busybox reboot", user="root", check=False)
    deadline = time.monotonic() + BOOT_S
    while boots(board) in ("", before):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert not played_back(board)


def test_only_a_power_cut_leaves_a_journal_to_play_back(board: TestBoard) -> None:
    board.restart()
    assert played_back(board)
    board.emulator.stop()
    board.start()
    assert not played_back(board)


def test_a_card_that_takes_no_writes_starts_a_board_that_it_never_saw(new_board: NewBoard) -> None:
    """So its keys are not on the card, which goes to another board without them."""
    board = new_board("pi-zero-2w", "write-protected", read_only=True)
    assert board.shell("touch /root/one", user="root", check=False).returncode == 1
    assert said(board, "ls /etc/ssh/ssh_host_* /root/.ssh /home/pi/.ssh 2>/dev/null; hostname") == [
        "/home/pi/.ssh:",
        "",
        "/root/.ssh:",
        board.name,
    ]
    board.emulator.cut_power()
