"""Read ONNX: checked, weights gathered, slimmed; the source's answers come from ONNX Runtime without optimizing."""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxslim
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor, uses_external_data

from edge_infer.convert import ask_source, override, spec_from_json
from edge_infer.convert.onnx_graphs import save
from edge_infer.errors import BundleError, ConversionError, UsageError
from edge_infer.manifest import DTYPES, TensorSpec
from edge_infer.quantize.onnx_graph import byte_count, graphs
from edge_infer.runtime.onnx_files import locations_of

#: onnxslim lets equal tensors of less than 1000 elements be one; larger ones it need not see.
COMPARED_BYTES = 16 * 1000


def read(request: dict[str, Any]) -> dict[str, Any]:
    path = Path(request["source"])
    if request["signature"] is not None:
        raise UsageError(f"--signature {request['signature']} was given, but ONNX models have no signatures")
    model = load(path)
    _drop_initializers_from_inputs(model)
    inputs = override(
        [_spec(path, item) for item in model.graph.input], [spec_from_json(row) for row in request["inputs"]]
    )
    _fix_shapes(model, inputs)
    names = [output.name for output in model.graph.output]
    folder = Path(request["out"])
    source = folder / "source.onnx"
    save(model, source)
    del model  # its memory: the file has all of it
    answer = _ask(path, source, request, inputs, names)
    save(slim(source), folder / "model.onnx")
    tools = {"onnx": onnx.__version__, "onnxslim": onnxslim.__version__, "onnxruntime": onnxruntime.__version__}
    return {**answer, "details": {"model": str(folder / "model.onnx")}, "tools": tools}


def _ask(
    path: Path, model: Path, request: dict[str, Any], inputs: list[TensorSpec], names: list[str]
) -> dict[str, Any]:
    """The engine and its copy of the weights are gone when this ends."""
    session = _open(path, model)

    def run(feed: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        return dict(zip(names, session.run(names, feed), strict=True))

    return ask_source(request, inputs, run)


def load(path: Path) -> onnx.ModelProto:
    """Read a model and the weights beside it. Raises ConversionError for what is damaged or points elsewhere."""
    try:
        locations = locations_of(path)
        _check_locations(path, locations)
        if not locations:  # before the model is in memory here: the checker reads it once more
            onnx.checker.check_model(str(path))
        model = onnx.load(path)
        if locations:
            onnx.checker.check_model(model)
    except BundleError as error:
        raise ConversionError(f"{path}: {error}") from None
    except (ConversionError, UsageError):
        raise
    except Exception as error:  # protobuf's and the checker's own kinds
        raise ConversionError(
            f"{path} is not a sound ONNX model: {str(error).strip().splitlines()[0][:300]}"
        ) from error
    if not model.graph.output:
        raise ConversionError(f"{path} is not a sound ONNX model: it has no outputs")
    return model


def _check_locations(path: Path, locations: set[str]) -> None:
    """External data must lie beside the model: the path is free text, and may point anywhere on this machine."""
    for location in sorted(locations):
        beside = path.parent / location
        if (
            Path(location).is_absolute()
            or ".." in Path(location).parts
            or beside.resolve() != path.parent.resolve() / location
        ):
            raise ConversionError(f"{path} refers to {location!r} outside its own folder; refused")
        if not beside.is_file():
            raise UsageError(f"{path} keeps weights in {location!r}, which is not beside it; copy that file too")


def slim(path: Path) -> onnx.ModelProto:
    """Constants folded, dead and doubled nodes gone. Parity with the source is checked on the result.

    onnxslim copies the model several times over, so the larger weights stay in their file meanwhile. It reads those
    that it folds from there, by their path relative to the working folder.
    """
    model = onnx.load(path, load_external_data=False)
    _share_places(model, path.with_name(f"{path.name}.data"))
    for tensor in _initializers(model):
        if byte_count(tensor) < COMPARED_BYTES and uses_external_data(tensor):
            load_external_data_for_tensor(tensor, str(path.parent))
    try:
        with contextlib.chdir(path.parent):
            slimmed: onnx.ModelProto = onnxslim.slim(model)
    except Exception as error:
        raise ConversionError(
            f"onnxslim cannot simplify the model: {str(error).strip().splitlines()[0][:300]}"
        ) from error
    for tensor in _initializers(slimmed):
        if not tensor.external_data:  # what was folded keeps the mark of what it was made from
            tensor.ClearField("data_location")
    onnx.load_external_data_for_model(slimmed, str(path.parent))
    return slimmed


def _initializers(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Those of branches and loops too."""
    return [tensor for graph in graphs(model.graph) for tensor in graph.initializer]


def _share_places(model: onnx.ModelProto, weights: Path) -> None:
    """Let equal weights point to one place in their file: by that onnxslim knows nodes that compute the same."""
    data: Any = np.memmap(weights, np.uint8, "r") if weights.is_file() else b""
    first: dict[bytes, onnx.TensorProto] = {}
    for tensor in filter(uses_external_data, _initializers(model)):
        place = ExternalDataInfo(tensor)
        start = place.offset or 0
        digest = hashlib.sha256(data[start : start + (place.length or 0)]).digest()
        if digest in first:
            del tensor.external_data[:]
            tensor.external_data.extend(first[digest].external_data)
        first.setdefault(digest, tensor)


def _open(path: Path, model: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        unknown = re.search(r"([\w.]+):(\w+)\(-?\d+\) is not a registered function/op", str(error))
        if unknown:
            raise ConversionError(
                f"{path}: ONNX Runtime has no operator {unknown[2]} in the domain {unknown[1]}; replace it in the model"
            ) from error
        raise ConversionError(f"ONNX Runtime cannot open {path}: {str(error).strip().splitlines()[0][:300]}") from error


def _drop_initializers_from_inputs(model: onnx.ModelProto) -> None:
    """Models before IR version 4 list weights as inputs too, which keeps engines from folding them."""
    weights = {item.name for item in model.graph.initializer}
    inputs = [item for item in model.graph.input if item.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)


def _spec(path: Path, item: onnx.ValueInfoProto) -> TensorSpec:
    tensor = item.type.tensor_type
    if not item.type.HasField("tensor_type") or not tensor.HasField("shape"):
        raise UsageError(f"{path}: input {item.name!r} is no tensor of known rank, which this packager does not take")
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    if dtype not in DTYPES:
        raise UsageError(f"{path}: input {item.name!r} has dtype {dtype}, expected one of {', '.join(DTYPES)}")
    return TensorSpec(item.name, dtype, tuple(_size(dim) for dim in tensor.shape.dim))


def _size(dim: Any) -> int | None:
    """A dimension's size, None when it is dynamic; some exporters write that as -1."""
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None


def _fix_shapes(model: onnx.ModelProto, inputs: list[TensorSpec]) -> None:
    """Write the user's fixed sizes over dynamic ones; what was inferred from the old ones goes."""
    by_name = {spec.name: spec for spec in inputs}
    for item in model.graph.input:
        for dim, size in zip(item.type.tensor_type.shape.dim, by_name[item.name].shape if item.name in by_name else ()):
            if size is not None and _size(dim) is None:
                dim.dim_value = size
                del model.graph.value_info[:]
