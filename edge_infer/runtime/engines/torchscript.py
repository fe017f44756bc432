"""TorchScript models: a skeleton without weights, loaded as usual, over weights that are mapped from a flat file.

``torch.jit.load`` copies every weight into private memory. The packager therefore takes the tensors out of the
archive and notes in it (extra file ``tensors.json``) where each lies in the weights file; here each parameter and
buffer becomes a view into one mapping. Tensors that shared a storage share it again. The packed weights of quantized
layers are made of such views: the kernels then repack them at the first run, but nothing is read before.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_infer.errors import BundleError, EngineError
from edge_infer.runtime import room
from edge_infer.runtime.buffers import Buffers, CopiedBuffers, write
from edge_infer.runtime.engines import EngineInfo, EngineOptions, engine_error, missing, require_version
from edge_infer.runtime.memory import give_back

if TYPE_CHECKING:
    from edge_infer.bundle import Bundle

#: Name of the extra file in the skeleton that says where each tensor lies.
TENSOR_TABLE = "tensors.json"
FAILED = "TorchScript failed while running the model"
#: The strategy for fusing operators is set for the whole process, if only while a module is planned.
PLANNING = threading.Lock()


def import_engine(bundle: Bundle) -> Any:
    """The torch module. Raises EngineMissing."""
    try:
        import torch
    except ImportError as error:
        raise missing(bundle, error) from None
    return torch


def open_model(bundle: Bundle, options: EngineOptions) -> TorchScriptEngine:
    torch = import_engine(bundle)
    require_version(bundle, "torch", torch.__version__)
    # The skeleton is read; it holds what int8 layers keep packed. The weights beside it are mapped.
    room.require(bundle, bundle.manifest.files[bundle.manifest.artifact.model].size, options.max_memory)
    torch.set_num_threads(options.threads)
    module, device, notes = _placed(bundle, options)
    info = EngineInfo("torch", torch.__version__, device, options.threads, notes)
    return TorchScriptEngine(bundle, module, info)


def _placed(bundle: Bundle, options: EngineOptions) -> tuple[Any, str, tuple[str, ...]]:
    """The module where it is going to run, the name of that, and why not elsewhere. Raises EngineError."""
    wanted = options.providers or (*bundle.manifest.artifact.providers, "cpu")
    notes: list[str] = []
    for name in wanted:
        if name == "cpu":
            return load_mapped(bundle), "cpu", tuple(notes)
        reason = _not_cuda() if name == "cuda" else f"{name} is no provider of TorchScript"
        if reason is None:
            try:
                # Once, and for good; anew after a failure, which may have moved some of the weights.
                return load_mapped(bundle).to("cuda"), "cuda", tuple(notes)
            except (RuntimeError, MemoryError) as error:
                reason = f"cuda cannot take the model: {engine_error(error, 'moving its weights')}"
        notes.append(reason)
    raise EngineError(
        f"none of {', '.join(wanted)} can be used here ({'; '.join(notes)}); leave the choice to the bundle or allow "
        "'cpu' as well"
    )


def _not_cuda() -> str | None:
    """Why torch has no CUDA device here; None where it has one."""
    import torch

    if torch.version.cuda is None:
        return "cuda is not in this build of torch"
    try:
        torch.cuda.init()  # says why not, where is_available() does not
    except (RuntimeError, AssertionError) as error:
        return f"cuda failed to initialise: {(str(error).splitlines() or ['torch does not say why'])[0][:300]}"
    return None if torch.cuda.device_count() else "cuda failed to initialise: torch sees no device"


def load_mapped(bundle: Bundle) -> Any:
    """The bundle's module in evaluation mode, its tensors views into the mapped weights file."""
    import torch

    artifact = bundle.manifest.artifact
    _select_quantized_engine(artifact.precision)
    extra = {TENSOR_TABLE: ""}
    module = torch.jit.load(str(bundle.file(artifact.model)), map_location="cpu", _extra_files=extra)
    module.eval()
    if artifact.weights is not None:
        size = bundle.manifest.files[artifact.weights].size
        storage = torch.UntypedStorage.from_file(str(bundle.file(artifact.weights)), False, size)
        _attach(module, json.loads(extra[TENSOR_TABLE]), storage)
    return module


def _select_quantized_engine(precision: str) -> None:
    """Quantized kernels are chosen for the whole process; the packager calibrates for qnnpack, as ARM has it."""
    import torch

    if precision.startswith("int8"):
        if "qnnpack" not in torch.backends.quantized.supported_engines:
            raise EngineError("this torch has no qnnpack kernels, which int8 TorchScript needs; package it as ONNX")
        torch.backends.quantized.engine = "qnnpack"


def _attach(module: Any, table: dict[str, dict[str, Any]], storage: Any) -> None:
    tensors = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    for name, row in table.items():
        if name in tensors:
            tensors[name].data = _view(row, storage)
            tensors[name].requires_grad_(False)
        elif "class" in row and module._c.hasattr(name):
            module._c.setattr(name, restored(row["class"], _state(row["state"], storage)))
        else:
            raise BundleError(f"the TorchScript skeleton has no tensor {name!r}, which its table lists; package again")


def _view(row: dict[str, Any], storage: Any) -> Any:
    import torch

    dtype = getattr(torch, row["dtype"])
    if "scale" in row:
        base = torch._empty_affine_quantized([0], scale=row["scale"], zero_point=row["zero_point"], dtype=dtype)
    else:
        base = torch.tensor([], dtype=dtype)
    return base.set_(storage, row["offset"] // dtype.itemsize, row["shape"], row["strides"])


def _state(parts: Any, storage: Any) -> Any:
    """What a packed layer is made of: in nested lists its numbers, and its tensors from the file."""
    if isinstance(parts, dict):
        # Of its own, where torch.jit.save would take it for one with whatever else lies in the file.
        own = storage[parts["offset"] : parts["offset"] + parts["bytes"]]
        return _view({**parts, "offset": 0}, own)
    return [_state(part, storage) for part in parts] if isinstance(parts, list) else parts


def restored(kind: str, state: Any) -> Any:
    """An object of a class that torch registers, such as ``quantized.LinearPackedParamsBase``, from its saved state."""
    import torch

    made: Any = torch.ScriptObject.__new__(torch.ScriptObject)
    made.__setstate__((tuple(state), kind))
    return made


class Planned:
    """A module whose first call on a CPU plans without profiling.

    torch otherwise watches the first runs for operators to fuse, of which it fuses none on CPUs: 25 ms and 3 MB.
    https://docs.pytorch.org/docs/stable/generated/torch.jit.set_fusion_strategy.html
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._is_planned = False

    def __call__(self, *tensors: Any) -> Any:
        if self._is_planned:
            return self._module(*tensors)
        import torch

        jit: Any = torch.jit
        with PLANNING:
            before = jit.set_fusion_strategy([])
            try:
                results = self._module(*tensors)
            finally:
                jit.set_fusion_strategy(before)
            self._is_planned = True
        give_back()  # what packing weights took besides its result
        return results


class TorchScriptEngine:
    """A module called in inference mode; it may be called from several threads."""

    def __init__(self, bundle: Bundle, module: Any, info: EngineInfo) -> None:
        self.info = info
        self._torch = import_engine(bundle)
        self._elsewhere = info.provider != "cpu"
        self._module = module
        self._call = module if self._elsewhere else Planned(module)

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        torch = self._torch
        try:
            with torch.inference_mode():
                # Copied, because a module may work in place and the array is the caller's, perhaps read-only.
                tensors = [torch.from_numpy(array.copy()) for array in arrays]
                if self._elsewhere:
                    tensors = [tensor.to(self.info.provider) for tensor in tensors]
                results = self._call(*tensors)
                if self._elsewhere:
                    results = [result.cpu() for result in results]
                # An output may be a view of an input or of a weight: what is returned belongs to the caller.
                return [result.clone().numpy() for result in results]
        except (RuntimeError, ValueError, MemoryError) as error:
            raise engine_error(error, FAILED) from error

    def bind(self, inputs: list[np.ndarray[Any, Any]]) -> Buffers:
        if self._elsewhere:
            return CopiedBuffers(self.run, inputs)
        return TorchScriptBuffers(self._call, inputs)

    def close(self) -> None:
        self._module = self._call = None


class TorchScriptBuffers:
    """The module reads the inputs where they lie (one that works in place writes there too); its answers are copied."""

    def __init__(self, call: Any, inputs: list[np.ndarray[Any, Any]]) -> None:
        import torch

        self._torch, self._call = torch, call
        self._given = [torch.from_numpy(array) for array in inputs]
        self.inputs = inputs
        self.outputs = [result.clone().numpy() for result in self._answers()]

    def run(self) -> None:
        for buffer, result in zip(self.outputs, self._answers()):
            write(buffer, result.numpy())

    def _answers(self) -> Any:
        try:
            with self._torch.inference_mode():
                return self._call(*self._given)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise engine_error(error, FAILED) from error

    def close(self) -> None:
        self._call = None
