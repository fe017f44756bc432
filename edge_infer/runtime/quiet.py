"""What an engine writes to standard error while it opens a model: dozens of lines that say that all is well."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator

from edge_infer.admission import ENGINE_WORDS

#: LiteRT's: ``INFO: [environment.cc:36] ...``; a warning's second line begins with a corner. ``USDT:`` is torch's
#: profiler, which says that it starts and stops.
CHATTER = re.compile(rb"(VERBOSE|INFO|WARNING): |USDT:|\xe2\x94\x94 ")

_lock = threading.Lock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back standard error; afterwards everything but an engine's chatter is written there.

    It is the whole process's: what other threads write meanwhile comes a few milliseconds late.
    """
    with _lock, contextlib.ExitStack() as stack:
        try:
            if ENGINE_WORDS in os.environ:
                raise OSError
            held = os.memfd_create("engine words")
            stack.callback(os.close, held)
            real = os.dup(2)
        except (OSError, AttributeError):  # closed, or no such system
            yield
            return
        stack.callback(_tell, held)
        stack.callback(os.close, real)
        stack.callback(os.dup2, real, 2)
        os.dup2(held, 2)
        yield


def _tell(held: int) -> None:
    size = os.fstat(held).st_size
    words = os.pread(held, size, 0)
    rest = b"".join(line for line in words.splitlines(keepends=True) if not CHATTER.match(line))
    with contextlib.suppress(OSError):
        os.write(2, rest)
