"""Tables and progress on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from edge_infer.errors import UsageError

#: Those that turn now: they would overwrite a question.
_spinners: list[Any] = []


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, file: IO[str] | None = None
) -> None:
    """A table on standard output or ``file``; columns named with a trailing ``>`` are aligned right."""
    table_class, console_class = _rich()
    table = table_class(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = console_class(soft_wrap=False, file=file)
    # Piped into a file there is no width to keep to.
    width = console.width if console.is_terminal else 200
    console_class(width=width, markup=False, highlight=False, file=file).print(table)


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Gives a function that shows what is running now: a spinner on a terminal, a line each elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step: print(f"  {step}", file=sys.stderr, flush=True)
        return
    _, console_class = _rich()
    with console_class(stderr=True).status("starting") as status, giving_way(status):
        yield status.update


@contextmanager
def giving_way(spinner: Any) -> Iterator[None]:
    """Let ``ask_secret`` stop and start a display of rich's that is running."""
    _spinners.append(spinner)
    try:
        yield
    finally:
        _spinners.remove(spinner)


def ask_secret(question: str) -> str | None:
    """What the user types at the terminal, unseen, while spinners rest; None at the end of input."""
    import getpass

    resting = list(_spinners)
    for spinner in resting:
        spinner.stop()
    try:
        return getpass.getpass(question)
    except EOFError:
        return None
    finally:
        for spinner in resting:
            spinner.start()


def _rich() -> tuple[type, type]:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise UsageError(
            f"the host's command line needs rich ({error}); install it: pip install 'edge-infer[host]'"
        ) from None
    return Table, Console


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
