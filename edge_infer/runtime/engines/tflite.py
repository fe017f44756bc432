"""TFLite models through ai-edge-litert, or through the classic tflite-runtime where only that is installed."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_infer.errors import EngineError, InputError
from edge_infer.runtime import room
from edge_infer.runtime.buffers import Buffers, CopiedBuffers
from edge_infer.runtime.engines import (
    Engine,
    EngineInfo,
    EngineOptions,
    engine_error,
    litert,
    missing,
    require_version,
)
from edge_infer.runtime.quiet import quiet

if TYPE_CHECKING:
    from edge_infer.bundle import Bundle

#: Package on PyPI and the module of its interpreter; the better-kept one first.
PACKAGES = (("ai-edge-litert", "ai_edge_litert.interpreter"), ("tflite-runtime", "tflite_runtime.interpreter"))

#: Operators whose weights may be most of a model, and which XNNPACK leaves where they are.
READ_IN_PLACE = frozenset({"GATHER", "GATHER_ND", "EMBEDDING_LOOKUP", "CUSTOM"})


def open_model(bundle: Bundle, options: EngineOptions) -> Engine:
    if options.providers and "cpu" not in options.providers:
        raise EngineError("TFLite runs on the CPU only; leave the choice to the bundle or allow 'cpu' as well")
    notes: tuple[str, ...] = ()
    if options.cache is not None and litert.suits(bundle):
        info = engine_info(bundle, options, *PACKAGES[0])
        entry = litert.repacked(bundle, info.version, options.cache, options.verify)
        if not entry.failed:
            return litert.CompiledEngine(bundle, info, entry.file(litert.WEIGHTS))
        notes = (f"weights are repacked in private memory: {entry.failed}",)
    package, module = import_engine(bundle)
    info = replace(engine_info(bundle, options, package, module.__name__), notes=notes)
    room.require(bundle, _least_private(bundle, package), options.max_memory)
    # The file is mapped by its path, and unlike the compiled model the interpreter verifies the flatbuffer.
    with quiet():
        interpreter = module.Interpreter(
            model_path=str(bundle.file(bundle.manifest.artifact.model)), num_threads=options.threads
        )
        return TFLiteEngine(bundle, interpreter, info)


def _least_private(bundle: Bundle, package: str) -> int:
    """Bytes that an interpreter repacks in any case: all weights, unless an operator reads some where they lie."""
    artifact = bundle.manifest.artifact
    repacks = package == "ai-edge-litert" or artifact.precision == "float32"
    repacks = repacks and bool(artifact.operators) and not READ_IN_PLACE.intersection(artifact.operators)
    return bundle.manifest.files[artifact.model].size if repacks else 0


def prepare(bundle: Bundle, options: EngineOptions, folder: Path) -> Engine:
    """Open the model with an engine that leaves in ``folder`` what later opens map. May crash: for a child."""
    return litert.CompiledEngine(bundle, engine_info(bundle, options, *PACKAGES[0]), folder / litert.WEIGHTS)


def import_engine(bundle: Bundle) -> tuple[str, Any]:
    """The package at hand and its interpreter module. Raises EngineMissing."""
    errors = []
    for package, module in PACKAGES:
        try:
            return package, importlib.import_module(module)
        except ImportError as error:
            errors.append(error)
    installed = [error for error in errors if not isinstance(error, ModuleNotFoundError)]
    raise missing(bundle, installed[0] if installed else ModuleNotFoundError("; ".join(map(str, errors))))


def engine_info(bundle: Bundle, options: EngineOptions, package: str, module: str) -> EngineInfo:
    """What is going to run the model. Raises EngineError when it is too old for that."""
    # The package's own word; importlib.metadata would know as well, but its import takes longer than a load.
    version = getattr(importlib.import_module(module.split(".", maxsplit=1)[0]), "__version__", None)
    if version is None:
        from importlib.metadata import version as installed

        version = installed(package)
    require_version(bundle, package, str(version))
    return EngineInfo(package, str(version), "cpu", options.threads)


class TFLiteEngine:
    """One interpreter behind a lock: it is not made for several threads at once."""

    def __init__(self, bundle: Bundle, interpreter: Any, info: EngineInfo) -> None:
        self.info = info
        self._interpreter = interpreter
        self._lock = threading.Lock()
        runner = interpreter.get_signature_runner(bundle.manifest.artifact.signature)
        inputs, outputs = runner.get_input_details(), runner.get_output_details()
        self._inputs = [_index(inputs, spec.name, "input") for spec in bundle.manifest.inputs]
        self._outputs = [_index(outputs, spec.name, "output") for spec in bundle.manifest.outputs]
        self._shapes: list[tuple[int, ...]] | None = None

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        with self._lock:
            try:
                self._resize([array.shape for array in arrays])
                for index, array in zip(self._inputs, arrays):
                    self._interpreter.set_tensor(index, array)
                self._interpreter.invoke()
                # asarray: of a scalar the interpreter gives no array but a number.
                return [np.asarray(self._interpreter.get_tensor(index)) for index in self._outputs]
            except InputError:
                raise
            except (RuntimeError, ValueError, MemoryError) as error:
                self._shapes = None
                raise engine_error(error, "TFLite failed while running the model") from error

    def bind(self, inputs: list[np.ndarray[Any, Any]]) -> Buffers:
        """The interpreter reads and writes its own memory alone: one copy in and one out."""
        return CopiedBuffers(self.run, inputs)

    def _resize(self, shapes: list[tuple[int, ...]]) -> None:
        if shapes == self._shapes:
            return
        if any(0 in shape for shape in shapes):
            # The XNNPACK delegate then computes shapes from memory that nobody wrote: it fails by chance.
            raise InputError("TFLite cannot run on an empty array; give at least one element in each dimension")
        for index, shape in zip(self._inputs, shapes):
            self._interpreter.resize_tensor_input(index, shape)
        with quiet():
            self._interpreter.allocate_tensors()
        self._shapes = shapes

    def close(self) -> None:
        with self._lock:
            self._interpreter = None


def _index(details: dict[str, dict[str, Any]], name: str, kind: str) -> int:
    """The tensor behind a name of the signature; the packager writes models with that one signature only."""
    if name not in details:
        raise EngineError(f"the TFLite model has no {kind} {name!r}, it has: {', '.join(sorted(details))}")
    return int(details[name]["index"])
