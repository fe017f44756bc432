"""Networks put together by hand for tests of memory: dense ones of any size for each engine, and a greedy one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from handmade import manifest_for, settle
from onnx import TensorProto, helper, numpy_helper
from tflite_models import Net

from edge_infer.bundle import Bundle, write_bundle
from edge_infer.manifest import Artifact, Golden, Requirement, TargetFacts, TensorSpec
from edge_infer.quantize.onnx_graph import externalize
from edge_infer.quantize.torchscript import save_mapped
from edge_infer.runtime.golden import write_golden

Array = np.ndarray[Any, Any]
Case = tuple[dict[str, Array], dict[str, Array]]

WIDTH = 2048
LAYER_BYTES = WIDTH * WIDTH * 4
#: Of answers near 1: what sums of 2048 products in another order differ by.
TOLERANCE = 1e-3
REQUIRES = {
    "tflite": Requirement("ai-edge-litert", "2.1.6"),
    "onnx": Requirement("onnxruntime", "1.17"),
    "torchscript": Requirement("torch", "2.1"),
}


def layers(count: int) -> Iterator[Array]:
    """Of (outputs, inputs), one after the other, so that nobody holds more than needed; the signal keeps its power."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        yield rng.standard_normal((WIDTH, WIDTH), np.float32) * np.float32(WIDTH**-0.5)


def dense(folder: Path, format: str, count: int, page_size_bytes: int = 4096, name: str = "dense") -> Bundle:
    """``count`` layers of LAYER_BYTES. The files of weights are the same for ONNX and TorchScript."""
    parts = folder / f"{format}-parts"
    parts.mkdir(parents=True)
    {"tflite": _tflite, "onnx": _onnx, "torchscript": _torchscript}[format](parts, count, page_size_bytes)
    asked = np.random.default_rng(2).standard_normal((2, WIDTH), np.float32)
    answered = asked
    for weights in layers(count):
        answered = answered @ weights.T
    cases = [({"x": asked[:n]}, {"y": answered[:n]}) for n in (1, len(asked))]
    return _bundle(parts, name, format, WIDTH, cases, page_size_bytes, prepack=format == "onnx")


def greedy(folder: Path, name: str, each: int) -> Bundle:
    """An ONNX model of a few hundred bytes that takes three times ``4 * each`` bytes for a row: y = 3 x + 3."""
    parts = folder / f"{name}-parts"
    parts.mkdir(parents=True)
    nodes, wide = [], [f"wide{number}" for number in range(3)]
    for number, output in enumerate(wide):
        nodes.append(helper.make_node("Add", ["x", f"add{number}"], [f"more{number}"]))
        nodes.append(helper.make_node("Expand", [f"more{number}", "shape"], [output]))
    nodes += [helper.make_node("Sum", wide, ["sum"]), helper.make_node("ReduceMax", ["sum"], ["y"], axes=[1])]
    constants = [numpy_helper.from_array(np.full((1, 1), number, np.float32), f"add{number}") for number in range(3)]
    constants.append(numpy_helper.from_array(np.array([1, each]), "shape"))
    _save_onnx(parts, nodes, 1, constants)
    asked = np.array([[1.0], [2.0]], np.float32)
    cases = [({"x": asked[:n]}, {"y": 3 * asked[:n] + 3}) for n in (1, 2)]
    return _bundle(parts, name, "onnx", 1, cases, 4096, prepack=False)


def _bundle(
    parts: Path, name: str, format: str, width: int, cases: list[Case], page_size_bytes: int, *, prepack: bool
) -> Bundle:
    spec = ("float32", (None, width))
    inputs, outputs = (TensorSpec("x", *spec),), (TensorSpec("y", *spec),)
    write_golden(parts / "golden.npz", inputs, outputs, cases)
    names = sorted(path.name for path in parts.iterdir())
    (model,) = (one for one in names if one.startswith("model."))
    manifest = manifest_for(
        parts,
        dict.fromkeys(names, b""),
        name=name,
        target=TargetFacts("board", "aarch64", ("asimd",), 2**27, page_size_bytes, "3.11"),
        artifact=Artifact(
            format,
            "float32",
            model,
            (REQUIRES[format],),
            ("FULLY_CONNECTED",) if format == "tflite" else (),
            ("cpu",),
            weights="weights.bin" if "weights.bin" in names else None,
            signature="serving_default" if format == "tflite" else None,
            prepack=prepack,
        ),
        inputs=inputs,
        outputs=outputs,
        golden=Golden("golden.npz", len(cases), {"y": TOLERANCE}),
        checks=(),
    )
    return settle(write_bundle(manifest, parts, parts.with_suffix(".edge")))


def _tflite(parts: Path, count: int, page_size_bytes: int) -> None:
    net = Net()
    x = last = net.input("x", (None, WIDTH))
    for number, weights in enumerate(layers(count)):
        last = net.dense(last, f"layer{number}", weights)
    net.finish(parts / "model.tflite", {"x": x}, {"y": last})


def _onnx(parts: Path, count: int, page_size_bytes: int) -> None:
    names = ["x", *(f"x{number}" for number in range(1, count)), "y"]
    nodes = [
        helper.make_node("Gemm", [names[number], f"{number}.weight"], [names[number + 1]], transB=1)
        for number in range(count)
    ]
    weights = [numpy_helper.from_array(array, f"{number}.weight") for number, array in enumerate(layers(count))]
    _save_onnx(parts, nodes, WIDTH, weights, page_size_bytes)


def _save_onnx(parts: Path, nodes: list[Any], width: int, weights: list[Any], page_size_bytes: int = 4096) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in "xy")
    graph = helper.make_graph(nodes, "made by hand", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    externalize(model, parts / "weights.bin", page_size_bytes)
    onnx.save_model(model, parts / "model.onnx")


def _torchscript(parts: Path, count: int, page_size_bytes: int) -> None:
    linear = []
    for weights in layers(count):
        layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        layer.weight = torch.nn.Parameter(torch.from_numpy(weights), requires_grad=False)
        linear.append(layer)
    save_mapped(torch.jit.trace(_Answers(*linear).eval(), torch.zeros(1, WIDTH)), parts, page_size_bytes)


class _Answers(torch.nn.Sequential):
    """Its answers are in a tuple, as those of every bundle."""

    def forward(self, x: Any) -> Any:
        return (super().forward(x),)
