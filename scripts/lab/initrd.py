"""The archive that a board's kernel starts from: busybox, the kernel's modules, and the first program.

A newc archive (https://docs.kernel.org/driver-api/early-userspace/buffer-format.html), written here since cpio is not
on every machine and asks root for the console. The kernel takes several archives one after another, so that what is
a board's own (its name, its host key) comes in a second one.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

#: What a board has devices for (ext4 asks for crc32c by a name that no module lists), and what its link is made of.
MODULES = (
    *("virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "crc32c_generic", "ext4"),
    *("sch_netem", "veth"),
)
FOLDERS = ("bin", "dev", "modules", "own", "proc", "root", "sys")
INIT = r"""#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
for module in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$module.ko; done
# The journal is played back here after a power cut.
/bin/busybox mount -t ext4 /dev/vda /root || { echo "no card"; exec /bin/busybox poweroff -f; }
for step in $(/bin/busybox cat /proc/cmdline); do
  case $step in configure) exec /bin/busybox chroot /root /bin/bash /configure;; esac
done
# What is the board's own is not written to the card, which may be in another one next, or write-protected.
/bin/busybox mount -t tmpfs -o mode=755 run /root/run
/bin/busybox cp -r /own /root/run/board
/bin/busybox hostname "$(/bin/busybox cat /own/hostname)"
/bin/busybox umount /proc
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
"""
CONSOLE = (0o020600, (5, 1))


def archive(files: Mapping[str, tuple[int, bytes]], *, console: bool = False) -> bytes:
    """A newc archive of ``files``: the mode and the content by name, folders with an empty content."""
    entries = [(name, mode, content, (0, 0)) for name, (mode, content) in files.items()]
    if console:
        entries.append(("dev/console", CONSOLE[0], b"", CONSOLE[1]))
    entries.append(("TRAILER!!!", 0, b"", (0, 0)))
    return b"".join(_entry(number + 1, *entry) for number, entry in enumerate(entries))


def _entry(number: int, name: str, mode: int, content: bytes, device: tuple[int, int]) -> bytes:
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


def folder(name: str) -> dict[str, tuple[int, bytes]]:
    return {name: (0o040755, b"")}


def for_kernel(kernel: Path, busybox: Path) -> bytes:
    """What starts every board with the kernel unpacked in the folder ``kernel``."""
    modules = in_order(kernel, MODULES)
    files: dict[str, tuple[int, bytes]] = {}
    for name in FOLDERS:
        files.update(folder(name))
    files["init"] = (0o100755, INIT.encode())
    files["bin/busybox"] = (0o100755, busybox.read_bytes())
    files["modules/order"] = (0o100644, "\n".join(modules).encode())
    for name, content in modules.items():
        files[f"modules/{name}.ko"] = (0o100644, content)
    return archive(files, console=True)


def for_board(hostname: str, authorized_keys: str, host_key: Path) -> bytes:
    """What is a board's own, to follow ``for_kernel``."""
    own = {"own/hostname": hostname.encode(), "own/authorized_keys": authorized_keys.encode()}
    files = {name: (0o100644, content) for name, content in own.items()}
    for path in (host_key, host_key.with_suffix(".pub")):
        files[f"own/{path.name}"] = (0o100600, path.read_bytes())
    return archive(files)


def in_order(kernel: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """The modules ``wanted`` and those that they need, each after what it needs; built-in ones are left out."""
    found = {path.name.partition(".")[0].replace("-", "_"): path for path in kernel.glob("lib/modules/**/*.ko*")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name not in found:
            return
        content = found[name].read_bytes()
        if found[name].suffix == ".xz":
            content = lzma.decompress(content)
        for needed in re.findall(rb"\0depends=([^\0]*)\0", content):
            for one in filter(None, needed.decode().split(",")):
                add(one.replace("-", "_"))
        ordered[name] = content

    for name in wanted:
        add(name)
    return ordered
