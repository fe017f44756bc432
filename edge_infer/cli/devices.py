"""``edge-infer push | status | rollback``: what happens on devices."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from edge_infer.cli import console
from edge_infer.errors import EXIT_DEVICE, EdgeInferError


def add_commands(commands: Any) -> None:
    push = commands.add_parser("push", help="send a bundle to devices; it serves there once it passed its self-test")
    push.add_argument("bundle", type=Path, metavar="BUNDLE")
    push.add_argument("devices", nargs="+", metavar="DEVICE")
    push.add_argument("--dry-run", action="store_true", help="print the steps and take none")
    push.add_argument("--tune", action="store_true", help="measure there how the model runs fastest, and keep that")
    push.add_argument("--self-test-timeout", type=float, default=120.0, metavar="SECONDS")
    push.set_defaults(call=call_push, show=show_push)
    status = commands.add_parser("status", help="a device and the models on it")
    status.add_argument("device", metavar="DEVICE")
    status.set_defaults(call=call_status, show=show_status)
    rollback = commands.add_parser("rollback", help="go back to the release before")
    rollback.add_argument("device", metavar="DEVICE")
    rollback.add_argument("name", metavar="NAME", help="the model's name on the device")
    rollback.set_defaults(
        call=call_rollback, show=lambda answer: print(f"{answer['name']} is {answer['digest'][:12]} again")
    )
    for parser in (push, status, rollback):
        parser.epilog = "DEVICE is local:PATH, user@host[:port] or an alias of ~/.ssh/config."
        if parser is not rollback:
            parser.add_argument("--python", help="the device's Python with edge-infer and an engine")
        add_ssh_options(parser)
        parser.add_argument("--json", action="store_true", help="the same facts for programs, on one line")


def add_ssh_options(parser: Any) -> None:
    """Options of every command that may talk to a device over SSH."""
    parser.add_argument("--ssh-config", type=Path, metavar="FILE", help="instead of ~/.ssh/config")
    parser.add_argument("--known-hosts", type=Path, metavar="FILE", help="instead of ~/.ssh/known_hosts")
    parser.add_argument("--identity", type=Path, metavar="FILE", help="the key to log in with")


def ssh_options(args: argparse.Namespace) -> dict[str, Path | None]:
    """What ``open_transport`` takes besides the address."""
    return {"ssh_config": args.ssh_config, "known_hosts": args.known_hosts, "identity": args.identity}


def _transport(args: argparse.Namespace, address: str) -> Any:
    from edge_infer.deploy.conversation import open_transport

    return open_transport(address, **ssh_options(args))


def call_push(args: argparse.Namespace) -> dict[str, Any]:
    """Push to each device in turn; one that fails does not keep the others from theirs."""
    from edge_infer.bundle import open_bundle

    bundle = open_bundle(args.bundle)
    rows = [_push_one(args, bundle, address) for address in args.devices]
    failed = any(row.get("error") for row in rows)
    return {
        "name": bundle.manifest.name,
        "dry_run": args.dry_run,
        "devices": rows,
        "exit_status": EXIT_DEVICE if failed else 0,
    }


def _push_one(args: argparse.Namespace, bundle: Any, address: str) -> dict[str, Any]:
    from edge_infer.deploy.push import push

    transport = _transport(args, address)
    try:
        with console.progress_line() as progress:
            pushed = push(
                bundle,
                transport,
                python=args.python,
                dry_run=args.dry_run,
                tune=args.tune,
                timeout_s=args.self_test_timeout,
                progress=progress,
            )
    except EdgeInferError as error:
        if error.exit_status != EXIT_DEVICE:  # the bundle or the request is wrong, and so for every device
            raise
        return {"address": address, "error": str(error)}
    finally:
        transport.close()
    return {**dataclasses.asdict(pushed), "steps": [str(step) for step in pushed.steps]}


def show_push(answer: dict[str, Any]) -> None:
    for row in answer["devices"]:
        if row.get("error"):
            place = "" if row["error"].startswith(f"{row['address']}:") else f"{row['address']}: "
            print(f"edge-infer: {place}{row['error']}", file=sys.stderr)
        elif answer["dry_run"]:
            print(f"{row['address']}: would")
            print("\n".join(f"  {step}" for step in row["steps"]))
        else:
            engine = row["report"]["engine"]
            print(
                f"{row['address']}: {answer['name']} is {row['digest'][:12]}{_instead_of(row)}; sent "
                f"{console.size(row['sent_bytes'])}, self-test passed on {engine['package']} {engine['version']} "
                f"({engine['provider']}){_tuned(row)}"
            )


def _tuned(pushed: dict[str, Any]) -> str:
    if pushed["tuned"] is None:
        return ""
    return f"; {pushed['tuned']}" if pushed["tuned"].startswith("not tuned") else f"; tuned: {pushed['tuned']}"


def _instead_of(pushed: dict[str, Any]) -> str:
    if pushed["replaced"] == pushed["digest"]:
        return " as before"
    return f", replacing {pushed['replaced'][:12]}" if pushed["replaced"] else ""


def call_status(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.push import status

    transport = _transport(args, args.device)
    try:
        return dict(status(transport, args.python))
    finally:
        transport.close()


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
            ", ".join(digest[:12] for digest in row["previous"]) or "-",
            console.size(row.get("size", 0)),
        ]
        for row in answer["models"]
    ]
    if rows:
        console.print_table(["model", "version", "format", "precision", "in use", "before", "size>"], rows)
    else:
        print("no models yet")


def call_rollback(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.push import rollback

    transport = _transport(args, args.device)
    try:
        return {"name": args.name, "digest": rollback(transport, args.name)}
    finally:
        transport.close()
