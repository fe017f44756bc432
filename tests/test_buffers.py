"""A session's own arrays: filled in, run on and read where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_infer import Session, load
from edge_infer.bundle import Bundle
from edge_infer.errors import EngineError, InputError, OutOfMemory, SessionClosed
from edge_infer.runtime import buffers, engine_cache
from edge_infer.runtime.engines.litert import CompiledEngine

Array = np.ndarray[Any, Any]
#: Each engine, and TFLite both ways.
WAYS = {
    "interpreter": ("keras.keras", "tflite"),
    "compiled": ("keras.keras", "tflite"),
    "onnx": ("torch.onnx", "onnx"),
    "torchscript": ("torch_script.pt", "torchscript"),
}


@pytest.fixture(params=WAYS)
def bundle(request: pytest.FixtureRequest, packaged: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> Bundle:
    if request.param != "interpreter":
        monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 0)
    return packaged(*WAYS[request.param], "float32")


@pytest.fixture
def session(bundle: Bundle, tmp_path: Path) -> Iterator[Session]:
    with load(bundle.path, threads=1, cache_dir=tmp_path / "cache") as opened:
        yield opened


def images(session: Session, count: int, seed: int = 0) -> Array:
    shape = [count, *session.inputs[0].shape[1:]]
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def test_the_answers_lie_in_the_same_arrays_each_time(session: Session) -> None:
    given, answers = session.input_buffers["image"], session.output_buffers["digit"]
    assert given.shape == images(session, 1).shape and answers.shape == (1, 10)
    assert given.ctypes.data % buffers.ALIGNMENT == 0
    seen = []
    for seed in (1, 2, 1):
        given[...] = images(session, 1, seed)
        session.run_buffers()
        np.testing.assert_allclose(answers, session(images(session, 1, seed)), atol=1e-6)
        seen.append(answers.copy())
    assert session.input_buffers["image"] is given and session.output_buffers["digit"] is answers
    assert np.array_equal(seen[0], seen[2]) and not np.array_equal(seen[0], seen[1])
    assert session.stats().count == 6


def test_run_and_buffers_do_not_meet(session: Session) -> None:
    image = images(session, 1)
    session.input_buffers["image"][...] = image
    session.run_buffers()
    kept = session.output_buffers["digit"].copy()
    session(images(session, 3, seed=7))
    session(images(session, 1, seed=8))
    assert np.array_equal(session.input_buffers["image"], image)
    assert np.array_equal(session.output_buffers["digit"], kept)
    session.run_buffers()
    np.testing.assert_array_equal(session.output_buffers["digit"], kept)


def test_other_sizes_are_bound_by_name_and_the_old_arrays_rest(session: Session) -> None:
    old = session.input_buffers["image"]
    old[...] = 0
    image = images(session, 5)
    session.bind({"image": image.shape})
    assert session.input_buffers["image"].shape == image.shape and session.output_buffers["digit"].shape == (5, 10)
    session.input_buffers["image"][...] = image
    session.run_buffers()
    np.testing.assert_allclose(session.output_buffers["digit"], session(image), atol=1e-6)
    assert not old.any()


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"picture": (1, 28, 28, 1)}, "shapes of ['picture'], expected some of ['image']"),
        ({"image": (1, -1, 8, 8)}, "shape [1, -1, 8, 8] for the input 'image', expected image float32"),
        ({"image": (1, 2)}, "shape [1, 2] for the input 'image', expected image float32"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_and_the_buffers_stay(
    session: Session, shapes: dict[str, Any], words: str
) -> None:
    before = session.input_buffers["image"]
    with pytest.raises(InputError) as caught:
        session.bind(shapes)
    assert words in str(caught.value)
    assert session.input_buffers["image"] is before
    session.run_buffers()


def test_more_than_there_is_memory_for(session: Session) -> None:
    with pytest.raises(OutOfMemory, match="ask for less"):
        session.bind({"image": (10**13, *session.inputs[0].shape[1:])})


def test_arrays_outlive_the_session_and_it_says_that_it_is_closed(session: Session) -> None:
    given, answers = session.input_buffers["image"], session.output_buffers["digit"]
    session.run_buffers()
    session.close()
    given[...] = 1
    assert np.isfinite(answers).all()
    for use in (session.run_buffers, lambda: session.input_buffers, session.bind):
        with pytest.raises(SessionClosed):
            use()


def test_nothing_is_copied_by_a_compiled_model(
    packaged: Callable[..., Bundle], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(engine_cache, "SMALLEST_BYTES", 0)
    bundle = packaged("keras.keras", "tflite", "float32")
    with load(bundle.path, cache_dir=tmp_path) as session:
        assert isinstance(session._engine, CompiledEngine)
        session.bind()
        assert session._engine._compiled is None, "a second set of activations"
        assert session.input_buffers["image"] is session._buffers.inputs[0]


def test_an_output_of_another_size_is_an_error() -> None:
    sizes = iter([2, 2, 3])
    bound = buffers.CopiedBuffers(lambda inputs: [np.zeros(next(sizes))], [])
    bound.run()
    with pytest.raises(EngineError, match="has shape \\[3\\] this time and \\[2\\] when the buffers were made"):
        bound.run()
