"""``.tflite`` files that are quantized already: packaged as they are, and as nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from conftest import MODELS

from edge_infer.errors import ConversionError
from edge_infer.package import Packaged, Request, package
from edge_infer.runtime.session import load

#: TensorFlow's converter, asked for the four kinds that people have.
CONVERT = """
import sys
import numpy as np, tensorflow as tf
models, kind, out = sys.argv[1:]
converter = tf.lite.TFLiteConverter.from_saved_model(models + "/keras_saved_model")
converter.optimizations = [tf.lite.Optimize.DEFAULT]
if kind == "float16":
    converter.target_spec.supported_types = [tf.float16]
if kind in ("uint8", "int16"):
    images = np.load(models + "/calibration.npz")["image"]
    converter.representative_dataset = lambda: ([image[None]] for image in images[:100])
if kind == "uint8":
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.uint8
if kind == "int16":
    int16 = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
    converter.target_spec.supported_ops = [int16]
    converter.inference_input_type = converter.inference_output_type = tf.int16
open(out, "wb").write(converter.convert())
"""
KINDS = {"uint8": "int8", "int16": "int16x8", "dynamic": "int8-dynamic", "float16": "float16"}


@pytest.fixture(scope="module")
def sources(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    made = {kind: folder / f"{kind}.tflite" for kind in KINDS}
    for kind, path in made.items():
        command = [sys.executable, "-c", CONVERT, str(models), kind, str(path)]
        subprocess.run(command, check=True, capture_output=True)
    return made


def asked(source: Path, out: Path, **options: object) -> Request:
    return Request(source, "cpu-x86_64", out, **{"format": "tflite", "name": "digits", **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def as_they_are(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Packaged]:
    folder = tmp_path_factory.mktemp("as-they-are")
    return {kind: package(asked(path, folder / f"{kind}.edge")) for kind, path in sources.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_its_precision_and_its_accuracy(kind: str, as_they_are: dict[str, Packaged]) -> None:
    done = as_they_are[kind]
    assert done.chosen.precision == KINDS[kind]
    assert [row["id"] for row in done.record["candidates"]] == [f"tflite {KINDS[kind]}"]
    with np.load(MODELS / "test.npz") as data, load(done.bundle.path) as session:
        assert [spec.dtype for spec in (*session.inputs, *session.outputs)] == ["float32", "float32"]
        assert (session(data["image"]).argmax(1) == data["label"]).mean() > 0.95


def test_integers_with_a_scale_become_floats_at_the_ends_alone(
    sources: dict[str, Path], as_they_are: dict[str, Packaged]
) -> None:
    """The same integers come out as when its own integers are given to the engine."""
    engine = Interpreter(str(sources["uint8"]), num_threads=1)
    engine.allocate_tensors()
    (given,), (taken,) = engine.get_input_details(), engine.get_output_details()
    (scale, zero), (out_scale, out_zero) = given["quantization"], taken["quantization"]
    with np.load(MODELS / "test.npz") as data, load(as_they_are["uint8"].bundle.path, threads=1) as session:
        for image in data["image"][:20]:
            integers = np.clip(np.round(image[None] / scale) + zero, 0, 255).astype(np.uint8)
            engine.set_tensor(given["index"], integers)
            engine.invoke()
            expected = (engine.get_tensor(taken["index"]).astype(np.float32) - out_zero) * out_scale
            np.testing.assert_allclose(session(image[None]), expected, atol=1e-6)


def test_another_precision_is_refused_with_what_it_is(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"is int8 already, which float16 cannot be made of; give the float32"):
        package(asked(sources["uint8"], tmp_path / "d.edge", precision="float16"))
    with pytest.raises(ConversionError, match=r"is int8-dynamic already, which float32 cannot be made of"):
        package(asked(sources["dynamic"], tmp_path / "d.edge", precision="float32"))
    with pytest.raises(ConversionError, match=r"no convolution, dense or recurrent layer with float weights"):
        calibration = MODELS / "calibration.npz"
        package(asked(sources["uint8"], tmp_path / "d.edge", sparsity=0.5, calibration=calibration))
    assert not list(tmp_path.iterdir())


def test_onnx_of_it_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="ONNX would compute it otherwise"):
        package(asked(sources["uint8"], tmp_path / "d.edge", format="onnx"))
