"""TFLite models through LiteRT's compiled model, whose weights are mapped in the order in which XNNPACK reads them.

An interpreter repacks all weights into private memory each time a model is opened. A compiled model can keep them in a
file and map that: opened in milliseconds, shared by all processes. In return it does not check the model and crashes on
some; so the file is made in a child, which also asks the golden questions of it, and a model that fails there is left
to the interpreter for good.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from ctypes import byref, c_int, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_infer.errors import EngineError, InputError
from edge_infer.runtime import engine_cache
from edge_infer.runtime.buffers import Buffers, zeros
from edge_infer.runtime.engine_cache import Entry, engine_build
from edge_infer.runtime.engines import EngineInfo, at_least, engine_error
from edge_infer.runtime.engines.litert_library import (
    ELEMENT_TYPES,
    MOST_DIMENSIONS,
    Layout,
    Library,
    TensorType,
    library,
)
from edge_infer.runtime.quiet import quiet

if TYPE_CHECKING:
    from edge_infer.bundle import Bundle
    from edge_infer.manifest import TensorSpec

Array = np.ndarray[Any, Any]

WEIGHTS = "xnnpack.weights"
#: The release since which the library's functions take the arguments that they take today.
LIBRARY_SINCE = "2.1.6"


def suits(bundle: Bundle) -> bool:
    """Whether a compiled model is worth a try here for this bundle."""
    return engine_cache.worth_it(bundle) and can_compile(bundle)


def can_compile(bundle: Bundle) -> bool:
    """Whether there is a library here, and a type in it for each of the bundle's tensors."""
    specs = (*bundle.manifest.inputs, *bundle.manifest.outputs)
    return (
        all(spec.dtype in ELEMENT_TYPES and len(spec.shape) <= MOST_DIMENSIONS for spec in specs)
        and _library_path() is not None
    )


def repacked(bundle: Bundle, version: str, folder: Path, verify: str) -> Entry:
    """The weights as XNNPACK reads them, made when they are not there."""
    library_path = _library_path()
    assert library_path is not None, "can_compile() says so"
    facts = {"engine": "ai-edge-litert", "version": version, "build": engine_build(library_path)}
    return engine_cache.entry(bundle, folder, facts, verify)


def _library_path() -> Path | None:
    """The library in the wheel of ai-edge-litert; None where that is not installed, or older than LIBRARY_SINCE."""
    try:
        package = importlib.import_module("ai_edge_litert")
    except ImportError:
        return None
    if not at_least(str(getattr(package, "__version__", "0")), LIBRARY_SINCE):
        return None
    path = Path(package.__file__ or "").parent / "libLiteRt.so"
    return path if path.is_file() else None


class CompiledEngine:
    """One compiled model behind a lock, for the sizes it was last run with; it is compiled anew for others.

    Compiling takes a millisecond or two, since the weights are packed already. Without a file at ``weights`` they are
    packed now and stored there.
    """

    def __init__(self, bundle: Bundle, info: EngineInfo, weights: Path) -> None:
        self.info = info
        self._lock = threading.Lock()
        self._model: _Model | None = _Model(bundle, info.threads, weights)
        self._compiled: _Compiled | None = None
        inputs = bundle.manifest.inputs
        if not any(None in spec.shape[1:] for spec in inputs):  # else nobody knows which sizes the model can take
            try:
                self._compile([tuple(size or 1 for size in spec.shape) for spec in inputs])
            except EngineError:
                self.close()
                raise

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        with self._lock:
            return self._run(arrays)

    def _run(self, arrays: Sequence[Array]) -> list[Array]:
        compiled, shapes = self._compiled, [array.shape for array in arrays]
        try:
            if compiled is None or compiled.shapes != shapes:
                compiled = self._compile(shapes)
            return compiled.answer(arrays)
        except (EngineError, MemoryError, OSError) as error:
            self._forget()  # whatever state it was left in
            raise engine_error(error, "TFLite failed while running the model") from error

    def bind(self, inputs: list[Array]) -> Buffers:
        """The compiled model's own arrays, its answers to ``inputs`` in place; ``run`` compiles another for itself."""
        with self._lock:
            self._run(inputs)
            compiled, self._compiled = self._compiled, None
        assert compiled is not None, "it has just run"
        return compiled

    def _compile(self, shapes: list[tuple[int, ...]]) -> _Compiled:
        if any(0 in shape for shape in shapes):
            raise InputError("TFLite cannot run on an empty array; give at least one element in each dimension")
        self._forget()  # its memory is free before the next one takes some
        if self._model is None:
            raise EngineError("the model is closed")
        with quiet():
            self._compiled = _Compiled(self._model, shapes)
        return self._compiled

    def _forget(self) -> None:
        if self._compiled is not None:
            self._compiled.close()
        self._compiled = None

    def close(self) -> None:
        with self._lock:
            self._forget()
            if self._model is not None:
                self._model.close()
            self._model = None


class _Model:
    """An opened model: what stays the same whatever the sizes of its inputs."""

    def __init__(self, bundle: Bundle, threads: int, weights: Path) -> None:
        path = _library_path()
        if path is None:
            raise EngineError(f"this Python has no LiteRT library; install ai-edge-litert {LIBRARY_SINCE} or later")
        self.library: Library = library(path)
        self.threads, self._weights = threads, weights
        self._kept: int | None = None
        self.inputs, self.outputs = bundle.manifest.inputs, bundle.manifest.outputs
        self._close = ExitStack()
        try:
            if weights.exists():
                # Held open, so that it can be mapped again when the release was collected meanwhile.
                self._kept = os.open(weights, os.O_RDONLY | os.O_CLOEXEC)
                self._close.callback(os.close, self._kept)
            self.environment = self._keep("Environment", self.library.environment())
            model = os.fsencode(bundle.file(bundle.manifest.artifact.model))
            self.handle = self._keep("Model", self.library.made("CreateModelFromFile", self.environment, model))
            self.signature, self.signature_index = self._signature(str(bundle.manifest.artifact.signature))
            self.input_places = self._places("Input", self.inputs)
            self.output_places = self._places("Output", self.outputs)
        except BaseException:
            self.close()
            raise

    def _keep(self, kind: str, handle: c_void_p) -> c_void_p:
        self._close.callback(self.library.destroy, kind, handle)
        return handle

    def options(self) -> c_void_p:
        """How to compile, once: the library takes and closes the descriptor."""
        if self._kept is None:
            descriptor = os.open(self._weights, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        else:  # for reading alone: no engine can change it
            descriptor = os.open(f"/proc/self/fd/{self._kept}", os.O_RDONLY | os.O_CLOEXEC)
        return self.library.cpu_options(self.threads, descriptor)

    def _signature(self, key: str) -> tuple[c_void_p, int]:
        lib = self.library
        found = []
        for index in range(lib.counted("GetNumModelSignatures", self.handle)):
            signature = lib.made("GetModelSignature", self.handle, index)
            found.append(lib.named("GetSignatureKey", signature))
            if found[-1] == key:
                return signature, index
        raise EngineError(f"the TFLite model has no signature {key!r}, it has: {', '.join(found)}")

    def _places(self, kind: str, specs: Sequence[TensorSpec]) -> list[int]:
        """Where the signature has each of ``specs``."""
        lib = self.library
        count = lib.counted(f"GetNumSignature{kind}s", self.signature)
        names = [lib.named(f"GetSignature{kind}Name", self.signature, index) for index in range(count)]
        if sorted(names) != sorted(spec.name for spec in specs):
            raise EngineError(f"the TFLite model's {kind.lower()}s are {', '.join(names)}; package it again")
        return [names.index(spec.name) for spec in specs]

    def close(self) -> None:
        self._close.close()


class _Compiled:
    """A model for inputs of given shapes, with arrays of our own for all that goes in and comes out."""

    def __init__(self, model: _Model, shapes: list[tuple[int, ...]]) -> None:
        self.shapes = shapes
        self._model, lib = model, model.library
        self._close = ExitStack()
        try:
            options = model.options()
            self._close.callback(lib.destroy, "Options", options)
            self._handle = lib.made("CreateCompiledModel", model.environment, model.handle, options)
            self._close.callback(lib.destroy, "CompiledModel", self._handle)
            signature = model.signature_index
            for place, spec, shape in zip(model.input_places, model.inputs, shapes):
                if None in spec.shape:
                    sizes = (c_int * len(shape))(*shape)
                    lib.CompiledModelResizeInputTensorNonStrict(self._handle, signature, place, sizes, len(shape))
            layouts = (Layout * len(model.outputs))()
            lib.GetCompiledModelOutputTensorLayouts(self._handle, signature, len(layouts), layouts, True)
            answers = [layouts[place].shape for place in model.output_places]
            given = [self._buffer("Input", *row) for row in zip(model.input_places, model.inputs, shapes)]
            made = [self._buffer("Output", *row) for row in zip(model.output_places, model.outputs, answers)]
        except BaseException:
            self.close()
            raise
        self.inputs, self.outputs = [array for array, _ in given], [array for array, _ in made]
        self._given = _in_order(model.input_places, [handle for _, handle in given])
        self._made = _in_order(model.output_places, [handle for _, handle in made])
        self.run = lib.bound(
            "RunCompiledModel", self._handle, signature, len(given), self._given, len(made), self._made
        )

    def _buffer(self, kind: str, place: int, spec: TensorSpec, shape: tuple[int, ...]) -> tuple[Array, c_void_p]:
        """An array, and the library's handle on it."""
        model, lib = self._model, self._model.library
        tensor = lib.made(f"GetSignature{kind}TensorByIndex", model.signature, place)
        type_ = TensorType()
        lib.GetRankedTensorType(tensor, byref(type_))
        if type_.element_type != ELEMENT_TYPES[spec.dtype] or len(type_.layout.shape) != len(shape):
            raise EngineError(f"the TFLite model's {spec.name!r} is of another type than {spec}; package it again")
        type_.layout.dimensions[: len(shape)] = shape
        needs = lib.made(f"GetCompiledModel{kind}BufferRequirements", self._handle, model.signature_index, place)
        size = lib.counted("GetTensorBufferRequirementsBufferSize", needs)
        dtype = np.dtype(spec.dtype)
        count = int(np.prod(shape, dtype=np.int64))
        if any(length < 0 for length in shape) or size < count * dtype.itemsize:
            raise EngineError(f"LiteRT knows no size for {spec.name!r} before it has run")
        array = zeros(shape, dtype, size)
        handle = lib.made("CreateTensorBufferFromHostMemory", byref(type_), array.ctypes.data, size, None)
        self._close.callback(lib.destroy, "TensorBuffer", handle)
        return array, handle

    def answer(self, arrays: Sequence[Array]) -> list[Array]:
        for mine, array in zip(self.inputs, arrays):
            mine[...] = array
        self.run()
        return [mine.copy() for mine in self.outputs]

    def profiler(self) -> c_void_p:
        """The library's handle on what it notes of each run; none where the options did not ask for it."""
        return self._model.library.made("CompiledModelGetProfiler", self._handle)

    def close(self) -> None:
        self._close.close()


def _in_order(places: Sequence[int], handles: Sequence[c_void_p]) -> Any:
    """Handles as the library's array has them: by place in the signature."""
    array = (c_void_p * len(handles))()
    for place, handle in zip(places, handles):
        array[place] = handle.value
    return array
