"""``.tflite`` files as sources: checked, one signature, the engine's own answers from its built-in kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from edge_infer.convert import ask_source, override, spec_from_json, tflite_files
from edge_infer.convert.tflite_precision import precision_of, with_float_ends
from edge_infer.errors import ConversionError, UsageError
from edge_infer.manifest import DTYPES, TensorSpec

Array = np.ndarray[Any, Any]


def read(request: dict[str, Any]) -> dict[str, Any]:
    """Ask a ``.tflite`` the probe inputs; the form is ``tflite``, ``details["precision"]`` says what it is in already.

    Raises UsageError, ConversionError.
    """
    path = Path(request["source"])
    _check(path)
    model = tflite_files.read(path)
    signature = _choose_signature(path, model, request["signature"])
    precision = precision_of(model)
    with_float_ends(model, signature)
    inputs = override(_specs(path, model, signature), [spec_from_json(row) for row in request["inputs"]])
    _fix_shapes(model, signature, inputs)
    tflite_files.operators(model)
    copy = Path(request["out"]) / "source.tflite"
    tflite_files.write(model, copy)
    key = signature.signatureKey.decode()
    names = _output_names(model, signature)
    runner = _open(copy).get_signature_runner(key)

    def run(feed: dict[str, Array]) -> dict[str, Array]:
        answer = runner(**feed)
        return {name: np.array(answer[name]) for name in names}  # a copy: the engine's memory is used again

    answer = ask_source(request, inputs, run)
    details = {
        "model": str(copy),
        "signature": key,
        "precision": precision,
    }
    return {**answer, "details": details, "tools": {"ai-edge-litert": _version()}}


def _version() -> str:
    from importlib.metadata import version

    return version("ai-edge-litert")


def _check(path: Path) -> None:
    """Let the engine's verifier see the file before anything follows its offsets."""
    try:
        _open(path).allocate_tensors()
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        if "custom op" in text or "Select TensorFlow op" in text:
            tflite_files.operators(tflite_files.read(path))  # names all of them
        raise ConversionError(f"TFLite cannot open {path}: {text[:300]}; convert or copy the model again") from error


def _open(path: Path) -> Interpreter:
    """One thread and no delegate: the same answers on every machine of a kind."""
    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return Interpreter(str(path), experimental_op_resolver_type=resolver, num_threads=1)


def _choose_signature(path: Path, model: Any, wanted: str | None) -> Any:
    """Leave the model one signature, and give it. One made of tensor names where there is none."""
    known = {signature.signatureKey.decode(): signature for signature in model.signatureDefs or []}
    if not known:
        if wanted is not None:
            raise UsageError(f"--signature {wanted} was given, but {path} has no signatures")
        signature = tflite_files.only_signature(model)
    else:
        if wanted is None:
            wanted = next(iter(known)) if len(known) == 1 else tflite_files.SIGNATURE
        if wanted not in known:
            raise UsageError(f"{path} has no signature {wanted!r}, it has: {', '.join(known)}; use --signature")
        signature = known[wanted]
    model.signatureDefs = [signature]
    return signature


def _specs(path: Path, model: Any, signature: Any) -> list[TensorSpec]:
    """The signature's inputs, in the order in which the graph has them."""
    graph = model.subgraphs[signature.subgraphIndex]
    order = [int(index) for index in graph.inputs]
    return [
        _spec(path, entry.name.decode(), graph.tensors[entry.tensorIndex])
        for entry in sorted(signature.inputs, key=lambda entry: order.index(int(entry.tensorIndex)))
    ]


def _spec(path: Path, name: str, tensor: Any) -> TensorSpec:
    kinds = {value: key.lower() for key, value in vars(schema.TensorType).items() if isinstance(value, int)}
    dtype = kinds[tensor.type]
    if dtype not in DTYPES:
        raise UsageError(f"{path}: input {name!r} has dtype {dtype}, expected one of {', '.join(DTYPES)}")
    shape = tensor.shapeSignature if tensor.shapeSignature is not None and len(tensor.shapeSignature) else tensor.shape
    sizes = [int(size) for size in (shape if shape is not None else ())]
    return TensorSpec(name, dtype, tuple(None if size < 0 else size for size in sizes))


def _output_names(model: Any, signature: Any) -> list[str]:
    order = [int(index) for index in model.subgraphs[signature.subgraphIndex].outputs]
    entries = sorted(signature.outputs, key=lambda entry: order.index(int(entry.tensorIndex)))
    return [entry.name.decode() for entry in entries]


def _fix_shapes(model: Any, signature: Any, inputs: list[TensorSpec]) -> None:
    """Write the sizes that the user gave over dynamic ones."""
    tensors = model.subgraphs[signature.subgraphIndex].tensors
    by_name = {spec.name: spec for spec in inputs}
    for entry in signature.inputs:
        tensor, spec = tensors[entry.tensorIndex], by_name[entry.name.decode()]
        old = [int(size) for size in (tensor.shapeSignature if tensor.shapeSignature is not None else ())]
        new = [-1 if size is None else size for size in spec.shape]
        if old and old != new:
            tensor.shapeSignature = new if -1 in new else None
            tensor.shape = [size if given < 0 else given for size, given in zip(tensor.shape, new, strict=True)]
