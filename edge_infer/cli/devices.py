"""``edge-infer push | status | history | confirm | rollback | gc``: what happens on devices."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_infer.admission import TIMEOUT_S
from edge_infer.cli import console, fleet
from edge_infer.cli.passphrases import Passphrases
from edge_infer.errors import EXIT_DEVICE, EdgeInferError, UsageError
from edge_infer.runtime.cli import positive
from edge_infer.store import KEEP

_passphrases = Passphrases()


def add_commands(commands: Any) -> None:
    for add in (_add_push, _add_status, _add_history, _add_confirm, _add_rollback, _add_gc):
        parser = add(commands)
        parser.epilog = "DEVICE is local:PATH, user@host[:port] or an alias of ~/.ssh/config."
        parser.add_argument("--store", metavar="FOLDER", help="the device's store (default: ~/.edge-infer there)")
        add_ssh_options(parser)
        parser.add_argument("--json", action="store_true", help="the same facts for programs, on one line")


def _add_push(commands: Any) -> Any:
    push = commands.add_parser("push", help="send a bundle to devices; it serves there once it passed its self-test")
    push.add_argument("bundle", type=Path, metavar="BUNDLE")
    devices = push.add_argument("devices", nargs="+", metavar="DEVICE", help="or with --inventory: more bundles")
    push.add_argument("--dry-run", action="store_true", help="print the steps and take none")
    push.add_argument("--tune", action="store_true", help="measure there how the model runs fastest, and keep that")
    push.add_argument("--self-test-timeout", type=float, default=TIMEOUT_S, metavar="SECONDS")
    push.add_argument(
        "--confirm-within", type=float, metavar="SECONDS",
        help="it serves on trial: the device goes back unless edge_infer.confirm or `confirm` is called in time",
    )  # fmt: skip
    push.add_argument(
        "--health", metavar="COMMAND", help="a shell command there that confirms it by succeeding in time (60 s)"
    )
    push.add_argument(
        "--allow-older", action="store_true", help="a signed bundle of a smaller serial than one that was in use there"
    )
    delta = push.add_mutually_exclusive_group()
    delta.add_argument(
        "--delta", action="store_const", const="all", default="auto",
        help="send what changed since a release that is there of files above 10 MB too, where that is less",
    )  # fmt: skip
    delta.add_argument(
        "--no-delta", dest="delta", action="store_const", const="never", help="send whole files in any case"
    )
    delta.add_argument(
        "--delta-only", dest="delta", action="store_const", const="only", help="refuse where that is not less"
    )
    push.add_argument(
        "--base", type=Path, metavar="BUNDLE", help="the release that is there, where this machine did not push it"
    )
    _add_keep(push)
    _add_python(push)
    _add_wait(push)
    push.add_argument(
        "--sftp",
        action="store_true",
        help="the plain way, where nothing can be run: no self-test, no check of the device",
    )
    push.add_argument("--no-read-back", action="store_true", help="with --sftp: do not read again what was sent")
    fleet.add_push_options(push, instead_of=devices)
    push.set_defaults(call=call_push, show=show_push)
    return push


def _add_status(commands: Any) -> Any:
    status = commands.add_parser("status", help="a device and the models on it")
    status.add_argument("device", metavar="DEVICE")
    _add_python(status)
    status.set_defaults(call=call_status, show=show_status)
    return status


def _add_history(commands: Any) -> Any:
    history = commands.add_parser("history", help="which release of a model came into use when, and which did not")
    _add_model(history)
    history.set_defaults(call=call_history, show=show_history)
    return history


def _add_confirm(commands: Any) -> Any:
    confirm = commands.add_parser("confirm", help="keep a release that is on trial")
    _add_model(confirm)
    _add_wait(confirm)
    confirm.set_defaults(
        call=call_confirm, show=lambda answer: print(f"{answer['name']} stays {answer['digest'][:12]}")
    )
    return confirm


def _add_rollback(commands: Any) -> Any:
    rollback = commands.add_parser("rollback", help="go back to the release before")
    _add_model(rollback)
    rollback.add_argument("--to", metavar="DIGEST", help="an older one that is kept: the beginning of its digest")
    _add_wait(rollback)
    rollback.set_defaults(
        call=call_rollback, show=lambda answer: print(f"{answer['name']} is {answer['digest'][:12]} again")
    )
    return rollback


def _add_gc(commands: Any) -> Any:
    gc = commands.add_parser("gc", help="remove older releases and what interrupted pushes left behind")
    gc.add_argument("device", metavar="DEVICE")
    gc.add_argument("name", nargs="?", metavar="NAME", help="one model (default: all)")
    _add_keep(gc)
    _add_wait(gc)
    gc.set_defaults(call=call_gc, show=lambda answer: print(f"{console.size(answer['freed'])} freed"))
    return gc


def _add_model(parser: Any) -> None:
    parser.add_argument("device", metavar="DEVICE")
    parser.add_argument("name", metavar="NAME", help="the model's name on the device")


def _add_keep(parser: Any) -> None:
    parser.add_argument(
        "--keep",
        type=positive,
        default=KEEP,
        metavar="N",
        help=f"releases of a model that stay (default: {KEEP})",
    )


def _add_python(parser: Any) -> None:
    parser.add_argument("--python", help="the device's Python with edge-infer and an engine")


def _add_wait(parser: Any) -> None:
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="for another push there to end (default: 0)"
    )


def add_ssh_options(parser: Any) -> None:
    """Options of every command that may talk to a device over SSH."""
    parser.add_argument("--ssh-config", type=Path, metavar="FILE", help="instead of ~/.ssh/config")
    parser.add_argument("--known-hosts", type=Path, metavar="FILE", help="instead of ~/.ssh/known_hosts")
    parser.add_argument("--identity", type=Path, metavar="FILE", help="the key to log in with")
    parser.add_argument(
        "--accept-new",
        action="store_true",
        help="trust a host key that is not known yet, and write it to known_hosts; a changed one is still refused",
    )


def ssh_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``open_transport`` takes besides the address. A passphrase is asked for only if somebody can answer."""
    someone = sys.stdin is not None and sys.stdin.isatty() and not args.json
    return {
        "ssh_config": args.ssh_config,
        "known_hosts": args.known_hosts,
        "identity": args.identity,
        "accept_new": args.accept_new,
        "ask_passphrase": _passphrases if someone else None,
        "note": lambda sentence: print(f"{args.program}: {sentence}", file=sys.stderr, flush=True),
    }


def _transport(args: argparse.Namespace, address: str) -> Any:
    from edge_infer.deploy.conversation import open_transport

    return open_transport(address, **ssh_options(args))


def push_options(args: argparse.Namespace) -> Any:
    """What the options of a push ask for. Raises UsageError."""
    from edge_infer.bundle import open_bundle
    from edge_infer.deploy.plan import PushOptions

    return PushOptions(
        python=args.python,
        store=args.store,
        keep=args.keep,
        wait_s=args.wait,
        timeout_s=args.self_test_timeout,
        tune=args.tune,
        confirm_within_s=args.confirm_within,
        health=args.health,
        allow_older=args.allow_older,
        delta=args.delta,
        base=open_bundle(args.base) if args.base else None,
    )


def call_push(args: argparse.Namespace) -> dict[str, Any]:
    """Push to each device in turn; one that fails does not keep the others from theirs."""
    from edge_infer.bundle import open_bundle

    if fleet.is_meant(args):
        return fleet.call_push(args)
    _check_sftp_options(args)
    bundle, options = open_bundle(args.bundle), push_options(args)
    rows = [_push_one(args, bundle, options, address) for address in args.devices]
    failed = any(row.get("error") for row in rows)
    return {
        "name": bundle.manifest.name,
        "dry_run": args.dry_run,
        "devices": rows,
        "exit_status": EXIT_DEVICE if failed else 0,
    }


def _check_sftp_options(args: argparse.Namespace) -> None:
    """Refuse what a push that runs nothing on the device cannot honour."""
    if args.no_read_back and not args.sftp:
        raise UsageError("--no-read-back is for --sftp only: otherwise the device hashes what it received")
    if not args.sftp:
        return
    asked = {
        "--tune": args.tune,
        "--python": args.python is not None,
        "--self-test-timeout": args.self_test_timeout != TIMEOUT_S,
        "--confirm-within": args.confirm_within is not None,
        "--health": args.health is not None,
        "--keep": args.keep != KEEP,
        "--wait": bool(args.wait),
        "--allow-older": args.allow_older,
        "--delta, --no-delta or --delta-only": args.delta != "auto",
        "--base": args.base is not None,
    }
    refused = [option for option, is_asked in asked.items() if is_asked]
    if refused:
        raise UsageError(f"--sftp runs nothing on the device, so it cannot heed {', '.join(refused)}; leave that out")
    here = [address for address in args.devices if address.startswith("local:")]
    if here:
        raise UsageError(f"--sftp is for devices reached over SSH, and {here[0]} is this machine; leave --sftp out")


def _push_one(args: argparse.Namespace, bundle: Any, options: Any, address: str) -> dict[str, Any]:
    from edge_infer.deploy.push import push

    transport = _transport(args, address)
    pushed: Any
    try:
        with console.progress_line() as progress:
            if args.sftp:
                from edge_infer.deploy.sftp import STORE, push_by_sftp

                pushed = push_by_sftp(
                    bundle,
                    transport,
                    store=args.store or STORE,
                    dry_run=args.dry_run,
                    read_back=not args.no_read_back,
                    progress=progress,
                )
            else:
                pushed = push(bundle, transport, options, dry_run=args.dry_run, progress=progress)
    except EdgeInferError as error:
        if error.exit_status != EXIT_DEVICE:  # the bundle or the request is wrong, and so for every device
            raise
        return {"address": address, "error": str(error)}
    finally:
        transport.close()
    return {**dataclasses.asdict(pushed), "steps": [str(step) for step in pushed.steps]}


def show_push(answer: dict[str, Any]) -> None:
    if "counts" in answer:
        fleet.show_push(answer)
        return
    for row in answer["devices"]:
        if row.get("error"):
            place = "" if row["error"].startswith(f"{row['address']}:") else f"{row['address']}: "
            print(f"edge-infer: {place}{row['error']}", file=sys.stderr)
        elif answer["dry_run"]:
            print(f"{row['address']}: would")
            print("\n".join(f"  {step}" for step in row["steps"]))
        elif "not_promised" in row:
            print(
                f"{row['address']}: {answer['name']} is {row['digest'][:12]}{_instead_of(row)}; sent "
                f"{console.size(row['sent_bytes'])} by SFTP, which promises less than an ordinary push:"
            )
            print("\n".join(f"  {missing}" for missing in row["not_promised"]))
        else:
            engine = row["report"]["engine"]
            print(
                f"{row['address']}: {answer['name']} is {row['digest'][:12]}{_instead_of(row)}; sent "
                f"{console.size(row['sent_bytes'])}, self-test passed on {engine['package']} {engine['version']} "
                f"({engine['provider']}){_tuned(row)}{_on_trial(row)}"
            )


def _tuned(pushed: dict[str, Any]) -> str:
    if pushed["tuned"] is None:
        return ""
    return f"; {pushed['tuned']}" if pushed["tuned"].startswith("not tuned") else f"; tuned: {pushed['tuned']}"


def _on_trial(pushed: dict[str, Any]) -> str:
    if pushed["pending_s"] is None:
        return ""
    return f"; on trial: it goes back in {pushed['pending_s']} s unless it is confirmed"


def _instead_of(pushed: dict[str, Any]) -> str:
    if pushed["replaced"] == pushed["digest"]:
        return " as before"
    return f", replacing {pushed['replaced'][:12]}" if pushed["replaced"] else ""


@contextmanager
def open_device(args: argparse.Namespace) -> Iterator[Any]:
    """The way to the device that the command line names."""
    transport = _transport(args, args.device)
    try:
        yield transport
    finally:
        transport.close()


def call_status(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.push import status

    with open_device(args) as device:
        return dict(status(device, args.python, args.store))


def show_status(answer: dict[str, Any]) -> None:
    facts = answer["facts"]
    packages = ", ".join(f"{name} {version}" for name, version in sorted(facts["packages"].items())) or "nothing"
    print(
        f"{facts['architecture']}, {console.size(facts['ram_bytes'])} memory, "
        f"{console.size(facts['free_bytes'])} free; {facts['serving_python']} (Python {facts['python']}) has {packages}"
    )
    rows = [
        [
            row["name"],
            row.get("version", ""),
            row.get("format", row.get("error", "")),
            row.get("precision", ""),
            row["digest"][:12],
            f"on trial, {row['pending_s']} s left" if "pending_s" in row else "",
            ", ".join(digest[:12] for digest in row["previous"]) or "-",
            console.size(row.get("size", 0)),
        ]
        for row in answer["models"]
    ]
    if rows:
        columns = ["model", "version", "format", "precision", "in use", "", "before", "size>"]
        if not any(row[5] for row in rows):  # nothing is on trial
            columns, rows = columns[:5] + columns[6:], [row[:5] + row[6:] for row in rows]
        console.print_table(columns, rows)
    else:
        print("no models yet")


def call_history(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.push import history

    with open_device(args) as device:
        return {"name": args.name, **history(device, args.name, args.store)}


def show_history(answer: dict[str, Any]) -> None:
    rows = [
        [_local_time(row["time"]), row["event"], row["digest"][:12], row.get("who", ""), row.get("reason", "")]
        for row in answer["events"]
    ]
    if rows:
        console.print_table(["device's time", "what", "release", "by", "why"], rows)
    else:
        print(f"nothing happened to {answer['name']} there")


def _local_time(seconds: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "?"


def call_confirm(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.push import confirm

    with open_device(args) as device:
        return {"name": args.name, "digest": confirm(device, args.name, args.store, args.wait)}


def call_rollback(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.push import rollback

    with open_device(args) as device:
        return {"name": args.name, "digest": rollback(device, args.name, args.to, args.store, args.wait)}


def call_gc(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.push import collect

    with open_device(args) as device:
        return {"freed": collect(device, args.name, args.keep, args.store, args.wait)}
