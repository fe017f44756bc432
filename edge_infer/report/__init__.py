"""The packager's report: a plain record of what was tried becomes one self-contained page, or a terminal table.

    html.render(record) -> str                    the page; the same record gives the same bytes
    text.table(record) -> (columns, rows)         the candidates, for a terminal
    text.summary(record), text.notes(record)      the verdict, and how candidates were measured, in sentences

docs/report.md states the record. Standard library only.
"""
