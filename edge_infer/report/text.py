"""The candidates of a report as a table for a terminal."""

from __future__ import annotations

from edge_infer.report import facts, units
from edge_infer.report.facts import Record
from edge_infer.report.markup import clean


def table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Column titles (a trailing ``>`` aligns right) and one row a candidate, the chosen one marked and all in order.

    A column in which nothing was measured is left out. Control characters in names cannot reach the terminal.
    """
    titles = ["candidate", "", "size>", "memory>", "load>", "latency>", "score>", "interval", "reason"]
    rows = [_row(record, item) for item in record.get("candidates") or []]
    used = [
        index for index, title in enumerate(titles) if title == "candidate" or any(_says(row[index]) for row in rows)
    ]
    return [titles[index] for index in used], [[row[index] for index in used] for row in rows]


def summary(record: Record) -> str:
    """The verdict in a few sentences, on one line."""
    verdict = facts.verdict(record)
    return _plain(" ".join((verdict.headline, *verdict.more)))


def notes(record: Record) -> list[str]:
    """Sentences on where, how long and under which conditions candidates were timed."""
    return [_plain(note) for note in facts.timing_notes(record)]


def _row(record: Record, item: Record) -> list[str]:
    final = facts.final_score(item)
    answer, samples = final or ({}, "")
    metric = record.get("metric")
    of = units.interval(answer, metric)
    cells = [
        item.get("id"),
        item.get("status"),
        units.size(item.get("size_bytes")),
        units.size(item.get("peak_bytes")),
        units.duration(item.get("load_ms")),
        units.duration(item.get("p50_ms")),
        units.score(answer.get("value"), metric),
        f"{of} ({samples})" if of else "",
        item.get("reason") or "",
    ]
    return [_plain(cell) for cell in cells]


def _says(cell: str) -> bool:
    return cell not in ("", units.NOTHING)


def _plain(cell: object) -> str:
    return clean("" if cell is None else cell).replace("\u00a0", " ").replace("\n", " ").replace("\t", " ")
