"""Wheels for a device, chosen and locked on the host: by pip, as if it ran there.

    DIR/<engines>-<abi>-<architecture>-<libc>.txt     locks: pip's requirements with exact versions and hashes
    DIR/*.whl                                         what they name, shared by all locks

A lock that fits a device is taken as it is, without network, until ``upgrade`` is asked for: devices of one kind get
the same versions. pip judges markers for the machine it runs on, so it is never left to find what a wheel needs: that
is read from the wheels' own metadata here, for the device.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_infer.bundle import hash_file, replace_file
from edge_infer.deploy.own_wheel import distribution, write_own_wheel
from edge_infer.deploy.platforms import Platform
from edge_infer.errors import BundleError, DeviceError, EngineMissing, UsageError
from edge_infer.store import default_root

from packaging.requirements import InvalidRequirement, Requirement  # isort: skip  (platforms says how to install packaging)
from packaging.specifiers import SpecifierSet

from packaging.utils import canonicalize_name, parse_wheel_filename  # isort: skip

#: The engines by their extra of edge-infer: the package, and the module whose import shows that it works.
ENGINES = {
    "tflite": ("ai-edge-litert", "ai_edge_litert.interpreter"),
    "tflite-runtime": ("tflite-runtime", "tflite_runtime.interpreter"),
    "onnx": ("onnxruntime", "onnxruntime"),
    "torch": ("torch", "torch"),
}
#: The program that installs the others on the device; it does not stay in the environment.
INSTALLER = "pip"
#: Packages that bring gigabytes for graphics cards: a version of an engine that needs any is passed over.
FOR_GPUS = re.compile(r"(nvidia|cuda|triton|pytorch-triton|rocm)(-|\Z)")
#: Versions of an engine that end with an illegal instruction on processors of an architecture without a feature.
UNFIT = (
    # The allocator that it carries was built for the atomic instructions of ARMv8.1, which Cortex-A53 and A72 lack:
    # https://github.com/pytorch/pytorch/issues/176993
    ("torch", "==2.10.0", "aarch64", "atomics"),
)
#: Versions of an engine that are looked at before giving up, and rounds until no wheel needs anything new.
MOST_VERSIONS, MOST_ROUNDS = 40, 10
PIP_TIMEOUT_S = 1800.0

PIN = re.compile(r"^# file: (\S+)\n(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})$", re.MULTILINE)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Pin:
    """One wheel of a lock; ``file`` is its name."""

    project: str
    version: str
    file: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.project}=={self.version} --hash=sha256:{self.sha256}"


@dataclass(frozen=True)
class Lock:
    """Everything that an environment with these engines consists of, and pip; edge-infer itself comes to it later."""

    engines: tuple[str, ...]
    pins: tuple[Pin, ...]

    def to_text(self, platform: str) -> str:
        head = f"# engines: {' '.join(self.engines)}\n# for: {platform}\n"
        return head + "".join(f"# file: {pin.file}\n{pin}\n" for pin in self.pins)

    @classmethod
    def from_text(cls, text: str) -> Lock:
        engines = re.search(r"^# engines: (.+)$", text, re.MULTILINE)
        pins = [Pin(project, version, file, digest) for file, project, version, digest in PIN.findall(text)]
        return cls(tuple(engines[1].split()) if engines else (), tuple(pins))

    def fits(self, platform: Platform, engines: Sequence[str]) -> bool:
        """Whether it holds these engines for this platform, as today's edge-infer needs them."""
        if self.engines != tuple(engines) or not all(platform.takes(pin.file) for pin in self.pins):
            return False
        if any(lacking(pin.project, pin.version, platform) for pin in self.pins):
            return False
        versions = {canonicalize_name(pin.project): pin.version for pin in self.pins}
        needed = [*own_needs(platform, engines), Requirement(INSTALLER)]
        return all(
            item.specifier.contains(versions.get(canonicalize_name(item.name), "0"), prereleases=True)
            and canonicalize_name(item.name) in versions
            for item in needed
        )

    def keeps(self, limits: Iterable[Requirement]) -> bool:
        """Whether all that it has of what ``limits`` name is within them."""
        bounds = {canonicalize_name(item.name): item.specifier for item in limits}
        named = ((bounds.get(canonicalize_name(pin.project)), pin.version) for pin in self.pins)
        return all(bound is None or bound.contains(version, prereleases=True) for bound, version in named)


@dataclass(frozen=True)
class Wheelhouse:
    """A lock, the wheel of edge-infer beside it, and the folder with the wheels that were asked for."""

    folder: Path
    lock: Lock
    own: Pin

    @property
    def pip(self) -> Pin:
        return next(pin for pin in self.lock.pins if pin.project == INSTALLER)

    @property
    def pins(self) -> tuple[Pin, ...]:
        """What is installed."""
        return (*(pin for pin in self.lock.pins if pin.project != INSTALLER), self.own)

    @property
    def requirements(self) -> str:
        """What pip is given on the device."""
        return "".join(f"{pin}\n" for pin in self.pins)

    def path(self, pin: Pin) -> Path:
        return self.folder / pin.file

    def unpacked_bytes(self, pins: Iterable[Pin]) -> int:
        """What wheels take once they are installed."""
        import zipfile

        return sum(item.file_size for pin in pins for item in zipfile.ZipFile(self.path(pin)).infolist())


def default_folder() -> Path:
    return default_root() / "wheelhouse"


def prepare(
    platform: Platform,
    engines: Sequence[str],
    folder: Path | None = None,
    *,
    constraints: Sequence[str] = (),
    whole: bool = True,
    upgrade: bool = False,
    progress: Progress = lambda step: None,
) -> Wheelhouse:
    """A wheelhouse in ``folder`` for ``engines`` on ``platform``: with all wheels, or with those of pip and edge-infer.

    ``constraints`` are requirements such as ``torch<2.9``, which every version that is chosen satisfies.
    Raises EngineMissing when there is no wheel for the platform, DeviceError when the index is out of reach,
    BundleError for a wheel that is not the one in the lock, UsageError for an engine that is not known.
    """
    for engine in engines:
        if engine not in ENGINES:
            raise UsageError(f"no engine is called {engine!r}, expected {', '.join(ENGINES)}")
    engines = sorted(set(engines))
    limits = [_constraint(text) for text in constraints]
    folder = folder or default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    lock = None if upgrade else find_lock(platform, engines, folder, limits)
    if lock is None:
        lock = choose(platform, engines, progress, limits)
        name = f"{'+'.join(engines)}-{platform.key}.txt"
        replace_file(folder / name, lock.to_text(str(platform)).encode())
    _fetch(platform, folder, [pin for pin in lock.pins if whole or pin.project == INSTALLER], progress)
    own = write_own_wheel(folder)
    return Wheelhouse(folder, lock, _pin(own.name, hash_file(own)))


def _constraint(text: str) -> Requirement:
    try:
        item = Requirement(text)
    except InvalidRequirement as error:
        raise UsageError(
            f"the constraint {text!r} is none ({str(error).splitlines()[0]}), expected such as 'torch<2.9'"
        ) from None
    if not item.specifier or item.url or item.marker or item.extras:
        raise UsageError(f"the constraint {text!r} bounds no version, expected such as 'torch<2.9'")
    return item


def find_lock(
    platform: Platform, engines: Sequence[str], folder: Path, limits: Sequence[Requirement] = ()
) -> Lock | None:
    """The lock in ``folder`` that fits, made for this very platform or for another that it also takes wheels of."""
    paths = sorted(folder.glob("*.txt"), key=lambda path: (platform.key in path.name, path.name), reverse=True)
    locks = (Lock.from_text(path.read_text("utf-8", "replace")) for path in paths)
    return next((lock for lock in locks if lock.fits(platform, engines) and lock.keeps(limits)), None)


def own_needs(platform: Platform, engines: Sequence[str]) -> list[Requirement]:
    """What edge-infer's own metadata says that it needs there, with these engines."""
    return _needs(distribution().requires or [], platform, engines)


# -- choosing ---------------------------------------------------------------------------------------------------------


def choose(
    platform: Platform,
    engines: Sequence[str],
    progress: Progress = lambda step: None,
    limits: Sequence[Requirement] = (),
) -> Lock:
    """Ask the index for the newest wheels that fit ``platform`` and each other. Raises as ``prepare``."""
    roots = own_needs(platform, engines)
    _refuse_what_edge_infer_rules_out(platform, engines, roots)
    bounds: list[Requirement] = []
    name = why = ""
    for _ in range(MOST_VERSIONS):
        progress(f"choosing wheels for {platform}")
        try:
            found = _closed([*roots, *bounds, Requirement(INSTALLER)], limits, platform)
        except EngineMissing as error:
            if any(f"{item.name}<" in str(error) for item in bounds):
                break  # there is none older
            raise
        passed = _passed_over(found, platform)
        if passed is None:
            pins = [_pin_of(item) for item in found]
            return Lock(tuple(engines), tuple(sorted(pins, key=lambda pin: canonicalize_name(pin.project))))
        name, version, why = passed
        progress(f"{name} {version} needs {why} there; looking for an older one")
        bounds = [item for item in bounds if item.name != name] + [Requirement(f"{name}<{version}")]
    raise EngineMissing(
        f"every wheel of {name} for {platform} needs {why}; set pip up with an index that has one without"
    )


def _refuse_what_edge_infer_rules_out(platform: Platform, engines: Sequence[str], roots: list[Requirement]) -> None:
    names = {canonicalize_name(item.name) for item in roots}
    for engine in engines:
        if ENGINES[engine][0] not in names:
            raise EngineMissing(_no_wheel(ENGINES[engine][0], platform))


def _no_wheel(what: str, platform: Platform, among: str = "") -> str:
    name = re.split(r"[^A-Za-z0-9._-]", what)[0]
    others = ", ".join(engine for engine, (package, _) in ENGINES.items() if package != name)
    found = f" (there are {among})" if among and among != "none" else ""
    return (
        f"no wheel of {what} is made for {platform}{found}; choose another engine with --engine ({others}), or name "
        "another Python there with --python"
    )


def _closed(roots: list[Requirement], limits: Sequence[Requirement], platform: Platform) -> list[dict[str, Any]]:
    """pip's report on ``roots`` and all that they need there within ``limits``, found round by round."""
    wanted = {str(item): item for item in roots}
    for _ in range(MOST_ROUNDS):
        found = _report(list(wanted), limits, platform)
        # An engine that is passed over anyway must not bring in what it needs.
        if _passed_over(found, platform) is not None:
            return found
        needed = {str(item): item for row in found for item in _needs_of(row, wanted.values(), platform)}
        if needed.keys() <= wanted.keys():
            return found
        wanted |= needed
    raise EngineMissing(f"what the wheels for {platform} need has no end; choose with --engine one engine alone")


def _needs_of(row: dict[str, Any], wanted: Iterable[Requirement], platform: Platform) -> list[Requirement]:
    name = canonicalize_name(row["metadata"]["name"])
    extras = {extra for item in wanted if canonicalize_name(item.name) == name for extra in item.extras}
    return _needs(row["metadata"].get("requires_dist") or [], platform, sorted(extras))


def _needs(lines: Sequence[str], platform: Platform, extras: Sequence[str]) -> list[Requirement]:
    """Requirements whose markers hold there, without the markers."""
    found = []
    for line in lines:
        item = Requirement(line)
        marker = item.marker
        if marker is None or any(marker.evaluate({**platform.markers(), "extra": extra}) for extra in ("", *extras)):
            item.marker = None
            found.append(item)
    return found


def _passed_over(found: list[dict[str, Any]], platform: Platform) -> tuple[str, str, str] | None:
    """Name and version of a wheel that nobody wants there, and what it needs."""
    for row in found:
        name, version = row["metadata"]["name"], row["metadata"]["version"].split("+")[0]
        if any(FOR_GPUS.match(canonicalize_name(item.name)) for item in _needs_of(row, (), platform)):
            return name, version, "a graphics card's packages"
        if feature := lacking(name, version, platform):
            return name, version, f"a processor with {feature}"
    return None


def lacking(name: str, version: str, platform: Platform) -> str | None:
    """A feature that the wheel needs and the processor lacks; None also where the processor's are not known."""
    for package, versions, architecture, feature in UNFIT:
        concerned = canonicalize_name(name) == package and version in SpecifierSet(versions)
        if concerned and platform.architecture == architecture and feature not in (platform.features or (feature,)):
            return feature
    return None


def _pin_of(row: dict[str, Any]) -> Pin:
    hashes = row["download_info"].get("archive_info", {}).get("hashes", {})
    file = row["download_info"]["url"].split("#")[0].rpartition("/")[2].replace("%2B", "+")
    if "sha256" not in hashes:
        raise DeviceError(f"the package index gives no SHA-256 of {file}, so it cannot be locked; use another index")
    return _pin(file, hashes["sha256"])


def _pin(file: str, sha256: str) -> Pin:
    project, version, _, _ = parse_wheel_filename(file)
    return Pin(project, str(version), file, sha256)


# -- pip --------------------------------------------------------------------------------------------------------------


def _report(requirements: list[str], limits: Sequence[Requirement], platform: Platform) -> list[dict[str, Any]]:
    """What pip would install, nothing more; one row a wheel."""
    with tempfile.TemporaryDirectory() as folder:
        report, constraints = Path(folder) / "report.json", Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{item}\n" for item in limits))
        options = ["--constraint", str(constraints)] if limits else []
        options += ["--dry-run", "--ignore-installed", "--no-deps", "--report", str(report), "--target", folder]
        _pip(["install", *options, *platform.pip_arguments(), *requirements], platform)
        rows: list[dict[str, Any]] = json.loads(report.read_text("utf-8"))["install"]
    return rows


def _fetch(platform: Platform, folder: Path, pins: Iterable[Pin], progress: Progress) -> None:
    """Download what is not in ``folder`` yet, and refuse what is there and is something else."""
    missing = [pin for pin in pins if not (folder / pin.file).exists()]
    if missing:
        progress(f"downloading {', '.join(f'{pin.project} {pin.version}' for pin in missing)}")
        # A folder of its own on the same disk: a download that is cut off leaves nothing that looks like a wheel.
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            requirements = Path(aside) / "requirements.txt"
            requirements.write_text("".join(f"{pin}\n" for pin in missing))
            options = ["--no-deps", "--require-hashes", "--dest", aside, "-r", str(requirements)]
            _pip(["download", *options, *platform.pip_arguments()], platform)
            for path in Path(aside).glob("*.whl"):
                path.replace(folder / path.name)
    for pin in pins:
        path = folder / pin.file
        if not path.exists():
            raise DeviceError(f"pip did not download {pin.file}, expected it in {folder}; choose anew with --upgrade")
        if hash_file(path) != pin.sha256:
            raise BundleError(
                f"{path} has SHA-256 {hash_file(path)[:12]}, the lock says {pin.sha256[:12]}; remove that file and run "
                "the same again, which downloads it anew"
            )


def _pip(arguments: Sequence[str], platform: Platform) -> None:
    """Run this machine's pip with its own settings: indexes, proxies and certificates are the user's."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-input", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"pip took longer than {PIP_TIMEOUT_S:g} s; is the package index within reach?") from None
    if done.returncode:
        raise _pip_error(done.stderr, platform)


def _pip_error(words: str, platform: Platform) -> Exception:
    if "No module named pip" in words:
        return UsageError(f"{sys.executable} has no pip, which chooses the wheels; run {sys.executable} -m ensurepip")
    absent = re.search(r"satisfies the requirement (.+?) \(from versions: (.*)\)", words)
    if absent and "Retrying" not in words:
        return EngineMissing(_no_wheel(absent[1], platform, absent[2][-60:].partition(", ")[2] or absent[2]))
    conflict = re.search(r"Cannot install (.+) because these package versions have conflicting", words)
    if conflict:
        return EngineMissing(f"{conflict[1]} cannot be together in one environment; give fewer with --engine")
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    told = next((line for line in lines if "Retrying" in line or line.startswith("ERROR")), lines[-1] if lines else "")
    return DeviceError(
        f"pip cannot get the wheels: {told[:300]}; is the package index within reach? --wheelhouse names a folder that "
        "holds a lock and its wheels"
    )
