"""Give a device what it needs to run models: a Python environment with engines, chosen and locked on the host.

First it is asked what it is, then the wheels are chosen, and only then is anything sent: what does not exist for it is
known before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_infer.admission import TIMEOUT_S
from edge_infer.deploy.conversation import Conversation, myself
from edge_infer.deploy.plan import OLDEST_PYTHON, Step
from edge_infer.deploy.platforms import Platform
from edge_infer.deploy.push import Shares, sound_start
from edge_infer.deploy.transport import Transport
from edge_infer.deploy.wheelhouse import ENGINES, Pin, Wheelhouse, prepare
from edge_infer.errors import DeviceError
from edge_infer.runtime.engines import at_least

#: Sent along beyond what a push sends.
MORE = ("edge_infer.deploy.venvs", "edge_infer.deploy.checkup", "edge_infer.deploy.installer")
#: Where nothing says otherwise.
DEFAULT_ENGINE = "tflite"
#: The engine for models of a format.
FOR_FORMAT = {"tflite": "tflite", "onnx": "onnx", "torchscript": "torch"}
#: The format of models that an engine runs.
RUNS = {"tflite": "tflite", "tflite-runtime": "tflite", "onnx": "onnx", "torch": "torchscript"}
#: What an environment takes beside its packages: links, and what is compiled when engines are imported first.
ENVIRONMENT_BYTES = 8 * 1024 * 1024
#: torch on a slow card takes minutes.
INSTALL_S = 1800.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ProvisionOptions:
    """What is asked of a provisioning.

    ``engines``: extras of edge-infer (default: those of the environment and the models there). ``constraints``:
    requirements such as ``torch<2.9`` that hold for what is chosen. ``offline``: wheels are
    sent, and the device asks no index. ``python``: the device's Python to build on. ``replace``: an environment that
    was made by hand is moved aside. ``timeout_s`` is for each model's golden questions, ``install_s`` for pip there.
    """

    engines: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    offline: bool = False
    wheelhouse: Path | None = None
    upgrade: bool = False
    python: str | None = None
    store: str | None = None
    replace: bool = False
    wait_s: float = 0.0
    timeout_s: float = TIMEOUT_S
    install_s: float = INSTALL_S


@dataclass(frozen=True)
class Provisioned:
    """What a provisioning did. ``packages`` and ``models`` are empty for a dry run; ``replaced`` is None when the
    environment was the one in use already, or the first."""

    address: str
    platform: str
    engines: tuple[str, ...]
    environment: str
    steps: tuple[Step, ...]
    sent_bytes: int
    replaced: str | None
    packages: Mapping[str, str]
    models: Sequence[Mapping[str, Any]]


def provision(
    transport: Transport, options: ProvisionOptions, *, dry_run: bool = False, progress: Progress = lambda step: None
) -> Provisioned:
    """Make the environment on the device and let it serve, after its engines and the models there were tried.

    Raises EngineMissing when a wheel does not exist for the device, UsageError, BundleError for a damaged wheelhouse,
    SelfTestFailed or another DeviceError when the device refuses; it then goes on with the environment it had.
    """
    progress("asking the device")
    with Conversation(transport, options.store, MORE) as device:
        facts = device.ask("look", python=options.python)
    platform = check_device(transport.address, facts, options)
    engines = tuple(sorted(set(options.engines or default_engines(facts))))
    check_models(transport.address, facts, engines)
    house = prepare(
        platform,
        engines,
        options.wheelhouse,
        constraints=options.constraints,
        whole=options.offline,
        upgrade=options.upgrade,
        progress=progress,
    )
    files = [pin for pin in (*house.pins, house.pip) if options.offline or pin in (house.own, house.pip)]
    with Conversation(transport, options.store, MORE) as device:
        answer = device.ask(
            "install-begin",
            requirements=house.requirements,
            engines=list(engines),
            files=[[pin.file, house.path(pin).stat().st_size, pin.sha256] for pin in files],
            python=options.python,
            who=myself(),
            wait_s=options.wait_s,
        )
        steps = make_steps(house, files, facts, answer, options.offline)
        done = Provisioned(
            transport.address, str(platform), engines, answer["environment"], tuple(steps), 0, answer["current"], {}, ()
        )
        if dry_run:
            return done
        sent = 0
        for step in steps:
            if step.action == "send":
                progress(str(step))
                sent += device.send_file(
                    step.subject, house.folder / step.subject, step.offset, Shares(step, progress), "wheel"
                )
        progress("; ".join(str(step) for step in steps if step.action not in ("send", "keep")))
        told = device.ask(
            "install-finish",
            imports=[ENGINES[engine][1] for engine in engines],
            online=not options.offline,
            replace=options.replace,
            timeout_s=options.timeout_s,
            install_s=options.install_s,
        )
    return Provisioned(
        transport.address, str(platform), engines, told["environment"], tuple(steps), sent, told["replaced"],
        told["packages"], told["models"],
    )  # fmt: skip


def switch_back(
    transport: Transport, store: str | None = None, timeout_s: float = TIMEOUT_S, wait_s: float = 0.0
) -> Mapping[str, Any]:
    """Let the environment before serve again. Raises DeviceError when there is none or a model would not run in it."""
    with Conversation(transport, store, MORE) as device:
        return device.ask("switch-back", timeout_s=timeout_s, who=myself(), wait_s=wait_s)


def check_device(address: str, facts: Mapping[str, Any], options: ProvisionOptions) -> Platform:
    """What wheels must fit. Raises DeviceError for a device that no environment can be made on."""
    try:
        platform = Platform.from_facts(facts["platform"])
    except DeviceError as error:
        raise DeviceError(f"{address}: {error}") from None
    if not at_least(platform.python, OLDEST_PYTHON):
        raise DeviceError(
            f"{address}: its Python is {platform.python}, expected {OLDEST_PYTHON} or later; install a newer one there "
            "and name it with --python"
        )
    if not facts["platform"]["venv"]:
        raise DeviceError(
            f"{address}: its Python has no venv module; install it there (Debian: sudo apt install python3-venv)"
        )
    if facts["by_hand"] and not options.replace:
        raise DeviceError(
            f"{address}: {facts['store']}/venv was made by hand; --replace moves it aside, where --rollback finds it"
        )
    return platform


def default_engines(facts: Mapping[str, Any]) -> list[str]:
    """Those of the environment in use, and what the models there need that have none."""
    have = [engine for engine in facts["engines"] if engine in RUNS]
    runs = {RUNS[engine] for engine in have}
    have += [FOR_FORMAT[format] for format in facts["formats"] if FOR_FORMAT[format] not in runs]
    return have or [DEFAULT_ENGINE]


def check_models(address: str, facts: Mapping[str, Any], engines: Sequence[str]) -> None:
    """Raise DeviceError where models that run now would lose their engine, before anything is chosen or sent."""
    runs_now = {RUNS[engine] for engine in facts["engines"] if engine in RUNS}
    lost = runs_now & set(facts["formats"]) - {RUNS[engine] for engine in engines}
    if lost:
        wanted = " ".join(f"--engine {FOR_FORMAT[format]}" for format in sorted(lost))
        raise DeviceError(f"{address}: models in use there need {', '.join(sorted(lost))}; add {wanted}")


def make_steps(
    house: Wheelhouse, files: Sequence[Pin], facts: Mapping[str, Any], answer: Mapping[str, Any], offline: bool
) -> list[Step]:
    """What will be done, given the device's answer to ``install-begin``. Raises DeviceError for too little space."""
    name = answer["environment"]
    steps = []
    if answer["present"]:
        steps.append(Step("keep", f"environment {name}"))
    else:
        needed = 0
        for pin in files:
            size = house.path(pin).stat().st_size
            row = answer["have"].get(pin.file, {"size": 0, "pieces": []})
            start = sound_start(house.path(pin), row["size"], row["pieces"])
            steps.append(Step("keep", pin.file) if start == size else Step("send", pin.file, size - start, start))
            needed += size - row["size"]
        needed += ENVIRONMENT_BYTES + house.unpacked_bytes(pin for pin in files if pin != house.pip)
        if needed > facts["free_bytes"]:
            raise DeviceError(
                f"the environment needs {needed:,} bytes{'' if offline else ' and what the device downloads'}, the "
                f"device has {facts['free_bytes']:,} free beyond its reserve; free some space there"
            )
        if not offline:
            others = ", ".join(f"{pin.project} {pin.version}" for pin in house.pins if pin not in files)
            steps.append(Step("download there", others))
        steps.append(Step("install", f"environment {name}"))
    steps.append(Step("import", ", ".join(ENGINES[engine][1] for engine in house.lock.engines)))
    if facts["formats"]:
        steps.append(Step("ask", "the models in use their golden questions"))
    return steps if answer["current"] == name else [*steps, Step("switch", f"to environment {name}")]
