"""The report's page: one file that asks the network for nothing and is the same for the same record."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources

from edge_infer.report import candidates, facts, sections
from edge_infer.report.facts import Record
from edge_infer.report.markup import Markup, element, join

_PARTS = (
    (sections.verdict, "Verdict"),
    (sections.request, "Asked"),
    (sections.limits, "Limits"),
    (candidates.candidates, "Candidates"),
    (candidates.tradeoffs, "Trade-offs"),
    (sections.layers, "Layers"),
    (sections.answers, "Answers"),
    (sections.samples, "Samples"),
    (sections.provenance, "Provenance"),
)


def render(record: Record) -> str:
    """The whole page as text, to be written as UTF-8.

    What the record lacks is left out of the page. The page carries its style and script, and its own content
    security policy lets these two run and nothing else: neither a name in the record nor a later edit adds another.
    """
    style, script = _resource("page.css"), _resource("page.js")
    made = [(part(record), name) for part, name in _PARTS]
    found = [(markup, name) for markup, name in made if markup is not None]
    page = element(
        "html",
        _head(record, style, script),
        element(
            "body",
            _top(record),
            _contents(found),
            element("main", [markup for markup, _ in found]),
            _footer(record),
            element("script", script),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _head(record: Record, style: Markup, script: Markup) -> Markup:
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{_title(record)} \u2013 edge-infer report"),
        element("style", style),
    )


def _title(record: Record) -> str:
    return str(record.get("title") or facts.target(record))


def _top(record: Record) -> Markup:
    return element("header", element("p", "edge-infer package", cls="over-title"), element("h1", _title(record)))


def _contents(found: list[tuple[Markup, str]]) -> Markup:
    """Links to the sections that are there."""
    links = [element("a", name, href=f"#{_section_name(markup)}") for markup, name in found]
    return element("nav", links, aria_label="Contents")


def _section_name(markup: Markup) -> str:
    return markup.split('id="', 1)[1].split('"', 1)[0]


def _footer(record: Record) -> Markup:
    made = record.get("made_with") or {}
    words = ", ".join(f"{name} {version}" for name, version in made.items() if version is not None)
    return element("footer", element("p", f"Made with {words}." if words else "Made with edge-infer."))


@cache
def _resource(name: str) -> Markup:
    text = (resources.files("edge_infer.report") / name).read_text("utf-8")
    return join([Markup(text)])


def _digest(text: str) -> str:
    """A content security policy's word for exactly this text, https://www.w3.org/TR/CSP3/#grammardef-hash-source"""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
