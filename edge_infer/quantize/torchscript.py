"""TorchScript artifacts: float32 with mapped weights, and int8 for the qnnpack kernels that ARM boards have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from edge_infer import probe
from edge_infer.convert import spec_from_json
from edge_infer.errors import ConversionError
from edge_infer.quantize.torchscript_archive import save_archive
from edge_infer.quantize.torchscript_graph import lean, nodes, with_buffers
from edge_infer.runtime.engines.torchscript import TENSOR_TABLE, restored
from edge_infer.samples import Samples

MODEL, WEIGHTS = "model.torchscript", "weights.bin"
#: Tensors of at least a page begin on a page, smaller ones on a cache line.
LINE_BYTES = 64
#: What the classes are called whose objects hold packed weights.
PACKED = "__torch__.torch.classes.quantized."
#: Archives of the file format that torch 2.x writes are read since 1.12; mapping storages from files came with 2.1.
OLDEST = "2.1.0"


def build(request: dict[str, Any]) -> dict[str, Any]:
    module = lean(torch.jit.load(request["from"]["model"]).eval(), _feeds(request))
    module = QUANTIZERS[request["precision"]](module, request)
    operators = sorted(torch.jit.export_opnames(module))
    weights = save_mapped(module, Path(request["out"]), request["target"]["page_size_bytes"])
    return {
        "model": MODEL,
        "weights": WEIGHTS if weights else None,
        "signature": None,
        "prepack": False,
        "operators": operators,
        "requires": [["torch", OLDEST]],
        "tools": {"torch": torch.__version__},
    }


def _feeds(request: dict[str, Any]) -> list[tuple[torch.Tensor, ...]]:
    names = [row["name"] for row in request["inputs"]]
    return [tuple(torch.from_numpy(feed[name]) for name in names) for feed in probe.load_feeds(Path(request["feeds"]))]


def float32(module: Any, request: dict[str, Any]) -> Any:
    return module


def int8(module: Any, request: dict[str, Any]) -> Any:
    """Weights and activations in int8, calibrated, for qnnpack."""
    from torch.ao.quantization import get_default_qconfig
    from torch.ao.quantization.quantize_jit import convert_jit, prepare_jit

    inputs = [spec_from_json(row) for row in request["inputs"]]
    data = request["calibration"]
    if data["ranges"] != "minmax":
        raise ConversionError(
            f"TorchScript's quantizer has no ranges by {data['ranges']}, only its own by histogram; "
            "leave --ranges at minmax, or choose --format tflite or onnx"
        )
    samples = Samples(Path(data["samples"]), inputs)
    torch.backends.quantized.engine = "qnnpack"
    try:
        observed = prepare_jit(module, {"": get_default_qconfig("qnnpack")})
        with torch.no_grad():
            for feed in samples.feeds(data["indices"]):
                observed(*(torch.from_numpy(feed[spec.name].copy()) for spec in inputs))
        converted = convert_jit(observed)
    except Exception as error:
        raise explain(error) from error
    _dequantize_each(converted.graph)
    return with_buffers(converted)


def _dequantize_each(graph: Any) -> None:
    """Where all outputs are int8 inside, the converter turns the tuple of them into float at once; that gives a list,
    and the module cannot be loaded any more. So it is done one by one."""
    for node in graph.findAllNodes("aten::dequantize"):
        packed = node.input().node()
        if packed.kind() == "prim::TupleConstruct":
            graph.setInsertPoint(node)
            floats = [graph.insertNode(graph.create("aten::dequantize", [item], 1)) for item in packed.inputs()]
            outputs = [each.output() for each in floats]
            made = graph.insertNode(graph.create("prim::TupleConstruct", outputs, 1))
            made.output().setType(node.output().type())
            node.output().replaceAllUsesWith(made.output())
            node.destroy()


def int8_dynamic(module: Any, request: dict[str, Any]) -> Any:
    """Weights of dense and recurrent layers in int8; activations are quantized while running."""
    from torch.ao.quantization import default_dynamic_qconfig
    from torch.ao.quantization.quantize_jit import quantize_dynamic_jit

    torch.backends.quantized.engine = "qnnpack"
    try:
        quantized = quantize_dynamic_jit(module, {"": default_dynamic_qconfig})
    except Exception as error:
        raise explain(error) from error
    return with_buffers(quantized)


QUANTIZERS = {"float32": float32, "int8-dynamic": int8_dynamic, "int8": int8}


def explain(error: BaseException) -> ConversionError:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ConversionError(
        f"TorchScript cannot quantize this model: {lines[0][:300]}; choose --format onnx or another precision"
    )


def save_mapped(module: Any, out: Path, page_size: int) -> int:
    """Write the weights flat and aligned, then the module without them; gives the bytes of the weights file.

    Tensors that share a storage (tied weights) share its one copy in the file. Of what quantized layers pack the parts
    are written, and small ones stand in for them in the module.
    """
    tensors = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    with (out / WEIGHTS).open("wb") as file:
        weights = _Weights(file, page_size)
        table = {name: weights.row(tensor) for name, tensor in sorted(tensors.items())}
        for name in packed_names(module):
            state, kind = module._c.getattr(name).__getstate__()
            table[name] = {"class": kind, "state": weights.parts(state)}
            module._c.setattr(name, restored(kind, _small(state)))
        file.truncate(weights.size)
    for tensor in tensors.values():
        tensor.data = torch.empty(0, dtype=tensor.dtype)
    save_archive(module, out / MODEL, {TENSOR_TABLE: json.dumps(table, sort_keys=True)})
    if not weights.size:
        (out / WEIGHTS).unlink()
    return weights.size


def packed_names(module: Any) -> list[str]:
    """The module's attributes that hold the packed weights of quantized layers, those with one scale each."""
    own = next(iter(module.graph.inputs()))
    reads = [node for node in nodes(module.graph) if node.kind() == "prim::GetAttr" and node.input() == own]
    names = {node.s("name") for node in reads if str(node.output().type()).startswith(PACKED)}
    return sorted(name for name in names if _has_one_scale(module._c.getattr(name).__getstate__()[0]))


def _has_one_scale(state: Any) -> bool:
    tensors = state if isinstance(state[0], torch.Tensor) else state[1]
    return all(
        not tensor.is_quantized or tensor.qscheme() == torch.per_tensor_affine
        for tensor in tensors
        if tensor is not None
    )


def _small(state: Any) -> Any:
    """The state of a packed layer of the same kind with one weight a group, in place of ``state``.

    Of a dense layer it is a weight and a bias; of a convolution a version, the list of its settings and the weight,
    and the list of the bias: ``serialize_conv`` and ``register_linear_params`` in
    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/quantized/cpu/fbgemm_utils.cpp
    """
    if isinstance(state[0], torch.Tensor):
        return _one_each(2, 1), None
    version, (settings, weight), _ = state
    return version, [settings, _one_each(weight.dim(), int(settings[-2]))], [None]


def _one_each(dimensions: int, groups: int) -> torch.Tensor:
    zeros = torch.zeros([groups, *[1] * (dimensions - 1)], dtype=torch.int8)
    return torch._make_per_tensor_quantized_tensor(zeros, 1.0, 0)


class _Weights:
    """Writes storages one after the other, each once."""

    def __init__(self, file: Any, page_size: int) -> None:
        self.size = 0
        self._file, self._page_size = file, page_size
        self._places: dict[int, int] = {}
        self._kept: list[Any] = []  # an address says which storage it is as long as that lives

    def row(self, tensor: torch.Tensor) -> dict[str, Any]:
        """Where the tensor lies, written if it is not yet."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._places:
            alignment = self._page_size if storage.nbytes() >= self._page_size else LINE_BYTES
            self.size = -(-self.size // alignment) * alignment
            self._places[storage.data_ptr()] = self.size
            self._kept.append(storage)
            self._file.seek(self.size)
            self._file.write(torch.tensor([], dtype=torch.uint8).set_(storage).numpy().tobytes())
            self.size += storage.nbytes()
        return _row(tensor, self._places[storage.data_ptr()])

    def parts(self, state: Any) -> Any:
        """A packed layer's state as JSON has it, with the tensors' places."""
        if isinstance(state, torch.Tensor):
            tensor = state if state.storage_offset() == 0 else state.clone()
            return {**self.row(tensor), "bytes": tensor.untyped_storage().nbytes()}
        return [self.parts(item) for item in state] if isinstance(state, (list, tuple)) else state


def _row(tensor: torch.Tensor, base: int) -> dict[str, Any]:
    quantized = {"scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()} if tensor.is_quantized else {}
    return {
        **quantized,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "offset": base + tensor.storage_offset() * tensor.element_size(),
        "shape": list(tensor.shape),
        "strides": list(tensor.stride()),
    }
