"""The card that every board begins with: a Debian for arm64, built once without root and kept in the lab's folder.

debootstrap's first half runs here, under fakeroot; its second half, which runs Debian's own programs, on an emulated
board. So nothing of arm64 has to be registered with this machine's kernel.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from lab import initrd, packages
from lab.boards import KERNELS, Lab

CARD_BYTES = 8 * 2**30
#: Far beyond what the second half takes on a slow machine (5 minutes on two cores).
SECOND_STAGE_S = 3600
DONE = "second stage done"

SECOND_STAGE = f"""#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C DEBIAN_FRONTEND=noninteractive
finish() {{ sync; exec busybox poweroff -f; }}
trap finish EXIT
set -e
mount -t devtmpfs dev /dev
echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/lab
/debootstrap/debootstrap --second-stage
rm -f /etc/dpkg/dpkg.cfg.d/lab /etc/ssh/ssh_host_* /second_stage
useradd --create-home --shell /bin/bash --password '*' pi
for home in /root /home/pi; do mkdir -p -m 700 $home/.ssh; done
chown pi: /home/pi/.ssh
ln -sf /bin/busybox /sbin/init
apt-get clean
rm -rf /var/lib/apt/lists/*
echo "{DONE}"
"""
INITTAB = """::sysinit:/etc/lab/boot
::respawn:/usr/sbin/sshd -D
::ctrlaltdel:/bin/busybox reboot
::shutdown:/bin/busybox killall5 -15
::shutdown:/bin/busybox sync
::shutdown:/bin/busybox mount -o remount,ro /
"""
BOOT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
mkdir -p /run/sshd
ip link set lo up
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
"""


def build(lab: Lab, say: Callable[[str], None]) -> None:
    """Make what boards start from, unless it is there: the kernels, their initrds, and the first card."""
    if lab.is_built():
        say(f"{lab.folder} is built")
        return
    if absent := packages.missing():
        raise SystemExit(f"the lab needs Debian packages that are missing here: apt-get install {' '.join(absent)}")
    work = lab.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    log = work / "log"
    say("fetching Debian's packages for arm64")
    root = _first_stage(work, log)
    say("fetching kernels")
    _add_kernels(lab, work, log)
    say("letting an emulated board configure the packages (some minutes)")
    _second_stage(lab, root, work, log)
    lab.base.parent.mkdir(parents=True, exist_ok=True)
    (work / "card.img").rename(lab.base)
    lab.stamp.write_text(fingerprint())
    shutil.rmtree(work)
    say(f"{lab.folder} is built")


def fingerprint() -> str:
    """What a card depends on; another one is built when it changes."""
    parts = (packages.SUITE, *packages.INCLUDE, *KERNELS.values(), *initrd.MODULES, initrd.INIT)
    return hashlib.sha256("\0".join((*parts, SECOND_STAGE, INITTAB, BOOT, str(CARD_BYTES))).encode()).hexdigest()


def _first_stage(work: Path, log: Path) -> Path:
    root = work / "root"
    packages.unpack_root(root, work / "ownership", log)
    packages.expand(root / "var" / "cache" / "apt" / "archives", log)
    (root / "etc" / "lab").mkdir(parents=True)
    for name, text, mode in (
        ("second_stage", SECOND_STAGE, 0o755),
        ("etc/lab/boot", BOOT, 0o755),
        ("etc/inittab", INITTAB, 0o644),
        ("etc/hosts", "127.0.0.1 localhost\n", 0o644),
    ):
        (root / name).write_text(text)
        (root / name).chmod(mode)
    return root


def _add_kernels(lab: Lab, work: Path, log: Path) -> None:
    (archive,) = (work / "root" / "var/cache/apt/archives").glob("busybox-static_*.deb")
    packages.run("dpkg-deb", "-x", archive, work / "busybox", log=log)
    apt = packages.Apt(work / "apt", log)
    for name, package in KERNELS.items():
        unpacked = apt.fetch_kernel(package)
        (image,) = unpacked.glob("boot/vmlinuz-*")
        folder = lab.kernel(name).parent
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, lab.kernel(name))
        lab.initrd(name).write_bytes(initrd.for_kernel(unpacked, work / "busybox" / "bin" / "busybox"))
        (folder / "release").write_text(image.name.removeprefix("vmlinuz-"))


def _second_stage(lab: Lab, root: Path, work: Path, log: Path) -> None:
    card = work / "card.img"
    packages.run(
        *("fakeroot", "-i", work / "ownership", "mke2fs", "-q", "-F", "-t", "ext4", "-L", "card", "-d", root),
        *(card, str(CARD_BYTES // 1024)),
        log=log,
    )
    console = work / "console"
    command = [
        *("qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a72", "-smp", "1", "-m", "1024"),
        *("-accel", "tcg,thread=single,tb-size=512", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{console}", "-kernel", str(lab.kernel("4k")), "-initrd", str(lab.initrd("4k"))),
        *(
            "-append",
            "console=ttyAMA0 quiet panic=1 mitigations=off kpti=off second_stage",
            "-device",
            "virtio-rng-device",
        ),
        *("-drive", f"if=none,id=card,file={card},format=raw,cache=unsafe", "-device", "virtio-blk-device,drive=card"),
    ]
    started = time.monotonic()
    with log.open("ab") as stream:
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=SECOND_STAGE_S, check=True
        )
    # Its journal is played back now and not at every first start; 1: something was put right.
    packages.run("sh", "-c", 'e2fsck -f -y "$0" || test $? = 1', card, log=log)
    said = console.read_text("utf-8", "replace")
    if DONE not in said:
        raise SystemExit("\n".join([*said.splitlines()[-15:], f"the second half of debootstrap failed; see {console}"]))
    with log.open("a") as stream:
        stream.write(f"the second stage took {time.monotonic() - started:.0f} s\n")
