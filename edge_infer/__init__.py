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

    from edge_infer.runtime.pool import Pool
    from edge_infer.runtime.session import Session, load

__all__ = ["EdgeInferError", "Pool", "Session", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("Session", "load"):
        from edge_infer.runtime import session

        return getattr(session, name)
    if name == "Pool":
        from edge_infer.runtime.pool import Pool

        return Pool
    raise AttributeError(f"module 'edge_infer' has no attribute {name!r}")
