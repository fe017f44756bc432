"""``edge-infer targets``: the profiles, or one of them."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from edge_infer.cli import console


def add_command(commands: Any) -> None:
    parser = commands.add_parser("targets", help="list the target profiles, or show one")
    parser.add_argument("name", nargs="?", metavar="NAME|FILE.toml")
    parser.add_argument("--json", action="store_true", help="the same facts for programs, on one line")
    parser.set_defaults(call=call, show=show)


def call(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.target import read_target, target_names

    if args.name:
        profile = read_target(args.name)
        limits = {"ram_limit_bytes": profile.ram_limit_bytes, "storage_limit_bytes": profile.storage_limit_bytes}
        return dataclasses.asdict(profile) | limits
    return {"targets": [dataclasses.asdict(read_target(name)) for name in target_names()]}


def show(answer: dict[str, Any]) -> None:
    if "targets" in answer:
        rows = [
            [row["name"], row["architecture"], console.size(row["ram_bytes"]), _engines(row), row["description"]]
            for row in answer["targets"]
        ]
        console.print_table(["name", "architecture", "memory>", "engines", "description"], rows)
        return
    print(f"{answer['name']}: {answer['description']}")
    print(f"  processor  {answer['architecture']}, {answer['cores']} cores, {' '.join(answer['cpu_features'])}")
    print(
        f"  memory     {console.size(answer['ram_bytes'])} in pages of {answer['page_size_bytes']} B; "
        f"a model may take {answer['model_ram_share']:.0%} = {console.size(answer['ram_limit_bytes'])}"
    )
    print(
        f"  storage    {console.size(answer['storage_bytes'])}; "
        f"a bundle may take {answer['model_storage_share']:.0%} = {console.size(answer['storage_limit_bytes'])}"
    )
    print(f"  python     {answer['python']} or later")
    for engine in answer["engines"]:
        print(
            f"  engine     {engine['format']}: {engine['package']} {engine['version']} "
            f"on {', '.join(engine['providers'])}; "
            f"{' > '.join(engine['precisions'])}"
        )
    for source in answer["sources"]:
        print(f"  source     {source}")


def _engines(row: dict[str, Any]) -> str:
    return ", ".join(engine["format"] for engine in row["engines"])
