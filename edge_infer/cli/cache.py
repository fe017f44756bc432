"""``edge-infer cache``: what packaging and pushing keep, so that the same work is not done or sent twice."""

from __future__ import annotations

import argparse
from typing import Any

from edge_infer.cli import console
from edge_infer.cli.options import byte_count


def add_command(commands: Any) -> None:
    parser = commands.add_parser("cache", help="what packaging and pushing keep: show, or make smaller")
    parser.add_argument(
        "--trim",
        metavar="SIZE",
        help="remove what was not used for longest until SIZE is left (such as 500MB; 0 removes all)",
    )
    parser.add_argument("--json", action="store_true", help="the same facts for programs, on one line")
    parser.set_defaults(call=call, show=show)


def call(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer import steps
    from edge_infer.deploy import bases

    root = steps.cache_root()
    pushed = bases.Bases(bases.bases_root())
    removed = 0
    if args.trim is not None:
        removed = steps.remove_oldest([*steps.folders(root), *pushed.entries()], byte_count(args.trim))
    found = steps.usage(root)
    return {
        "path": str(root),
        "steps": found.steps,
        "size": found.size,
        "removed": removed,
        "most": steps.MAX_BYTES,
        "pushed": {"path": str(pushed.root), "size": steps.size_of(pushed.entries()), "most": pushed.most},
    }


def show(answer: dict[str, Any]) -> None:
    if answer["removed"]:
        print(f"removed {console.size(answer['removed'])}")
    print(
        f"{answer['path']}: {answer['steps']} steps, {console.size(answer['size'])} "
        f"of at most {console.size(answer['most'])}"
    )
    pushed = answer["pushed"]
    print(
        f"{pushed['path']}: pushed releases, {console.size(pushed['size'])} of at most {console.size(pushed['most'])}"
    )
