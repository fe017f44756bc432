"""The parts of the device lab that need no board: archives, modules, links, names. Boards are in tests/boards."""

from __future__ import annotations

import json
import lzma
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from lab import image, initrd, packages
from lab.boards import KINDS, Lab
from lab.emulator import Emulator
from lab.network import Link

from edge_infer.target import read_target


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("EDGE_INFER_LAB", str(tmp_path / "lab"))
    return Lab()


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "scripts" / "device_lab", *words], capture_output=True, text=True, check=False)


# -- what a kernel starts from -----------------------------------------------------------------------------------------


def test_an_archive_is_newc_as_the_kernel_documents_it() -> None:
    made = initrd.archive({"bin": (0o040755, b""), "bin/x": (0o100644, b"12345")}, console=True)
    folder, rest = made[:116], made[116:]
    assert folder[:6] == b"070701" and folder[110:] == b"bin\0" + bytes(2)
    assert int(folder[14:22], 16) == 0o040755 and int(folder[94:102], 16) == len("bin") + 1
    file = rest[:124]
    assert int(file[54:62], 16) == 5 and file[110:116] == b"bin/x\0" and file[116:121] == b"12345"
    console = rest[124:]
    assert int(console[14:22], 16) == 0o020600 and (int(console[78:86], 16), int(console[86:94], 16)) == (5, 1)
    assert b"TRAILER!!!\0" in console and len(made) % 4 == 0


def test_modules_come_after_what_they_need_and_compressed_ones_are_unpacked(tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "modules" / "6.1" / "kernel"
    folder.mkdir(parents=True)
    for name, needed in (("virtio", b"virtio_ring"), ("virtio-rng", b"virtio,hw"), ("virtio_ring", b"")):
        (folder / f"{name}.ko").write_bytes(b"\x7fELF\0depends=" + needed + b"\0name\0")
    (folder / "hw.ko.xz").write_bytes(lzma.compress(b"\x7fELF\0depends=\0"))
    order = initrd.in_order(tmp_path, ("virtio_rng", "built_into_the_kernel", "virtio"))
    assert list(order) == ["virtio_ring", "virtio", "hw", "virtio_rng"]
    assert order["hw"] == b"\x7fELF\0depends=\0"


# -- the first card ----------------------------------------------------------------------------------------------------


def make_package(folder: Path, name: str, fields: str = "", preinst: str | None = None) -> None:
    (folder / name / "DEBIAN").mkdir(parents=True)
    (folder / name / "usr" / "share").mkdir(parents=True)
    (folder / name / "usr" / "share" / name).write_text(name)
    about = f"Package: {name}\nVersion: 1\nArchitecture: arm64\nMaintainer: nobody\nDescription: nothing\n{fields}"
    (folder / name / "DEBIAN" / "control").write_text(about)
    if preinst:
        (folder / name / "DEBIAN" / "preinst").write_text(preinst)
        (folder / name / "DEBIAN" / "preinst").chmod(0o755)
    subprocess.run(["dpkg-deb", "-b", folder / name, folder / f"{name}_1_arm64.deb"], check=True, capture_output=True)
    shutil.rmtree(folder / name)


@pytest.mark.skipif(shutil.which("fakeroot") is None or shutil.which("dpkg") is None, reason="needs Debian's fakeroot")
def test_packages_are_unpacked_and_nothing_of_them_is_run(tmp_path: Path) -> None:
    archives, root = tmp_path / "archives", tmp_path / "root"
    archives.mkdir()
    script = f"#!/bin/sh\ntouch {tmp_path}/was-run\n"
    make_package(archives, "program", "Pre-Depends: library, not-there\n", preinst=script)
    make_package(archives, "library", "Multi-Arch: same\n", preinst=script)
    packages.unpack(archives, root, tmp_path / "ownership", tmp_path / "log")
    assert not (tmp_path / "was-run").exists()
    assert (root / "usr" / "share" / "program").read_text() == "program"
    database = root / "var" / "lib" / "dpkg"
    for name in ("program", "library:arm64"):
        assert (database / "info" / f"{name}.list").is_file()
        assert (database / "info" / f"{name}.preinst").read_text() == script
    assert (database / "status").read_text().count("Status: install ok unpacked") == 2


@pytest.mark.parametrize(
    "module, name", [(image, "BOOT"), (image, "CONFIGURE"), (packages, "UNPACK"), (initrd, "INIT")]
)
def test_a_card_is_made_anew_when_what_makes_it_changes(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    before = image.fingerprint()
    monkeypatch.setattr(module, name, getattr(module, name) + "#")
    assert image.fingerprint() != before


# -- boards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_has_the_memory_and_the_pages_of_the_target_it_stands_for(kind: object) -> None:
    target = read_target(kind.target)  # type: ignore[attr-defined]
    assert kind.kernel == f"{target.page_size_bytes >> 10}k"  # type: ignore[attr-defined]
    assert kind.memory_bytes <= target.ram_bytes  # type: ignore[attr-defined]


def test_a_board_is_refused_by_a_name_that_is_none(lab: Lab) -> None:
    with pytest.raises(SystemExit, match="no name for a board"):
        lab.new_board("pi-4", "../x")
    with pytest.raises(SystemExit, match=r"no board x in .*there are: none"):
        lab.board("x")


def test_the_number_of_another_process_is_no_board_that_is_on(lab: Lab) -> None:
    folder = lab.boards_folder / "kitchen"
    folder.mkdir(parents=True)
    (folder / "board.json").write_text('{"kind": "pi-4"}')
    (folder / "pid").write_text(str(os.getpid()))
    assert Emulator(lab.board("kitchen")).pid() is None
    Emulator(lab.board("kitchen")).cut_power()  # and it is not killed


def test_a_board_whose_emulator_is_not_gone_yet_is_on(lab: Lab) -> None:
    """As one that was killed, while its memory is given back: it has no command line any more."""
    folder = lab.boards_folder / "kitchen"
    folder.mkdir(parents=True)
    (folder / "board.json").write_text('{"kind": "pi-4"}')
    (folder / "pid").write_text("1234\n")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / "pid")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        assert Emulator(lab.board("kitchen")).pid() == 1234
        holder.communicate(b"\n")
    assert Emulator(lab.board("kitchen")).pid() is None


def test_the_command_says_what_is_missing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("start").stderr.startswith("which boards? --board KIND makes one")
    assert "not built; run device_lab build" in command("status").stderr
    monkeypatch.setenv("PATH", "/nowhere")
    assert "qemu-system-arm" in packages.missing() or Path("/usr/sbin/qemu-system-aarch64").exists()


# -- links -------------------------------------------------------------------------------------------------------------


def test_a_link_is_the_same_in_both_directions_and_half_the_latency_each() -> None:
    lines = Link(latency_ms=200, loss=0.02, bandwidth=2_000_000).commands().splitlines()
    netem = [line for line in lines if "root netem" in line]
    assert [line.partition(" root ")[0] for line in netem] == [
        "tc qdisc replace dev near",
        "tc -n road qdisc replace dev far",
    ]
    assert all(line.endswith("delay 100ms loss 2% rate 2000000bit") for line in netem)


def test_a_plain_link_only_takes_away_what_there_was() -> None:
    assert "add" not in Link().commands() and Link().port == 22 != Link(latency_ms=1).port


def test_a_link_cannot_be_changed_where_the_emulator_does_not_do_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lab.boards_folder / "kitchen"
    folder.mkdir(parents=True)
    (folder / "board.json").write_text('{"kind": "pi-4"}')
    emulator = Emulator(lab.board("kitchen"))
    monkeypatch.setattr(emulator, "port", lambda: 2022)
    monkeypatch.setattr(emulator, "ssh", lambda user, *words: ["true"])
    with monitor(emulator.monitor, ["host forwarding rule for tcp:127.0.0.1:2022 removed\r\n", ""]) as asked:
        emulator.link(Link(loss=0.1))
    assert asked == ["hostfwd_remove net tcp:127.0.0.1:2022", "hostfwd_add net tcp:127.0.0.1:2022-:2200"]
    refused = pytest.raises(SystemExit, match="kitchen did not change its port: host forwarding rule not found")
    with monitor(emulator.monitor, ["host forwarding rule not found\r\n", "Could not set up"]), refused:
        emulator.link(Link(loss=0.1))
    monkeypatch.setattr(emulator, "ssh", lambda user, *words: ["sh", "-c", "echo tc: unknown >&2; exit 2"])
    with pytest.raises(SystemExit, match="the link of kitchen did not change: tc: unknown"):
        emulator.link(Link(loss=0.1))


@contextmanager
def monitor(path: Path, answers: list[str]) -> Iterator[list[str]]:
    """An emulator's monitor that gives these answers; the commands that it was asked."""
    asked: list[str] = []

    def talk() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rw") as stream:
            stream.write('{"QMP": {}}\n')
            for answer in ["", *answers]:
                stream.flush()
                asked.append(json.loads(stream.readline()).get("arguments", {}).get("command-line", ""))
                stream.write(json.dumps({"return": answer}) + "\n")

    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=talk)
        thread.start()
        yield asked
        thread.join()
    del asked[0]
