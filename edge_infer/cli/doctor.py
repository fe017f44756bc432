"""``edge-infer doctor``: what is there, what is missing, and the command that mends it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from edge_infer.admission import TIMEOUT_S
from edge_infer.cli.devices import add_ssh_options, open_device
from edge_infer.errors import EXIT_DEVICE, EXIT_UNEXPECTED


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor", help="what is there, what is missing and the command that mends it: here, or on a device"
    )
    parser.add_argument("device", nargs="?", metavar="DEVICE", help="default: this machine")
    parser.add_argument("--python", help="the device's Python with edge-infer and an engine")
    parser.add_argument("--self-test-timeout", type=float, default=TIMEOUT_S, metavar="SECONDS")
    parser.epilog = (
        "DEVICE is local:PATH, user@host[:port] or an alias of ~/.ssh/config. "
        "Exit status: 0 nothing is wrong, 1 something is wrong here, 5 on the device."
    )
    parser.add_argument("--store", metavar="FOLDER", help="the device's store (default: ~/.edge-infer there)")
    add_ssh_options(parser)
    parser.add_argument("--json", action="store_true", help="the same facts for programs, on one line")
    parser.set_defaults(call=call, show=show)


def call(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy import doctor

    if args.device is None:
        lines = doctor.examine_host()
    else:
        with open_device(args) as device:
            lines = doctor.examine_device(device, args.python, args.store, args.self_test_timeout)
    status = EXIT_UNEXPECTED if args.device is None else EXIT_DEVICE
    return {
        "device": args.device,
        "lines": [dataclasses.asdict(line) for line in lines],
        "exit_status": 0 if doctor.is_well(lines) else status,
    }


def show(answer: dict[str, Any]) -> None:
    """Plain lines: what would draw a table may be what is missing."""
    width = max(len(row["topic"]) for row in answer["lines"])
    for row in answer["lines"]:
        print(f"{row['state']:8}{row['topic']:{width}}  {row['text']}")
        if row["mend"]:
            print(f"{'':8}{'':{width}}  mend: {row['mend']}")
