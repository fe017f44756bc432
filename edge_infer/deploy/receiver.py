"""The device's side of a push. Sent along by the host and run by any Python >= 3.8; nothing is installed for it.

It speaks lines of JSON on standard input and output. A ``file`` request is followed by that many raw bytes; every
request gets one line back: ``{"ok": ...}`` or ``{"error": {"type": ..., "message": ...}}``, after which it ends.

    begin     name, manifest, store, python -> facts, what is missing of each file, the release in use
    file      name, offset, size, then bytes (no answer, so that files stream without waiting)
    finish    timeout_s, tune -> verify, self-test in a child, tune if asked to, activate, collect
    measure   timeout_s, runs -> verify, self-test and time it; it is thrown away when the conversation ends
    status    -> rows of the store
    rollback  name -> the release now in use
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, Mapping, Optional, Tuple

from edge_infer import admission
from edge_infer.bundle import CHUNK_BYTES, hash_file
from edge_infer.errors import BundleError, DeviceError, EdgeInferError, SelfTestFailed
from edge_infer.manifest import MANIFEST_NAME, Manifest, parse
from edge_infer.store import Store, default_root

#: A request line may hold a whole manifest.
MAX_LINE_BYTES = 16 * 1024 * 1024
#: Left free on the device's storage: a full disk breaks more than a push.
RESERVE_BYTES = 16 * 1024 * 1024
#: Tuning takes some 20 children of half a second each, and the time it takes a board to import an engine so often.
TUNE_S = 900.0

#: Asks the Python that will serve for its version and engines, without importing any.
ENGINES_SCRIPT = """
import importlib.metadata as m, json, sys
found = {}
for name in ("edge-infer", "ai-edge-litert", "tflite-runtime", "onnxruntime", "onnxruntime-gpu", "torch"):
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps({"python": "%d.%d" % sys.version_info[:2], "packages": found}))
"""


#: What each request must hold, and which are part of a push.
TEXT_OR_NONE = (str, type(None))
FIELDS: Dict[str, Dict[str, Tuple[type, ...]]] = {
    "begin": {"manifest": (str,), "python": TEXT_OR_NONE, "store": TEXT_OR_NONE},
    "file": {"name": (str,), "offset": (int,), "size": (int,)},
    "finish": {"timeout_s": (int, float), "tune": (bool,)},
    "measure": {"timeout_s": (int, float), "runs": (int,)},
    "status": {"python": TEXT_OR_NONE, "store": TEXT_OR_NONE},
    "rollback": {"name": (str,), "store": TEXT_OR_NONE},
}
AFTER_BEGIN = ("file", "finish", "measure")


class Receiver:
    """One conversation. ``asked`` and ``told`` are its two streams."""

    def __init__(self, asked: BinaryIO, told: BinaryIO) -> None:
        self.asked, self.told = asked, told
        self.requests: Dict[str, Callable[[Mapping[str, Any]], Optional[Dict[str, Any]]]] = {
            "begin": self.begin,
            "file": self.file,
            "finish": self.finish,
            "measure": self.measure,
            "status": self.status,
            "rollback": self.rollback,
        }
        self.store = Store(default_root())
        self.python = sys.executable
        self.manifest: Optional[Manifest] = None
        self.digest = ""
        self.passing = False  # whether the bundle is here to be measured only

    def serve(self) -> None:
        """Answer requests until the host ends the conversation or one fails."""
        try:
            first = self.read()
            if first is None:
                return
            self.store = Store(Path(first["store"]).expanduser() if first.get("store") else default_root())
            if first["op"] == "status":
                self.answer(first)
                return
            with self.store.lock():
                try:
                    request: Optional[Mapping[str, Any]] = first
                    while request is not None:
                        self.answer(request)
                        request = self.read()
                finally:
                    if self.passing:
                        self.store.discard(self.bundle.name, self.digest)
        except EdgeInferError as error:
            self.tell({"error": admission.describe(error)})
        except OSError as error:
            self.tell({"error": admission.describe(_device_error(error, self.store.root))})

    def read(self) -> Optional[Mapping[str, Any]]:
        line = self.asked.readline(MAX_LINE_BYTES)
        if not line:
            return None
        try:
            value = json.loads(line)
        except ValueError:
            raise DeviceError("the host sent a line that is not JSON; use the same edge-infer on both ends") from None
        if not isinstance(value, dict) or value.get("op") not in self.requests:
            raise DeviceError("the host asked for something this receiver does not know")
        for name, kinds in FIELDS[value["op"]].items():
            if not isinstance(value.get(name), kinds) or (isinstance(value.get(name), bool) and bool not in kinds):
                raise DeviceError(f"the host's request {value['op']!r} has no valid {name!r}")
        if value["op"] in AFTER_BEGIN and self.manifest is None:
            raise DeviceError(f"the host's request {value['op']!r} came before it said which bundle it pushes")
        return value

    def answer(self, request: Mapping[str, Any]) -> None:
        reply = self.requests[request["op"]](request)
        if reply is not None:
            self.tell({"ok": reply})

    def tell(self, message: Mapping[str, Any]) -> None:
        self.told.write(json.dumps(message).encode() + b"\n")
        self.told.flush()

    @property
    def bundle(self) -> Manifest:
        """The manifest of the bundle being pushed; ``read`` lets no request that needs it come before it."""
        assert self.manifest is not None
        return self.manifest

    # -- requests ----------------------------------------------------------------------------------------------

    def begin(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        data = request["manifest"].encode("utf-8", "surrogatepass")
        self.manifest = parse(data)
        self.digest = hashlib.sha256(data).hexdigest()
        self.python = serving_python(self.store, request.get("python"))
        name = self.bundle.name
        present = self.store.has(name, self.digest)
        have = {} if present else self._staged()
        return {
            "facts": facts(self.store.root, self.python),
            "present": present,
            "have": have,
            "copies": [] if present else self._copies(have),
            "current": self._history()[:1],
        }

    def _history(self) -> List[str]:
        """As the store has it; none when the pointer is damaged, which this push mends."""
        try:
            return self.store.history(self.bundle.name)
        except BundleError:
            return []

    def _staged(self) -> Dict[str, int]:
        """Bytes of each file that an interrupted push left."""
        folder = self.store.root / "staging" / self.digest
        return {name: min(max(_size(folder / name), 0), entry.size) for name, entry in self.bundle.files.items()}

    def _copies(self, have: Mapping[str, int]) -> List[str]:
        """Files that need not be sent since another release has the same."""
        files = self.bundle.files.items()
        return [name for name, entry in files if have[name] < entry.size and self._same_file(entry.size, entry.sha256)]

    def _same_file(self, size: int, sha256: str) -> Optional[Path]:
        for digest in self._history():
            folder = self.store.release(self.bundle.name, digest)
            try:
                files = parse((folder / MANIFEST_NAME).read_bytes()).files
            except (OSError, BundleError):
                continue
            for name, entry in files.items():
                if (entry.size, entry.sha256) == (size, sha256) and hash_file(folder / name) == sha256:
                    return folder / name
        return None

    def file(self, request: Mapping[str, Any]) -> None:
        """Append the bytes that follow to the staged file."""
        name, offset, size = request["name"], request["offset"], request["size"]
        entry = self.bundle.files.get(name)
        if entry is None or offset < 0 or size < 0 or offset + size > entry.size:
            raise DeviceError(
                f"the host sent bytes {offset} to {offset + size} of {name!r}, which are not in the manifest"
            )
        part = self.store.staging(self.digest) / name
        descriptor = os.open(str(part), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.truncate(offset)
            file.seek(offset)
            while size:
                data = self.asked.read(min(CHUNK_BYTES, size))
                if not data:
                    raise DeviceError("the connection ended in the middle of a file; push again, it goes on from here")
                file.write(data)
                size -= len(data)

    def finish(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        name = self.bundle.name
        if not self.store.has(name, self.digest):
            self._admit()
        release = self.store.release(name, self.digest)
        try:
            report = admission.self_test(release, self.python, float(request["timeout_s"]))
        except EdgeInferError as error:
            self.store.discard(name, self.digest)
            raise SelfTestFailed(f"{error}; {self._still()}") from None
        tuned = self._tune(release) if request["tune"] else None
        self.store.activate(name, self.digest)
        return {"report": report, "tuned": tuned, "freed": self.store.collect(), "digest": self.digest}

    def _tune(self, release: Path) -> str:
        """What ``tune`` chose, which later loads take; or why it did not, which keeps no release from serving."""
        try:
            tuned = admission.run_child(self.python, ["tune", str(release)], TUNE_S)
            return str(tuned["chosen"]) if tuned["kept"] else "not tuned: the device's cache cannot be written"
        except EdgeInferError as error:
            return f"not tuned: {error}"

    def measure(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        """Time the bundle that was sent, after a self-test the first time. The store serves what it served."""
        name, timeout_s = self.bundle.name, float(request["timeout_s"])
        release = self.store.release(name, self.digest)
        if not self.store.has(name, self.digest):
            self._admit()
            self.passing = True
            admission.self_test(release, self.python, timeout_s)
        asked = ["bench", str(release), "--runs", str(int(request["runs"]))]
        return {"measured": admission.run_child(self.python, asked, timeout_s)}

    def _admit(self) -> None:
        """Complete the staged folder and move it among the releases; one that fails its check is thrown away."""
        staged = self.store.staging(self.digest)
        try:
            for name, entry in self.bundle.files.items():
                same = None if _size(staged / name) == entry.size else self._same_file(entry.size, entry.sha256)
                if same is not None:
                    if (staged / name).exists():
                        (staged / name).unlink()
                    shutil.copyfile(str(same), str(staged / name))
            (staged / MANIFEST_NAME).write_bytes(self.bundle.to_bytes())
            self.store.admit(staged, self.bundle.name, self.digest)
        except BundleError:
            shutil.rmtree(str(staged), ignore_errors=True)
            raise

    def _still(self) -> str:
        digests = self._history()
        return f"the release {digests[0][:12]} stays in use" if digests else "nothing was activated"

    def status(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        python = serving_python(self.store, request.get("python"))
        return {"facts": facts(self.store.root, python), "models": self.store.status()}

    def rollback(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        return {"digest": self.store.rollback(str(request["name"]))}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _device_error(error: OSError, root: Path) -> DeviceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DeviceError(
            f"the device's storage at {root} is full; free some space and push again, it goes on from here"
        )
    return DeviceError(f"the device reports: {error}")


def serving_python(store: Store, wanted: Optional[str]) -> str:
    """The Python that runs models: the one asked for, else the store's own environment, else this one."""
    own = store.root / "venv" / "bin" / "python"
    if wanted:
        return str(Path(wanted).expanduser())
    return str(own) if own.exists() else sys.executable


def facts(root: Path, python: str) -> Dict[str, Any]:
    """What the device is: compared on the host with what the bundle needs, before any file is sent."""
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
    while not root.exists():
        root = root.parent
    numbers = os.statvfs(str(root))
    return numbers.f_bavail * numbers.f_frsize


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
    try:
        done = subprocess.run(
            [python, "-c", ENGINES_SCRIPT],
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


def main() -> None:
    Receiver(sys.stdin.buffer, sys.stdout.buffer).serve()
