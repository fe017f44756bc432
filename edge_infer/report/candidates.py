"""The candidates: the table of all with what became of each, and the plots of their trade-offs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edge_infer.report import facts, scatter, units
from edge_infer.report.blocks import figure_of, scrolled, section, table
from edge_infer.report.facts import Record
from edge_infer.report.markup import Markup, element

_MARKS = {"chosen": "◆", "fits": "○", "dropped": "✕"}
_SAMPLES = {"search": "search", "holdout": "held-out"}


def candidates(record: Record) -> Markup | None:
    items = record.get("candidates") or []
    if not items:
        return None
    columns = _candidate_columns(record, items)
    head = [title for title, _, _ in columns]
    body = [
        element(
            "tr",
            [_cell(at, title, *cell(item), numeric=numeric) for at, (title, numeric, cell) in enumerate(columns)],
            cls=_status(item),
        )
        for item in items
    ]
    numbers = [at for at, (_, numeric, _) in enumerate(columns) if numeric]
    states = [_status(item) for item in items]
    counted = ", ".join(f"{states.count(state)} {words}" for state, words in _counted(states) if state in states)
    caption = f"{units.count(len(items), 'candidate')}: {counted}."
    notes = facts.timing_notes(record)
    note = element("p", " ".join(notes), cls="note") if notes else None
    return section(
        "candidates",
        "Candidates",
        scrolled("Candidates", table(caption, head, body, "cards sortable", numbers)),
        note,
    )


def _counted(states: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return ("chosen", "chosen"), ("fits", "more fit" if "chosen" in states else "fit"), ("dropped", "dropped")


_Cell = tuple[Any, Any]
_Column = tuple[str, bool, Callable[[Record], _Cell]]


def _candidate_columns(record: Record, items: Sequence[Record]) -> list[_Column]:
    """Title, whether numeric, and the cell with its sort key; columns without any figure are left out."""
    metric = record.get("metric") or {}
    columns: list[_Column] = [("Candidate", False, _who), ("Verdict and why", False, _verdict_cell)]

    def add(title: str, key: str, show: Callable[[Any], str], second: str | None = None, word: str = "") -> None:
        if any(units.is_number(item.get(key)) for item in items):
            columns.append((title, True, lambda item: _figure_cell(item, key, show, second, word)))

    add("Size", "size_bytes", units.size, "download_bytes", "compressed")
    add("Memory at peak", "peak_bytes", units.size, "private_bytes", "private")
    add("Load time", "load_ms", units.duration)
    add("Latency", "p50_ms", units.duration, "p95_ms", "p95")

    def add_score(title: str, key: str, lost: str | None = None) -> None:
        answers = [item[key] for item in items if item.get(key)]
        counts = {answer.get("count") for answer in answers}
        if answers:
            on = f" ({units.count(counts.pop(), 'sample')})" if len(counts) == 1 and counts != {None} else ""
            columns.append((title + on, True, lambda item: _score_cell(item, key, metric, not on, lost)))

    add_score("Score, search", "search")
    add_score("Score, held out", "holdout", "loss")
    if any(units.is_number(item.get("sparsity")) and item["sparsity"] > 0 for item in items):
        columns.append(("Weights zero", True, lambda item: (units.share(item.get("sparsity")), item.get("sparsity"))))
    return columns


def _cell(at: int, title: str, content: Any, key: Any, numeric: bool) -> Markup:
    if at == 0:
        return element("th", content, scope="row", data_sort=key)
    sort = key if key is None or isinstance(key, str) else repr(key)
    return element("td", content, cls="number" if numeric else "why", data_label=title, data_sort=sort)


def _status(item: Record) -> str:
    status = item.get("status")
    return status if status in _MARKS else "dropped"


def _who(item: Record) -> _Cell:
    route = " → ".join(str(step) for step in item.get("route") or [])
    kept = item.get("kept_float")
    smalls = [element("small", route) if route else None, _kept(kept) if kept else None]
    return [item.get("id"), smalls], str(item.get("id"))


def _verdict_cell(item: Record) -> _Cell:
    status = _status(item)
    mark = element("span", _MARKS[status], aria_hidden="true", cls="mark-sign")
    front = element("span", " on the front", cls="on-front") if item.get("pareto") else None
    reason = element("div", item["reason"], cls="reason") if item.get("reason") else None
    order = ("chosen", "fits", "dropped").index(status) * 2 + (not item.get("pareto"))
    return [element("span", mark, status, cls="status"), front, reason], order


def _figure_cell(item: Record, key: str, show: Callable[[Any], str], second: str | None, word: str) -> _Cell:
    has_second = second is not None and units.is_number(item.get(second))
    small = element("small", f"{show(item[second])} {word}") if second and has_second else None
    value = item.get(key)
    return [show(value), small], value if units.is_number(value) else None


def _score_cell(item: Record, key: str, metric: Record, counted: bool, lost: str | None) -> _Cell:
    """A score with its interval and, where it is the field ``lost``, what it is less than the source's."""
    answer = item.get(key) or {}
    value = answer.get("value")
    on = units.count(answer["count"], "sample") if counted and units.is_number(answer.get("count")) else ""
    less = units.loss(item.get(lost)) if lost else ""
    parts = (units.interval(answer, metric), on, f"loss {less}" if less else "")
    smalls = [element("small", part) for part in parts if part]
    return [units.score(value, metric), smalls], value if units.is_number(value) else None


def _kept(kept: Record) -> Markup:
    names = [str(name) for name in kept.get("layers") or []]
    share = kept.get("share_of_weights")
    of = f", {units.share(share)} of the weights" if units.is_number(share) else ""
    return element("small", f"◇ {units.count(len(names), 'layer')} in float{of}", title=", ".join(names) or None)


def tradeoffs(record: Record) -> Markup | None:
    """Size and latency against the score, as far as they were measured."""
    axes = (("size_bytes", "size", "bytes"), ("p50_ms", "latency", "ms"))
    found = [drawing for drawing in (_tradeoff(record, *axis) for axis in axes) if drawing]
    if not found:
        return None
    samples, items = max((scatter.plotted(record, figure) for figure, _, _ in axes), key=lambda both: len(both[1]))
    better = "higher" if facts.higher_is_better(record) else "lower"
    says = f"Further left and {better} is better. Scores are of the {_SAMPLES[samples]} samples"
    if any(item[samples].get("low") is not None for item in items):
        says += "; whiskers are their intervals"
    if any('class="front"' in drawing for drawing in found):
        says += "; stairs join the front"
    if any(item.get("emulated") for item in items):
        says += "; latency is that of an emulated machine"
    return section(
        "tradeoffs",
        "Size and speed against score",
        element("p", f"{says}.", cls="note"),
        _key(items),
        element("div", found, cls="pair"),
    )


def _tradeoff(record: Record, figure: str, what: str, unit: str) -> Markup | None:
    return figure_of(lambda name, width: scatter.draw(record, figure, what, unit, name, width), f"plot-{what}", 540)


def _key(items: Sequence[Record]) -> Markup:
    """The meaning of the marks that occur."""
    occurring = {(_status(item), bool(item.get("pareto")) and _status(item) != "chosen") for item in items}
    entries = [
        element(
            "li",
            scatter.legend_mark({"status": status, "pareto": front}),
            f"{status}, on the front" if front else status,
        )
        for status in ("chosen", "fits", "dropped")
        for front in (True, False)
        if (status, front) in occurring
    ]
    return element("ul", entries, cls="legend")
