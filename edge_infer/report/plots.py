"""The report's plots, each drawn for a width in px: candidates against the score, layers, and error histograms."""

from __future__ import annotations

from collections.abc import Sequence

from edge_infer.report import units
from edge_infer.report.facts import Record
from edge_infer.report.markup import Markup, element
from edge_infer.report.svg import (
    LINE,
    Axis,
    Box,
    draw_label,
    line,
    log_axis,
    marked,
    picture,
    place_labels,
    rect,
    shorten,
    text,
    text_width,
    x_axis,
    y_axis,
)

#: From so many layers on their names no longer fit beside bars.
MANY_LAYERS = 40
#: Candidates named in a plot; the others are in the table, and named when pointed at.
MOST_LABELS = 24
_R = 5.5  # px, half a mark


# --------------------------------------------------------------------------------------------------- layers


def layers(rows: Sequence[Record], name: str, width: float) -> Markup:
    """int8's error at each layer (logarithmic) and the bytes of its weights, in execution order."""
    draw = _few_layers if len(rows) <= MANY_LAYERS else _many_layers
    errors = [row["error"] for row in rows if units.is_number(row.get("error"))]
    kept = sum(bool(row.get("kept_float")) for row in rows)
    description = f"{len(rows)} layers in execution order, {kept} kept in float"
    if errors:
        worst = max((row for row in rows if units.is_number(row.get("error"))), key=lambda row: row["error"])
        description += f"; the largest error is {units.number(worst['error'])}, at {worst.get('name')}"
    height, parts = draw(rows, width)
    title = "Error of int8 and size by layer" if errors else "Size by layer"
    return picture(name, title, f"{description}.", width, height, *parts)


def _has_errors(rows: Sequence[Record]) -> bool:
    """Only what int8 costs is measured by layer."""
    return any(units.is_number(row.get("error")) for row in rows)


def _error_axis(rows: Sequence[Record], start: float, end: float) -> Axis:
    """Whole decades around the errors above zero, six of them at most below the largest."""
    errors = [row["error"] for row in rows if units.is_number(row.get("error")) and row["error"] > 0] or [1e-3, 1.0]
    return log_axis([max(min(errors), max(errors) * 1e-6), max(errors)], start, end)


def _bytes_axis(rows: Sequence[Record], start: float, end: float) -> Axis:
    sizes = [row[key] for row in rows for key in ("bytes", "stored_bytes") if units.is_number(row.get(key))]
    return Axis(0.0, max([*sizes, 1]) * 1.05, start, end)


def _layer_tip(row: Record, index: int) -> str:
    parts = [f"{index}. {row.get('name')} ({row.get('kind')})"]
    if units.is_number(row.get("error")):
        parts.append(f"error {units.number(row['error'])}")
    if units.is_number(row.get("bytes")):
        parts.append(f"{units.size(row['bytes'])} in float32")
    if units.is_number(row.get("stored_bytes")):
        parts.append(f"{units.size(row['stored_bytes'])} stored")
    return ", ".join([*parts, "kept in float"] if row.get("kept_float") else parts)


def _few_layers(rows: Sequence[Record], width: float) -> tuple[float, list[Markup]]:
    """A line a layer: its name, its error as a stem from the left, its bytes as a bar."""
    step, top = 20.0, 34.0
    longest = max(text_width(str(row.get("name"))) for row in rows)
    names = min(longest, width * 0.34)
    bottom = top + step * len(rows)
    gap = 26.0
    start = names + 12
    panel = (width - start - gap - 14) / 2
    measured = _has_errors(rows)
    error = _error_axis(rows, start, start + panel)
    size = _bytes_axis(rows, start + panel + gap if measured else start, width - 14)
    wanted = 4 if width > 600 else 2
    parts = [
        text(size.start, 14, "weights: float32 (pale), stored (full)" if width > 450 else "weights", cls="title"),
        *x_axis(size, bottom, top - 8, units.size, wanted),
    ]
    if measured:
        title = "error of int8 (log scale)" if width > 450 else "error (log)"
        parts += [text(error.start, 14, title, cls="title"), *x_axis(error, bottom, top - 8, units.number, wanted)]
    for index, row in enumerate(rows, start=1):
        y = top + step * (index - 0.5)
        parts.append(
            marked(
                _layer_tip(row, index),
                rect(0, y - step / 2, width, step, "band"),
                text(names, y + 4, shorten(str(row.get("name")), names), "end", "label"),
                _stem(row, error, y, upright=False),
                _size_bars(row, size, y, 9.0, upright=False),
                cls="mark layer float" if row.get("kept_float") else "mark layer",
            )
        )
    return bottom + LINE + 8, parts


def _many_layers(rows: Sequence[Record], width: float) -> tuple[float, list[Markup]]:
    """A column a layer, errors above and bytes below; the worst and those kept in float are named where there is room.

    Names stay above the stems: over them nobody could read either.
    """
    left, right = 64.0, width - 10
    measured = _has_errors(rows)
    error = _error_axis(rows, 210.0, 68.0)
    above = 230.0 if measured else 0.0
    bottom = above + 110
    size = _bytes_axis(rows, bottom, above + 26)
    index_axis = Axis(0.5, len(rows) + 0.5, left, right)
    column = (right - left) / len(rows)
    parts = [
        text(4, above + 14, "weights: float32 (pale), stored (full)", cls="title"),
        text(right, bottom + 34, "layer, in execution order →" if width > 450 else "layer →", "end", "title"),
        *y_axis(size, left, right, units.size, 3),
        *(
            text(index_axis.at(tick), bottom + LINE, f"{tick:g}", "middle", "tick")
            for tick in index_axis.ticks(10 if width > 450 else 5)
            if tick >= 1
        ),
    ]
    if measured:
        parts += [text(4, 14, "error of int8 (log scale)", cls="title"), *y_axis(error, left, right, units.number, 4)]
    for index, row in enumerate(rows, start=1):
        at = index_axis.at(index)
        parts.append(
            marked(
                _layer_tip(row, index),
                rect(at - column / 2, 30, column, bottom - 30, "band"),
                _stem(row, error, at, upright=True),
                _size_bars(row, size, at, max(column * 0.8, 0.5), upright=True),
                cls="mark layer float" if row.get("kept_float") else "mark layer",
            )
        )
    return bottom + 44, [*parts, *_worst_names(rows, error, index_axis, Box(left, 20, right - left, 56))]


def _worst_names(rows: Sequence[Record], error: Axis, index_axis: Axis, bounds: Box) -> list[Markup]:
    measured = [
        (row["error"], index, row) for index, row in enumerate(rows, start=1) if units.is_number(row.get("error"))
    ]
    measured.sort(key=lambda item: (not item[2].get("kept_float"), -item[0], item[1]))
    named = [item for item in measured if item[2].get("kept_float")][:8] + [
        item for item in sorted(measured, key=lambda item: (-item[0], item[1]))[:5] if not item[2].get("kept_float")
    ]
    points = [(index_axis.at(index), error.at(value), row) for value, index, row in named]
    wanted = [(x, y, shorten(str(row.get("name")), 190 if bounds.width > 450 else 130)) for x, y, row in points]
    stems = [Box(x - 4, y - 5, 8, 10) for x, y, _ in points]
    return [draw_label(label) for label in place_labels(wanted, stems, (), bounds) if label]


def _stem(row: Record, axis: Axis, across: float, upright: bool) -> list[Markup]:
    """A stem from the axis's low end with a dot; a diamond for layers kept in float, a ring for no error at all."""
    if not units.is_number(row.get("error")):
        return []
    at = axis.at(row["error"]) if row["error"] > 0 else axis.start
    x, y = (across, at) if upright else (at, across)
    stem = line(across, axis.start, across, at, "stem") if upright else line(axis.start, across, at, across, "stem")
    if row.get("kept_float"):
        return [stem, element("path", d=f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z", cls="dot hollow")]
    radius = 1.6 if upright else 3.5
    return [stem, element("circle", cx=x, cy=y, r=radius, cls="dot full" if row["error"] > 0 else "dot hollow")]


def _size_bars(row: Record, axis: Axis, across: float, thick: float, upright: bool) -> list[Markup]:
    """float32's bytes as a pale bar, those stored as a full one in it."""
    bars = []
    for key, cls in (("bytes", "pale"), ("stored_bytes", "stored")):
        if not units.is_number(row.get(key)):
            continue
        length = abs(axis.at(row[key]) - axis.start)
        inner = thick if cls == "pale" or upright else thick - 3
        if upright:
            bars.append(rect(across - inner / 2, axis.start - length, inner, length, cls))
        else:
            bars.append(rect(axis.start, across - inner / 2, length, inner, cls))
    return bars


# --------------------------------------------------------------------------------------------------- errors


def histogram(output: Record, name: str, width: float) -> Markup | None:
    """How many values of an output differ by how much; None when the record has no counts."""
    edges, counts = output.get("edges") or [], output.get("counts") or []
    usable = len(edges) == len(counts) + 1 and all(units.is_number(value) for value in [*edges, *counts])
    if not usable or not counts or not edges[0] < edges[-1]:
        return None
    height = 210.0
    tallest = max([*counts, 1])
    y = Axis(0.0, tallest * 1.08, height - 44, 14.0)
    left = max(text_width(units.number(tick)) for tick in y.ticks(4)) + 14
    x = Axis(float(edges[0]), float(edges[-1]), left, width - 16)
    total = sum(counts)
    parts = [
        *x_axis(x, y.start, y.end, units.number, 4),
        *y_axis(y, left, x.end, units.number, 4),
        text(x.end, height - 8, f"{output.get('unit') or 'difference'} →", "end", "title"),
    ]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        # A value among thousands is still to be seen.
        tall = max(y.start - y.at(count), 1.5) if count else 0.0
        tip = f"{units.number(low)} to {units.number(high)}: {units.count(count, 'value')}"
        tip += f" ({units.share(count / total)})" if total else ""
        parts.append(marked(tip, rect(x.at(low) + 0.5, y.start - tall, x.at(high) - x.at(low) - 1, tall, "bar")))
    what = f"{output.get('name')}: {output.get('what') or 'difference'}"
    largest = f"the largest is {units.number(output['largest'])}" if units.is_number(output.get("largest")) else ""
    description = (
        f"Histogram of {units.count(total, 'difference')} in {len(counts)} bins; {largest or 'see the table'}."
    )
    return picture(name, what, description, width, height, *parts)


def bar(name: str, observed: float, allowed: float, kept: bool | None, title: str) -> Markup:
    """Observed against allowed on one line, as wide as its place: positions in percent."""
    full = max(observed, allowed) * 1.08 or 1.0
    state = "over" if kept is False else "within"
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("rect", x="0", y="3", width="100%", height="10", rx="3", cls="track"),
        element("rect", x="0", y="3", width=f"{max(observed / full, 0.004):.2%}", height="10", rx="3", cls=state),
        element("line", x1=f"{allowed / full:.2%}", x2=f"{allowed / full:.2%}", y1="0", y2="16", cls="limit"),
        id=name,
        cls="meter",
        width="100%",
        height="16",
        role="img",
        aria_labelledby=f"{name}-title",
    )
