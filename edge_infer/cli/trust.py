"""``edge-infer sign | trust``: who made a bundle, and whom a device believes."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from edge_infer.cli import console
from edge_infer.cli.devices import add_ssh_options, ssh_options
from edge_infer.errors import UsageError
from edge_infer.manifest import FORMATS


def add_commands(commands: Any) -> None:
    sign = commands.add_parser("sign", help="sign a bundle with an SSH key, or check who did")
    sign.add_argument("bundle", type=Path, metavar="BUNDLE")
    sign.add_argument("--key", type=Path, metavar="FILE", help="a private key, or FILE.pub of a key in your agent")
    sign.add_argument("--serial", type=int, metavar="N", help="grows from each bundle to the next (default: the time)")
    sign.add_argument(
        "--allowed-signers", type=Path, metavar="FILE", help="check: would a device that has this take it"
    )
    sign.add_argument("--revoked-keys", type=Path, metavar="FILE", help="and this")
    sign.set_defaults(call=call_sign, show=show_sign)
    trust = commands.add_parser("trust", help="who may sign what a device runs: show or change it")
    trust.add_argument("device", metavar="DEVICE")
    verb = trust.add_mutually_exclusive_group()
    verb.add_argument("--allowed-signers", type=Path, metavar="FILE", help="the device's whole list is this now")
    verb.add_argument("--key", type=Path, metavar="FILE.pub", help="one more; needs --principal")
    verb.add_argument("--remove", metavar="FINGERPRINT|PRINCIPAL", help="one less")
    verb.add_argument("--revoke", type=Path, metavar="FILE.pub", help="counts no more, in whatever list or certificate")
    verb.add_argument("--clear", action="store_true", help="no list: the device takes what is not signed")
    trust.add_argument("--principal", metavar="NAME", help="whose key it is, such as anna@example.com")
    trust.add_argument("--authority", action="store_true", help="the key signs certificates of those who sign")
    trust.add_argument("--format", choices=FORMATS, help="a list for this format only")
    trust.add_argument("--force", action="store_true", help="even if a model in use would not load any more")
    trust.epilog = "DEVICE is local:PATH, user@host[:port] or an alias of ~/.ssh/config."
    trust.add_argument("--store", metavar="FOLDER", help="the device's store (default: ~/.edge-infer there)")
    add_ssh_options(trust)
    trust.set_defaults(call=call_trust, show=show_trust)
    for parser in (sign, trust):
        parser.add_argument("--json", action="store_true", help="the same facts for programs, on one line")


def call_sign(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.bundle import open_bundle
    from edge_infer.deploy import signing
    from edge_infer.trust import parse_signature, read_signature

    if not args.key and not args.allowed_signers:
        raise UsageError("expected --key FILE to sign with, or --allowed-signers FILE to check against")
    if (args.serial is not None and not args.key) or (args.revoked_keys and not args.allowed_signers):
        raise UsageError("--serial belongs to --key, --revoked-keys to --allowed-signers")
    bundle = open_bundle(args.bundle)
    key = signing.sign(bundle, args.key, args.serial) if args.key else None
    signed = signing.check(bundle, args.allowed_signers, args.revoked_keys) if args.allowed_signers else None
    statement, _ = parse_signature(read_signature(bundle.path) or b"")
    return {
        "name": statement.name,
        "digest": statement.digest,
        "serial": statement.serial,
        "time": statement.time,
        "key": signed.key if signed else key,
        "principal": signed.principal if signed else None,
    }


def show_sign(answer: dict[str, Any]) -> None:
    by = f" by {answer['principal']}" if answer["principal"] else ""
    print(f"{answer['name']} {answer['digest'][:12]} is signed{by}: serial {answer['serial']}, key {answer['key']}")


def call_trust(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.deploy.conversation import open_transport
    from edge_infer.deploy.signing import change_signers

    verb, text = _request(args)
    with contextlib.closing(open_transport(args.device, **ssh_options(args))) as transport:
        return dict(change_signers(transport, verb, text, args.format, args.force, args.store))


def _request(args: argparse.Namespace) -> tuple[str, str | None]:
    """What is asked of the device. Raises UsageError for options that would not be heeded."""
    from edge_infer.deploy import signing

    if bool(args.key) != bool(args.principal) or (args.authority and not args.key):
        raise UsageError("--key, --principal and --authority belong together: whose key it is, or whose certificates")
    if args.revoke and args.format:
        raise UsageError("--revoke is for all formats, expected no --format beside it")
    if args.allowed_signers:
        return "set", signing.signers_text(args.allowed_signers)
    if args.key:
        return "add", signing.signer_line(args.key, args.principal, args.authority)
    if args.remove:
        return "remove", args.remove
    if args.revoke:
        return "revoke", signing.public_key(args.revoke)
    return ("clear", None) if args.clear else ("show", None)


def show_trust(answer: dict[str, Any]) -> None:
    for file in answer["signers"]:
        print(f"{file['path']} says who may sign {file['format'] or 'what has no list of its own'}")
        for row in file["keys"] or ():
            print("  " + "  ".join(row[part] for part in ("principals", "options", "key", "comment") if row[part]))
        if not file["keys"]:
            print("  nobody")
    if not answer["signers"]:
        print("this device asks for no signature")
    for row in answer["revoked"]:
        print(f"revoked: {row['key']}")
    for line in answer["oldest"]:
        print(f"none older than: {line}")
    if answer["models"]:
        rows = [[row["name"], row["digest"][:12], row["refused"] or row["signed"] or "-"] for row in answer["models"]]
        console.print_table(["in use", "digest", "signed by"], rows)
