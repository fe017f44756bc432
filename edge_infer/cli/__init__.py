"""The host's command line. Each command is a file here: it parses, calls one function, prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from edge_infer import __version__
from edge_infer.errors import EXIT_USAGE
from edge_infer.runtime.cli import add_commands, report

PROGRAM = "edge-infer"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit status that ``edge_infer.errors`` lists."""
    if sys.version_info < (3, 11):
        print(f"{PROGRAM}: the host needs Python 3.11 or later, this is {sys.version.split()[0]}", file=sys.stderr)
        return EXIT_USAGE
    args = _parser().parse_args(argv)
    try:
        return report(args)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; run the same again, it starts over or goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from edge_infer.cli import cache, converters, devices, doctor, fleet, oci, package, provision, targets, trust

    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Package trained models for edge devices, push them over SSH, run them there.",
        epilog="Exit status: 0 done, 1 unexpected, 2 usage, 3 nothing fits the target, 4 bundle damaged or refused, "
        "5 device or connection, 6 conversion failed.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(program=PROGRAM)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    package.add_command(commands)
    targets.add_command(commands)
    converters.add_command(commands)
    cache.add_command(commands)
    add_commands(commands, info_name="inspect")
    devices.add_commands(commands)
    provision.add_command(commands)
    doctor.add_command(commands)
    trust.add_commands(commands)
    fleet.add_command(commands)
    oci.add_commands(commands)
    return parser
