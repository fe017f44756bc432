"""From one framework to the engine of another, through the packager: ways of two steps, converters of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import FORMS, MODELS, calibration_for

from edge_infer.package import Request, package
from edge_infer.runtime.session import load


@pytest.mark.parametrize(
    ("form", "format", "way"),
    [
        ("keras.keras", "torchscript", ("saved-model", "onnx", "torchscript")),
        ("torch.onnx", "tflite", ("onnx", "tflite")),
        ("torch.onnx", "torchscript", ("onnx", "torchscript")),
        ("torch_script.pt", "tflite", ("torch", "tflite")),
    ],
)
def test_int8_keeps_contract_and_accuracy(
    converters: Path, models: Path, tmp_path: Path, form: str, format: str, way: tuple[str, ...]
) -> None:
    calibration = calibration_for(form)
    request = Request(
        models / form, "cpu-x86_64", tmp_path / "d.edge", format, "int8", calibration=calibration, **FORMS[form]
    )
    done = package(request)
    assert done.chosen.way == way
    keras = form.startswith("keras")
    image = "image float32[?, 8, 8, 1]" if keras else "image float32[?, 1, 8, 8]"
    assert [str(spec) for spec in done.bundle.manifest.inputs] == [image]
    assert [str(spec) for spec in done.bundle.manifest.outputs] == ["digit float32[?, 10]"]
    with np.load(MODELS / ("test.npz" if keras else "test_nchw.npz")) as data, load(done.bundle.path) as session:
        observed = float((session(data["image"]).argmax(1) == data["label"]).mean())
    trained = json.loads((MODELS / "accuracy.json").read_text())
    assert observed >= 0.99 * trained["keras" if keras else "torch"]
