"""What many tests share: the example models, bundles made from them once, and a home of their own."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_infer.bundle import Bundle, open_bundle
from edge_infer.manifest import TensorSpec

#: What the tests package is kept for the session and not with the user's own. Set before anything is packaged; the
#: workers of pytest-xdist share the one that the process which started them made.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="edge-infer-test-cache-")
    os.environ["EDGE_INFER_CACHE"] = CACHE.name

#: Run by scripts/test_device, which builds the boards.
collect_ignore = ["boards"]

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "build" / "models"
IMAGE_NCHW = TensorSpec("image", "float32", (None, 1, 8, 8))

#: What it takes to package each form of the example models.
FORMS: dict[str, dict[str, object]] = {
    "keras.keras": {},
    "keras.h5": {},
    "keras_saved_model": {},
    "torch_state.pth": {"factory": str(MODELS / "digits_net.py") + ":create", "inputs": (IMAGE_NCHW,)},
    "torch_module.pth": {"trust_pickle": True, "inputs": (IMAGE_NCHW,)},
    "torch_script.pt": {"inputs": (IMAGE_NCHW,)},
    "torch_export.pt2": {},
    "torch.onnx": {},
}

#: The route from a form that the tests use for each format.
SOURCES = {"tflite": "keras.keras", "onnx": "torch.onnx", "torchscript": "torch_script.pt"}


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store and caches of whoever runs the tests take no part."""
    home = tmp_path_factory.mktemp("edge-infer-home")
    monkeypatch.setenv("EDGE_INFER_HOME", str(home))
    return home


@pytest.fixture
def converters(own_home: Path) -> Path:
    """The converters with environments of their own, which scripts/test installs once, in this test's home."""
    installed = ROOT / "build" / "converters-home" / "converters"
    assert installed.is_dir(), f"{installed} is missing; run scripts/test, which makes it"
    (own_home / "converters").symlink_to(installed)
    return installed


@pytest.fixture(scope="session")
def models() -> Path:
    """The example models, trained once and kept in ``build/`` until their script changes."""
    script = ROOT / "scripts" / "make_models.py"
    stamp = MODELS / "made_by"
    wanted = hashlib.sha256(script.read_bytes()).hexdigest()
    MODELS.mkdir(parents=True, exist_ok=True)
    with (MODELS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be making them
        if not stamp.is_file() or stamp.read_text() != wanted:
            subprocess.run([sys.executable, str(script), "--out", str(MODELS)], check=True)
            stamp.write_text(wanted)
    return MODELS


def calibration_for(form: str) -> Path:
    return MODELS / ("calibration.npz" if form.startswith("keras") else "calibration_nchw.npz")


Package = Callable[..., Bundle]


@pytest.fixture(scope="session")
def packaged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """``packaged(form, format, precision, target=...)``: a bundle of the digits network, made once a session."""
    from edge_infer.package import Request, package

    folder = tmp_path_factory.mktemp("bundles")
    made: dict[tuple[str, ...], Path] = {}

    def make(form: str, format: str, precision: str, target: str = "cpu-x86_64") -> Bundle:
        key = (form, format, precision, target)
        if key not in made:
            path = folder / ("-".join(key) + ".edge")
            package(
                Request(
                    models / form,
                    target,
                    path,
                    format,
                    precision,
                    calibration=calibration_for(form),
                    name="digits",
                    **FORMS[form],  # type: ignore[arg-type]
                )
            )
            made[key] = path
        return open_bundle(made[key])

    return make


@pytest.fixture(scope="session")
def digits_test_set(models: Path) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """``digits_test_set(form)``: test images in the layout of that form, and labels."""

    def read(form: str) -> tuple[np.ndarray, np.ndarray]:
        with np.load(models / ("test.npz" if form.startswith("keras") else "test_nchw.npz")) as data:
            return data["image"], data["label"]

    return read


@pytest.fixture(scope="session")
def device_python() -> Callable[[str], Path]:
    """``device_python(extra)``: the Python of a fresh environment with the built wheel and that one engine."""

    def find(extra: str) -> Path:
        path = ROOT / "build" / f"device-{extra}" / "bin" / "python"
        assert path.exists(), f"{path} is missing; run scripts/test, which makes it"
        return path

    return find
