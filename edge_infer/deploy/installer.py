"""The device's side of ``provision`` and ``doctor``: the receiver with requests of its own. Python >= 3.8.

    look             python -> what decides which wheels fit, and what is here
    examine          python, timeout_s -> the same and more, for doctor; each model in use is asked its golden questions
    install-begin    requirements, engines, files, python, who, wait_s -> the environment's name, what is here of files
    wheel            name, offset, size, then bytes (no answer)
    install-finish   imports, online, replace, timeout_s, install_s -> made, checked, switched
    switch-back      timeout_s, imports, who, wait_s -> the environment now in use

A new environment takes over only after its engines were imported and every model that answers its golden questions now
has answered them with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from edge_infer import admission
from edge_infer.bundle import hash_file
from edge_infer.deploy.checkup import examine, look, platform_facts
from edge_infer.deploy.device import serving_python
from edge_infer.deploy.incoming import Arrivals
from edge_infer.deploy.receiver import NUMBER, SILENCE_S, TEXT, TEXT_OR_NONE, Patient, Receiver
from edge_infer.deploy.venvs import KEEP_PATHS, PATH_FILE, Venvs, identify
from edge_infer.errors import BundleError, DeviceError, EdgeInferError, SelfTestFailed
from edge_infer.manifest import SHA256, FileEntry
from edge_infer.store import Store

WHEEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]{0,250}\.whl\Z")
MOST_WHEELS = 500
#: An engine that is not imported by then never will be; torch takes half a minute on a Pi.
IMPORT_S = 300.0
#: Settings of pip that would let it install somewhere else.
ELSEWHERE = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_PYTHON", "PIP_REQUIRE_VIRTUALENV")

FIELDS: Dict[str, Dict[str, Tuple[type, ...]]] = {
    "look": {"python": TEXT_OR_NONE},
    "examine": {"python": TEXT_OR_NONE, "timeout_s": NUMBER},
    "install-begin": {
        "requirements": TEXT, "engines": (list,), "files": (list,), "python": TEXT_OR_NONE,
        "who": TEXT, "wait_s": NUMBER,
    },
    "wheel": {"name": TEXT, "offset": (int,), "size": (int,)},
    "install-finish": {
        "imports": (list,), "online": (bool,), "replace": (bool,), "timeout_s": NUMBER, "install_s": NUMBER,
    },
    "switch-back": {"timeout_s": NUMBER, "who": TEXT, "wait_s": NUMBER},
}  # fmt: skip
AFTER_INSTALL_BEGIN = ("wheel", "install-finish")


class Installation:
    """One environment on its way: the files it is made from, and the Python that makes it."""

    def __init__(self, store: Store, request: Mapping[str, Any]) -> None:
        self.store = store
        self.venvs = Venvs(store.root)
        self.requirements: str = request["requirements"]
        self.engines: List[str] = request["engines"]
        self.python = str(Path(request["python"]).expanduser()) if request["python"] else sys.executable
        self.platform = platform_facts(self.python)
        #: What the environment holds, where it is there already and each of its engines can be imported.
        self.versions: Optional[Dict[str, str]] = None
        self.name = self._choose()
        files = _files_of(request["files"])
        listing = json.dumps(sorted((name, entry.size, entry.sha256) for name, entry in files.items()))
        self.arrivals = Arrivals(store, files, hashlib.sha256(listing.encode()).hexdigest())

    def _choose(self) -> str:
        """The environment that is there and intact, else a name for a new one.

        A damaged one may serve, and run what it still can, while another is made beside it.
        """
        plain = identify(self.requirements, self.platform["abi"])
        same = [name for name in self.venvs.names() if re.match(plain + r"(-\d+)?\Z", name)]
        same = [name for name in same if self.venvs.is_usable(name)]
        for name in same:
            imports = (self.venvs.facts(name) or {}).get("imports", [])
            with contextlib.suppress(EdgeInferError):
                self.versions = check(self.venvs.python(name), imports)
                return name
        return next(name for name in (plain, *(f"{plain}-{n}" for n in range(2, 1000))) if name not in same)

    def make(self, online: bool, install_s: float) -> None:
        """The environment, complete but for its marker. Raises BundleError for a damaged wheel, DeviceError."""
        wheels = self.store.staging(self.arrivals.digest)
        self._verify(wheels)
        folder = self.venvs.path(self.name)
        if folder.exists():
            self.venvs.remove(self.name)  # what an interruption left
        with self.venvs.hold() as descriptor:
            try:
                # pip unpacks into the temporary folder, which on many boards lies in memory.
                aside = folder / "tmp"
                run([self.python, "-I", "-m", "venv", "--without-pip", str(folder)], install_s, descriptor)
                aside.mkdir()
                requirements = folder / "requirements.txt"
                requirements.write_text(self.requirements, "utf-8")
                pip = next(str(wheels / name) for name in self.arrivals.files if name.startswith("pip-"))
                command = [self.venvs.python(self.name), "-I", f"{pip}/pip", "install", "-r", str(requirements)]
                command += ["--find-links", str(wheels), *([] if online else ["--no-index"])]
                run([*command, *PIP_OPTIONS], install_s, descriptor, _pip_environment(online, aside))
                shutil.rmtree(str(aside))
                (_packages(folder) / PATH_FILE).write_text(KEEP_PATHS, "ascii")
            except BaseException:
                shutil.rmtree(str(folder), ignore_errors=True)
                raise

    def _verify(self, wheels: Path) -> None:
        """What was received is what was announced; a file that is not is removed, so that it comes anew."""
        for name, entry in self.arrivals.files.items():
            path = wheels / name
            if not path.is_file() or path.is_symlink() or hash_file(path) != entry.sha256:
                if os.path.lexists(str(path)):
                    path.unlink()
                raise BundleError(f"{name} arrived damaged or not at all; run the same again, which sends it anew")

    def forget_wheels(self) -> None:
        shutil.rmtree(str(self.store.staging(self.arrivals.digest)), ignore_errors=True)

    def facts(self, versions: Mapping[str, str], imports: Sequence[str]) -> Dict[str, Any]:
        """What the marker of the environment says."""
        return {
            "engines": self.engines,
            "imports": list(imports),
            "packages": dict(versions),
            "python": self.platform["python"],
            "base": self.python,
            "made": int(time.time()),
            "replaces": None,
        }


#: Everything is named and hashed; nothing is built, cached or compiled. What is imported is compiled then, and once.
PIP_OPTIONS = (
    "--require-hashes", "--no-deps", "--only-binary=:all:", "--no-input", "--no-cache-dir", "--no-compile",
    "--disable-pip-version-check", "--no-warn-script-location", "--quiet",
)  # fmt: skip


class Installer(Receiver):
    """A receiver that also makes environments and examines the device."""

    def __init__(self, asked: Any, told: Any) -> None:
        super().__init__(asked, told)
        self.fields.update(FIELDS)
        self.requests.update(
            {
                "look": lambda request: look(self.store, request["python"]),
                "examine": lambda request: examine(self.store, request["python"], float(request["timeout_s"])),
                "install-begin": self.install_begin,
                "wheel": self.wheel,
                "install-finish": self.install_finish,
                "switch-back": self.switch_back,
            }
        )
        self.installation: Optional[Installation] = None

    def read(self) -> Optional[Mapping[str, Any]]:
        request = super().read()
        if request is not None and (request["op"] in AFTER_INSTALL_BEGIN) != (self.installation is not None):
            raise DeviceError(f"the host's request {request['op']!r} came at the wrong moment of an installation")
        return request

    @property
    def coming_environment(self) -> Installation:
        """``read`` lets no request that needs it come before it."""
        assert self.installation is not None
        return self.installation

    def install_begin(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        self.locked.enter_context(self.changing(request, "an installation"))
        self.installation = Installation(self.store, request)
        is_here = self.installation.versions is not None
        return {
            "environment": self.installation.name,
            "present": is_here,
            "have": {} if is_here else self.installation.arrivals.have(),
            "current": self.installation.venvs.current(),
        }

    def wheel(self, request: Mapping[str, Any]) -> None:
        """Append the bytes that follow to the staged wheel."""
        self.coming_environment.arrivals.receive(request["name"], request["offset"], request["size"], self.asked)

    def install_finish(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        coming = self.coming_environment
        venvs, name = coming.venvs, coming.name
        if venvs.is_by_hand() and not request["replace"]:
            raise DeviceError(f"{venvs.link} was made by hand; --replace moves it aside, where a rollback finds it")
        made = coming.versions is None
        if made:
            coming.make(request["online"], float(request["install_s"]))
        try:
            versions = coming.versions or check(venvs.python(name), request["imports"])
            models = self._try_models(venvs.python(name), float(request["timeout_s"]))
        except EdgeInferError as error:
            if made:
                venvs.remove(name)
            coming.forget_wheels()
            raise type(error)(f"{error}; {_still(venvs)}") from None
        if made:
            venvs.complete(name, coming.facts(versions, request["imports"]))
        if venvs.is_by_hand():
            venvs.adopt()
        before = venvs.current()
        venvs.switch(name)
        coming.forget_wheels()
        return {
            "environment": name,
            "replaced": before if before != name else None,
            "python": venvs.python(name),
            "packages": versions,
            "models": models,
            "freed": venvs.collect(),
        }

    def switch_back(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        """The environment before, after the same questions as a new one."""
        with self.changing(request, "an environment's rollback"):
            venvs = Venvs(self.store.root)
            name = venvs.to_go_back_to()
            facts = venvs.facts(name) or {}
            try:
                versions = check(venvs.python(name), facts.get("imports", []))
                models = self._try_models(venvs.python(name), float(request["timeout_s"]))
            except EdgeInferError as error:
                raise type(error)(f"{error}; {_still(venvs)}") from None
            before = venvs.current()
            venvs.switch(name)
            return {"environment": name, "replaced": before, "packages": versions, "models": models}

    def _try_models(self, python: str, timeout_s: float) -> List[Dict[str, Any]]:
        """Ask each model in use its golden questions with ``python``; one row each.

        Raises the error of the first that does not answer but does with the Python that serves now. What does not
        answer now does not keep the device from what may mend it.
        """
        rows: List[Dict[str, Any]] = []
        for name in self.store.names():
            try:
                bundle = self.store.open_current(name).path
                admission.self_test(bundle, python, timeout_s)
                rows.append({"name": name, "answers": True})
            except EdgeInferError as error:
                if self._answers_now(name, timeout_s):
                    raise type(error)(f"{name} does not answer with the new environment: {error}") from None
                rows.append({"name": name, "answers": False, "reason": str(error)})
        return rows

    def _answers_now(self, name: str, timeout_s: float) -> bool:
        try:
            admission.self_test(self.store.open_current(name).path, serving_python(self.store, None), timeout_s)
        except EdgeInferError:
            return False
        return True


def _files_of(rows: Sequence[Any]) -> Dict[str, FileEntry]:
    """The wheels that the host will send. Raises DeviceError for what is no such list."""
    files: Dict[str, FileEntry] = {}
    for row in rows[: MOST_WHEELS + 1]:
        if not (isinstance(row, list) and len(row) == 3 and [type(item) for item in row] == [str, int, str]):
            raise DeviceError("the host's list of wheels is not one of names, sizes and hashes")
        name, size, digest = row
        if not WHEEL_NAME.match(name) or size < 0 or not SHA256.match(digest) or name in files:
            raise DeviceError(f"the host's list of wheels has an entry {name[:100]!r} that is none")
        files[name] = FileEntry(size, digest)
    if len(files) > MOST_WHEELS or not any(name.startswith("pip-") for name in files):
        raise DeviceError(f"the host's list of wheels has no pip in it or is longer than {MOST_WHEELS}")
    return files


def _packages(folder: Path) -> Path:
    return next((folder / "lib").glob("python3*")) / "site-packages"


def _still(venvs: Venvs) -> str:
    current = venvs.current()
    return f"the environment {current} stays in use" if current else "no environment was switched"


def check(python: str, imports: Sequence[str]) -> Dict[str, str]:
    """Import each module in a child of its own, and edge_infer; gives versions of what is installed.

    Raises SelfTestFailed with the module's name and the child's last words.
    """
    for module in imports:
        if not re.match(r"[A-Za-z_][A-Za-z0-9_.]*\Z", str(module)):
            raise DeviceError(f"{str(module)[:100]!r} is no module that could be imported")
        _try([python, "-I", "-c", f"import {module}"], str(module))
    _try([python, "-I", "-m", "edge_infer", "--version"], "edge_infer")
    listed = _try([python, "-I", "-c", VERSIONS_SCRIPT], "importlib.metadata")
    versions: Dict[str, str] = json.loads(listed)
    return versions


VERSIONS_SCRIPT = """
import importlib.metadata as m, json
print(json.dumps({item.metadata["Name"]: item.version for item in m.distributions()}))
"""


def _try(command: Sequence[str], what: str) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            timeout=IMPORT_S,
            env=_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SelfTestFailed(f"{what} was not imported within {IMPORT_S:g} s") from None
    except OSError as error:
        raise DeviceError(f"cannot start {command[0]}: {error.strerror}") from None
    if done.returncode:
        raise SelfTestFailed(f"{what} cannot be imported: {_reason(done.returncode, done.stderr)}")
    return done.stdout.decode("utf-8", "replace")


def _reason(status: int, errors: bytes) -> str:
    lines = [line.strip() for line in errors.decode("utf-8", "replace").splitlines() if line.strip()]
    if status < 0:
        try:
            number = signal.Signals(-status)
        except ValueError:
            return f"it ended with signal {-status}"
        remedy = "; choose another version with --constraint" if number == signal.SIGILL else ""
        return f"{number.name}, {admission.SIGNALS.get(number, 'it was stopped from outside')}{remedy}"
    return lines[-1][:300] if lines else f"it ended with status {status}"


def _environment() -> Dict[str, str]:
    """This process's, without what points Python somewhere else."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _pip_environment(online: bool, temporary: Path) -> Dict[str, str]:
    """Online, the device's own settings of pip count: its index, proxies and certificates. Offline, none do."""
    names = [name for name in os.environ if name.startswith("PIP_")] if not online else ELSEWHERE
    kept = {name: value for name, value in _environment().items() if name not in names}
    if not online:
        kept["PIP_CONFIG_FILE"] = os.devnull
    return {**kept, "TMPDIR": str(temporary)}


def run(
    command: Sequence[str], timeout_s: float, descriptor: int, environment: Optional[Mapping[str, str]] = None
) -> None:
    """Run a step of an installation; it holds the lock ``descriptor`` too. Raises DeviceError with its last words."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=dict(environment or _environment()),
            pass_fds=(descriptor,),
            start_new_session=True,
        )
    except OSError as error:
        raise DeviceError(f"cannot start {command[0]}: {error.strerror}") from None
    try:
        words = process.communicate(timeout=timeout_s)[0].decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        raise DeviceError(
            f"the installation took longer than {timeout_s:g} s; give it more with --install-timeout"
        ) from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise DeviceError(_install_failed(words))


def _install_failed(words: str) -> str:
    if "No space left on device" in words or "Disk quota exceeded" in words:
        return "the device's storage is full; free some space and run the same again, what was sent is still there"
    if "No module named venv" in words:
        return "its Python has no venv module; install it there (Debian: sudo apt install python3-venv)"
    if "DO NOT MATCH THE HASHES" in words:
        return "the index that the device asks has another file than the lock names; use --offline, or --upgrade"
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ERROR") or "Error" in line]
    retried = [line for line in lines if "Retrying" in line]
    reason = (told or retried or lines or ["no reason given"])[0][:300]
    hint = "; the device reaches no package index, so use --offline" if retried else ""
    return f"the environment cannot be made: {reason}{hint}"


def main() -> None:
    Installer(Patient(sys.stdin.buffer, SILENCE_S), sys.stdout.buffer).serve()
