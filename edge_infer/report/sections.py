"""The parts of the page, each from the record; None where the record has nothing for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edge_infer.report import facts, plots, units
from edge_infer.report.blocks import NARROW, figure_of, pairs, plain_value, scrolled, section, sort, spaced, table
from edge_infer.report.facts import Record
from edge_infer.report.markup import Markup, element, join

#: A table longer than this scrolls in its own frame.
LONG = 30
#: Outputs whose histograms are shown at once.
MANY_OUTPUTS = 6


# -------------------------------------------------------------------------------------------------- verdict


def verdict(record: Record) -> Markup:
    says = facts.verdict(record)
    sign = {"chosen": "✓", "nothing-fits": "✕", "open": "?"}[says.state]
    item = facts.shown(record)
    nearest = (
        element("p", f"The figures of the nearest, {item['id']}:", cls="note")
        if item and says.state != "chosen"
        else None
    )
    return element(
        "section",
        element("h2", element("span", sign, cls="sign", aria_hidden="true"), says.headline, id="verdict-title"),
        element("p", " ".join(says.more)) if says.more else None,
        nearest,
        figures(record, item) if item else None,
        id="verdict",
        cls=f"verdict {says.state}",
        aria_labelledby="verdict-title",
    )


def figures(record: Record, item: Record) -> Markup | None:
    """The candidate's key figures, each with its limit and what float32 has."""
    tiles = [
        _tile(record, item, label, key, show, limit)
        for label, key, show, limit in (
            ("size", "size_bytes", units.size, "size"),
            ("latency", "p50_ms", units.duration, "latency"),
            ("memory at peak", "peak_bytes", units.size, "memory"),
            ("load time", "load_ms", units.duration, "load time"),
        )
    ]
    tiles.insert(0, _score_tile(record, item))
    found = [tile for tile in tiles if tile]
    measured = item.get("measured_on")
    note = element("p", f"Time and memory: {measured}.", cls="note") if measured else None
    return join([element("dl", found, cls="figures"), note]) if found else None


def _tile(
    record: Record, item: Record, label: str, key: str, show: Callable[[Any], str], limit_name: str
) -> Markup | None:
    if not units.is_number(item.get(key)):
        return None
    row = next((row for row in facts.limits(record) if row.name == limit_name), None)
    lines = [f"{show(row.allowed)} allowed"] if row else []
    lines += _against_float32(record, item, key)
    return _figure(label, show(item[key]), lines, row.kept if row else None)


def _score_tile(record: Record, item: Record) -> Markup | None:
    final = facts.final_score(item)
    if final is None:
        return None
    metric = record.get("metric") or {}
    answer, samples = final
    of = units.interval(answer, metric)
    row = next((row for row in facts.limits(record) if row.name == "score"), None)
    lines = [of] if of else []
    lines.append(f"{samples} samples")
    source = (metric.get("source") or {}).get("value")
    lines += [f"source {units.score(source, metric)}"] if units.is_number(source) else []
    lost = units.loss(item.get("loss"))
    lines += [f"loss against the source: {lost}"] if lost else []
    return _figure(
        str(metric.get("name") or "score"), units.score(answer["value"], metric), lines, row.kept if row else None
    )


def _figure(label: str, value: str, lines: Sequence[str], kept: bool | None) -> Markup:
    over = element("small", "✕ beyond the limit", cls="over-note") if kept is False else None
    return element(
        "div",
        element("dt", label),
        element("dd", element("b", value), over, [element("small", line) for line in lines]),
    )


def _against_float32(record: Record, item: Record, key: str) -> list[str]:
    """How much less than float32 in the same format, where both were measured."""
    float32 = next(
        (
            other
            for other in record.get("candidates") or []
            if other.get("precision") == "float32" and other.get("format") == item.get("format")
        ),
        None,
    )
    if float32 is None or float32 is item or not units.is_number(float32.get(key)) or not item[key]:
        return []
    ratio = float32[key] / item[key]
    if 0.95 < ratio < 1.05:
        return ["as float32"]
    return [f"float32: {ratio:.2g} \u00d7 as much" if ratio > 1 else f"float32: {ratio:.0%} of it"]


# ---------------------------------------------------------------------------------------- request and limits


def request(record: Record) -> Markup | None:
    asked = record.get("request")
    if not asked:
        return None
    rows = [(key, value) for key, value in asked.items() if value is not None]
    return section("request", "What was asked", pairs(rows))


def limits(record: Record) -> Markup | None:
    rows = facts.limits(record)
    if not rows:
        return None
    item = facts.shown(record)
    whose = f"Limits, and what {item['id']} has" if item else "Limits"
    head = ["Limit", "Observed", "Allowed", "Observed of allowed", "Stated by"]
    body = [_limit_row(record, index, row) for index, row in enumerate(rows)]
    return section("limits", "Limits", table(whose, head, body, cls="limits", numbers=(1, 2)))


def _limit_row(record: Record, index: int, row: facts.Limit) -> Markup:
    bound = "at least " if row.at_least else "at most "
    cells: list[Any] = [
        facts.quantity(row.observed, row.unit, record),
        bound + facts.quantity(row.allowed, row.unit, record),
    ]
    if row.observed is None or row.kept is None:
        cells.append("not measured")
    else:
        of = units.share(row.observed / row.allowed) if row.allowed else ""
        says = f"{'✓ kept' if row.kept else '✕ not kept'}{f', {of}' if of and not row.at_least else ''}"
        title = f"{row.name}: {cells[0]}, {cells[1]} allowed, {says[2:]}"
        meter = plots.bar(f"limit-{index}", row.observed, row.allowed, row.kept, title)
        cells.append(join([meter, element("span", says, cls="within-note" if row.kept else "over-note")]))
    return element(
        "tr",
        element("th", row.name, scope="row"),
        [
            element("td", cell, cls=cls, data_label=label)
            for cell, cls, label in zip(
                cells, ("number", "number", None), ("Observed", "Allowed", "Of allowed"), strict=True
            )
        ],
        element("td", row.origin or units.NOTHING, data_label="Stated by"),
    )


# --------------------------------------------------------------------------------------------------- layers


def layers(record: Record) -> Markup | None:
    rows = record.get("layers") or []
    if not rows:
        return None
    drawing = figure_of(lambda name, width: plots.layers(rows, name, width), "plot-layers", 1090)
    kept = [row for row in rows if row.get("kept_float")]
    floats = [row["bytes"] for row in rows if units.is_number(row.get("bytes"))]
    stored = [row["stored_bytes"] for row in rows if units.is_number(row.get("stored_bytes"))]
    words = units.count(len(rows), "layer")
    if floats:
        words += f" with {units.size(sum(floats))} of weights in float32"
    if len(stored) == len(rows):
        words += f", {units.size(sum(stored))} stored"
    words += f"; {units.count(len(kept), 'layer')} kept in float (◇)." if kept else "."
    return section("layers", "Layers", element("p", words, cls="note"), drawing, _layer_table(rows))


def _layer_table(rows: Sequence[Record]) -> Markup:
    head = ["#", "Layer", "Kind", "float32", "Stored", "Error of int8", "Kept in float"]
    body = [_layer_row(index, row) for index, row in enumerate(rows, start=1)]
    caption = f"{units.count(len(rows), 'layer')}, in execution order."
    frame = scrolled("Layers", table(caption, head, body, "sortable layers", (0, 3, 4, 5)), len(rows) > LONG)
    return element("details", element("summary", "All layers as a table"), frame, open=len(rows) <= 10)


def _layer_row(index: int, row: Record) -> Markup:
    def numeric(key: str, show: Callable[[Any], str]) -> Markup:
        value = row.get(key)
        return element("td", show(value), cls="number", data_sort=repr(value) if units.is_number(value) else None)

    return element(
        "tr",
        element("td", index, cls="number", data_sort=index),
        element("th", row.get("name"), scope="row"),
        element("td", row.get("kind") or units.NOTHING),
        numeric("bytes", units.size),
        numeric("stored_bytes", units.size),
        numeric("error", units.number),
        element("td", "◇ float" if row.get("kept_float") else units.NOTHING),
        cls="float" if row.get("kept_float") else None,
    )


# --------------------------------------------------------------------------------------------------- answers


def answers(record: Record) -> Markup | None:
    """Error histograms and the checks."""
    outputs, rows = record.get("outputs") or [], record.get("checks") or []
    if not outputs and not rows:
        return None
    figures_ = [_output(index, output) for index, output in enumerate(outputs)]
    shown, rest = figures_[:MANY_OUTPUTS], figures_[MANY_OUTPUTS:]
    more = element(
        "details", element("summary", f"{units.count(len(rest), 'more output')}"), element("div", rest, cls="grid")
    )
    return section(
        "answers",
        "Answers compared",
        element("div", shown, cls="grid") if shown else None,
        more if rest else None,
        _checks(rows) if rows else None,
    )


def _output(index: int, output: Record) -> Markup:
    what = element("figcaption", element("b", output.get("name")), f" {output.get('what') or ''}".rstrip())
    drawing = plots.histogram(output, f"plot-output-{index}", NARROW)
    return element(
        "figure",
        what,
        drawing or element("p", "No values to compare.", cls="note"),
        [element("small", line) for line in _how_far(output)],
    )


def _how_far(output: Record) -> list[str]:
    lines = []
    if units.is_number(output.get("largest")):
        lines.append(f"largest difference {units.number(output['largest'])}")
    if units.is_number(output.get("cosine")):
        lines.append(f"cosine similarity {output['cosine']:.6f}")
    if units.is_number(output.get("not_finite")) and output["not_finite"] > 0:
        lines.append(f"{units.count(output['not_finite'], 'difference')} not finite")
    return lines


def _checks(rows: Sequence[Record]) -> Markup:
    body = [
        element(
            "tr",
            element("th", row.get("what"), scope="row"),
            element("td", row.get("output") or units.NOTHING),
            _check_state(row),
            element("td", units.number(row.get("observed")), cls="number", data_sort=sort(row.get("observed"))),
            element("td", units.number(row.get("allowed")), cls="number", data_sort=sort(row.get("allowed"))),
            element("td", row.get("unit") or units.NOTHING),
        )
        for row in rows
    ]
    head = ["Check", "Output", "Result", "Observed", "Allowed", "Measured as"]
    caption = f"{units.count(len(rows), 'check')} of the artifact's answers."
    return scrolled("Checks", table(caption, head, body, "sortable", (3, 4)), len(rows) > LONG)


def _check_state(row: Record) -> Markup:
    if not (units.is_number(row.get("observed")) and units.is_number(row.get("allowed"))):
        return element("td", units.NOTHING)
    kept = row["observed"] <= row["allowed"]
    return element(
        "td", element("span", "✓ kept" if kept else "✕ not kept", cls="within-note" if kept else "over-note")
    )


# ---------------------------------------------------------------------------------- samples and provenance


def samples(record: Record) -> Markup | None:
    metric, given = record.get("metric") or {}, record.get("samples") or {}
    if not metric and not given:
        return None
    source = metric.get("source") or {}
    rows: list[tuple[Any, Any]] = []
    if metric:
        better = "higher" if facts.higher_is_better(record) else "lower"
        rows.append(
            ("metric", f"{metric.get('name') or 'score'} ({metric.get('kind') or 'score'}, {better} is better)")
        )
        rows += [("interval", metric["interval"])] if metric.get("interval") else []
    if units.is_number(source.get("value")):
        of = units.interval(source, metric)
        on = f", on {units.count(source['count'], 'sample')}" if units.is_number(source.get("count")) else ""
        rows.append(("the source's score", f"{units.score(source['value'], metric)}{f' ({of})' if of else ''}{on}"))
    for key, title in (
        ("calibration", "calibration samples"),
        ("search", "search samples"),
        ("holdout", "held-out samples"),
    ):
        rows.append((title, _sample_words(given.get(key))))
    return section("samples", "Metric and samples", pairs(rows))


def _sample_words(entry: Record | None) -> str:
    if not entry:
        return "none"
    origin = f", from {entry['from']}" if entry.get("from") else ""
    others = "".join(
        f", {spaced(key)} {plain_value(value)}" for key, value in entry.items() if key not in ("count", "from")
    )
    return f"{units.count(entry.get('count'), 'sample')}{origin}{others}"


def provenance(record: Record) -> Markup | None:
    made = [(key, value) for key, value in (record.get("made_with") or {}).items() if value is not None]
    versions = [(key, value) for key, value in (record.get("versions") or {}).items() if value is not None]
    hashes = [(key, value) for key, value in (record.get("hashes") or {}).items() if value is not None]
    files = record.get("files") or []
    parts = [
        element("div", element("h3", "SHA-256"), _hashes(hashes)) if hashes else None,
        _files(files) if files else None,
        element("div", element("h3", "Made with"), pairs([*made, *versions])) if made or versions else None,
    ]
    return section("provenance", "Provenance", parts) if any(parts) else None


def _hashes(rows: Sequence[tuple[Any, Any]]) -> Markup:
    return element(
        "dl",
        [element("div", element("dt", spaced(key)), element("dd", element("code", value))) for key, value in rows],
        cls="pairs hashes",
    )


def _files(rows: Sequence[Record]) -> Markup:
    body = [
        element(
            "tr",
            element("th", row.get("name"), scope="row"),
            element("td", units.size(row.get("size")), cls="number", data_sort=sort(row.get("size"))),
            element("td", element("code", row.get("sha256") or units.NOTHING)),
        )
        for row in rows
    ]
    known = [row["size"] for row in rows if units.is_number(row.get("size"))]
    caption = f"{units.count(len(rows), 'file')} in the bundle, {units.size(sum(known))}."
    return scrolled("Files", table(caption, ["File", "Size", "SHA-256"], body, "sortable", (1,)), len(rows) > LONG)
