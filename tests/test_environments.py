"""Fresh environments with the built wheel and one engine, as devices have them: they run bundles and stay light."""

from __future__ import annotations

import json
import subprocess
import zipfile

import pytest
from conftest import ROOT, SOURCES

HOST_PACKAGES = ("tensorflow", "torch", "onnx", "onnxscript", "tf2onnx", "litert_torch", "paramiko", "rich", "sklearn")
HOST_MODULES = ("package", "convert", "quantize", "deploy", "cli", "target", "measure", "worker")

RUN = """
import json, sys
import edge_infer
assert "numpy" not in sys.modules, "importing edge_infer imported numpy"
with edge_infer.load(sys.argv[1] + "/") as session:
    import numpy as np
    data = np.load(sys.argv[2])
    accuracy = float((session(data["image"]).argmax(1) == data["label"]).mean())
    info = session.info
modules = sorted(sys.modules)
print(json.dumps({"accuracy": accuracy, "package": info.package, "modules": modules, "file": edge_infer.__file__}))
"""


@pytest.mark.parametrize(
    ("extra", "precision", "package"),
    [
        ("onnx", "float32", "onnxruntime"),
        ("onnx", "int8", "onnxruntime"),
        ("tflite", "float32", "ai-edge-litert"),
        ("tflite", "int8", "ai-edge-litert"),
        ("tflite-runtime", "float32", "tflite-runtime"),
        ("tflite-runtime", "int8", "tflite-runtime"),
    ],
)
def test_a_fresh_environment_runs_a_bundle(device_python, packaged, models, tmp_path, extra, precision, package):
    format = "onnx" if extra == "onnx" else "tflite"
    bundle = packaged(SOURCES[format], format, precision)
    data = models / ("test_nchw.npz" if format == "onnx" else "test.npz")
    python = str(device_python(extra))
    done = subprocess.run(
        [python, "-c", RUN, str(bundle.path), str(data)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["accuracy"] > 0.96 and answer["package"] == package
    assert str(ROOT / "edge_infer") not in answer["file"]
    roots = {name.split(".")[0] for name in answer["modules"]}
    assert roots.isdisjoint(HOST_PACKAGES)
    assert {f"edge_infer.{name}" for name in HOST_MODULES}.isdisjoint(answer["modules"])


def test_the_classic_runtime_is_refused_what_it_cannot_run(device_python, packaged, tmp_path):
    """tflite-runtime 2.14 lacks the operator version that has a scale a channel in dynamic-range int8."""
    bundle = packaged(SOURCES["tflite"], "tflite", "int8-dynamic")
    done = subprocess.run(
        [str(device_python("tflite-runtime")), "-m", "edge_infer", "verify", str(bundle.path)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 5
    assert "digits needs ai-edge-litert>=1.0.1, which tflite-runtime 2.14.0 cannot stand in for" in done.stderr


def test_a_missing_engine_is_named_with_the_pip_command(device_python, packaged, tmp_path):
    bundle = packaged(SOURCES["onnx"], "onnx", "float32")
    python = str(device_python("tflite"))
    done = subprocess.run(
        [python, "-m", "edge_infer", "run", str(bundle.path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5 and f"{python} -m pip install 'edge-infer[onnx]'" in done.stderr


def test_the_wheel_carries_the_targets_and_works_without_the_checkout(device_python, tmp_path):
    (wheel,) = (ROOT / "build" / "wheel").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"edge_infer/targets/{path.name}" for path in (ROOT / "targets").glob("*.toml")} <= set(names)
    assert all(name.startswith(("edge_infer/", "edge_infer-")) for name in names)
    script = "import edge_infer.target as t; print(*t.target_names()); print(t.read_target('raspberry-pi-4').cores)"
    done = subprocess.run(
        [str(device_python("onnx")), "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1] == "4" and len(done.stdout.splitlines()[0].split()) == 8
