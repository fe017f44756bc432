"""The card that every board begins with: a Debian for arm64, built once without root and kept in the lab's folder.

This machine's dpkg unpacks the packages, under fakeroot; what runs Debian's own programs, their configuration, an
emulated board does. So nothing of arm64 has to be registered with this machine's kernel.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from lab import initrd, packages
from lab.boards import KERNELS, Lab

CARD_BYTES = 8 * 2**30
#: With its tables written here, or every board would write them in its first minutes.
FILE_SYSTEM = ("-t", "ext4", "-L", "card", "-E", "lazy_itable_init=0,lazy_journal_init=0")
#: Far beyond what configuring takes on a slow machine (5 minutes on two cores).
CONFIGURE_S = 3600
DONE = "configured"

CONFIGURE = f"""#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C DEBIAN_FRONTEND=noninteractive
finish() {{ sync; exec busybox poweroff -f; }}
trap finish EXIT
set -e
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs run /run
printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
cd /var/lib/dpkg/info
for script in base-passwd.preinst *.preinst; do
  name=${{script%.preinst}}
  DPKG_MAINTSCRIPT_NAME=preinst DPKG_MAINTSCRIPT_PACKAGE=${{name%:*}} DPKG_MAINTSCRIPT_ARCH=arm64 ./$script install
done
cd /
# Boards get keys of their own; sshd's package makes none where there are some.
touch /etc/ssh/ssh_host_{{rsa,ecdsa,ed25519}}_key
dpkg --configure --pending --force-unsafe-io
rm /usr/sbin/policy-rc.d /etc/ssh/ssh_host_* /configure
useradd --create-home --shell /bin/bash --password '*' pi
for home in /root /home/pi; do mkdir -p -m 700 $home/.ssh; done
chown pi: /home/pi/.ssh
ln -sf /bin/busybox /sbin/init
echo "{DONE}"
"""
#: In /run/board is what came with the board's own initrd.
INITTAB = """::sysinit:/etc/lab/boot
::respawn:/usr/sbin/sshd -D -h /run/board/ssh_host_ed25519_key -o AuthorizedKeysFile=/run/board/authorized_keys
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
    apt = packages.Apt(work / "apt", log)
    say("fetching Debian's packages for arm64")
    archives = apt.fetch(*packages.INCLUDE)
    _add_kernels(lab, apt, archives, work, log)
    say("unpacking them")
    _unpack(archives, work, log)
    say("letting an emulated board configure them (some minutes)")
    _configure(lab, work, log)
    lab.base.parent.mkdir(parents=True, exist_ok=True)
    (work / "card.img").rename(lab.base)
    lab.stamp.write_text(fingerprint())
    shutil.rmtree(work)
    say(f"{lab.folder} is built")


def fingerprint() -> str:
    """What a card depends on; another one is built when it changes."""
    parts = (packages.RELEASE, *packages.INCLUDE, packages.UNPACK, *KERNELS.values(), *initrd.MODULES, initrd.INIT)
    parts += (CONFIGURE, INITTAB, BOOT, *FILE_SYSTEM, str(CARD_BYTES))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _unpack(archives: Path, work: Path, log: Path) -> None:
    """The card with everything unpacked on it and nothing configured."""
    root = work / "root"
    packages.unpack(archives, root, work / "ownership", log)
    (root / "etc" / "lab").mkdir()
    for name, text, mode in (
        ("configure", CONFIGURE, 0o755),
        ("etc/lab/boot", BOOT, 0o755),
        ("etc/inittab", INITTAB, 0o644),
        ("etc/hosts", "127.0.0.1 localhost\n", 0o644),
        ("etc/fstab", "", 0o644),
    ):
        (root / name).write_text(text)
        (root / name).chmod(mode)
    packages.run(
        *("fakeroot", "-i", work / "ownership", "mke2fs", "-q", "-F", *FILE_SYSTEM, "-d", root),
        *(work / "card.img", str(CARD_BYTES // 1024)),
        log=log,
    )


def _add_kernels(lab: Lab, apt: packages.Apt, archives: Path, work: Path, log: Path) -> None:
    (archive,) = archives.glob("busybox-static_*.deb")
    packages.run("dpkg-deb", "-x", archive, work / "busybox", log=log)
    for name, package in KERNELS.items():
        unpacked = apt.fetch_kernel(package)
        (image,) = unpacked.glob("boot/vmlinuz-*")
        folder = lab.kernel(name).parent
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, lab.kernel(name))
        lab.initrd(name).write_bytes(initrd.for_kernel(unpacked, work / "busybox" / "bin" / "busybox"))
        (folder / "release").write_text(image.name.removeprefix("vmlinuz-"))


def _configure(lab: Lab, work: Path, log: Path) -> None:
    console = work / "console"
    drive = f"if=none,id=card,file={work / 'card.img'},format=raw,cache=unsafe"
    command = [
        *("qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a72", "-smp", "1", "-m", "1024"),
        *("-accel", "tcg,thread=single,tb-size=512", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{console}", "-kernel", str(lab.kernel("4k")), "-initrd", str(lab.initrd("4k"))),
        *("-append", "console=ttyAMA0 quiet panic=1 mitigations=off kpti=off configure"),
        *("-device", "virtio-rng-device", "-drive", drive, "-device", "virtio-blk-device,drive=card"),
    ]
    with log.open("ab") as stream:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=CONFIGURE_S, check=True)
    said = console.read_text("utf-8", "replace")
    if DONE not in said.splitlines():
        raise SystemExit("\n".join([*said.splitlines()[-15:], f"the packages were not configured; see {console}"]))
    # Its journal is played back now and not at every first start; 1: something was put right.
    packages.run("sh", "-c", 'e2fsck -f -y "$0" || test $? = 1', work / "card.img", log=log)
