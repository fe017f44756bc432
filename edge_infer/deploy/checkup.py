"""What a device is and what is on it, beyond what a push asks. Python >= 3.8, sent along by provision and doctor."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from edge_infer import admission, emulation, trust
from edge_infer.deploy.device import (
    RESERVE_BYTES,
    ask_python,
    cpu_features,
    facts,
    free_bytes,
    read_only_mount,
    serving_python,
)
from edge_infer.deploy.venvs import Venvs
from edge_infer.errors import EdgeInferError
from edge_infer.manifest import FORMATS
from edge_infer.store import Store

#: Asks a Python what decides which wheels fit it. ``libc`` is filled in by the caller where this says nothing.
PLATFORM_SCRIPT = """
import importlib.util, json, os, platform, struct, sys, sysconfig
try: libc = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
except (OSError, ValueError): libc = []
print(json.dumps({
    "python": "%d.%d.%d" % sys.version_info[:3],
    "implementation": sys.implementation.name,
    "abi": "cp%d%d%s" % (*sys.version_info[:2], "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""),
    "machine": platform.machine(),
    "bits": struct.calcsize("P") * 8,
    "libc": libc[0] if len(libc) == 2 else "",
    "libc_version": libc[1] if len(libc) == 2 else "",
    "venv": importlib.util.find_spec("venv") is not None,
    "executable": os.path.realpath(sys.executable),
}))
"""


def platform_facts(python: str) -> Dict[str, Any]:
    """What decides which wheels fit ``python``. Raises DeviceError when it does not start."""
    found = ask_python(python, PLATFORM_SCRIPT, "-I")
    if not found["libc"]:
        found["libc"], found["libc_version"] = _musl(Path(found["executable"]))
    found["features"] = cpu_features()
    return found


def _musl(executable: Path) -> Tuple[str, str]:
    """musl and its version, which its loader prints; nothing for another C library."""
    with executable.open("rb") as file:
        loader = re.search(rb"/lib/ld-musl-[^\0]+\.so\.1", file.read(4096))
    if loader is None:
        return "", ""
    try:
        done = subprocess.run([loader[0]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "", ""
    version = re.search(rb"Version (\d+\.\d+)", done.stderr)
    return ("musl", version[1].decode()) if version else ("", "")


def look(store: Store, python: Optional[str]) -> Dict[str, Any]:
    """What a provisioning is planned from."""
    venvs = Venvs(store.root)
    current = venvs.current()
    return {
        "platform": platform_facts(str(Path(python).expanduser()) if python else sys.executable),
        "free_bytes": max(0, free_bytes(store.root) - RESERVE_BYTES),
        "store": str(store.root),
        "current": current,
        "engines": (venvs.facts(current or "") or {}).get("engines", []),
        "by_hand": venvs.is_by_hand(),
        "previous": venvs.previous(),
        "formats": sorted({str(row["format"]) for row in store.status() if "format" in row}),
    }


def examine(store: Store, python: Optional[str], timeout_s: float) -> Dict[str, Any]:
    """Everything that doctor shows of a device."""
    venvs = Venvs(store.root)
    serving = serving_python(store, python)
    found = look(store, python)
    return {
        **found,
        "time": time.time(),
        "kernel": f"{platform.system()} {platform.release()}",
        "emulated": emulation.here(),
        "page_size_bytes": os.sysconf("SC_PAGE_SIZE"),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available_bytes": _available(),
        "reserve_bytes": RESERVE_BYTES,
        "writable": _writable(store.root),
        "read_only": read_only_mount(store.root),
        "environment": venvs.facts(found["current"] or ""),
        "environments": venvs.names(),
        "serving": _serving(store.root, serving),
        "models": [_examine_model(store, row, serving, timeout_s) for row in store.status()],
        "unfinished_bytes": store.reclaimable_bytes(""),
        "ssh_keygen": shutil.which("ssh-keygen"),
        "signers": _signers(store.root),
    }


def _signers(root: Path) -> Dict[str, Optional[str]]:
    """The file that says who may sign bundles of each format; None where none has to. An unreadable one is named."""
    found: Dict[str, Optional[str]] = {}
    for format in FORMATS:
        try:
            demanded = trust.demand(root, "", format)
            found[format] = str(demanded.path) if demanded else None
        except EdgeInferError as error:
            found[format] = str(error)
    return found


def _serving(root: Path, python: str) -> Dict[str, Any]:
    """The Python that serves and its engines, or why it does not start."""
    try:
        return facts(root, python)
    except EdgeInferError as error:
        return {"serving_python": python, "error": str(error)}


def _examine_model(store: Store, row: Dict[str, Any], python: str, timeout_s: float) -> Dict[str, Any]:
    if "error" in row:
        return {**row, "damaged": True}
    try:
        report = admission.self_test(store.open_current(row["name"]).path, python, timeout_s)
    except EdgeInferError as error:
        return {**row, "error": str(error), "damaged": type(error).__name__ == "BundleError"}
    return {**row, "engine": report["engine"]}


def _available() -> int:
    """Memory that programs can still get, as the kernel sees it."""
    with open("/proc/meminfo", encoding="ascii", errors="replace") as file:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", file.read(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _writable(root: Path) -> bool:
    """Whether this user may write where the store is, or will be made."""
    while not root.exists():
        root = root.parent
    return os.access(str(root), os.W_OK)
