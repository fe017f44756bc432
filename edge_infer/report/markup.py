"""HTML and SVG written as nested calls. Whatever is not Markup is escaped, so that no name can become a tag."""

from __future__ import annotations

import html
from typing import Any

#: Written without a closing tag; all other elements have one, so that the page is well-formed XML too.
_VOID = frozenset({"br", "circle", "col", "line", "link", "meta", "path", "rect"})
#: Invisible characters that reorder the text around them: a name could pose as another.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Markup(str):
    """A string that is markup already."""

    __slots__ = ()


def clean(text: object) -> str:
    """As text that can be encoded, is allowed in XML and stays in its order; other characters become U+FFFD."""
    return "".join(char if _is_plain(char) else "\ufffd" for char in str(text))


def _is_plain(char: str) -> bool:
    code = ord(char)
    if char in _REORDERING or 0xD800 <= code <= 0xDFFF or code in (0xFFFE, 0xFFFF):
        return False
    return code >= 0xA0 or 0x20 <= code < 0x7F or char in "\n\t"


def element(tag: str, /, *children: object, **attributes: Any) -> Markup:
    """An element. ``cls`` is class, ``aria_label`` is aria-label; None and False leave an attribute out.

    Children are strings (escaped), Markup (as it is), or lists of those; None is nothing.
    """
    written = "".join(f' {_name(key)}="{_value(value)}"' for key, value in attributes.items() if _is_given(value))
    if tag in _VOID:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: Any) -> Markup:
    """Children one after the other, with nothing around them."""
    return Markup("".join(_child(child) for child in children))


def _child(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, (list, tuple)):
        return join(child)
    return child if isinstance(child, Markup) else html.escape(clean(child), quote=False)


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


def _name(key: str) -> str:
    return {"cls": "class", "for_": "for"}.get(key, key.replace("_", "-"))


def _value(value: Any) -> str:
    if value is True:
        return "true"
    if isinstance(value, float):
        # Hundredths of a pixel are enough, and make the page smaller.
        return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"
    return html.escape(clean(value))
