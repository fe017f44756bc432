"""``edge-infer push --inventory`` and ``edge-infer fleet``: the devices of an inventory file."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from edge_infer.cli import console
from edge_infer.errors import EXIT_DEVICE, EXIT_DONE, EdgeInferError, UsageError
from edge_infer.runtime.cli import positive

if TYPE_CHECKING:
    from edge_infer.bundle import Bundle
    from edge_infer.deploy.inventory import Device
    from edge_infer.deploy.plan import PushOptions
    from edge_infer.deploy.rollout import Job, Policy, Rollout
    from edge_infer.deploy.rollout_report import Row
    from edge_infer.deploy.transport import Transport

#: Options of ``push`` that mean nothing without an inventory.
OPTIONS = ("group", "select", "parallel", "canary", "batch", "abort_after", "report", "resume", "retry_failed")


class _Inventory(argparse.Action):
    """Its file; and no device has to be named any more. (With ``nargs="*"`` argparse would take none after options.)"""

    def __init__(self, instead_of: argparse.Action, **settings: Any) -> None:
        super().__init__(**settings)
        self._instead_of = instead_of

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        self._instead_of.required = False


def add_push_options(push: Any, instead_of: argparse.Action) -> None:
    fleet = push.add_argument_group("devices of an inventory", "instead of DEVICE; docs/fleet.md has more")
    fleet.add_argument(
        "--inventory",
        action=_Inventory,
        instead_of=instead_of,
        type=Path,
        metavar="FILE.toml",
        help="the file that lists the devices",
    )
    _add_selection(fleet)
    fleet.add_argument("--canary", metavar="N", help="devices that go first and must all succeed (default: 1)")
    fleet.add_argument("--batch", metavar="N", help="then so many at a time, or such as 10%% (default: all the rest)")
    fleet.add_argument(
        "--abort-after", metavar="N", help="start no more when more of a batch fail, or such as 10%% (default: 5%%)"
    )
    fleet.add_argument("--report", type=Path, metavar="FILE", help="what was done (default: rollout-NAME-TIME.json)")
    fleet.add_argument("--resume", type=Path, metavar="REPORT", help="go on from there, and write there")
    fleet.add_argument("--retry-failed", action="store_true", default=None, help="with --resume: those too")


def _add_selection(parser: Any) -> None:
    parser.add_argument("--group", action="append", metavar="NAME", help="its devices; may be repeated; all has all")
    parser.add_argument("--select", metavar="PATTERN", help="as Ansible's --limit, such as 'kitchen,&target=*-4,!pi-7'")
    parser.add_argument("--parallel", type=positive, metavar="N", help="devices at once (default: 32)")


def add_command(commands: Any) -> None:
    fleet = commands.add_parser("fleet", help="the devices of an inventory: list, status, rollback, confirm")
    verbs = fleet.add_subparsers(required=True, metavar="COMMAND")
    shown = verbs.add_parser("list", help="the devices, their groups and targets; asks none of them")
    shown.set_defaults(call=call_list, show=show_list)
    status = verbs.add_parser("status", help="which devices can be reached, and the models on them")
    status.add_argument("--python", help="the devices' Python with edge-infer and an engine")
    status.set_defaults(call=call_status, show=show_status)
    rollback = verbs.add_parser("rollback", help="let devices go back to the release before")
    rollback.add_argument("name", metavar="NAME", help="the model's name on the devices")
    rollback.set_defaults(call=call_rollback, show=show_releases)
    confirm = verbs.add_parser("confirm", help="keep a release that is on trial")
    confirm.add_argument("name", metavar="NAME", help="the model's name on the devices")
    confirm.set_defaults(call=call_confirm, show=show_releases)
    from edge_infer.cli.devices import add_ssh_options

    for parser in (shown, status, rollback, confirm):
        parser.add_argument("--inventory", type=Path, metavar="FILE.toml", required=True)
        _add_selection(parser)
        add_ssh_options(parser)
        parser.add_argument("--json", action="store_true", help="the same facts for programs, on one line")


# -- which devices, which bundles ------------------------------------------------------------------------------------


def is_meant(args: argparse.Namespace) -> bool:
    """Whether a push is for an inventory. Raises UsageError for options that are for one where none is named."""
    if args.inventory is not None:
        if args.sftp or args.no_read_back:
            raise UsageError(
                "a rollout goes by the devices' self-tests, which --sftp has none of; push to each by address"
            )
        return True
    given = [name for name in OPTIONS if getattr(args, name) is not None]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for the devices of an inventory; name that with --inventory"
        )
    return False


def _selected(args: argparse.Namespace, by_default: str | None = None) -> list[Device]:
    """The devices that --group and --select name, those of both where both are given."""
    from edge_infer.deploy.inventory import read_inventory
    from edge_infer.deploy.selector import select

    inventory = read_inventory(args.inventory)
    for group in args.group or ():
        if group not in inventory.groups:
            raise UsageError(f"{inventory.path} has no group {group!r}, only {', '.join(inventory.groups)}")
    pattern = args.select or (None if args.group else by_default)
    if not args.group and pattern is None:
        raise UsageError("say which devices are meant with --group or --select; --group all means every one")
    chosen = select(inventory, ",".join(args.group or ["all"]))
    if pattern is not None:
        also = select(inventory, pattern)
        chosen = [device for device in chosen if device in also]
    if not chosen:
        raise UsageError(f"no device is in {' or '.join(args.group)} and also {args.select!r}")
    for device in chosen:
        if device.identity is not None and args.identity is None and not device.identity.is_file():
            raise UsageError(f"{inventory.path}: device {device.name}: identity: there is no file {device.identity}")
    return chosen


def _way_opener(args: argparse.Namespace) -> Callable[[Device], Transport]:
    """Gives the way to a device. What the command line says counts before the inventory."""
    from edge_infer.cli.devices import ssh_options
    from edge_infer.deploy.conversation import open_transport

    options = ssh_options(args)

    def open_way(device: Device) -> Transport:
        own = {"identity": options["identity"] or device.identity, "jump": device.jump}
        return open_transport(device.address, **{**options, **own})

    return open_way


def _bundles(paths: Sequence[Path]) -> list[Bundle]:
    """The bundles at ``paths``; a folder that is none stands for the bundles in it."""
    from edge_infer.bundle import open_bundle, verify
    from edge_infer.manifest import MANIFEST_NAME

    found = []
    for path in paths:
        inside = sorted(path.glob("*.edge")) if path.is_dir() and not (path / MANIFEST_NAME).exists() else []
        found += [open_bundle(each) for each in inside or [path]]
    for bundle in found:
        verify(bundle, mode="full")
    return found


# -- push ------------------------------------------------------------------------------------------------------------


def call_push(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.rollout import Rollout, assign
    from edge_infer.deploy.rollout_report import Report, Row, resume

    if args.retry_failed and args.resume is None:
        raise UsageError("--retry-failed goes on from an earlier report; name that with --resume")
    policy = _policy(args)
    bundles = _bundles([args.bundle, *map(Path, args.devices or ())])
    jobs = assign(_selected(args), bundles)
    send = _sender(args, jobs)
    rows = [Row(job.device.name, job.device.address, job.bundle.digest) for job in jobs]
    if args.resume is not None:
        resume(rows, args.resume, bool(args.retry_failed))
    report = Report(_report_path(args, bundles[0].manifest.name), rows, _about(args, policy, bundles))
    with _watching(len(rows)) as watch:
        rollout = Rollout(jobs, policy, report, _way_opener(args), send, watch)
        with _stopped_by_signals(rollout) as caught:
            rollout.run()
    done = all(row.state == "done" for row in rows)
    status = 128 + caught[0] if caught else EXIT_DONE if done else EXIT_DEVICE
    return {
        **report.as_dict(),
        "dry_run": args.dry_run,
        "report": str(report.path) if report.path else None,
        "exit_status": status,
    }


def _policy(args: argparse.Namespace) -> Policy:
    from edge_infer.deploy.rollout import PARALLEL, Amount, Policy

    parallel = args.parallel or PARALLEL
    if args.dry_run:  # nothing can go wrong, and every device is to be heard
        return Policy(Amount(0, False), Amount(100, True), Amount(100, True), parallel)
    names = ("canary", "batch", "abort_after")
    given: dict[str, Any] = {name: Amount.parse(text) for name in names if (text := getattr(args, name)) is not None}
    return Policy(**given, parallel=parallel)


def _report_path(args: argparse.Namespace, name: str) -> Path | None:
    if args.report is not None or args.resume is not None:
        return Path(args.report or args.resume)
    return None if args.dry_run else Path(f"rollout-{name}-{time.strftime('%Y%m%d-%H%M%S')}.json")


def _about(args: argparse.Namespace, policy: Policy, bundles: Sequence[Bundle]) -> dict[str, Any]:
    return {
        "model": bundles[0].manifest.name,
        "inventory": str(args.inventory),
        "group": args.group,
        "select": args.select,
        "bundles": {
            bundle.manifest.target.name: {
                "path": str(bundle.path),
                "version": bundle.manifest.version,
                "digest": bundle.digest,
            }
            for bundle in bundles
        },
        "policy": {
            "canary": str(policy.canary),
            "batch": str(policy.batch),
            "abort_after": str(policy.abort_after),
            "parallel": policy.parallel,
        },
    }


def _sender(args: argparse.Namespace, jobs: Sequence[Job]) -> Any:
    """Gives the function that pushes to one device. What a device lacks for its options is said before any is asked."""
    from edge_infer.cli.devices import push_options
    from edge_infer.deploy.push import push

    shared = push_options(args)
    options = {job.device.name: _options_of(shared, job.device) for job in jobs}

    def send(job: Job, way: Transport, progress: Callable[[str], None]) -> Any:
        return push(job.bundle, way, options[job.device.name], dry_run=args.dry_run, progress=progress)

    return send


def _options_of(options: PushOptions, device: Device) -> PushOptions:
    """Those of the command line, filled up from the inventory, with the device's variables put in."""
    own = {"python": options.python or device.python, "store": options.store or device.store}
    texts = {
        **{name: value for name, value in asdict(options).items() if isinstance(value, str)},
        **{name: value for name, value in own.items() if value is not None},
    }
    return replace(options, **{name: device.expand(text) for name, text in texts.items()})  # type: ignore[arg-type]


@contextmanager
def _stopped_by_signals(rollout: Rollout) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the rollout in good order; gives the signals that came."""
    caught: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        rollout.stop(f"stopped by {signal.Signals(number).name}")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_push(answer: dict[str, Any]) -> None:
    rows = answer["devices"]
    if answer["dry_run"]:
        for row in rows:
            print(f"{row['device']}: would" if row["pushed"] else f"{row['device']}: {row['error']}")
            for step in row["pushed"]["steps"] if row["pushed"] else ():
                print(f"  {step}")
        return
    columns = ["device", "group", "state", "release", "before", "sent>", "s>", "why"]
    console.print_table(columns, [_cells(row) for row in rows])
    counts = ", ".join(f"{count} {state}" for state, count in answer["counts"].items())
    print(f"{answer['model']} on {len(rows)} devices: {counts}; the report is {answer['report']}")
    if answer["reason"]:
        print(f"edge-infer: no further devices were started: {answer['reason']}", file=sys.stderr)
    if answer["exit_status"]:
        print(
            f"edge-infer: the same command with --resume {answer['report']} tries the rest, with --retry-failed also "
            "what failed",
            file=sys.stderr,
        )


def _cells(row: dict[str, Any]) -> list[str]:
    pushed = row["pushed"]
    return [
        row["device"],
        f"batch {row['group']}" if row["group"] else "canary",
        row["state"] + (" earlier" if row["kept"] else "") + (", on trial" if pushed and pushed["pending_s"] else ""),
        row["digest"][:12],
        _before(row) if pushed else "",
        console.size(pushed["sent_bytes"]) if pushed else "",
        "" if row["seconds"] is None else f"{row['seconds']:.1f}",
        row["error"] or "",
    ]


def _before(row: dict[str, Any]) -> str:
    replaced = row["pushed"]["replaced"]
    return "the same" if replaced == row["digest"] else (replaced or "none")[:12]


# -- progress --------------------------------------------------------------------------------------------------------


class Lines:
    """One line for everything that happens on a device."""

    def step(self, row: Row, step: str) -> None:
        print(f"{row.device}: {step}", file=sys.stderr, flush=True)

    def ended(self, row: Row) -> None:
        print(ended_line(row), file=sys.stderr, flush=True)


class Live:
    """On a terminal: a line for each device under way that changes in place, and above them those that are through."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._total, self._through = total, 0
        self._steps: dict[str, str] = {}
        terminal = Console(stderr=True, markup=False, highlight=False)
        self.display = RichLive(console=terminal, transient=True, get_renderable=self._lines)

    def step(self, row: Row, step: str) -> None:
        self._steps[row.device] = step

    def ended(self, row: Row) -> None:
        self._steps.pop(row.device, None)
        self._through += 1
        self.display.console.print(ended_line(row))

    def _lines(self) -> Any:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for device, step in list(self._steps.items()):  # a thread of rich's draws
            table.add_row(device, step)
        table.add_row(f"{self._through} of {self._total}", "")
        return table


def ended_line(row: Row) -> str:
    if row.pushed is None:
        return f"{row.device}: {row.state}: {row.error}"
    return f"{row.device}: {row.state}, sent {console.size(row.pushed['sent_bytes'])} in {row.seconds:.1f} s"


@contextmanager
def _watching(total: int) -> Iterator[Lines | Live]:
    if not sys.stderr.isatty():
        yield Lines()
        return
    live = Live(total)
    with live.display, console.giving_way(live.display):
        yield live


# -- list, status, rollback ------------------------------------------------------------------------------------------


def call_list(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "devices": [
            {
                "device": device.name,
                "address": device.address,
                "target": device.target,
                "jump": device.jump,
                "groups": list(device.groups),
                "variables": dict(device.variables),
            }
            for device in _selected(args, by_default="all")
        ]
    }


def show_list(answer: dict[str, Any]) -> None:
    rows = [
        [row["device"], row["address"], row["target"] or "", row["jump"] or "", ", ".join(row["groups"])]
        for row in answer["devices"]
    ]
    console.print_table(["device", "address", "target", "jump", "groups"], rows)


def call_status(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.push import status

    return _ask_all(args, "all", lambda device, way: dict(status(way, args.python or device.python, device.store)))


def show_status(answer: dict[str, Any]) -> None:
    rows = []
    for row in answer["devices"]:
        models = row["answer"]["models"] if row["answer"] else []
        running = [f"{model['name']} {model.get('version', '?')} ({model['digest'][:12]})" for model in models]
        state = "reachable" if row["state"] == "done" else row["state"]
        rows.append([row["device"], state, row["error"] or ", ".join(running) or "no models yet"])
    console.print_table(["device", "state", "models"], rows)


def call_rollback(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.push import rollback

    def ask(device: Device, way: Transport) -> dict[str, Any]:
        return {"name": args.name, "digest": rollback(way, args.name, store=device.store)}

    return _ask_all(args, None, ask)


def call_confirm(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.push import confirm

    def ask(device: Device, way: Transport) -> dict[str, Any]:
        return {"name": args.name, "digest": confirm(way, args.name, device.store)}

    return _ask_all(args, None, ask)


def show_releases(answer: dict[str, Any]) -> None:
    for row in answer["devices"]:
        if row["error"]:
            print(f"edge-infer: {row['device']}: {row['state']}: {row['error']}", file=sys.stderr)
        else:
            print(f"{row['device']}: {row['answer']['name']} is {row['answer']['digest'][:12]} now")


def _ask_all(
    args: argparse.Namespace, by_default: str | None, ask: Callable[[Device, Transport], dict[str, Any]]
) -> dict[str, Any]:
    """Ask the selected devices, many at once; one row for each, in the inventory's order."""
    from edge_infer.deploy.fan_out import Work, run_all
    from edge_infer.deploy.rollout import PARALLEL, is_unreachable

    open_way = _way_opener(args)
    devices = _selected(args, by_default)
    addresses = {device.name: device.address for device in devices}

    def work(device: Device) -> Work:
        def ask_one(progress: Callable[[str], None]) -> dict[str, Any]:
            with closing(open_way(device)) as way:
                return ask(device, way)

        return ask_one

    rows: dict[str, dict[str, Any]] = {}
    for event in run_all({device.name: work(device) for device in devices}, args.parallel or PARALLEL):
        if event.error is not None and not isinstance(event.error, EdgeInferError):
            raise event.error
        state = "done" if event.error is None else "unreachable" if is_unreachable(event.error) else "failed"
        error = None if event.error is None else str(event.error).removeprefix(f"{addresses[event.key]}: ")
        rows[event.key] = {"device": event.key, "state": state, "error": error, "answer": event.value}
    failed = any(row["error"] for row in rows.values())
    return {
        "devices": [rows[device.name] for device in devices],
        "exit_status": EXIT_DEVICE if failed else EXIT_DONE,
    }
