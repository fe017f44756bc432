"""``edge-infer export | import``: bundles in an OCI image layout and out of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    out = commands.add_parser("export", help="put bundles into an OCI image layout, for registries and content stores")
    out.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    out.add_argument("--tag", help="instead of NAME:VERSION-TARGET, for one bundle")
    out.set_defaults(call=call_export, show=show_export)
    back = commands.add_parser("import", help="take a bundle out of an OCI image layout")
    back.add_argument("name", metavar="NAME", help="its tag or its OCI digest")
    back.add_argument("-o", "--output", type=Path, required=True, metavar="PATH.edge")
    back.set_defaults(call=call_import, show=lambda answer: print(f"{answer['path']} is {answer['digest'][:12]}"))
    for parser in (out, back):
        parser.add_argument("--oci", type=Path, required=True, metavar="DIR", help="the image layout's folder")
        parser.add_argument("--json", action="store_true", help="the same facts for programs, on one line")


def call_export(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.bundle import open_bundle
    from edge_infer.errors import UsageError
    from edge_infer.oci import export, tag_of

    if args.tag and len(args.bundles) > 1:
        raise UsageError(
            f"--tag {args.tag} names one bundle, and {len(args.bundles)} are given; export them one by one"
        )
    rows = []
    for bundle in map(open_bundle, args.bundles):
        oci_digest = export(bundle, args.oci, args.tag)
        rows.append({"tag": args.tag or tag_of(bundle.manifest), "oci_digest": oci_digest, "digest": bundle.digest})
    return {"layout": str(args.oci), "bundles": rows}


def show_export(answer: dict[str, Any]) -> None:
    for row in answer["bundles"]:
        print(f"{answer['layout']}: {row['tag']} is {row['oci_digest']}, the bundle {row['digest'][:12]}")


def call_import(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.oci import import_bundle

    bundle = import_bundle(args.oci, args.name, args.output)
    return {"path": str(bundle.path), "digest": bundle.digest}
