"""ONNX models through ONNX Runtime, with weights in a file of their own that is mapped, not read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_infer.errors import BundleError, EngineError
from edge_infer.runtime import engine_cache, room
from edge_infer.runtime.buffers import Buffers, zeros
from edge_infer.runtime.engine_cache import Entry, engine_build
from edge_infer.runtime.engines import EngineInfo, EngineOptions, engine_error, missing, require_version
from edge_infer.runtime.onnx_files import external_locations

if TYPE_CHECKING:
    from edge_infer.bundle import Bundle

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}


FAILED = "ONNX Runtime failed while running the model"

#: In the engine cache: the optimized model, and how it is written.
MODEL = "model.onnx"
KEEPING = {
    "save_external_prepacked_constant_initializers": "1",
    "optimized_model_external_initializers_file_name": "weights.bin",
    "optimized_model_external_initializers_min_size_in_bytes": "1024",
}


def check_model(bundle: Bundle) -> None:
    """Refuse a model that points at files outside its bundle: ONNX stores such paths as free text."""
    model = bundle.file(bundle.manifest.artifact.model)
    for location in sorted(external_locations(model.read_bytes())):
        if location not in bundle.manifest.files:
            raise BundleError(f"{model} refers to the file {location!r}, which is not part of the bundle; refused")


def import_engine(bundle: Bundle) -> Any:
    """The onnxruntime module. Raises EngineMissing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise missing(bundle, error) from None
    return onnxruntime


def open_model(
    bundle: Bundle, options: EngineOptions, adjust: Callable[[Any], None] = lambda settings: None
) -> OnnxEngine:
    """``adjust`` is given the session's options last."""
    onnxruntime = import_engine(bundle)
    version = onnxruntime.__version__
    available = onnxruntime.get_available_providers()
    # Told by what it can do: asking importlib.metadata takes longer than opening a model.
    package = "onnxruntime-gpu" if PROVIDERS["cuda"] in available else "onnxruntime"
    require_version(bundle, package, version)
    providers, notes = _providers(bundle, options, available)
    notes = (*notes, "idle threads spin") if options.spinning else notes
    model = bundle.file(bundle.manifest.artifact.model)
    settings = session_options(bundle, options.threads, options.spinning, options.prepack)
    if options.cache is not None and engine_cache.worth_it(bundle) and providers == [PROVIDERS["cpu"]]:
        entry = _laid_out(bundle, package, options)
        if entry.failed:
            notes = (*notes, f"weights are laid out in private memory: {entry.failed}")
        else:
            model = entry.file(MODEL)
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was done
    if model == bundle.file(bundle.manifest.artifact.model):
        room.require(bundle, _least_private(bundle), options.max_memory)
    adjust(settings)
    session = onnxruntime.InferenceSession(str(model), settings, providers=providers)
    used = {value: name for name, value in PROVIDERS.items()}[session.get_providers()[0]]
    return OnnxEngine(bundle, session, EngineInfo(package, version, used, options.threads, notes))


def _least_private(bundle: Bundle) -> int:
    """Bytes that are read or repacked in any case: with ``prepack``, more than half of the weights (decision 7)."""
    artifact, files = bundle.manifest.artifact, bundle.manifest.files
    weights = files[artifact.weights].size if artifact.weights and artifact.prepack else 0
    return files[artifact.model].size + weights // 2


def prepare(bundle: Bundle, options: EngineOptions, folder: Path) -> OnnxEngine:
    """Leave in ``folder`` the model as it was optimized for this processor, its weights in a file beside it: as
    convolutions were laid out anew for it, and repacked where the bundle says so.

    The engine that is given opened those files, as later opens do.
    https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html#onnx-runtime-prepacked-weights
    """
    onnxruntime = import_engine(bundle)
    settings = session_options(bundle, options.threads, options.spinning, options.prepack)
    settings.optimized_model_filepath = str(folder / MODEL)
    for name, value in KEEPING.items():
        settings.add_session_config_entry(f"session.{name}", value)
    onnxruntime.InferenceSession(
        str(bundle.file(bundle.manifest.artifact.model)), settings, providers=[PROVIDERS["cpu"]]
    )
    settings = session_options(bundle, options.threads, options.spinning, options.prepack)
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / MODEL), settings, providers=[PROVIDERS["cpu"]])
    return OnnxEngine(bundle, session, EngineInfo("onnxruntime", onnxruntime.__version__, "cpu", options.threads))


def _laid_out(bundle: Bundle, package: str, options: EngineOptions) -> Entry:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as library

    facts = {"engine": package, "version": onnxruntime.__version__, "build": engine_build(Path(library.__file__))}
    if options.prepack not in (None, bundle.manifest.artifact.prepack):
        facts["prepack"] = str(options.prepack)
    assert options.cache is not None
    return engine_cache.entry(bundle, options.cache, facts, options.verify, options.prepack)


def session_options(bundle: Bundle, threads: int, spinning: bool = False, prepack: bool | None = None) -> Any:
    """The options a bundle is opened with; public so that anyone can compare with the plain engine."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle worker threads that spin starve the application on a small board.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if not (bundle.manifest.artifact.prepack if prepack is None else prepack):
        # Repacked weights would live on the heap, a private copy in every process.
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _providers(bundle: Bundle, options: EngineOptions, available: list[str]) -> tuple[list[str], tuple[str, ...]]:
    wanted = options.providers or bundle.manifest.artifact.providers
    if options.providers:
        absent = [name for name in wanted if PROVIDERS[name] not in available]
        if absent:
            raise EngineError(
                f"this onnxruntime has no provider {absent[0]!r}, it has: {', '.join(available)}; "
                "install a build that has it or leave the choice to the bundle"
            )
    usable = [PROVIDERS[name] for name in wanted if PROVIDERS[name] in available]
    notes = tuple(f"no {name} here" for name in wanted if PROVIDERS[name] not in available)
    if PROVIDERS["cpu"] not in usable:
        usable.append(PROVIDERS["cpu"])
    return usable, notes


class OnnxEngine:
    """An inference session, which is made for several threads at once."""

    def __init__(self, bundle: Bundle, session: Any, info: EngineInfo) -> None:
        self.info = info
        self._session = session
        self._inputs = [spec.name for spec in bundle.manifest.inputs]
        self._outputs = [spec.name for spec in bundle.manifest.outputs]

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        try:
            results: list[np.ndarray[Any, Any]] = self._session.run(self._outputs, dict(zip(self._inputs, arrays)))
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise engine_error(error, FAILED) from error
        return results

    def bind(self, inputs: list[np.ndarray[Any, Any]]) -> Buffers:
        return OnnxBuffers(self._session, self._inputs, inputs, self._outputs, self.run(inputs))

    def end_profiling(self) -> str:
        """The path of the file, where the session's options asked for a profile."""
        return str(self._session.end_profiling())

    def close(self) -> None:
        self._session = None


class OnnxBuffers:
    """Arrays whose addresses the session knows; with an accelerator it copies them there and back itself."""

    def __init__(
        self,
        session: Any,
        input_names: Sequence[str],
        inputs: list[np.ndarray[Any, Any]],
        output_names: Sequence[str],
        answers: Sequence[np.ndarray[Any, Any]],
    ) -> None:
        self.inputs, self.outputs = inputs, [zeros(answer.shape, answer.dtype) for answer in answers]
        for buffer, answer in zip(self.outputs, answers):
            buffer[...] = answer
        self._session, self._binding = session, session.io_binding()
        for bind, names, arrays in (
            (self._binding.bind_input, input_names, self.inputs),
            (self._binding.bind_output, output_names, self.outputs),
        ):
            for name, array in zip(names, arrays):
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise engine_error(error, FAILED) from error

    def close(self) -> None:
        self._session = self._binding = None
