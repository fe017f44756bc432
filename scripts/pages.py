"""The parts of pages in docs/ that scripts write: tables between two comments that name them."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; columns that end in ``>`` are aligned to the right."""
    return [
        "| " + " | ".join(column.rstrip(">") for column in columns) + " |",
        "|" + "|".join("---:" if column.endswith(">") else "---" for column in columns) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def between(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with ``lines`` between ``<!-- name -->`` and ``<!-- /name -->``."""
    before, rest = page.split(f"<!-- {name} -->\n")
    _, after = rest.split(f"<!-- /{name} -->")
    return before + f"<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- /{name} -->" + after
