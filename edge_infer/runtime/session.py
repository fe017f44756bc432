"""Open a bundle and run it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_infer import bundle as bundles
from edge_infer import trust
from edge_infer.bundle import Bundle
from edge_infer.errors import InputError, SessionClosed, UsageError
from edge_infer.manifest import PROVIDERS, TensorSpec
from edge_infer.runtime import memory, plan, room
from edge_infer.runtime.buffers import Buffers
from edge_infer.runtime.cores import kept_to
from edge_infer.runtime.engines import Engine, EngineInfo, EngineOptions, check_model, engine_module, open_engine
from edge_infer.runtime.golden import read_golden
from edge_infer.runtime.inputs import InputCheck
from edge_infer.runtime.plan import Setting
from edge_infer.runtime.residency import RESIDENCIES, Memory, lock, mappings, prefault
from edge_infer.runtime.stats import Recorder, Stats
from edge_infer.store import Store, default_root, is_model_name, store_of

if TYPE_CHECKING:
    from edge_infer.runtime.predict import Image, Prediction, Predictor

Array = np.ndarray[Any, Any]


def load(
    source: str | os.PathLike[str],
    *,
    threads: int | None = None,
    verify: str = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    providers: tuple[str, ...] | None = None,
    residency: str = "lazy",
    spinning: bool | None = None,
    max_memory: int | None = None,
) -> Session:
    """Open a bundle.

    ``source`` is the name of a model in this device's store, or the path of a bundle; a plain word such as
    ``"digits"`` is a name, anything with a separator or ending in ``.edge`` and any ``Path`` is a path.

    ``threads`` defaults to what ``python -m edge_infer tune`` found best here, else to the cores this process may use;
    ``spinning``, which lets idle threads of ONNX Runtime wait in a loop, likewise, else not. ``verify="auto"`` hashes
    the files once and then trusts them until device, inode, length or times change; ``"full"`` always hashes.
    ``cache_dir`` is where that is remembered, and where an engine keeps what it makes of a model once (default: the
    store's ``cache``); the first open of a large model makes it, in a child process. ``providers`` overrides the
    bundle's order of accelerators. ``residency="lazy"`` reads weights from the storage when they are first used,
    ``"prefault"`` now, and ``"lock"`` keeps them in memory as well.

    ``max_memory``: the private memory in bytes that opening and one golden question may add to this process, over the
    imported engine; mapped files do not count. What is known to take more is refused at once, the rest is measured,
    and closed when it took more (docs/loading.md). A model known not to fit the memory that is there is always refused.

    Raises UsageError (nothing there), ReleaseNotFound, BundleError (damaged, or not signed as this device demands),
    EngineMissing, EngineError, OutOfMemory.
    """
    bundle = find_bundle(source)
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise UsageError(f"threads={threads!r}, expected a whole number of at least 1 or None")
    if providers is not None and (isinstance(providers, str) or not set(providers) <= set(PROVIDERS)):
        raise UsageError(f"providers={providers!r}, expected a tuple of {', '.join(PROVIDERS)} or None")
    if residency not in RESIDENCIES:
        raise UsageError(f"residency={residency!r} is not known, expected one of {', '.join(RESIDENCIES)}")
    if max_memory is not None and (not isinstance(max_memory, int) or max_memory < 1):
        raise UsageError(f"max_memory={max_memory!r}, expected a whole number of bytes above 0 or None")
    cache = cache_of(bundle, cache_dir)
    bundles.verify(bundle, verify, cache, check_model)
    setting = plan.chosen(bundle, cache, threads, spinning, verify)
    return open_session(
        bundle, cache, setting, providers=providers, verify=verify, residency=residency, max_memory=max_memory
    )


def open_session(
    bundle: Bundle,
    cache: Path,
    setting: Setting,
    *,
    providers: tuple[str, ...] | None = None,
    verify: str = "auto",
    residency: str = "lazy",
    max_memory: int | None = None,
) -> Session:
    """``load`` for a bundle whose files were checked, with a setting that is known."""
    trust.require_signed(bundle, cache, verify)
    options = EngineOptions(setting.threads, providers, cache, verify, setting.spinning, setting.prepack, max_memory)
    before = _private_bytes_of_engine(bundle) if max_memory is not None else 0
    with kept_to(setting.cores):
        session = Session(bundle, open_engine(bundle, options), cache, setting)
        memory.give_back()
        try:
            if residency != "lazy":
                {"prefault": prefault, "lock": lock}[residency](session.files)
            if setting.cores or max_memory is not None:
                session.warm_up()  # some engines start their threads and take their memory only now
            if max_memory is not None:
                memory.give_back()
                room.require_taken(bundle, memory.private_bytes() - before, max_memory)
        except BaseException:
            session.close()
            raise
    return session


def _private_bytes_of_engine(bundle: Bundle) -> int:
    """Private memory of this process with the engine imported."""
    engine_module(bundle).import_engine(bundle)
    memory.give_back()  # what was freed before would otherwise be taken off what opening takes
    return memory.private_bytes()


def find_bundle(source: str | os.PathLike[str]) -> Bundle:
    """The bundle that ``load`` would open."""
    if isinstance(source, str) and is_model_name(source):
        return Store(default_root()).open_current(source)
    return bundles.open_bundle(Path(source))


def cache_of(bundle: Bundle, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where ``load`` keeps what it learned and made of a bundle."""
    return Path(cache_dir) if cache_dir is not None else (store_of(bundle.path) or Store(default_root())).cache


class Session:
    """An open model. May be used from several threads; use it as a context manager or call ``close()``."""

    def __init__(
        self, bundle: Bundle, engine: Engine, cache: Path | None = None, setting: Setting | None = None
    ) -> None:
        self.bundle = bundle
        self.setting = setting or Setting(engine.info.threads)
        self._cache = cache
        self.inputs: tuple[TensorSpec, ...] = bundle.manifest.inputs
        self.outputs: tuple[TensorSpec, ...] = bundle.manifest.outputs
        self._engine: Engine | None = engine
        self._check = InputCheck(self.inputs)
        self._output_names = [spec.name for spec in self.outputs]
        self._input_names = [spec.name for spec in self.inputs]
        self._recorder = Recorder()
        self._buffers: Buffers | None = None
        self._predictor: Predictor | None = None

    @property
    def info(self) -> EngineInfo:
        """The engine package, its version, the provider really in use and the threads."""
        return self._open_engine().info

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once on arrays of exactly the names, dtypes and shapes of ``inputs``; gives arrays by output name.

        Raises InputError (before the engine sees anything), SessionClosed, EngineError, OutOfMemory.
        """
        engine = self._open_engine()
        started = time.perf_counter()
        try:
            results = engine.run(self._check.arrays(inputs))
        except Exception:
            self._recorder.failed()
            self._open_engine()  # another thread may have closed the session meanwhile; then that is the error
            raise
        self._recorder.answered(time.perf_counter() - started)
        return dict(zip(self._output_names, results))

    def warm_up(self) -> None:
        """Run once on the first golden question, which ``stats`` does not count."""
        asked, _ = read_golden(self.bundle)[0]
        self._open_engine().run(self._check.arrays(asked))

    def shapes(self, inputs: Mapping[str, Array]) -> list[tuple[int, ...]]:
        """The shapes of what ``run`` would be given, in the order of ``inputs``. Raises InputError as ``run`` does."""
        return [array.shape for array in self._check.arrays(inputs)]

    def predict(self, image: Image) -> Prediction:
        """An image through the bundle's own preprocessing, the model and the bundle's postprocessing.

        ``image`` is uint8 of height x width, or height x width x 1 (grey), 3 (RGB) or 4 (alpha is dropped), or the
        path of an image file, which Pillow reads. Gives ``ClassScore`` or ``Detection`` rows, best first; the arrays of
        ``run`` where the bundle has no postprocessing.

        Raises UsageError (a bundle without preprocessing, or of several inputs), InputError (no image, or one that
        does not fit), and what ``run`` raises.
        """
        if self._predictor is None:
            from edge_infer.runtime.predict import Predictor

            self._predictor = Predictor(self.bundle)
        return self._predictor(self.run, image)

    def bind(self, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        """Make ``input_buffers`` and ``output_buffers`` for inputs of these shapes; those made before go on no more.

        Without ``shapes`` each size that the model leaves open is 1. Raises InputError, SessionClosed, EngineError,
        OutOfMemory.
        """
        engine = self._open_engine()
        arrays = self._check.empty(shapes or {})
        self._release_buffers()
        self._buffers = engine.bind(arrays)

    @property
    def input_buffers(self) -> dict[str, Array]:
        """Arrays to write the inputs into, which ``run_buffers`` reads where they lie; made at first use.

        One thread at a time may use a session's buffers. ``run`` does not touch them.
        """
        return dict(zip(self._input_names, self._bound().inputs))

    @property
    def output_buffers(self) -> dict[str, Array]:
        """Arrays that hold the answers to the latest ``run_buffers`` until the next; copy what is to stay longer."""
        return dict(zip(self._output_names, self._bound().outputs))

    def run_buffers(self) -> None:
        """Run on what lies in ``input_buffers``; the answers are in ``output_buffers`` then.

        Nothing is checked and nothing copied, unless the engine can do no other: the TFLite interpreter, which runs
        models of less than a megabyte, copies in and out, TorchScript out. Raises SessionClosed, EngineError (also
        where an output has another shape this time), OutOfMemory.
        """
        buffers = self._bound()
        started = time.perf_counter()
        try:
            buffers.run()
        except Exception:
            self._recorder.failed()
            raise
        self._recorder.answered(time.perf_counter() - started)

    def _bound(self) -> Buffers:
        if self._buffers is None:
            self.bind()
        assert self._buffers is not None
        return self._buffers

    def _release_buffers(self) -> None:
        buffers, self._buffers = self._buffers, None
        if buffers is not None:
            buffers.close()

    @property
    def files(self) -> tuple[Path, ...]:
        """What may be mapped: the bundle, and what the engine made of it."""
        made = self._cache.glob(f"{self.bundle.digest}.*") if self._cache else ()
        return (self.bundle.path, *made)

    def memory(self) -> Memory:
        """What the process has of the model's files in memory, and its private memory; see ``Memory``."""
        found = mappings(self.files) if self._engine is not None else []
        resident = sum(mapping.resident for mapping in found)
        return Memory(
            private=memory.private_bytes(),
            mapped=sum(mapping.end - mapping.start for mapping in found),
            resident=resident,
            shared=resident - sum(mapping.changed for mapping in found),
        )

    def stats(self) -> Stats:
        """How many answers this session gave, how many calls failed, and how long the latest took."""
        return self._recorder.stats()

    def __call__(self, array: Array) -> Array:
        """``run`` for a model with one input and one output."""
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            raise InputError(
                f"this model has {len(self.inputs)} inputs and {len(self.outputs)} outputs; "
                "call run() with names, the short form takes one of each"
            )
        return self.run({self.inputs[0].name: array})[self.outputs[0].name]

    def close(self) -> None:
        """Release the engine, its memory and its mappings. May be called twice."""
        self._release_buffers()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise SessionClosed(f"the session of {self.bundle.manifest.name} is closed; load it again")
        return self._engine
