"""Fresh environments with the built wheel and one engine, as devices have them: they run bundles and stay light."""

from __future__ import annotations

import json
import subprocess
import zipfile

import pytest
from conftest import ROOT, SOURCES

PROBE = ROOT / "scripts" / "device_probe.py"


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
        [python, "-I", str(PROBE), str(bundle.path), "--data", str(data)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["accuracy"] > 0.96 and answer["package"] == package
    assert str(ROOT / "edge_infer") not in answer["file"]


def test_the_classic_runtime_is_refused_what_it_cannot_run(device_python, packaged, tmp_path):
    """tflite-runtime 2.14 lacks the operator version that has a scale a channel in dynamic-range int8."""
    bundle = packaged(SOURCES["tflite"], "tflite", "int8-dynamic")
    done = subprocess.run(
        [str(device_python("tflite-runtime")), "-m", "edge_infer", "verify", str(bundle.path)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 5
    assert "digits needs ai-edge-litert>=1.4.0, which tflite-runtime 2.14.0 cannot stand in for" in done.stderr


def test_a_missing_engine_is_named_with_the_pip_command(device_python, packaged, tmp_path):
    bundle = packaged(SOURCES["onnx"], "onnx", "float32")
    python = str(device_python("tflite"))
    done = subprocess.run(
        [python, "-m", "edge_infer", "run", str(bundle.path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5 and f"{python} -m pip install 'edge-infer[onnx]'" in done.stderr


def test_an_engine_that_cannot_be_imported_is_not_called_absent(device_python, packaged, tmp_path):
    """As onnxruntime before 1.19 beside numpy 2."""
    bundle = packaged(SOURCES["onnx"], "onnx", "float32")
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('numpy.core.multiarray failed to import')\n")
    python = str(device_python("tflite"))
    done = subprocess.run(
        [python, "-m", "edge_infer", "run", str(bundle.path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert "cannot be imported (numpy.core.multiarray failed to import)" in done.stderr
    assert done.stderr.endswith(f"bring it up to date: {python} -m pip install --upgrade onnxruntime\n")


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
