"""Try a bundle in a process of its own before this one opens it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from edge_infer import admission
from edge_infer.errors import UsageError
from edge_infer.runtime.session import find_bundle


@dataclass(frozen=True)
class Verified:
    """What ran the model, and the largest difference of each output from its golden answers."""

    package: str
    version: str
    provider: str
    largest_difference: dict[str, float]


def verify(
    source: str | os.PathLike[str], *, timeout_s: float = admission.TIMEOUT_S, max_memory: int | None = None
) -> Verified:
    """Open a bundle in a child and ask it the golden questions.

    A crash, a hang, an illegal instruction or a lack of memory there is a typed error here, with the words of whatever
    failed: SelfTestFailed, OutOfMemory, EngineError, EngineMissing, BundleError. ``max_memory`` is the most private
    memory in bytes that the child may take, Python and engine included; ``timeout_s`` how long it may take.
    ``source`` is as for ``load``.
    """
    if not timeout_s > 0 or (max_memory is not None and max_memory < 1):
        raise UsageError(f"timeout_s={timeout_s!r}, max_memory={max_memory!r}; expected numbers above 0")
    report = admission.self_test(find_bundle(source).path, sys.executable, timeout_s, max_memory)
    engine = report["engine"]
    return Verified(engine["package"], engine["version"], engine["provider"], report["largest_difference"])
