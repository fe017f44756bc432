"""LiteRT's C library, which lies in the ai-edge-litert wheel, called without its Python wrapper.

The wrapper holds the interpreter lock while a model runs, copies what goes in and comes out, and writes dozens of
lines to standard error (docs/decisions/0016-engine-cache.md). The declarations below are those of
https://github.com/google-ai-edge/LiteRT/tree/main/litert/c, whose structures are marked as stable there; tried with
2.1.6, 2.2.0 and 2.3.0.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_infer.errors import EngineError

#: The most dimensions that the library has (``LITERT_TENSOR_MAX_RANK``).
MOST_DIMENSIONS = 8
#: Options of an environment: which accelerators it looks for, and the least that it logs.
ACCELERATORS_TAG, SEVERITY_TAG = 24, 25
INTEGER, CPU, ERRORS = 2, 1, 3
#: ``LiteRtElementType`` by numpy's names.
ELEMENT_TYPES = {
    "float32": 1, "int32": 2, "uint8": 3, "int64": 4, "bool": 6, "int16": 7, "int8": 9, "float16": 10, "float64": 11,
    "uint64": 13, "uint32": 16, "uint16": 17,
}  # fmt: skip


class _Any(ctypes.Structure):
    _fields_ = (("type", c_int), ("integer", c_int64))


class EnvironmentOption(ctypes.Structure):
    _fields_ = (("tag", c_int), ("value", _Any))


class Layout(ctypes.Structure):
    """``rank`` has a flag in its highest bit."""

    _fields_ = (
        ("rank", c_uint8),
        ("_unused", c_uint8 * 3),
        ("dimensions", c_int32 * MOST_DIMENSIONS),
        ("strides", c_uint32 * MOST_DIMENSIONS),
    )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dimensions[: self.rank & 0x7F])


class TensorType(ctypes.Structure):
    _fields_ = (("element_type", c_int), ("layout", Layout))


#: Function -> its arguments. Each gives a status but for those that destroy.
FUNCTIONS: dict[str, Sequence[Any]] = {
    "CreateEnvironment": (c_int, POINTER(EnvironmentOption), POINTER(c_void_p)),
    "CreateModelFromFile": (c_void_p, c_char_p, POINTER(c_void_p)),
    "GetNumModelSignatures": (c_void_p, POINTER(c_size_t)),
    "GetModelSignature": (c_void_p, c_size_t, POINTER(c_void_p)),
    "GetSignatureKey": (c_void_p, POINTER(c_char_p)),
    "GetNumSignatureInputs": (c_void_p, POINTER(c_size_t)),
    "GetNumSignatureOutputs": (c_void_p, POINTER(c_size_t)),
    "GetSignatureInputName": (c_void_p, c_size_t, POINTER(c_char_p)),
    "GetSignatureOutputName": (c_void_p, c_size_t, POINTER(c_char_p)),
    "GetSignatureInputTensorByIndex": (c_void_p, c_size_t, POINTER(c_void_p)),
    "GetSignatureOutputTensorByIndex": (c_void_p, c_size_t, POINTER(c_void_p)),
    "GetRankedTensorType": (c_void_p, POINTER(TensorType)),
    "CreateOptions": (POINTER(c_void_p),),
    "SetOptionsHardwareAccelerators": (c_void_p, c_int),
    "CreateOpaqueOptions": (c_char_p, c_void_p, c_void_p, POINTER(c_void_p)),
    "AddOpaqueOptions": (c_void_p, c_void_p),
    "CreateCompiledModel": (c_void_p, c_void_p, c_void_p, POINTER(c_void_p)),
    "CompiledModelResizeInputTensorNonStrict": (c_void_p, c_size_t, c_size_t, POINTER(c_int), c_size_t),
    "GetCompiledModelOutputTensorLayouts": (c_void_p, c_size_t, c_size_t, POINTER(Layout), c_bool),
    "GetCompiledModelInputBufferRequirements": (c_void_p, c_size_t, c_size_t, POINTER(c_void_p)),
    "GetCompiledModelOutputBufferRequirements": (c_void_p, c_size_t, c_size_t, POINTER(c_void_p)),
    "GetTensorBufferRequirementsBufferSize": (c_void_p, POINTER(c_size_t)),
    "CreateTensorBufferFromHostMemory": (POINTER(TensorType), c_void_p, c_size_t, c_void_p, POINTER(c_void_p)),
    "RunCompiledModel": (c_void_p, c_size_t, c_size_t, POINTER(c_void_p), c_size_t, POINTER(c_void_p)),
    "CompiledModelGetProfiler": (c_void_p, POINTER(c_void_p)),
    "StartProfiler": (c_void_p,),
    "StopProfiler": (c_void_p,),
    "GetNumProfilerEvents": (c_void_p, POINTER(c_int)),
    "GetProfilerEvents": (c_void_p, c_int, c_void_p),
}
DESTROYERS = ("TensorBuffer", "CompiledModel", "Options", "Model", "Environment")


class Library:
    """The functions without their prefix, each raising EngineError with the status that it gives."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        for name in FUNCTIONS:
            setattr(self, name, _checked(loaded, name))
        self._loaded = loaded
        self._destroyers = {kind: _plain(loaded, f"LiteRtDestroy{kind}", (c_void_p,)) for kind in DESTROYERS}
        libc = ctypes.CDLL(None)
        self._strdup = libc.strdup
        self._strdup.argtypes, self._strdup.restype = (c_char_p,), c_void_p
        self._free = ctypes.cast(libc.free, c_void_p)

    if TYPE_CHECKING:  # the functions that __init__ sets

        def __getattr__(self, name: str) -> Callable[..., None]: ...

    def bound(self, name: str, *arguments: Any) -> Callable[[], None]:
        """A function with arguments that stay, for what is called over and over."""
        function = functools.partial(_declared(self._loaded, name), *arguments)

        def call() -> None:
            if status := function():
                raise _failed(name, status)

        return call

    def made(self, name: str, *arguments: Any) -> c_void_p:
        """What a function leaves behind its last argument."""
        handle = c_void_p()
        getattr(self, name)(*arguments, byref(handle))
        return handle

    def counted(self, name: str, of: c_void_p) -> int:
        count = c_size_t()
        getattr(self, name)(of, byref(count))
        return count.value

    def named(self, name: str, *arguments: Any) -> str:
        text = c_char_p()
        getattr(self, name)(*arguments, byref(text))
        return (text.value or b"").decode()

    def destroy(self, kind: str, handle: c_void_p) -> None:
        self._destroyers[kind](handle)

    def environment(self) -> c_void_p:
        """An environment that looks for no accelerators and tells of errors alone."""
        options = (EnvironmentOption * 2)(
            EnvironmentOption(ACCELERATORS_TAG, _Any(INTEGER, CPU)),
            EnvironmentOption(SEVERITY_TAG, _Any(INTEGER, ERRORS)),
        )
        return self.made("CreateEnvironment", len(options), options)

    def cpu_options(self, threads: int, weights: int) -> c_void_p:
        """How a model is compiled; ``weights`` is the descriptor of the file with XNNPACK's weights."""
        options = self.made("CreateOptions")
        self.SetOptionsHardwareAccelerators(options, CPU)
        self.ask(options, "xnnpack", f"num_threads = {threads}\nweight_cache_file_descriptor = {weights}\n")
        return options

    def ask(self, options: c_void_p, part: str, wishes: str) -> None:
        """Add what a part of the library is to do, as TOML. A part that does not know its name asks for nothing."""
        # The library frees the text, and so it has to come from the C library's heap.
        text = self._strdup(wishes.encode())
        self.AddOpaqueOptions(options, self.made("CreateOpaqueOptions", part.encode(), text, self._free))


@functools.cache
def library(path: Path) -> Library:
    """The library at ``path``, loaded once. Raises OSError, AttributeError when it is another than expected."""
    return Library(path)


def _plain(loaded: ctypes.CDLL, name: str, arguments: Sequence[Any]) -> Any:
    function = getattr(loaded, name)
    function.argtypes, function.restype = tuple(arguments), None
    return function


def _checked(loaded: ctypes.CDLL, name: str) -> Callable[..., None]:
    function = _declared(loaded, name)

    def call(*given: Any) -> None:
        if status := function(*given):
            raise _failed(name, status)

    return call


def _declared(loaded: ctypes.CDLL, name: str) -> Any:
    function = getattr(loaded, f"LiteRt{name}")
    function.argtypes, function.restype = tuple(FUNCTIONS[name]), c_int
    return function


def _failed(name: str, status: int) -> EngineError:
    return EngineError(f"LiteRT's {name} failed with status {status}")
