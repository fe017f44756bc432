"""TorchScript artifacts: float32 with mapped weights, and int8 for the qnnpack kernels that ARM boards have."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

from edge_infer.convert import spec_from_json
from edge_infer.errors import ConversionError
from edge_infer.runtime.engines.torchscript import TENSOR_TABLE
from edge_infer.samples import Samples

MODEL, WEIGHTS = "model.torchscript", "weights.bin"
#: Tensors of at least a page begin on a page, smaller ones on a cache line.
LINE_BYTES = 64
#: Archives of the file format that torch 2.x writes are read since 1.12; mapping storages from files came with 2.1.
OLDEST = "2.1.0"


def build(request: dict[str, Any]) -> dict[str, Any]:
    module = torch.jit.load(request["from"]["model"]).eval()
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
    return converted


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
        return quantize_dynamic_jit(module, {"": default_dynamic_qconfig})
    except Exception as error:
        raise explain(error) from error


QUANTIZERS = {"float32": float32, "int8-dynamic": int8_dynamic, "int8": int8}


def explain(error: BaseException) -> ConversionError:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ConversionError(
        f"TorchScript cannot quantize this model: {lines[0][:300]}; choose --format onnx or another precision"
    )


def save_mapped(module: Any, out: Path, page_size: int) -> int:
    """Write the weights flat and aligned, then the module without them; gives the bytes of the weights file.

    Tensors that share a storage (tied weights) share its one copy in the file. What quantized layers keep packed
    is no tensor and stays in the skeleton.
    """
    tensors = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    places: dict[int, int] = {}
    table: dict[str, dict[str, Any]] = {}
    position = 0
    with (out / WEIGHTS).open("wb") as file:
        for name, tensor in sorted(tensors.items()):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in places:
                alignment = page_size if storage.nbytes() >= page_size else LINE_BYTES
                position = -(-position // alignment) * alignment
                places[storage.data_ptr()] = position
                file.seek(position)
                file.write(torch.tensor([], dtype=torch.uint8).set_(storage).numpy().tobytes())
                position += storage.nbytes()
            table[name] = _row(tensor, places[storage.data_ptr()])
        file.truncate(position)
    for tensor in tensors.values():
        tensor.data = torch.empty(0, dtype=tensor.dtype)
    save_archive(module, out / MODEL, {TENSOR_TABLE: json.dumps(table, sort_keys=True)})
    if not position:
        (out / WEIGHTS).unlink()
    return position


def save_archive(module: Any, path: Path, extra: dict[str, str]) -> None:
    """Save without the call stacks that TorchScript keeps for debugging: they hold this machine's paths."""
    full = torch._C.PyTorchFileReader(io.BytesIO(module.save_to_buffer(_extra_files=extra)))
    writer = torch._C.PyTorchFileWriter(str(path))
    for name in full.get_all_records():
        # The last is the writer's own.
        if not name.endswith(".debug_pkl") and name not in ("version", "byteorder", ".data/serialization_id"):
            data = full.get_record(name)
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()


def _row(tensor: torch.Tensor, base: int) -> dict[str, Any]:
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "offset": base + tensor.storage_offset() * tensor.element_size(),
        "shape": list(tensor.shape),
        "strides": list(tensor.stride()),
    }
