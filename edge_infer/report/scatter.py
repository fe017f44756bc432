"""The plot of candidates: a figure of which less is better against the score, with limits, intervals and the front."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from edge_infer.report import facts, units
from edge_infer.report.facts import Record
from edge_infer.report.markup import Markup, element
from edge_infer.report.svg import (
    LINE,
    Axis,
    Box,
    draw_label,
    line,
    linear_axis,
    log_axis,
    marked,
    picture,
    place_labels,
    shorten,
    text,
    text_width,
    x_axis,
    y_axis,
)

#: Candidates named in a plot; the others are in the table, and named when pointed at.
MOST_LABELS = 24
_R = 5.5  # px, half a mark


def plotted(record: Record, figure: str) -> tuple[str, list[Record]]:
    """The samples that scores are of ("search" or "holdout") and the candidates that have both figures.

    One kind of samples for all, that which more candidates have: scores of different samples do not compare.
    """
    have = {
        samples: [
            item
            for item in record.get("candidates") or []
            if units.is_number(item.get(figure))
            and item[figure] > 0
            and units.is_number((item.get(samples) or {}).get("value"))
        ]
        for samples in ("search", "holdout")
    }
    samples = "holdout" if len(have["holdout"]) > len(have["search"]) else "search"
    return samples, have[samples]


def draw(record: Record, figure: str, what: str, unit: str, name: str, width: float) -> Markup | None:
    """A figure (smaller is better) against the score, with limits, intervals and the front; None without points."""
    samples, items = plotted(record, figure)
    if not items:
        return None
    metric = record.get("metric") or {}
    height = max(320.0, width * 0.74)
    limit = next((row for row in facts.limits(record) if row.name == what), None)
    floor = next((row.allowed for row in facts.limits(record) if row.name == "score"), None)
    source = (metric.get("source") or {}).get("value")
    source = source if units.is_number(source) else None
    y, y_far = _score_axis(items, samples, [source], floor, height - 46, 30)

    def score(value: float) -> str:
        return units.score(value, metric)

    left = max(text_width(score(tick)) for tick in y.ticks(5)) + 14
    x, x_far = _figure_axis([float(item[figure]) for item in items], limit, left, width - 12)

    def amount(value: float) -> str:
        return units.quantity(value, unit)

    parts: list[Any] = [
        *x_axis(x, y.start, y.end, amount, 5 if width > 450 else 4),
        *y_axis(y, left, x.end, score, 5),
        text(x.end, height - 8, f"{what} →", "end", "title"),
        text(4, 14, _score_title(metric, floor, y_far, width), "start", "title"),
    ]
    parts += _limit_line(limit, x, y, x_far, amount, text_width(_score_title(metric, floor, y_far, width)) + 12)
    lines = _level_lines([("source", source), ("limit", floor)], x, y, y_far, score)
    points = [(x.at(item[figure]), _height(item[samples]["value"], y), item) for item in items]
    level_text, level_boxes = _level_labels(lines, x, points)
    parts += level_text
    parts += _front(points, facts.higher_is_better(record))
    parts += [
        marked(
            _tip(item, figure, what, unit, samples, metric),
            _whisker(px, item[samples], y),
            _mark(px, py, item),
            _outside(px, item[samples]["value"], y),
            cls=f"mark {_state(item)}",
        )
        for px, py, item in sorted(points, key=lambda point: _state(point[2]) == "chosen")
    ]
    drawn = [Box(x.start, at - 1, x.end - x.start, 2) for at, *_ in lines]
    if limit is not None and not x_far:
        drawn.append(Box(x.at(limit.allowed) - 1, y.end, 2, y.start - y.end))
    parts += _labels(points, samples, metric, y, x, level_boxes, drawn)
    description = (
        f"{len(items)} candidates by {what} and by {metric.get('name') or 'score'} on the {samples} samples; "
        "all figures are in the table of candidates."
    )
    return picture(name, f"{what} against {metric.get('name') or 'score'}", description, width, height, *parts)


def _score_title(metric: Record, floor: float | None, far: str, width: float) -> str:
    name = f"↑ {metric.get('name') or 'score'}"
    if floor is not None and far:
        name += f" (limit {units.score(floor, metric)}, {far})"
    return shorten(name, width * 0.6)


def _figure_axis(values: list[float], limit: facts.Limit | None, start: float, end: float) -> tuple[Axis, str]:
    """The horizontal axis, and which way the limit lies when it is too far off to be on it."""
    low, high = min(values), max(values)
    far = ""
    shown = list(values)
    if limit is not None and limit.allowed > 0:
        far = "right" if limit.allowed > high * 4 else "left" if limit.allowed < low / 4 else ""
        shown += [] if far else [limit.allowed]
    if max(shown) > min(shown) * 5:
        return log_axis(shown, start, end), far
    return linear_axis(shown, start, end, 0.12), far


def _score_axis(
    items: Sequence[Record], samples: str, others: Sequence[float | None], floor: float | None, start: float, end: float
) -> tuple[Axis, str]:
    """The vertical axis, and which way the limit lies when it is too far off to be on it.

    A candidate far out would press all others together: the window is then of those that were not dropped, and the
    one outside lies on its border. Errors that span decades are drawn on a logarithmic axis.
    """
    levels = [value for value in others if value is not None]
    values = [*_scores(items, samples), *levels]
    positive = [value for value in values if value > 0]
    if len(positive) > 1 and max(values) > 1e-12 and max(positive) > 50 * min(positive):
        on = positive + ([floor] if floor is not None and floor > 0 else [])
        return log_axis(on, start, end), "" if floor is None or floor > 0 else "below"
    far = ""
    if floor is not None:
        span = max(max(values) - min(values), abs(max(values)) * 0.02)
        far = "above" if floor > max(values) + span else "below" if floor < min(values) - span else ""
        levels += [] if far else [floor]
    kept = [item for item in items if _state(item) != "dropped"]
    inner = [*_scores(kept, samples), *levels] if kept else []
    values = [*_scores(items, samples), *levels]
    if inner and max(inner) > min(inner) and max(values) - min(values) > 1.8 * (max(inner) - min(inner)):
        return linear_axis(inner, start, end, 0.2), far
    return linear_axis(values, start, end), far


def _scores(items: Sequence[Record], samples: str) -> list[float]:
    return [float(item[samples][key]) for item in items for key in ("value", "low", "high") if _has(item[samples], key)]


def _has(answer: Record, key: str) -> bool:
    return units.is_number(answer.get(key))


def _limit_line(limit: facts.Limit | None, x: Axis, y: Axis, far: str, amount: Any, text_from: float) -> list[Markup]:
    """The limit of the horizontal figure, named above the plot, right of ``text_from``."""
    if limit is None:
        return []
    words = f"limit {amount(limit.allowed)}"
    if far:
        return [text(x.end, 14, f"{words} →" if far == "right" else f"← {words}", "end", "limit")]
    at, half = x.at(limit.allowed), text_width(words) / 2
    middle = min(max(at, text_from + half), x.end - half)
    return [line(at, y.end - 8, at, y.start, "limit"), text(middle, 14, words, "middle", "limit")]


def _level_lines(
    levels: Sequence[tuple[str, float | None]], x: Axis, y: Axis, far: str, score: Any
) -> list[tuple[float, str, str, bool]]:
    """Horizontal lines from the top: height, name, class, and whether the text goes above the line."""
    found = [
        (y.at(value), f"{name} {score(value)}", name)
        for name, value in levels
        if value is not None and not (name == "limit" and far)
    ]
    found.sort()
    return [(at, words, name, index == 0 and at > y.end + LINE) for index, (at, words, name) in enumerate(found)]


def _level_labels(
    lines: Sequence[tuple[float, str, str, bool]], x: Axis, points: Sequence[tuple[float, float, Record]]
) -> tuple[list[Markup], list[Box]]:
    """The lines, each named at the end of the plot where fewer points are."""
    parts: list[Markup] = []
    boxes: list[Box] = []
    for at, words, cls, above in lines:
        width = text_width(words)
        top = at - LINE - 1 if above else at + 1
        ends = [Box(x.end - width - 2, top, width, LINE), Box(x.start + 4, top, width, LINE)]
        crowd = [sum(box.meets(_around(px, py)) for px, py, _ in points) for box in ends]
        right = crowd[0] <= crowd[1]
        box = ends[0 if right else 1]
        parts.append(line(x.start, at, x.end, at, cls))
        parts.append(
            text(box.x + box.width if right else box.x, top + LINE - 4, words, "end" if right else "start", cls)
        )
        boxes.append(box)
    return parts, boxes


def _around(x: float, y: float) -> Box:
    return Box(x - _R - 1, y - _R - 1, 2 * _R + 2, 2 * _R + 2)


def _front(points: Sequence[tuple[float, float, Record]], higher_is_better: bool) -> list[Markup]:
    """The front as stairs, where its candidates are one in these two figures: it may be one in more."""
    front = sorted(((x, y) for x, y, item in points if item.get("pareto")), key=lambda point: point)
    down = -1 if higher_is_better else 1
    if len(front) < 2 or any((b[1] - a[1]) * down < 0 for a, b in pairwise(front)):
        return []
    path = f"M{front[0][0]:.1f} {front[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in front[1:])
    return [element("path", d=path, cls="front")]


def _state(item: Record) -> str:
    status = item.get("status")
    return status if status in ("chosen", "fits") else "dropped"


def _whisker(x: float, answer: Record, y: Axis) -> list[Markup]:
    if not (_has(answer, "low") and _has(answer, "high")):
        return []
    low, high = y.at(answer["low"]), y.at(answer["high"])
    return [
        line(x, low, x, high, "whisker"),
        line(x - 4, low, x + 4, low, "whisker"),
        line(x - 4, high, x + 4, high, "whisker"),
    ]


def _mark(x: float, y: float, item: Record) -> Markup:
    """Chosen: a large diamond. Others: a circle, filled on the front. Dropped: a cross, in a ring on the front."""
    state = _state(item)
    if state == "chosen":
        return element("path", d=f"M{x:.1f} {y - 9:.1f}l9 9l-9 9l-9 -9z", cls="dot full")
    if state == "fits":
        full = "full" if item.get("pareto") else "hollow"
        return element("circle", cx=x, cy=y, r=_R, cls=f"dot {full}")
    cross = element("path", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8", cls="dot cross")
    ring = element("circle", cx=x, cy=y, r=_R + 2, cls="dot hollow") if item.get("pareto") else None
    return element("g", ring, cross)


def _height(value: float, y: Axis) -> float:
    """Where a score is drawn: one outside the window a little inside its border, with room for an arrow."""
    return y.start - 18 if value < y.low else y.end + 18 if value > y.high else y.at(value)


def _outside(x: float, value: float, y: Axis) -> Markup | None:
    """An arrow under or over the mark of a score that lies outside the window."""
    if y.low <= value <= y.high:
        return None
    down = 1 if value < y.low else -1
    return element("path", d=f"M{x - 5:.1f} {_height(value, y) + down * 9:.1f}h10l-5 {down * 7}z", cls="dot full")


def _tip(item: Record, figure: str, what: str, unit: str, samples: str, metric: Record) -> str:
    answer = item[samples]
    of = units.interval(answer, metric)
    return (
        f"{item.get('id')} ({_state(item)}{', on the front' if item.get('pareto') else ''}): "
        f"{what} {units.quantity(item[figure], unit)}, {metric.get('name') or 'score'} "
        f"{units.score(answer['value'], metric)}{f' ({of})' if of else ''}"
    )


def _label_text(item: Record, value: float, y: Axis, metric: Record) -> str:
    name = shorten(str(item.get("id")), 150)
    return name if y.low <= value <= y.high else f"{name}, {units.score(value, metric)}"


def _labels(
    points: Sequence[tuple[float, float, Record]],
    samples: str,
    metric: Record,
    y: Axis,
    x: Axis,
    taken: Sequence[Box],
    lines: Sequence[Box],
) -> list[Markup]:
    rank = {"chosen": 0, "fits": 2, "dropped": 3}
    ordered = sorted(points, key=lambda point: min(rank[_state(point[2])], 1 if point[2].get("pareto") else 3))
    ordered = ordered[:MOST_LABELS]
    whiskers = [
        Box(px - 4, y.at(item[samples]["high"]), 8, y.at(item[samples]["low"]) - y.at(item[samples]["high"]))
        for px, _, item in points
        if _has(item[samples], "low") and _has(item[samples], "high")
    ]
    names = [(px, py, _label_text(item, item[samples]["value"], y, metric)) for px, py, item in ordered]
    bounds = Box(x.start, y.end - 8, x.end - x.start + 10, y.start - y.end + 8)
    labels = place_labels(names, [*taken, *(_around(px, py) for px, py, _ in points)], [*whiskers, *lines], bounds)
    return [
        draw_label(label, _state(item))
        for label, (_, _, item) in zip(labels, ordered, strict=True)
        if label is not None
    ]


def legend_mark(item: Record) -> Markup:
    """A mark as in the plots, for their key."""
    return element(
        "svg", element("g", _mark(10, 10, item), cls=f"mark {_state(item)}"), width="20", height="20", cls="key",
        aria_hidden="true",
    )  # fmt: skip
