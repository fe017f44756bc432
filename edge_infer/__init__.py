"""Run model bundles on edge devices.

    import edge_infer

    with edge_infer.load("digits") as session:
        answer = session.run({"image": image})

Importing this package imports neither numpy nor an engine; ``load`` does.
"""

from __future__ import annotations

from edge_infer.errors import EdgeInferError

TYPE_CHECKING = False  # importing it from typing would take longer than all the rest
if TYPE_CHECKING:
    from typing import Any

    from edge_infer.runtime.confirmation import confirm
    from edge_infer.runtime.pool import Pool
    from edge_infer.runtime.session import Session, load
    from edge_infer.runtime.verify import verify

__all__ = ["EdgeInferError", "Pool", "Session", "__version__", "confirm", "load", "verify"]
__version__ = "0.1.0"


#: Name -> the module that has it, imported when it is asked for.
_LAZY = {
    "Pool": "pool",
    "Session": "session",
    "confirm": "confirmation",
    "load": "session",
    "verify": "verify",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"edge_infer.runtime.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'edge_infer' has no attribute {name!r}")
