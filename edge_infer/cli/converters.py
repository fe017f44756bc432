"""``edge-infer converters``: what runs in an environment of its own; list, install, remove."""

from __future__ import annotations

import argparse
from typing import Any

from edge_infer.cli import console


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "converters", help="list, install or remove converters with an environment of their own"
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for action, words, call, show in (
        ("list", "what there is and what is installed", call_list, show_list),
        ("install", "install one, into a folder of its own", call_install, show_install),
        ("remove", "remove one, with what older versions left", call_remove, show_remove),
    ):
        one = actions.add_parser(action, help=words)
        if action != "list":
            one.add_argument("name", metavar="NAME")
        one.add_argument("--json", action="store_true", help="the same facts for programs, on one line")
        one.set_defaults(call=call, show=show)


def call_list(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.convert import environments

    there = environments.installed()
    rows = []
    for name in environments.names():
        lock = environments.locks_of(name)[0]
        row = next((row for row in there if row["name"] == name and row["current"]), None)
        facts = {"version": environments.version_of(name), "does": lock.does, "takes": lock.takes}
        rows.append({"name": name, **facts, "installed": row})
    return {"converters": rows, "older": [row for row in there if not row["current"]]}


def show_list(answer: dict[str, Any]) -> None:
    rows = [[row["name"], row["version"], row["does"], _state(row)] for row in answer["converters"]]
    console.print_table(["name", "version", "does", "state"], rows)
    for row in answer["older"]:
        print(f"of another version: {row['path']}, {console.size(row['bytes'])}")


def _state(row: dict[str, Any]) -> str:
    there = row["installed"]
    if there:
        return f"installed, {console.size(there['bytes'])}, Python {there['python']}"
    return f"edge-infer converters install {row['name']}: {row['takes']}"


def call_install(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.convert import environments

    with console.progress_line() as progress:
        folder = environments.install(args.name, progress)
    return {"name": args.name, "path": str(folder)}


def show_install(answer: dict[str, Any]) -> None:
    print(f"installed {answer['name']} in {answer['path']}")


def call_remove(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.convert import environments

    return {"name": args.name, "freed_bytes": environments.remove(args.name)}


def show_remove(answer: dict[str, Any]) -> None:
    print(f"removed {answer['name']}: {console.size(answer['freed_bytes'])} freed")
