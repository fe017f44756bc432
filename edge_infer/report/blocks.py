"""What sections are built of: headed boxes, tables that scroll and sort, names with values, drawings at two widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edge_infer.report import units
from edge_infer.report.markup import Markup, element

#: Plots are drawn twice, since text in a picture scaled to a phone's width could not be read.
NARROW = 340


def section(name: str, title: str, *children: Any) -> Markup:
    heading = element("h2", title, id=f"{name}-title")
    return element("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def figure_of(
    draw: Callable[[str, float], Markup | None], name: str, width: float, caption: Any = None
) -> Markup | None:
    """A drawing for wide and one for narrow windows; the style sheet shows one of them."""
    wide = draw(name, width)
    if wide is None:
        return None
    narrow = draw(f"{name}-narrow", NARROW)
    return element(
        "figure",
        element("div", wide, cls="wide"),
        element("div", narrow, cls="narrow"),
        element("figcaption", caption) if caption else None,
    )


def pairs(rows: Sequence[tuple[Any, Any]]) -> Markup:
    """Names with their values."""
    return element(
        "dl",
        [element("div", element("dt", spaced(key)), element("dd", plain_value(value))) for key, value in rows],
        cls="pairs",
    )


def spaced(key: Any) -> str:
    return str(key).replace("_", " ")


def plain_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{spaced(key)} {plain_value(inner)}" for key, inner in value.items()) or units.NOTHING
    if isinstance(value, (list, tuple)):
        return ", ".join(plain_value(inner) for inner in value) or units.NOTHING
    return units.number(value) if isinstance(value, (int, float)) else str(value)


def sort(value: Any) -> str | None:
    return repr(value) if units.is_number(value) else None


def table(
    caption: str, head: Sequence[str], body: Sequence[Markup], cls: str = "", numbers: Sequence[int] = ()
) -> Markup:
    titles = [
        element("th", title, scope="col", cls="number" if at in numbers else None) for at, title in enumerate(head)
    ]
    return element(
        "table",
        element("caption", caption),
        element("thead", element("tr", titles)),
        element("tbody", body),
        cls=cls or None,
    )


def scrolled(label: str, table: Markup, long: bool = False) -> Markup:
    """A table that scrolls sideways in a narrow window, and in its own frame when it is long."""
    return element("div", table, cls="scroll long" if long else "scroll", role="region", aria_label=label, tabindex="0")
