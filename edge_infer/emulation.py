"""Whether this machine is an emulated one, whose times say nothing of the board that it stands for.

Only what is certain is called so. A virtual machine runs on the processor that it shows, and people deploy to some:
that is no emulation. What tells the two apart:

* A program of another processor, by QEMU (``qemu-aarch64``) or another: the kernel says that the emulator is what runs,
  under a name of ``/proc/self/exe`` that QEMU does not answer itself, or ``/proc/cpuinfo`` is an x86's.
* QEMU's board ``virt``, whose device tree is ``linux,dummy-virt``. Hypervisors use that name too, but call its cores
  by their architecture (``arm,arm-v8``), since a guest has the cores that there are. A product (``arm,cortex-a53``), or
  no implementer at all (``-cpu max``), is an imitation. The one exception known: QEMU on a Cortex-A53 or A57 with KVM
  and the same ``-cpu``. Sources: ``dtb_compatible`` in ``target/arm`` of QEMU, ``generate_cpu_nodes`` of kvmtool.
* The same board started by firmware that hides the tree: QEMU calls the machine ``KVM Virtual Machine`` where it runs
  on KVM, ``QEMU Virtual Machine`` elsewhere (``virt_build_smbios``); Apple's hypervisor shows cores of Apple, not Arm.

An imitation of a whole board, as QEMU's ``raspi3b``, cannot be known. Standard library only, Python >= 3.8: a push
sends this file along.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Dict, Optional

#: Enough of /proc/cpuinfo for the first processor.
MOST_BYTES = 16384
#: Implementers of cores, as the Arm Architecture Reference Manual lists them for MIDR_EL1.
NOBODY, ARM = 0x00, 0x41


def here(root: Path = Path("/"), machine: Optional[str] = None) -> Optional[str]:
    """What emulates this machine, in a few words; None where nothing shows that anything does.

    ``root``: where ``/proc`` and ``/sys`` lie; ``machine``: what ``uname -m`` says there.
    """
    cpuinfo = _read(root / "proc/cpuinfo")
    return _program(root, machine or os.uname().machine, cpuinfo) or _board(root, cpuinfo)


def mark() -> Dict[str, str]:
    """``emulated`` and what ``here`` says, to go along with what was measured here; nothing on other machines."""
    found = here()
    return {} if found is None else {"emulated": found}


def _program(root: Path, machine: str, cpuinfo: str) -> Optional[str]:
    try:
        program = os.path.basename(os.readlink(str(root / "proc/thread-self/exe")))
    except OSError:
        program = ""
    emulator = re.match(r"(qemu-[a-z0-9_]+?)(-static)?\Z", program)
    if emulator:
        return str(emulator[1])
    is_x86 = re.search(r"^vendor_id\s*:", cpuinfo, re.MULTILINE)
    return "a program for ARM on an x86 processor" if machine == "aarch64" and is_x86 else None


def _board(root: Path, cpuinfo: str) -> Optional[str]:
    found = re.search(r"^CPU implementer\s*:\s*0x([0-9a-f]+)", cpuinfo, re.MULTILINE)
    implementer = int(found[1], 16) if found else None
    tree = root / "proc/device-tree"
    if "linux,dummy-virt" in _read(tree / "compatible").split("\0"):
        core = _read(tree / "cpus/cpu@0/compatible").split("\0")[0]
        product = re.match(r"[a-z]+,(?!arm-?v\d)(.+)\Z", core)
        if product:
            return f"QEMU's virt machine imitating a {product[1]}"
        return "QEMU's virt machine" if implementer == NOBODY else None
    vendor, product_name = (_read(root / "sys/class/dmi/id" / name).strip() for name in ("sys_vendor", "product_name"))
    is_imitated = (vendor, product_name) == ("QEMU", "QEMU Virtual Machine") and implementer in (NOBODY, ARM)
    return "QEMU's virt machine" if is_imitated else None


def _read(path: Path) -> str:
    """The beginning of a file of the kernel's; empty where there is none."""
    try:
        with open(str(path), "rb") as file:
            return file.read(MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
