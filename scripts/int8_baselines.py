#!/usr/bin/env python3
"""What the engines' own converters make of a trained network in int8, by their defaults: the figures to beat.

    python scripts/int8_baselines.py build/trained digits_mobilenet keras|torch

Reads what train_nets.py wrote, calibrates with all calibration samples, and adds the share of evaluation digits that
each int8 model gets right to ``report.json``: for the torch network ONNX Runtime's static (QDQ, per tensor and per
channel) and dynamic quantization of the ONNX form, for the Keras network TensorFlow's converter and ai-edge-quantizer.

For the wild network it also finds out whether the wild layers alone are to blame: ONNX Runtime's static quantization
without them, how much of all weights they hold, and both again with any other pair of neighbours left out.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from train_nets import record

EVERY = slice(None)


def samples(out: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(out / f"{name}.npz") as data:
        return data["image"], data["label"]


def onnx_baselines(out: Path, name: str, judged: Sequence[int] | slice = EVERY) -> dict[str, Any]:
    """Accuracy on the evaluation samples of those indices."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    calibration, _ = samples(out, "calibration_nchw")
    images, labels = (array[judged] for array in samples(out, "evaluate_nchw"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rows, None)
            return None if row is None else {"image": row[None]}

    def accuracy(path: Path) -> float:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return float((session.run(None, {"image": images})[0].argmax(1) == labels).mean())

    with tempfile.TemporaryDirectory() as folder:
        prepared, made = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        quant_pre_process(out / f"{name}-torch.onnx", prepared)

        def static(**more: Any) -> float:
            quantize_static(prepared, made, Reader(), **more)
            return accuracy(made)

        facts: dict[str, Any] = {
            "ort_static": static(),
            "ort_static_per_channel": static(per_channel=True),
        }
        quantize_dynamic(prepared, made)
        facts["ort_dynamic"] = accuracy(made)
        if name == "digits_wild":
            facts |= _wild(prepared, static)
    return facts


def _wild(prepared: Path, static: Callable[..., float]) -> dict[str, Any]:
    """The wild layers, and every other pair of neighbours for comparison, left in float."""
    layers = _weighted(prepared)
    names, total = list(layers), sum(layers.values())
    facts: dict[str, Any] = {}
    for left, right in itertools.pairwise(names):
        facts[f"float {left} + {right}"] = {
            "per_tensor": static(nodes_to_exclude=[left, right]),
            "per_channel": static(nodes_to_exclude=[left, right], per_channel=True),
            "share_of_weights": round((layers[left] + layers[right]) / total, 4),
        }
    for alone in names[1:3]:
        facts[f"float {alone}"] = static(nodes_to_exclude=[alone], per_channel=True)
    return facts


def _weighted(path: Path) -> dict[str, int]:
    """Nodes with weights in order of execution -> how many weights."""
    import onnx

    graph = onnx.load(path).graph
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    weighted = ("Conv", "Gemm", "MatMul")
    return {node.name: sizes[node.input[1]] for node in graph.node if node.op_type in weighted}


def tflite_baselines(out: Path, name: str, judged: Sequence[int] | slice = EVERY) -> dict[str, Any]:
    """Accuracy on the evaluation samples of those indices."""
    import tensorflow as tf
    from ai_edge_quantizer import quantizer, recipe

    calibration, _ = samples(out, "calibration")
    images, labels = (array[judged] for array in samples(out, "evaluate"))

    def accuracy(content: bytes) -> float:
        runner = tf.lite.Interpreter(model_content=content, num_threads=1).get_signature_runner("serving_default")
        (answer,) = runner(image=_as_int8(images, runner.get_input_details()["image"])).values()
        return float((answer.argmax(1) == labels).mean())

    converter = tf.lite.TFLiteConverter.from_saved_model(str(out / f"{name}-keras-saved-model"))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ({"image": row[None]} for row in calibration)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    facts: dict[str, Any] = {"tflite_converter_int8": accuracy(converter.convert())}

    converter = tf.lite.TFLiteConverter.from_saved_model(str(out / f"{name}-keras-saved-model"))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    facts["tflite_converter_dynamic"] = accuracy(converter.convert())

    edge = quantizer.Quantizer(str(out / f"{name}-keras.tflite"), recipe.static_wi8_ai8())
    ranges = edge.calibrate({"serving_default": [{"image": row[None]} for row in calibration]}, num_threads=1)
    facts["ai_edge_quantizer_static_wi8_ai8"] = accuracy(bytes(edge.quantize(ranges).quantized_model))
    return facts


def _as_int8(images: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """ai-edge-quantizer's models take integers; their order, which argmax needs, is that of the numbers they mean."""
    if details["dtype"] == np.float32:
        return images
    scale, zero = details["quantization"]
    return np.clip(np.round(images / scale) + zero, -128, 127).astype(np.int8)


def main() -> None:
    out, name, framework = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    baselines = {"keras": tflite_baselines, "torch": onnx_baselines}[framework]
    record(out, f"{name}-{framework}", baselines(out, name))


if __name__ == "__main__":
    main()
