"""Accelerators: the order in which they are tried, their options, who really runs, and what is told. No GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from handmade import rebuild

from edge_infer import load
from edge_infer.bundle import Bundle
from edge_infer.errors import EngineError
from edge_infer.runtime import engine_cache, gpu
from edge_infer.runtime.engines import onnx
from edge_infer.runtime.engines import onnx_providers as providers
from edge_infer.runtime.golden import self_test

FORMS = {"onnx": "torch.onnx", "torchscript": "torch_script.pt"}
each_format = pytest.mark.parametrize("format", FORMS)
JETSON = ("tensorrt", "cuda", "cpu")


# -- what is tried -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "orders"),
    [
        (JETSON, [JETSON, ("cuda", "cpu"), ("cpu",)]),
        (("cuda",), [("cuda",)]),
        (("cpu",), [("cpu",)]),
        (("cpu", "cuda"), [("cpu",)]),
        (("tensorrt", "cpu", "cpu"), [("tensorrt", "cpu"), ("cpu",)]),
        ((), []),
    ],
)
def test_each_order_leaves_out_the_first_of_the_one_before(
    wanted: tuple[str, ...], orders: list[tuple[str, ...]]
) -> None:
    assert providers.orders(wanted) == orders


@pytest.mark.parametrize(("precision", "half", "integer"), [("float32", 0, 0), ("float16", 1, 0), ("int8", 0, 1)])
def test_tensorrt_builds_for_the_artifacts_precision_and_keeps_it_where_it_is_told(
    precision: str, half: int, integer: int
) -> None:
    words = ("False", "True")
    options = providers.provider_options("tensorrt", precision, "1.20.0", Path("/cache/entry"))
    assert options == {
        "device_id": "0",
        "trt_fp16_enable": words[half],
        "trt_int8_enable": words[integer],
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": "/cache/entry",
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": "/cache/entry",
    }


def test_an_option_is_given_to_no_release_before_it() -> None:
    assert "trt_timing_cache_path" not in providers.provider_options("tensorrt", "float32", "1.16.3", Path("/cache"))
    assert not any("cache" in name for name in providers.provider_options("tensorrt", "float32", "1.20.0"))


def test_the_processor_always_comes_last() -> None:
    names = [name for name, _ in providers.with_options(("cuda",), "float32", "1.20.0")]
    assert names == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert providers.with_options(("cpu",), "float32", "1.20.0") == [("CPUExecutionProvider", {})]


# -- who really runs ---------------------------------------------------------------------------------------------------

TENSORRT, CUDA, CPU = (providers.NAMES[name] for name in JETSON)


@pytest.mark.parametrize(
    ("order", "parts", "provider", "notes"),
    [
        (("cpu",), None, "cpu", ()),
        (JETSON, [(TENSORRT, ["Conv", "Relu"])], "tensorrt", ("cuda runs none of the model's 2 operators",)),
        (
            JETSON,
            [(TENSORRT, ["Conv", "Relu"]), (CUDA, ["Resize"]), (CPU, ["Shape"]), (CPU, ["Shape"]), (CPU, ["Cast"])],
            "tensorrt",
            (
                "cuda runs 1 of the model's 6 operators: Resize",
                "cpu runs 3 of the model's 6 operators: Shape, Cast",
            ),
        ),
        (JETSON, [(CUDA, ["Conv"])], "cuda", ("tensorrt runs none of the model's 1 operators",)),
        (("cuda",), [(CPU, ["Conv"])], "cpu", ("cuda runs none of the model's 1 operators",)),
        (JETSON, None, "tensorrt", ("whether tensorrt runs any operator is not known: onnxruntime tells since 1.24",)),
    ],
)
def test_what_runs_is_counted(
    order: tuple[str, ...], parts: list[tuple[str, list[str]]] | None, provider: str, notes: tuple[str, ...]
) -> None:
    assert providers.placement(order, parts) == (provider, notes)


def real_session(bundle: Bundle, *names: str) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry(providers.RECORD_ASSIGNMENT, "1")
    return onnxruntime.InferenceSession(str(bundle.file("model.onnx")), settings, list(names), enable_fallback=0)


def test_a_provider_that_is_listed_and_runs_nothing_is_seen(
    packaged: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one: this build's Azure provider takes no ordinary operator."""
    monkeypatch.setitem(providers.NAMES, "azure", "AzureExecutionProvider")
    session = real_session(packaged("torch.onnx", "onnx", "float32"), "AzureExecutionProvider", CPU)
    assert session.get_providers()[0] == "AzureExecutionProvider"  # which therefore proves nothing
    provider, notes = providers.placement(("azure", "cpu"), providers.assigned(session))
    assert provider == "cpu" and "azure runs none of the model's " in notes[0]


# -- what is told ------------------------------------------------------------------------------------------------------


@each_format
def test_a_bundle_for_a_jetson_runs_on_the_processor_and_says_why(
    packaged: Callable[..., Bundle], tmp_path: Path, format: str
) -> None:
    bundle = packaged(FORMS[format], format, "float32")
    wanted = JETSON if format == "onnx" else ("cuda", "cpu")
    jetson = rebuild(bundle, tmp_path / "b.edge", artifact=replace(bundle.manifest.artifact, providers=wanted))
    engine = "onnxruntime" if format == "onnx" else "torch"
    with load(jetson.path) as session:
        assert session.info.provider == "cpu"
        assert session.info.notes == tuple(f"{name} is not in this build of {engine}" for name in wanted[:-1])
        self_test(session)


@each_format
def test_what_was_asked_for_falls_back_only_to_what_was_asked_for(packaged: Callable[..., Bundle], format: str) -> None:
    bundle = packaged(FORMS[format], format, "float32")
    with load(bundle.path, providers=("cuda", "cpu")) as session:
        assert session.info.provider == "cpu" and "cuda is not in this build" in session.info.notes[0]
    with pytest.raises(EngineError, match=r"none of cuda can be used here \(cuda is not in this build of "):
        load(bundle.path, providers=("cuda",))


def test_a_provider_that_is_dropped_without_a_word_is_missed(
    packaged: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine really drops it: as CUDA where a library is missing. Only that it could be had is made up."""
    real = onnxruntime.get_available_providers()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, *real])
    bundle = packaged("torch.onnx", "onnx", "float32")
    requires = (replace(bundle.manifest.artifact.requires[0], package="onnxruntime-gpu"),)
    artifact = replace(bundle.manifest.artifact, providers=("cuda", "cpu"), requires=requires)
    jetson = rebuild(bundle, tmp_path / "b.edge", artifact=artifact)
    with pytest.warns(UserWarning, match="is not in available provider names"), load(jetson.path) as session:
        assert session.info.provider == "cpu"
        (note,) = session.info.notes
        assert note.startswith("cuda failed to initialise: ") and "libonnxruntime_providers_cuda.so" in note
        self_test(session)


def test_a_lack_of_gpu_memory_is_told_from_a_missing_library(tmp_path: Path) -> None:
    full = RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; hostname=jetson")
    assert providers.why_not("cuda", tmp_path / "x.so", full).startswith("cuda ran out of GPU memory: CUDA failure 2")
    assert "x.so: cannot open shared object file" in providers.why_not("tensorrt", tmp_path / "x.so", RuntimeError("a"))
    (tmp_path / "x.c").write_text("")
    subprocess.run(["cc", "-shared", "-o", str(tmp_path / "x.so"), str(tmp_path / "x.c")], check=True)
    assert providers.why_not("cuda", tmp_path / "x.so", RuntimeError("first\nsecond")).endswith("initialise: first")
    assert "does not say why" in providers.why_not("cuda", tmp_path / "x.so")


# -- TensorRT's engines ------------------------------------------------------------------------------------------------

ORIN = {"gpu": "Orin", "capability": "8.7", "driver": "12060"}


@pytest.fixture
def jetson(packaged: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle for TensorRT, and a machine that is taken for one with a GPU; the engine is what it is."""
    real = onnxruntime.get_available_providers()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, *real])
    monkeypatch.setattr(onnx, "gpu_facts", lambda: ORIN)
    monkeypatch.setattr(onnx, "tensorrt_version", lambda: "100300")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    bundle = packaged("torch.onnx", "onnx", "float32")
    requires = (replace(bundle.manifest.artifact.requires[0], package="onnxruntime-gpu"),)
    artifact = replace(bundle.manifest.artifact, providers=("tensorrt", "cpu"), requires=requires)
    return rebuild(bundle, tmp_path / "jetson.edge", artifact=artifact)


def test_engines_that_a_child_cannot_build_are_not_tried_here(jetson: Bundle, tmp_path: Path) -> None:
    """The child is real, and its onnxruntime has no TensorRT."""
    for _ in range(2):
        with load(jetson.path, cache_dir=tmp_path / "cache") as session:
            assert session.info.provider == "cpu"
            assert session.info.notes[0].startswith("tensorrt could not build its engines: ")
            assert "tensorrt is not in this build of onnxruntime" in session.info.notes[0]
            self_test(session)
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    facts = json.loads((entry / "entry.json").read_text())["facts"]
    assert ORIN.items() <= facts.items() and (facts["tensorrt"], facts["bundle"]) == ("100300", jetson.digest)


def test_engines_are_kept_by_gpu_and_tensorrt_and_used_as_a_copy(
    jetson: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    copies: list[Path] = []

    def prepare(bundle: Bundle, folder: Path, build: engine_cache.Build) -> str:
        assert build.arguments == ("--provider", "tensorrt") and build.seconds == onnx.TENSORRT_S
        (folder / "graph_0.engine").write_bytes(b"an engine")
        built.append(folder)
        return ""

    def session(*arguments: object) -> None:
        folder = arguments[-1]
        assert isinstance(folder, Path) and (folder / "graph_0.engine").read_bytes() == b"an engine"
        (folder / "graph_0.engine").write_bytes(b"built anew for another size")
        copies.append(folder)
        raise onnx._Unusable("tensorrt is not here after all")

    monkeypatch.setattr(engine_cache, "prepare_in_child", prepare)
    monkeypatch.setattr(onnx, "_session", session)
    for driver in ("12060", "12060", "13000", "13000"):
        monkeypatch.setattr(onnx, "gpu_facts", lambda driver=driver: {**ORIN, "driver": driver})
        with load(jetson.path, cache_dir=tmp_path / "cache") as opened:
            assert opened.info.notes == ("tensorrt is not here after all",)
    assert len(built) == 2 and len(copies) == 4
    assert list((tmp_path / "temporary").iterdir()) == []


# -- the GPU -----------------------------------------------------------------------------------------------------------


def test_without_a_driver_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TENSORRT_LIBRARIES", (str(tmp_path / "libnvinfer.so.10"),))
    assert gpu.tensorrt_version() is None


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Orin", size); return device; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 7; return device; }
int getInferLibVersion(void) { return 100300; }
"""


def test_the_libraries_are_asked_as_they_are_declared(tmp_path: Path) -> None:
    """Against a library with their functions, since no driver is here."""
    (tmp_path / "driver.c").write_text(DRIVER)
    for name in ("libcuda.so.1", "libnvinfer.so.10"):
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / name), str(tmp_path / "driver.c")], check=True)
    code = "from edge_infer.runtime import gpu; print(gpu.facts(), gpu.tensorrt_version())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "'gpu': 'Orin', 'capability': '8.7', 'driver': '12060" in done.stdout
    assert done.stdout.strip().endswith(" 100300")


def test_a_session_on_the_processor_is_not_slowed_by_any_of_it(packaged: Callable[..., Bundle]) -> None:
    with load(packaged("torch.onnx", "onnx", "float32").path, threads=1) as session:
        assert session.info.notes == ()
        assert session(np.zeros((1, 1, 8, 8), np.float32)).shape == (1, 10)
