"""Requests that wait together are run as one where the model's own questions show that this changes no answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import save, value, weight
from test_pool import SOURCES, Gate

from edge_infer import Pool, load
from edge_infer.bundle import Bundle, open_bundle
from edge_infer.errors import EngineError, InputError, UsageError
from edge_infer.package import Request, package
from edge_infer.runtime.pool import _Queue, _Request

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def images(bundle: Bundle, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    (spec,) = bundle.manifest.inputs
    shape = (rows, *spec.shape[1:])
    return {spec.name: np.random.default_rng(seed).random(shape, dtype=np.float32)}  # type: ignore[arg-type]


@pytest.fixture
def onnx(packaged: Callable[..., Bundle]) -> Bundle:
    return packaged(SOURCES["onnx"], "onnx", "float32")


def packaged_onnx(folder: Path, model: Path, samples: dict[str, np.ndarray] | None = None) -> Bundle:
    calibration = None
    if samples:
        calibration = folder / "samples.npz"
        np.savez(calibration, **samples)
    path = folder / f"{model.stem}.edge"
    package(Request(model, "cpu-x86_64", path, "onnx", "float32", calibration=calibration, name="made"))
    return open_bundle(path)


@pytest.mark.parametrize("format", SOURCES)
def test_requests_that_wait_are_answered_by_one_run(
    packaged: Callable[..., Bundle], format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = packaged(SOURCES[format], format, "float32")
    asked = [images(bundle, rows, seed) for seed, rows in enumerate((1, 1, 3, 1, 2, 1))]
    with load(bundle.path, threads=1, cache_dir=tmp_path) as session:
        expected = [session.run(feed) for feed in asked]
    with Pool(bundle.path, sessions=1, threads=1, batch=5, cache_dir=tmp_path) as pool:
        (session,) = pool.sessions
        gate = Gate(monkeypatch)
        before = session.stats().count
        futures = [pool.submit(asked[0])]
        assert gate.reached.acquire(timeout=30)  # the session is busy with the first
        futures += [pool.submit(feed) for feed in asked[1:]]
        gate.open.set()
        for future, want in zip(futures, expected):
            for name, answer in future.result().items():
                assert answer.shape == want[name].shape
                np.testing.assert_allclose(answer, want[name], atol=1e-5)
        assert session.stats().count - before == 2


def test_no_more_than_asked_for_run_together(onnx: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(onnx.path, sessions=1, threads=1, batch=3, cache_dir=tmp_path) as pool:
        gate = Gate(monkeypatch)
        before = pool.sessions[0].stats().count
        futures = [pool.submit(images(onnx, 1))]
        assert gate.reached.acquire(timeout=30)
        futures += [pool.submit(images(onnx, 1, seed)) for seed in range(7)]
        gate.open.set()
        assert all(future.result() for future in futures)
        assert pool.sessions[0].stats().count - before == 1 + 3


def test_a_request_waits_for_company_until_there_is_enough(onnx: Bundle, tmp_path: Path) -> None:
    with Pool(onnx.path, sessions=1, threads=1, batch=2, wait_ms=50_000, cache_dir=tmp_path) as pool:
        before = pool.sessions[0].stats().count
        futures = [pool.submit(images(onnx, 1, seed)) for seed in range(2)]
        assert all(future.result(timeout=30) for future in futures)
        assert pool.sessions[0].stats().count - before == 1
        alone = pool.submit(images(onnx, 1))
    assert alone.result(timeout=0)  # closing ends the wait


def test_a_request_that_does_not_fit_fails_alone(onnx: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(onnx.path, sessions=1, threads=1, batch=8, cache_dir=tmp_path) as pool:
        gate = Gate(monkeypatch)
        futures = [pool.submit(images(onnx, 1))]
        assert gate.reached.acquire(timeout=30)
        name = onnx.manifest.inputs[0].name
        broken = [
            pool.submit(inputs)
            for inputs in ({"picture": np.zeros(3)}, {name: np.zeros((1, 1, 8, 8))}, {name: np.zeros(3, np.float32)})
        ]
        futures.append(pool.submit(images(onnx, 1)))
        gate.open.set()
        for future in broken:
            with pytest.raises(InputError):
                future.result()
        assert all(future.result() for future in futures)


def test_a_request_that_the_engine_cannot_answer_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = weight("table", 16, 4)
    model = save(
        tmp_path / "ids.onnx",
        [helper.make_node("Gather", ["table", "ids"], ["rows"])],
        [value("ids", INT64, ["n"])],
        [value("rows", FLOAT, ["n", 4])],
        [table],
    )
    bundle = packaged_onnx(tmp_path, model, {"ids": np.arange(16, dtype=np.int64)})
    with Pool(bundle.path, sessions=1, threads=1, batch=8, cache_dir=tmp_path) as pool:
        gate = Gate(monkeypatch)
        futures = [pool.submit({"ids": np.array([number])}) for number in (0, 3, 99, 5)]
        gate.open.set()
        for future, number in zip(futures, (0, 3, 99, 5)):
            if number == 99:
                with pytest.raises(EngineError, match="out of data bounds"):
                    future.result()
            else:
                np.testing.assert_array_equal(future.result()["rows"], numpy_helper.to_array(table)[[number]])


def test_requests_of_other_sizes_are_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(
        tmp_path / "double.onnx",
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [value("x", FLOAT, ["n", "columns"])],
        [value("y", FLOAT, ["n", "columns"])],
        [],
    )
    bundle = packaged_onnx(tmp_path, model)
    asked = [np.random.default_rng(seed).random((1 + seed % 2, columns), np.float32) for seed, columns in
             enumerate((3, 3, 5, 3, 5, 5, 0))]  # fmt: skip
    with Pool(bundle.path, sessions=1, threads=1, batch=8, cache_dir=tmp_path) as pool:
        gate = Gate(monkeypatch)
        futures = [pool.submit({"x": array}) for array in asked]
        gate.open.set()
        for future, array in zip(futures, asked):
            np.testing.assert_array_equal(future.result()["y"], array + array)


def test_a_run_that_fails_for_whatever_reason_leaves_no_request_unanswered(
    onnx: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a caller changes an array that waits, which it must not."""
    with Pool(onnx.path, sessions=1, threads=1, batch=4, cache_dir=tmp_path) as pool:
        gate = Gate(monkeypatch)
        futures = [pool.submit(images(onnx, 1))]
        assert gate.reached.acquire(timeout=30)
        changed = images(onnx, 1)
        broken, sound = pool.submit(changed), pool.submit(images(onnx, 1))
        changed.clear()
        gate.open.set()
        with pytest.raises(InputError, match=r"inputs named \[\]"):
            broken.result(timeout=30)
        assert all(future.result(timeout=30) for future in (*futures, sound))


def test_a_request_that_does_not_fit_is_taken_by_whoever_is_idle() -> None:
    """Though the word that it came went to the one who waited for company, and left."""
    queue = _Queue(8)
    first, other = (_Request({}, Future(), ((size,),)) for size in (1, 2))
    taken: list[list[_Request]] = []
    queue.put(first)
    for number, most in enumerate((2, 1)):  # one for company, then one for anything
        threading.Thread(target=lambda most=most: taken.append(queue.take(most, 60.0)), daemon=True).start()
        while len(queue._changed._waiters) <= number:  # type: ignore[attr-defined]
            time.sleep(0.001)
    queue.put(other)
    end = time.monotonic() + 30
    while len(taken) < 2 and time.monotonic() < end:
        time.sleep(0.001)
    assert taken == [[first], [other]]


# -- models that cannot ------------------------------------------------------------------------------------------------


def refusal(bundle: Bundle, folder: Path) -> str:
    with pytest.raises(UsageError, match="leave batch at 1") as caught:
        Pool(bundle.path, batch=2, cache_dir=folder)
    return str(caught.value)


def test_a_model_of_one_batch_size_is_refused(tmp_path: Path) -> None:
    model = save(
        tmp_path / "fixed.onnx",
        [helper.make_node("Relu", ["x"], ["y"])],
        [value("x", FLOAT, [1, 4])],
        [value("y", FLOAT, [1, 4])],
        [],
    )
    assert "the first size of x float32[1, 4] is fixed" in refusal(packaged_onnx(tmp_path, model), tmp_path)


def test_a_model_that_looks_at_the_whole_batch_is_refused(tmp_path: Path) -> None:
    model = save(
        tmp_path / "mean.onnx",
        [
            helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
            helper.make_node("Add", ["x", "mean"], ["y"]),
        ],
        [value("x", FLOAT, ["n", 4])],
        [value("y", FLOAT, ["n", 4])],
        [],
    )
    assert "in company its golden questions get other answers" in refusal(packaged_onnx(tmp_path, model), tmp_path)


def test_a_model_with_one_answer_for_all_rows_is_refused(tmp_path: Path) -> None:
    model = save(
        tmp_path / "any.onnx",
        [helper.make_node("ReduceMax", ["x"], ["y"], axes=[0], keepdims=1)],
        [value("x", FLOAT, ["n", 4])],
        [value("y", FLOAT, [1, 4])],
        [],
    )
    assert "the first size of y float32[1, 4] is fixed" in refusal(packaged_onnx(tmp_path, model), tmp_path)


def test_a_model_whose_answers_have_other_rows_is_refused(tmp_path: Path) -> None:
    model = save(
        tmp_path / "turned.onnx",
        [helper.make_node("Transpose", ["x"], ["y"])],
        [value("x", FLOAT, ["n", "m"])],
        [value("y", FLOAT, ["m", "n"])],
        [],
    )
    assert "output 'y' has shape" in refusal(packaged_onnx(tmp_path, model), tmp_path)


def test_activations_scaled_by_the_largest_of_a_batch_are_seen(packaged: Callable[..., Bundle], tmp_path: Path) -> None:
    """ONNX's dynamic quantization has one range for all rows; TFLite has one for each."""
    onnx = packaged(SOURCES["onnx"], "onnx", "int8-dynamic")
    assert "in company its golden questions get other answers" in refusal(onnx, tmp_path)
    tflite = packaged(SOURCES["tflite"], "tflite", "int8-dynamic")
    with Pool(tflite.path, batch=2, cache_dir=tmp_path) as pool:
        assert pool.run(images(tflite, 1))


@pytest.mark.parametrize("options", [{"batch": 0}, {"batch": 2.0}, {"wait_ms": -1}, {"wait_ms": "5"}, {"wait_ms": 1e9}])
def test_an_odd_size_or_wait_is_refused(onnx: Bundle, options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"expected (a whole number|milliseconds)"):
        Pool(onnx.path, **options)  # type: ignore[arg-type]
