"""What is there, what is missing and the command that mends it: of this machine, or of a device."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_infer.admission import TIMEOUT_S
from edge_infer.deploy.conversation import Conversation
from edge_infer.deploy.device import WRITABLE_AGAIN
from edge_infer.deploy.local import LocalTransport
from edge_infer.deploy.plan import OLDEST_PYTHON
from edge_infer.deploy.provision import FOR_FORMAT, MORE
from edge_infer.deploy.transport import Transport
from edge_infer.errors import DeviceError
from edge_infer.report.units import size
from edge_infer.runtime.engines import at_least
from edge_infer.store import default_root

#: A clock further off makes certificates and dated signatures fail, and histories hard to read.
MOST_SKEW_S = 300.0


@dataclass(frozen=True)
class Line:
    """``state``: ok, missing (needed for what ``mend`` or ``text`` says, and only for that) or wrong."""

    topic: str
    state: str
    text: str
    mend: str = ""


def ok(topic: str, text: str) -> Line:
    return Line(topic, "ok", text)


def missing(topic: str, text: str, mend: str) -> Line:
    return Line(topic, "missing", text, mend)


def wrong(topic: str, text: str, mend: str) -> Line:
    return Line(topic, "wrong", text, mend)


# -- a device ---------------------------------------------------------------------------------------------------------


def examine_device(
    transport: Transport, python: str | None = None, store: str | None = None, timeout_s: float = TIMEOUT_S
) -> list[Line]:
    """One line a fact. A connection that fails is the first and only one. Raises UsageError for a bad address."""
    started = time.monotonic()
    try:
        with Conversation(transport, store, MORE) as device:
            asked = time.time()
            facts = device.ask("examine", python=python, timeout_s=timeout_s)
    except DeviceError as error:
        what, _, mend = str(error).partition("; ")
        return [wrong("connection", what, mend or f"see that {transport.address} is on and lets you log in")]
    took = time.monotonic() - started
    way = "this machine" if isinstance(transport, LocalTransport) else "its host key is known, and a key logs in"
    lines = judge(transport.address, facts, (asked, time.time()))
    return [ok("connection", f"{transport.address}: {way}; answered in {took:.1f} s"), *lines]


def judge(address: str, facts: Mapping[str, Any], between: tuple[float, float]) -> list[Line]:
    """What the device's answer means. A pure function; ``between`` are this machine's times around it."""
    lines = [_python(facts), _system(facts), _memory(facts), _disk(facts), _clock(facts, between)]
    lines += [_store(facts), *_environment(address, facts), *_engines(address, facts)]
    lines += [_model(address, row) for row in facts["models"]]
    return [*lines, *_signing(facts)]


def _python(facts: Mapping[str, Any]) -> Line:
    platform = facts["platform"]
    text = f"{platform['implementation']} {platform['python']} ({platform['executable']})"
    if not at_least(platform["python"], OLDEST_PYTHON):
        return wrong("python", text, f"install Python {OLDEST_PYTHON} or later there and name it with --python")
    if not platform["venv"]:
        return wrong("python", f"{text} without its venv module", "there: sudo apt install python3-venv")
    return ok("python", text)


def _system(facts: Mapping[str, Any]) -> Line:
    platform = facts["platform"]
    libc = f"{platform['libc'] or 'unknown C library'} {platform['libc_version']}".strip()
    bits = "" if platform["bits"] == 64 else f", {platform['bits']}-bit Python"
    pages = f"{facts['page_size_bytes'] // 1024} KiB pages"
    emulated = f", emulated: {facts['emulated']}" if facts["emulated"] else ""
    text = f"{platform['machine']}{bits}, {libc}, {facts['kernel']}, {pages}{emulated}"
    if platform["bits"] == 32:
        return wrong("system", text, "install the 64-bit system there: engines have no wheels for 32 bits")
    return ok("system", text)


def _memory(facts: Mapping[str, Any]) -> Line:
    return ok("memory", f"{size(facts['ram_bytes'])}, {size(facts['available_bytes'])} available")


def _disk(facts: Mapping[str, Any]) -> Line:
    text = f"{size(facts['free_bytes'])} free beyond a reserve of {size(facts['reserve_bytes'])}"
    if facts["read_only"]:
        what = f"{facts['store']} is on a read-only file system: what is there answers, nothing can be pushed"
        return wrong("storage", what, f"there: {WRITABLE_AGAIN.format(mount=facts['read_only'])}")
    if not facts["writable"]:
        return wrong("storage", f"{facts['store']} cannot be written", f"there: sudo chown -R $USER {facts['store']}")
    if not facts["free_bytes"]:
        return wrong("storage", text, f"free some space at {facts['store']}")
    return ok("storage", text)


def _clock(facts: Mapping[str, Any], between: tuple[float, float]) -> Line:
    # The answer was on its way for a while, and models were asked meanwhile: only what is beyond that counts.
    skew = facts["time"] - min(max(facts["time"], between[0]), between[1])
    if abs(skew) < 1:
        return ok("clock", "as this machine's")
    text = f"{abs(skew):,.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
    return (
        ok("clock", text) if abs(skew) <= MOST_SKEW_S else wrong("clock", text, "there: sudo timedatectl set-ntp true")
    )


def _store(facts: Mapping[str, Any]) -> Line:
    count = len(facts["models"])
    left = facts["unfinished_bytes"]
    unfinished = f", {size(left)} of unfinished pushes" if left else ""
    return ok("store", f"{facts['store']}: {count} model{'' if count == 1 else 's'} in use{unfinished}")


def _environment(address: str, facts: Mapping[str, Any]) -> Iterator[Line]:
    mend = f"edge-infer provision {address}"
    if facts["by_hand"]:
        yield ok("environment", f"{facts['store']}/venv, made by hand")
        return
    if facts["current"] is None:
        yield missing("environment", "none; models run with the system's own Python", mend)
        return
    made = facts["environment"]
    if made is None:
        yield wrong("environment", f"{facts['current']} is gone or incomplete", mend)
        return
    before = f", before it {facts['previous']}" if facts["previous"] else ""
    text = f"{facts['current']} ({', '.join(made['engines'])}; Python {made['python']}){before}"
    serving = facts["serving"].get("python")
    if serving is not None and not made["python"].startswith(f"{serving}."):
        yield wrong("environment", f"{text}; the system's Python has become {serving}", mend)
    else:
        yield ok("environment", text)


def _engines(address: str, facts: Mapping[str, Any]) -> Iterator[Line]:
    serving = facts["serving"]
    mend = f"edge-infer provision {address}"
    if "error" in serving:
        yield wrong("engines", serving["error"], mend)
        return
    packages = serving["packages"]
    if "edge-infer" not in packages:
        yield wrong("engines", f"{serving['serving_python']} has no edge-infer", mend)
        return
    found = [f"{name} {version}" for name, version in sorted(packages.items()) if name != "edge-infer"]
    if found:
        yield ok("engines", f"{', '.join(found)}; edge-infer {packages['edge-infer']}")
    else:
        yield wrong("engines", f"{serving['serving_python']} has no engine", f"{mend} --engine tflite")


def _model(address: str, row: Mapping[str, Any]) -> Line:
    topic = f"model {row['name']}"
    if "error" not in row:
        trial = f", on trial for {row['pending_s']} s more" if "pending_s" in row else ""
        engine = row["engine"]
        return ok(topic, f"{row['digest'][:12]} answers with {engine['package']} {engine['version']}{trial}")
    if row["damaged"]:
        return wrong(topic, row["error"], f"edge-infer push BUNDLE {address}")
    what, _, _ = row["error"].partition("; ")
    engine = f" --engine {FOR_FORMAT[row['format']]}" if row.get("format") in FOR_FORMAT else ""
    return wrong(topic, what, f"edge-infer provision {address}{engine}, or edge-infer rollback {address} {row['name']}")


def _signing(facts: Mapping[str, Any]) -> Iterator[Line]:
    demanded = [f"{format} by {path}" for format, path in facts["signers"].items() if path]
    if facts["ssh_keygen"] is None:
        make = wrong if demanded else missing
        yield make("ssh-keygen", "not there; signed bundles need it", "there: sudo apt install openssh-client")
    free = [format for format, path in facts["signers"].items() if not path]
    taken = [f"any bundle of {', '.join(free)}"] if free else []
    yield ok("signing", "; ".join([*demanded, *taken]))


# -- this machine -----------------------------------------------------------------------------------------------------


def examine_host() -> list[Line]:
    """What packaging and pushing need here; a package that is missing is needed for what its line says."""
    return [_host_python(), *_host_packages(), *_converters(), *_ssh(), *_caches()]


def _host_python() -> Line:
    version = sys.version.split()[0]
    return ok("python", f"{version} ({sys.executable})")  # an older one does not get here: the command line refuses it


#: What the extras of edge-infer are for, in the order in which they are shown; each without those before it.
EXTRAS_HERE = {"ssh": "pushing to devices", "host": "packaging"}


def _host_packages() -> Iterator[Line]:
    """Every package that edge-infer's own metadata names for a host, and pip, which chooses wheels for devices."""
    from packaging.requirements import Requirement

    from edge_infer.deploy.own_wheel import distribution

    known = [Requirement(line) for line in distribution().requires or []]
    shown = {"numpy"}
    for extra, purpose in EXTRAS_HERE.items():
        items = [item for item in known if item.marker and item.marker.evaluate({"extra": extra})]
        items = [item for item in items if item.name not in shown]
        shown |= {item.name for item in items}
        yield from _packages(items, purpose, f"{sys.executable} -m pip install --upgrade 'edge-infer[{extra}]'")
    yield from _packages([Requirement("pip")], "choosing wheels for devices", f"{sys.executable} -m ensurepip")


def _packages(items: list[Any], purpose: str, install: str) -> Iterator[Line]:
    """One line for what is there, one for each package that is not or is too old."""
    there = []
    for item in items:
        try:
            version = importlib.metadata.version(item.name)
        except importlib.metadata.PackageNotFoundError:
            yield missing(item.name, f"not installed; for {purpose}", install)
            continue
        if item.specifier.contains(version, prereleases=True):
            there.append(f"{item.name} {version}")
        else:
            yield wrong(item.name, f"{version}, expected {item.specifier}; for {purpose}", install)
    if there:
        yield ok(purpose, ", ".join(there))


def _converters() -> Iterator[Line]:
    from edge_infer.convert import environments

    there = {row["name"]: row for row in environments.installed() if row["current"]}
    for name in environments.names():
        lock = environments.locks_of(name)[0]
        if name in there:
            row = there[name]
            yield ok(f"converter {name}", f"{environments.version_of(name)}, {size(row['bytes'])}")
        else:
            yield missing(
                f"converter {name}", f"not installed; for {lock.does}", f"edge-infer converters install {name}"
            )


def _ssh() -> Iterator[Line]:
    keys = [path.name for path in sorted((Path.home() / ".ssh").glob("id_*")) if path.suffix != ".pub"]
    agent = _agent_keys()
    if keys or agent:
        parts = ([f"{', '.join(keys)} in ~/.ssh"] if keys else []) + ([f"{agent} in the agent"] if agent else [])
        yield ok("ssh keys", "; ".join(parts))
    else:
        yield missing("ssh keys", "none in ~/.ssh or the agent; needed to log in", "ssh-keygen -t ed25519")


def _agent_keys() -> int:
    """Keys in the user's agent; 0 without an agent, or without OpenSSH."""
    if not os.environ.get("SSH_AUTH_SOCK"):
        return 0
    try:
        done = subprocess.run(
            ["ssh-add", "-l"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(done.stdout.splitlines()) if done.returncode == 0 else 0


def _caches() -> Iterator[Line]:
    from edge_infer import steps
    from edge_infer.deploy.wheelhouse import default_folder

    used = steps.usage(steps.cache_root())
    most = size(steps.MAX_BYTES)
    yield ok("cache", f"{steps.cache_root()}: {size(used.size)} of at most {most} (edge-infer cache --trim)")
    wheels = [path.stat().st_size for path in default_folder().glob("*.whl")]
    yield ok("wheelhouse", f"{default_folder()}: {len(wheels)} wheels, {size(sum(wheels))}")
    try:
        default_root().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield wrong("home", f"{default_root()} cannot be made ({error.strerror})", "name a folder in EDGE_INFER_HOME")


def is_well(lines: list[Line]) -> bool:
    """Whether nothing has to be mended; what is missing may not be needed."""
    return all(line.state != "wrong" for line in lines)
