"""``edge-infer provision``: a Python environment with engines on a device that has none, or a newer one."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from edge_infer.admission import TIMEOUT_S
from edge_infer.cli import console
from edge_infer.cli.devices import add_ssh_options, open_device
from edge_infer.errors import UsageError


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "provision",
        help="make a Python environment with engines on a device; it serves there once engines and models were tried",
    )
    parser.add_argument("device", metavar="DEVICE")
    parser.add_argument(
        "--engine", action="append", choices=["tflite", "tflite-runtime", "onnx", "torch"], dest="engines",
        help="may be given several times (default: what the device's environment and models have, else tflite)",
    )  # fmt: skip
    parser.add_argument(
        "--constraint", action="append", metavar="REQUIREMENT", dest="constraints",
        help="a bound on what is chosen, such as 'torch<2.9'; may be given several times",
    )  # fmt: skip
    parser.add_argument("--offline", action="store_true", help="send the wheels: the device asks no package index")
    parser.add_argument(
        "--wheelhouse",
        type=Path,
        metavar="DIR",
        help="where locks and wheels are kept (default: ~/.edge-infer/wheelhouse)",
    )
    parser.add_argument("--upgrade", action="store_true", help="choose the newest wheels anew, though a lock fits")
    parser.add_argument("--python", help="the device's Python to build the environment on (default: python3)")
    parser.add_argument(
        "--replace", action="store_true", help="move aside an environment that was made by hand; a rollback finds it"
    )
    parser.add_argument("--rollback", action="store_true", help="let the environment before serve again")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and take none")
    parser.add_argument("--self-test-timeout", type=float, default=TIMEOUT_S, metavar="SECONDS")
    parser.add_argument("--install-timeout", type=float, default=1800.0, metavar="SECONDS", help="for pip there")
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="for a push there to end (default: 0)"
    )
    parser.epilog = "DEVICE is local:PATH, user@host[:port] or an alias of ~/.ssh/config."
    parser.add_argument("--store", metavar="FOLDER", help="the device's store (default: ~/.edge-infer there)")
    add_ssh_options(parser)
    parser.add_argument("--json", action="store_true", help="the same facts for programs, on one line")
    parser.set_defaults(call=call, show=show)


def call(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.provision import ProvisionOptions, provision, switch_back

    made = (args.engines, args.constraints, args.offline, args.upgrade, args.python, args.replace, args.dry_run)
    if args.rollback and any(made):
        raise UsageError("--rollback makes no environment; leave out what says which one to make, or --rollback")
    with open_device(args) as device:
        if args.rollback:
            told = switch_back(device, args.store, args.self_test_timeout, args.wait)
            return {"address": args.device, "rollback": True, **told}
        options = ProvisionOptions(
            engines=tuple(args.engines or ()),
            constraints=tuple(args.constraints or ()),
            offline=args.offline,
            wheelhouse=args.wheelhouse,
            upgrade=args.upgrade,
            python=args.python,
            store=args.store,
            replace=args.replace,
            wait_s=args.wait,
            timeout_s=args.self_test_timeout,
            install_s=args.install_timeout,
        )
        with console.progress_line() as progress:
            done = provision(device, options, dry_run=args.dry_run, progress=progress)
    row = {**dataclasses.asdict(done), "steps": [str(step) for step in done.steps]}
    return {**row, "rollback": False, "dry_run": args.dry_run}


def show(answer: dict[str, Any]) -> None:
    address, name = answer["address"], answer["environment"]
    if answer.get("dry_run"):
        print(f"{address}: {answer['platform']}; would")
        print("\n".join(f"  {step}" for step in answer["steps"]))
        return
    instead = f", replacing {answer['replaced']}" if answer["replaced"] not in (None, name) else ""
    again = " again" if answer["rollback"] else ""
    print(f"{address}: environment {name} serves{again}{instead}{_sent(answer)}")
    print("  " + ", ".join(f"{package} {version}" for package, version in sorted(answer["packages"].items())))
    for row in answer["models"]:
        print(
            f"  {row['name']} answers its golden questions" if row["answers"] else f"  {row['name']}: {row['reason']}"
        )


def _sent(answer: dict[str, Any]) -> str:
    return "" if answer["rollback"] else f"; sent {console.size(answer['sent_bytes'])}"
