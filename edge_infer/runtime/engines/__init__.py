"""The engines: one file each, imported only when a bundle needs it.

Every engine offers the same three verbs on a model that is already open; ``open_engine`` picks the file by the
bundle's format. A new engine is one file and one row in ``ENGINES``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edge_infer.errors import EngineError, EngineMissing, OutOfMemory
from edge_infer.records import Record

if TYPE_CHECKING:
    import numpy as np

    from edge_infer.bundle import Bundle
    from edge_infer.runtime.buffers import Buffers

ENGINES = {
    "tflite": "edge_infer.runtime.engines.tflite",
    "onnx": "edge_infer.runtime.engines.onnx",
    "torchscript": "edge_infer.runtime.engines.torchscript",
}

#: The extra of edge-infer that brings an engine's package.
EXTRAS = {
    "ai-edge-litert": "tflite",
    "tflite-runtime": "tflite-runtime",
    "onnxruntime": "onnx",
    "torch": "torch",
}

#: Of C++, the system, its linker, ONNX Runtime and torch; then of TensorRT, cuBLAS and cuDNN.
OUT_OF_MEMORY_WORDS = (
    "bad_alloc",
    "out of memory",
    "failed to map segment",
    "Failed to allocate",
    "can't allocate memory",
    "Cannot allocate",
    "OutOfMemory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(eq=False, repr=False)
class EngineOptions(Record):
    """How to open a model.

    ``providers=None`` takes the bundle's own order; ``cache=None`` keeps nothing from one open to the next;
    ``spinning`` lets idle threads of ONNX Runtime wait in a loop; ``prepack`` whether it repacks weights, None as the
    bundle says; ``max_memory`` is the most private memory in bytes that opening may add, as far as an engine knows it
    beforehand.
    """

    threads: int
    providers: tuple[str, ...] | None = None
    cache: Path | None = None
    verify: str = "auto"
    spinning: bool = False
    prepack: bool | None = None
    max_memory: int | None = None


@dataclass(eq=False, repr=False)
class EngineInfo(Record):
    """What really runs the model; ``notes`` says where that differs from what was asked."""

    package: str
    version: str
    provider: str
    threads: int
    notes: tuple[str, ...] = field(default=())


class Engine(Protocol):
    """An open model. Arrays go in the order of the manifest's inputs and come in the order of its outputs."""

    info: EngineInfo

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Run once. The arrays returned belong to the caller. May be called from several threads."""

    def bind(self, inputs: list[np.ndarray[Any, Any]]) -> Buffers:
        """Buffers that begin with ``inputs``, which are aligned and may be written by the caller alone."""

    def close(self) -> None:
        """Let go of the model and its memory."""


def engine_module(bundle: Bundle) -> Any:
    """The file of this package that runs bundles of this format; its ``import_engine`` imports the engine."""
    return importlib.import_module(ENGINES[bundle.manifest.artifact.format])


def open_engine(bundle: Bundle, options: EngineOptions) -> Engine:
    """Open ``bundle`` with its engine. Raises EngineMissing, EngineError, OutOfMemory."""
    module = engine_module(bundle)
    try:
        engine: Engine = module.open_model(bundle, options)
    except (EngineError, EngineMissing):
        raise
    except Exception as error:  # engines raise whatever they like
        raise engine_error(error, f"cannot open {bundle.path}") from error
    return engine


def prepare_engine(bundle: Bundle, options: EngineOptions, folder: Path) -> Engine:
    """Open ``bundle`` so that the engine leaves in ``folder`` what later opens map. May crash: for a child."""
    try:
        engine: Engine = engine_module(bundle).prepare(bundle, options, folder)
    except (EngineError, EngineMissing):
        raise
    except Exception as error:
        raise engine_error(error, f"cannot prepare {bundle.path}") from error
    return engine


def check_model(bundle: Bundle) -> None:
    """What an engine wants to know of a model's files before it opens them; raises BundleError."""
    module = engine_module(bundle)
    check = getattr(module, "check_model", None)
    if check is not None:
        check(bundle)


def engine_error(error: Exception, what: str) -> EngineError:
    """An engine's own exception in our words, one line of it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if isinstance(error, MemoryError) or any(word in str(error) for word in OUT_OF_MEMORY_WORDS):
        return OutOfMemory(f"{what}: not enough memory ({line}); close other programs or package a smaller precision")
    return EngineError(f"{what}: {line}")


def missing(bundle: Bundle, error: ImportError) -> EngineMissing:
    """The error for a bundle none of whose engines can be imported; its sentence holds the pip command.

    ``error`` is a ModuleNotFoundError where none is installed.
    """
    wanted = bundle.manifest.artifact.requires
    extra = EXTRAS.get(wanted[0].package, bundle.manifest.artifact.format)
    if not isinstance(error, ModuleNotFoundError):  # as engines from before numpy 2 do beside it, some without a word
        return EngineMissing(
            f"{bundle.manifest.name} needs {' or '.join(map(str, wanted))}, and what {sys.executable} has cannot be "
            f"imported ({error or 'no reason given'}), most likely for another numpy than it was built for; bring it "
            f"up to date: {sys.executable} -m pip install --upgrade {wanted[0].package}"
        )
    return EngineMissing(
        f"{bundle.manifest.name} needs {' or '.join(map(str, wanted))}, and {sys.executable} "
        f"has none ({error}); install it: {sys.executable} -m pip install 'edge-infer[{extra}]'"
    )


def require_version(bundle: Bundle, package: str, version: str) -> None:
    """Raise EngineError when the installed engine is not among those that can run the bundle, or too old."""
    name, known = bundle.manifest.name, bundle.manifest.artifact.requires
    requirement = next((item for item in known if item.package == package), None)
    if requirement is None:
        raise EngineError(
            f"{name} needs {' or '.join(map(str, known))}, which {package} {version} cannot stand in for; "
            f"install that, or package the model for a target with {package}"
        )
    if not at_least(version, requirement.version):
        raise EngineError(
            f"{name} needs {requirement}, installed is {version}; "
            f"upgrade it, or package the model for a target with {package} {version}"
        )


def at_least(version: str, oldest: str) -> bool:
    """Compare dotted release numbers; what follows a ``+`` and letters at the end do not count."""
    return release_numbers(version) >= release_numbers(oldest)


def release_numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+", maxsplit=1)[0].split("."):
        digits = "".join(char for char in part if char.isdigit())
        if not digits or not part[0].isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers)
