"""Several sessions over one mapping, fed from a queue; and what a session says of its runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_infer import Pool, load
from edge_infer.bundle import Bundle
from edge_infer.errors import InputError, QueueFull, SessionClosed, UsageError
from edge_infer.runtime import engine_cache
from edge_infer.runtime.session import Session
from edge_infer.runtime.stats import LATEST, Recorder

SOURCES = {"tflite": "keras.keras", "onnx": "torch.onnx", "torchscript": "torch_script.pt"}


@pytest.fixture(params=SOURCES)
def bundle(request: pytest.FixtureRequest, packaged: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 0)
    return packaged(SOURCES[request.param], request.param, "float32")


@pytest.fixture
def tflite(packaged: Callable[..., Bundle]) -> Bundle:
    return packaged(SOURCES["tflite"], "tflite", "float32")


def image(bundle: Bundle, seed: int) -> dict[str, np.ndarray]:
    (spec,) = bundle.manifest.inputs
    shape = tuple(size or 1 for size in spec.shape)
    return {spec.name: np.random.default_rng(seed).random(shape, dtype=np.float32)}


class Gate:
    """Sessions that begin to run only when it opens; tells when one has come that far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Semaphore(0)
        real = Session.run

        def run(session: Session, inputs: Any) -> Any:
            self.reached.release()
            self.open.wait(30)
            return real(session, inputs)

        monkeypatch.setattr(Session, "run", run)


def test_a_pool_answers_as_a_session(bundle: Bundle, tmp_path: Path) -> None:
    asked = [image(bundle, seed) for seed in range(24)]
    with load(bundle.path, threads=1, cache_dir=tmp_path) as session:
        expected = [session.run(feed) for feed in asked]
    with Pool(bundle.path, sessions=3, threads=1, cache_dir=tmp_path) as pool:
        assert len(pool.sessions) == 3
        futures = [pool.submit(feed) for feed in asked]
        for future, want in zip(futures, expected):
            for name, answer in future.result().items():
                np.testing.assert_allclose(answer, want[name], atol=1e-6)
        assert sum(session.stats().count for session in pool.sessions) == len(asked)


def test_the_sessions_share_the_cores(tflite: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_infer.runtime.pool.default_threads", lambda: 8)
    with Pool(tflite.path, sessions=3, cache_dir=tmp_path) as pool:
        assert [session.info.threads for session in pool.sessions] == [2, 2, 2]


def test_sessions_run_side_by_side(tflite: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Pool(tflite.path, sessions=2, threads=1, cache_dir=tmp_path) as pool:
        futures = [pool.submit(image(tflite, seed)) for seed in range(2)]
        assert gate.reached.acquire(timeout=30) and gate.reached.acquire(timeout=30)
        gate.open.set()
        assert all(future.result() for future in futures)


def test_a_full_queue_refuses_at_once_and_loses_nothing(
    tflite: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with Pool(tflite.path, sessions=1, waiting=2, threads=1, cache_dir=tmp_path) as pool:
        futures = [pool.submit(image(tflite, 0))]
        assert gate.reached.acquire(timeout=30)  # the session has taken the first
        futures += [pool.submit(image(tflite, seed)) for seed in (1, 2)]
        with pytest.raises(QueueFull, match="2 requests are waiting already"):
            pool.submit(image(tflite, 3))
        gate.open.set()
        assert all(future.result() for future in futures)
        assert pool.run(image(tflite, 3))


def test_an_error_is_the_futures_own(tflite: Bundle, tmp_path: Path) -> None:
    with Pool(tflite.path, sessions=1, cache_dir=tmp_path) as pool:
        broken = pool.submit({"picture": np.zeros(3, np.float32)})
        sound = pool.submit(image(tflite, 1))
        with pytest.raises(InputError, match="picture"):
            broken.result()
        assert sound.result()
        assert (pool.sessions[0].stats().count, pool.sessions[0].stats().errors) == (1, 1)


def test_what_was_cancelled_is_not_run(tflite: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Pool(tflite.path, sessions=1, cache_dir=tmp_path) as pool:
        pool.submit(image(tflite, 0))
        assert gate.reached.acquire(timeout=30)
        assert pool.submit(image(tflite, 1)).cancel()
        gate.open.set()
    assert pool.sessions[0].stats().count == 1


def test_closing_answers_what_waits_and_then_refuses(tflite: Bundle, tmp_path: Path) -> None:
    pool = Pool(tflite.path, sessions=2, cache_dir=tmp_path)
    futures = [pool.submit(image(tflite, seed)) for seed in range(20)]
    pool.close()
    pool.close()
    assert all(future.result(timeout=0) for future in futures)
    with pytest.raises(SessionClosed, match="the pool is closed"):
        pool.submit(image(tflite, 0))
    with pytest.raises(SessionClosed):
        pool.sessions[0].run(image(tflite, 0))


@pytest.mark.parametrize("options", [{"sessions": 0}, {"waiting": 0}, {"sessions": 1.5}, {"threads": 0}])
def test_a_pool_of_nothing_is_refused(tflite: Bundle, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected a whole number of at least 1"):
        Pool(tflite.path, **options)


# -- a session's figures -----------------------------------------------------------------------------------------------


def test_a_session_counts_its_runs(tflite: Bundle, tmp_path: Path) -> None:
    with load(tflite.path, cache_dir=tmp_path) as session:
        assert session.stats().count == 0 and session.stats().p50_ms is None
        for seed in range(5):
            session.run(image(tflite, seed))
        with pytest.raises(InputError):
            session.run({})
        stats = session.stats()
    assert (stats.count, stats.errors) == (5, 1)
    assert 0 < stats.p50_ms <= stats.p95_ms <= stats.p99_ms  # type: ignore[operator]


def test_percentiles_are_those_of_the_latest_runs() -> None:
    recorder = Recorder()
    for _ in range(LATEST):
        recorder.answered(9.0)
    for number in range(LATEST):
        recorder.answered((number + 1) / 1e6)
    stats = recorder.stats()
    assert stats.count == 2 * LATEST
    assert (stats.p50_ms, stats.p95_ms, stats.p99_ms) == pytest.approx((0.501, 0.951, 0.991))
