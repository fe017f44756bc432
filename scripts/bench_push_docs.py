"""The tables of scripts/bench_push.py: printed, and put into docs/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pages import between, markdown

from edge_infer.cli.console import print_table

DOCS = Path(__file__).resolve().parent.parent / "docs"
Report = dict[str, Any]
Row = list[str]

COLUMNS = ["case", "round trip", "way", "seconds>", "MB/s>", "sync after>", "its time / ours>", "/ our transfer>"]
GOAL_COLUMNS = ["goal", "round trip", "ours>", "theirs>", "ours / theirs>", "at most>"]


def table(report: Report) -> list[Row]:
    """Rows for COLUMNS; ours is there twice, as a whole and as the transfer alone."""
    rows = []
    for case, trips in report["results"].items():
        megabytes = report["sizes"][case] / 1e6
        for ms, ways in trips.items():
            ours = ways["edge_infer"]
            first = [case, f"{ms} ms"]
            if case != "again":
                rows.append([*first, "edge_infer, transfer", *seconds(ours["transfer_s"], megabytes), "", "", ""])
                first = ["", ""]
            for way, figures in ways.items():
                name = "edge_infer, whole" if way == "edge_infer" else way
                ratios = ["", ""] if way == "edge_infer" else against(figures, ours, case)
                speed = seconds(figures["whole_s"], None if case == "again" else megabytes)
                rows.append([*first, name, *speed, f"{figures['sync_s']:.2f}", *ratios])
                first = ["", ""]
    return rows


def seconds(value: float, megabytes: float | None) -> Row:
    return [f"{value:.2f}", f"{megabytes / value:.1f}" if megabytes else ""]


def against(figures: dict[str, float], ours: dict[str, float], case: str) -> Row:
    whole = f"{figures['whole_s'] / ours['whole_s']:.2f}x"
    return [whole, "" if case == "again" else f"{figures['whole_s'] / ours['transfer_s']:.2f}x"]


#: (what is compared, case, round trips in ms, our figure, the peer, the greatest ratio)
GOALS = (
    ("transfer of 100 MB beside rsync -W", "100 MB", ("0", "40", "200"), "transfer_s", "rsync", 1.0),
    ("whole push of 100 MB beside rsync -W", "100 MB", ("0", "40", "200"), "whole_s", "rsync", 1.0),
    ("whole push of 200 files beside SFTP", "200 files", ("40",), "whole_s", "SFTP", 0.2),
)


def goals(report: Report) -> list[Row]:
    """Rows for GOAL_COLUMNS; what misses its goal is marked."""
    rows = []
    for what, case, trips, figure, peer, most in GOALS:
        for ms in trips:
            ways = report["results"].get(case, {}).get(ms)
            if ways is None:
                continue
            ours, theirs = ways["edge_infer"][figure], ways[peer]["whole_s"]
            ratio = f"{ours / theirs:.2f}{'' if ours <= most * theirs else ' (missed)'}"
            rows.append([what, f"{ms} ms", f"{ours:.2f} s", f"{theirs:.2f} s", ratio, f"{most:g}"])
    return rows


TABLES = {"goals": (GOAL_COLUMNS, goals), "table": (COLUMNS, table)}


def show(report: Report) -> None:
    for columns, rows in TABLES.values():
        print_table(columns, rows(report))
        print()


def around(report: Report) -> str:
    """The sentence on machine and versions."""
    facts = report["surroundings"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    machine = f"{facts['processor']}, {facts['cores']} cores, which are host, link and device at once"
    return f"{machine}; Python {facts['python']}, {versions}; medians of {facts['runs']} runs in turn."


def filled(page: str, report: Report) -> str:
    """The page with its tables as the report has them."""
    page = between(page, "machine", [around(report)])
    for name, (columns, rows) in TABLES.items():
        page = between(page, name, markdown(columns, rows(report)))
    return page


def write(report: Report) -> None:
    """docs/push.json and the tables of push-benchmark.md."""
    (DOCS / "push.json").write_text(json.dumps(report, indent=1) + "\n")
    page = DOCS / "push-benchmark.md"
    page.write_text(filled(page.read_text(), report))
