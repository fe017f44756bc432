"""ONNX models through ONNX Runtime, with weights in a file of their own that is mapped, not read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_infer.errors import BundleError, EngineError, EngineMissing
from edge_infer.runtime import engine_cache, memory, room
from edge_infer.runtime.buffers import Buffers, zeros
from edge_infer.runtime.engine_cache import Build, Entry, engine_build
from edge_infer.runtime.engines import EngineInfo, EngineOptions, engine_error, missing, require_version
from edge_infer.runtime.engines import onnx_providers as providers
from edge_infer.runtime.gpu import facts as gpu_facts
from edge_infer.runtime.gpu import tensorrt_version
from edge_infer.runtime.onnx_files import external_locations
from edge_infer.runtime.quiet import quiet

if TYPE_CHECKING:
    from tempfile import TemporaryDirectory

    from edge_infer.bundle import Bundle

CPU_ONLY = [providers.NAMES["cpu"]]
#: TensorRT tries many kernels for each layer, which takes minutes on a small board.
TENSORRT_S = 900.0
FAILED = "ONNX Runtime failed while running the model"
#: Of the memory that there is, what repacking weights has to leave.
SPARED_BYTES = engine_cache.CHILD_BYTES

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
    package = _package(onnxruntime)
    require_version(bundle, package, onnxruntime.__version__)
    present, notes = _present(bundle, options, onnxruntime)
    for order in providers.orders(present):
        try:
            opened = _open(bundle, options, order, adjust)
        except _Unusable as unusable:
            notes = (*notes, *unusable.notes)
            continue
        opened.info = replace(opened.info, notes=(*notes, *opened.info.notes))
        return opened
    raise EngineError(
        f"none of {', '.join(options.providers or bundle.manifest.artifact.providers)} can be used here "
        f"({'; '.join(notes)}); leave the choice to the bundle or allow 'cpu' as well"
    )


class _Unusable(Exception):
    """The first provider of an order cannot be used; ``notes`` say why."""

    def __init__(self, *notes: str) -> None:
        super().__init__(*notes)
        self.notes = notes


def _package(onnxruntime: Any) -> str:
    """Told by what it can do: asking importlib.metadata takes longer than opening a model."""
    return "onnxruntime-gpu" if providers.NAMES["cuda"] in onnxruntime.get_available_providers() else "onnxruntime"


def _present(bundle: Bundle, options: EngineOptions, onnxruntime: Any) -> tuple[list[str], tuple[str, ...]]:
    """Of the providers that are wanted, those that this build has, and a note for each other."""
    wanted, available = options.providers or bundle.manifest.artifact.providers, onnxruntime.get_available_providers()
    absent = [name for name in wanted if providers.NAMES[name] not in available]
    notes = tuple(f"{name} is not in this build of onnxruntime" for name in absent)
    present = [name for name in wanted if name not in absent]
    # A bundle's own order ends with the processor, whether it says so or not; one that was asked for does not.
    return present if options.providers else [*present, "cpu"], notes


def _open(bundle: Bundle, options: EngineOptions, order: Sequence[str], adjust: Callable[[Any], None]) -> OnnxEngine:
    """Open with these providers. Raises _Unusable where another order may do."""
    if tuple(order) == ("cpu",):
        return _open_on_cpu(bundle, options, adjust)
    with ExitStack() as stack:
        engines = _tensorrt_engines(bundle, options) if order[0] == "tensorrt" else None
        if engines is not None:
            stack.callback(engines.cleanup)
        session = _session(bundle, options, order, adjust, Path(engines.name) if engines else None)
        used, notes = providers.placement(order, providers.assigned(session))
        if used == "cpu" and "cpu" not in order:
            raise _Unusable(*notes)
        stack.pop_all()  # from here on they are the engine's
    import onnxruntime

    notes = (*notes, "idle threads spin") if options.spinning else notes
    info = EngineInfo(_package(onnxruntime), onnxruntime.__version__, used, options.threads, notes)
    return OnnxEngine(bundle, session, info, engines)


def _session(
    bundle: Bundle, options: EngineOptions, order: Sequence[str], adjust: Callable[[Any], None], engines: Path | None
) -> Any:
    """A session that has the first of ``order``, and tells what runs where. Raises _Unusable."""
    import onnxruntime

    artifact, first = bundle.manifest.artifact, order[0]
    settings = session_options(bundle, options.threads, options.spinning, options.prepack)
    settings.add_session_config_entry(providers.RECORD_ASSIGNMENT, "1")
    adjust(settings)
    listed = providers.with_options(order, artifact.precision, onnxruntime.__version__, engines)
    library = providers.library_of(first, Path(onnxruntime.__file__).parent)
    try:
        with quiet():
            # Without its own fallback, which changes providers behind our back, also in the middle of a run.
            session = onnxruntime.InferenceSession(
                str(bundle.file(artifact.model)), settings, providers=listed, enable_fallback=0
            )
    except Exception as error:
        raise _Unusable(providers.why_not(first, library, error)) from error
    session.disable_fallback()  # releases that do not know the option above, 1.20 among them
    if providers.NAMES[first] not in session.get_providers():
        raise _Unusable(providers.why_not(first, library))
    return session


def _open_on_cpu(bundle: Bundle, options: EngineOptions, adjust: Callable[[Any], None]) -> OnnxEngine:
    import onnxruntime

    notes: tuple[str, ...] = ("idle threads spin",) if options.spinning else ()
    entry = _laid_out(bundle, options)
    if why := _why_not_repacked(bundle, options, entry):
        notes = (*notes, f"weights are not repacked, which is slower: {why}")
        options = replace(options, prepack=False)
        entry = _laid_out(bundle, options)
    model = bundle.file(bundle.manifest.artifact.model)
    settings = session_options(bundle, options.threads, options.spinning, options.prepack)
    if entry is not None and not entry.failed:
        model = entry.file(MODEL)
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was done
    else:
        room.require(bundle, _least_private(bundle, options), options.max_memory)
        notes = (*notes, f"weights are laid out in private memory: {entry.failed}") if entry else notes
    adjust(settings)
    session = onnxruntime.InferenceSession(str(model), settings, providers=CPU_ONLY, enable_fallback=0)
    info = EngineInfo(_package(onnxruntime), onnxruntime.__version__, "cpu", options.threads, notes)
    return OnnxEngine(bundle, session, info)


def _laid_out(bundle: Bundle, options: EngineOptions) -> Entry | None:
    """What there is to map, made if need be; None without a cache, and for a model that is too small for one."""
    import onnxruntime

    if options.cache is None or not engine_cache.worth_it(bundle):
        return None
    facts, build = _facts(onnxruntime), Build(private_bytes=_repacked_bytes(bundle, options))
    if options.prepack not in (None, bundle.manifest.artifact.prepack):
        facts["prepack"] = str(options.prepack)
        build = replace(build, arguments=("--prepack" if options.prepack else "--no-prepack",))
    return engine_cache.entry(bundle, options.cache, facts, options.verify, build)


def _why_not_repacked(bundle: Bundle, options: EngineOptions, entry: Entry | None) -> str:
    """Why weights that should be repacked cannot be: there is no memory for that, in a child or here."""
    takes = _repacked_bytes(bundle, options)
    if takes < room.NOTABLE_BYTES or (entry is not None and not entry.failed):
        return ""
    if entry is not None and entry.lacks_memory:
        return entry.failed
    has = memory.available_bytes()
    # Those who use the board beside this process need some too.
    return f"it takes {takes:,} bytes of private memory, the system has {has:,}" if takes + SPARED_BYTES > has else ""


def _facts(onnxruntime: Any) -> dict[str, str]:
    """What of an onnxruntime decides whether it can use what one made."""
    from onnxruntime.capi import onnxruntime_pybind11_state as library

    version, build = onnxruntime.__version__, engine_build(Path(library.__file__))
    return {"engine": _package(onnxruntime), "version": version, "build": build}


def _repacked_bytes(bundle: Bundle, options: EngineOptions) -> int:
    """The most that repacked weights take: as much as they themselves do, of which more than half is repacked
    (decision 7)."""
    artifact = bundle.manifest.artifact
    repacks = artifact.prepack if options.prepack is None else options.prepack
    return bundle.manifest.files[artifact.weights].size if artifact.weights and repacks else 0


def _least_private(bundle: Bundle, options: EngineOptions) -> int:
    """Bytes that are read or repacked in any case."""
    return bundle.manifest.files[bundle.manifest.artifact.model].size + _repacked_bytes(bundle, options) // 2


def _tensorrt_engines(bundle: Bundle, options: EngineOptions) -> TemporaryDirectory[str] | None:
    """A copy of the engines that TensorRT made of this model for this GPU, made now where there are none.

    A copy, since TensorRT writes over them when inputs have other sizes. Without a cache folder it builds them at each
    open. Raises _Unusable where a child could not make them: this process shall not try what may have crashed there.
    """
    import onnxruntime

    if options.cache is None:
        return None
    version, here = tensorrt_version(), gpu_facts()
    if version is None or here is None:
        missing_part = "TensorRT (libnvinfer)" if version is None else "a GPU (libcuda)"
        raise _Unusable(f"tensorrt failed to initialise: {missing_part} is not here")
    choices = providers.provider_options("tensorrt", bundle.manifest.artifact.precision, onnxruntime.__version__)
    facts = {**_facts(onnxruntime), **here, "tensorrt": version, "options": json.dumps(choices, sort_keys=True)}
    build = engine_cache.Build(("--provider", "tensorrt"), TENSORRT_S)
    entry = engine_cache.entry(bundle, options.cache, facts, options.verify, build)
    if entry.failed:
        raise _Unusable(f"tensorrt could not build its engines: {entry.failed}")
    import shutil
    import tempfile

    copy = tempfile.TemporaryDirectory(prefix="edge-infer-tensorrt-")
    for name in entry.files:
        shutil.copyfile(entry.file(name), Path(copy.name) / name)
    return copy


def prepare(bundle: Bundle, options: EngineOptions, folder: Path) -> OnnxEngine:
    """Leave in ``folder`` what later opens map: for ``providers`` that begin with tensorrt its engines, else the model
    laid out for the processor. The engine that is given has made or opened those files."""
    import_engine(bundle)
    if options.providers and options.providers[0] == "tensorrt":
        return _build_engines(bundle, options, folder)
    return _lay_out(bundle, options, folder)


def _build_engines(bundle: Bundle, options: EngineOptions, folder: Path) -> OnnxEngine:
    """TensorRT builds while it opens a model, and in the first run where sizes are open."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    order = [name for name in ("tensorrt", "cuda") if providers.NAMES[name] in available]
    if "tensorrt" not in order:
        raise EngineError("tensorrt is not in this build of onnxruntime")
    try:
        session = _session(bundle, options, order, lambda settings: None, folder)
    except _Unusable as unusable:
        # Not EngineError, which would be kept as the model's lasting fault.
        raise EngineMissing("; ".join(unusable.notes)) from unusable
    used, notes = providers.placement(order, providers.assigned(session))
    if used != "tensorrt":
        raise EngineError("; ".join(notes))
    version = onnxruntime.__version__
    info = EngineInfo(_package(onnxruntime), version, used, options.threads, notes)
    return OnnxEngine(bundle, session, info)


def _lay_out(bundle: Bundle, options: EngineOptions, folder: Path) -> OnnxEngine:
    """Leave in ``folder`` the model as it was optimized for this processor, its weights in a file beside it: as
    convolutions were laid out anew for it, and repacked where the bundle says so.

    The engine that is given opened those files, as later opens do.
    https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html#onnx-runtime-prepacked-weights
    """
    import onnxruntime

    settings = session_options(bundle, options.threads, options.spinning, options.prepack)
    settings.optimized_model_filepath = str(folder / MODEL)
    for name, value in KEEPING.items():
        settings.add_session_config_entry(f"session.{name}", value)
    onnxruntime.InferenceSession(
        str(bundle.file(bundle.manifest.artifact.model)), settings, providers=CPU_ONLY, enable_fallback=0
    )
    settings = session_options(bundle, options.threads, options.spinning, options.prepack)
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / MODEL), settings, providers=CPU_ONLY, enable_fallback=0)
    return OnnxEngine(bundle, session, EngineInfo("onnxruntime", onnxruntime.__version__, "cpu", options.threads))


def session_options(bundle: Bundle, threads: int, spinning: bool = False, prepack: bool | None = None) -> Any:
    """The options a bundle is opened with; public so that anyone can compare with the plain engine."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle worker threads that spin starve the application on a small board.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    target = bundle.manifest.target
    if not saturates(target.architecture, target.cpu_features):
        # Weights of 8 bits: this machine's kernels are to answer as the device's do, and as the model says.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not (bundle.manifest.artifact.prepack if prepack is None else prepack):
        # Repacked weights would live on the heap, a private copy in every process.
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def saturates(architecture: str, cpu_features: Iterable[str]) -> bool:
    """Whether the fast 8-bit kernels of such a processor want weights of 7 bits.

    An x86 processor without VNNI adds pairs of 8-bit products in 16 bits, which saturate.
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#when-to-use-reduce-range-and-per-channel-quantization
    """
    return architecture == "x86_64" and not {"avx512_vnni", "avx_vnni"} & set(cpu_features)


class OnnxEngine:
    """An inference session, which is made for several threads at once."""

    def __init__(
        self, bundle: Bundle, session: Any, info: EngineInfo, engines: TemporaryDirectory[str] | None = None
    ) -> None:
        self.info = info
        self._session = session
        self._engines = engines
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
        engines, self._engines = self._engines, None
        if engines is not None:
            engines.cleanup()


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
