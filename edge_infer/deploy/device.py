"""What a device is, asked on the device itself: compared on the host with what a bundle needs before a byte is sent.

Standard library only, Python >= 3.8: a push sends this file along.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

from edge_infer.errors import DeviceError
from edge_infer.store import Store

#: Left free on the device's storage: a full disk breaks more than a push.
RESERVE_BYTES = 16 * 1024 * 1024
#: What helps where the storage takes no writes.
WRITABLE_AGAIN = "sudo mount -o remount,rw {mount}; if nobody mounted it so, dmesg says what failed"

#: Asks the Python that will serve for its version and engines, without importing any.
ENGINES_SCRIPT = """
import importlib.metadata as m, json, sys
found = {}
for name in ("edge-infer", "ai-edge-litert", "tflite-runtime", "onnxruntime", "onnxruntime-gpu", "torch"):
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps({"python": "%d.%d" % sys.version_info[:2], "packages": found}))
"""


def serving_python(store: Store, wanted: Optional[str]) -> str:
    """The Python that runs models: the one asked for, else the store's own environment, else this one."""
    own = store.root / "venv" / "bin" / "python"
    if wanted:
        return str(Path(wanted).expanduser())
    return str(own) if own.exists() else sys.executable


def facts(root: Path, python: str) -> Dict[str, Any]:
    """Processor, memory, storage, and the Python that serves with its engines. Raises DeviceError."""
    return {
        "architecture": platform.machine(),
        "cpu_features": cpu_features(),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "page_size_bytes": os.sysconf("SC_PAGE_SIZE"),
        "free_bytes": max(0, free_bytes(root) - RESERVE_BYTES),
        "serving_python": python,
        **engines(python),
    }


def free_bytes(root: Path) -> int:
    """Free space for this user where ``root`` is, or will be made."""
    numbers = os.statvfs(str(_existing(root)))
    return numbers.f_bavail * numbers.f_frsize


def read_only_mount(root: Path) -> Optional[str]:
    """Where the file system that ``root`` is on, or will be, is mounted if it takes no writes, whoever asks."""
    folder = _existing(root.absolute())
    if not os.statvfs(str(folder)).f_flag & os.ST_RDONLY:
        return None
    return str(next(path for path in (folder, *folder.parents) if path.is_mount() or path == path.parent))


def _existing(path: Path) -> Path:
    """``path``, or the first folder above it that there is."""
    while not path.exists():
        path = path.parent
    return path


def cpu_features(path: str = "/proc/cpuinfo") -> List[str]:
    """Flags (x86) or Features (ARM) of the first processor that lists any."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return value.split()
    return []


def engines(python: str) -> Dict[str, Any]:
    """Version and engine packages of the serving Python. Raises DeviceError when it does not start."""
    return ask_python(python, ENGINES_SCRIPT)


def ask_python(python: str, script: str, *options: str) -> Dict[str, Any]:
    """The JSON object that ``script`` prints there. Raises DeviceError when that Python does not start."""
    try:
        done = subprocess.run(
            [python, *options, "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            timeout=60,
            check=False,
        )
        found: Dict[str, Any] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"cannot start {python} on the device ({error}); name its Python with --python") from None
    return found
