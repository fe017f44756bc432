"""TensorFlow models whose contracts are hard, and TensorFlow's own answers to questions of several sizes.

TensorFlow shares no process with the tests: ``make(folder)`` runs in one child, which writes everything at once.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


@functools.cache
def made() -> Path:
    """The folder with the models, made once a session."""
    folder = Path(tempfile.mkdtemp(prefix="edge-infer-tensorflow-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment, capture_output=True)
    return folder


def ask(folder: Path, name: str, run: Callable[[Arrays], Arrays], feeds: list[Arrays]) -> None:
    """Keep questions and answers: ``NAME.npz`` holds ``in/CASE/NAME`` and ``out/CASE/NAME``."""
    arrays = {}
    for case, feed in enumerate(feeds):
        arrays |= {f"in/{case}/{key}": value for key, value in feed.items()}
        arrays |= {f"out/{case}/{key}": np.asarray(value) for key, value in run(feed).items()}
    np.savez(folder / f"{name}.npz", **arrays)


def questions(folder: Path, name: str) -> list[tuple[Arrays, Arrays]]:
    """What ``ask`` kept, one (inputs, outputs) a case."""
    cases: dict[str, tuple[Arrays, Arrays]] = {}
    with np.load(folder / f"{name}.npz") as file:
        for key in file.files:
            side, case, tensor = key.split("/", 2)
            cases.setdefault(case, ({}, {}))[side == "out"][tensor] = file[key]
    return list(cases.values())


def make(folder: Path) -> None:
    import keras

    keras.utils.set_random_seed(3)
    for build in (two_named_inputs, two_signatures, many_dtypes, beyond_tflite, sequential, recurrent):
        build(folder)


def two_named_inputs(folder: Path) -> None:
    """Tokens of any length and features to two outputs, none of them in alphabetical order."""
    import keras

    tokens = keras.Input((None,), name="tokens", dtype="int32")
    features = keras.Input((4,), name="features")
    x = keras.layers.Embedding(16, 8, name="table")(tokens)
    pooled = keras.layers.GlobalAveragePooling1D()(x)
    joined = keras.layers.Concatenate()([pooled, features])
    topic = keras.layers.Dense(3, activation="softmax", name="topic")(joined)
    each = keras.layers.Dense(2, name="each")(x)
    model = keras.Model({"tokens": tokens, "features": features}, {"topic": topic, "each": each})
    model.save(folder / "two_named_inputs.keras")
    rng = np.random.default_rng(1)
    feeds = [
        {
            "tokens": rng.integers(0, 16, (batch, length), np.int32),
            "features": rng.standard_normal((batch, 4), np.float32),
        }
        for batch, length in ((1, 1), (2, 7), (5, 33))
    ]
    ask(folder, "two_named_inputs", lambda feed: model(feed, training=False), feeds)


def two_signatures(folder: Path) -> None:
    """One SavedModel that squares and roots, with a weight behind each."""
    import tensorflow as tf

    class Powers(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = tf.Variable(tf.random.stateless_normal((6, 3), (1, 2)), name="weight")

        @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.float32, name="x")])
        def squared(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"y": tf.square(x @ self.weight)}

        @tf.function(input_signature=[tf.TensorSpec((None, None, 6), tf.float32, name="x")])
        def rooted(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"root": tf.sqrt(tf.abs(tf.reduce_sum(x, 1) @ self.weight))}

    model = Powers()
    tf.saved_model.save(
        model, str(folder / "two_signatures"), signatures={"squared": model.squared, "rooted": model.rooted}
    )
    rng = np.random.default_rng(2)
    feeds = [{"x": rng.standard_normal((*size, 6), np.float32)} for size in ((1,), (4,), (7,))]
    ask(folder, "squared", lambda feed: model.squared(**feed), feeds)
    feeds = [{"x": rng.standard_normal((2, length, 6), np.float32)} for length in (5, 5)]
    ask(folder, "rooted", lambda feed: model.rooted(**feed), feeds)


def many_dtypes(folder: Path) -> None:
    """Bytes, booleans and a scalar go in; floats, integers and a scalar come out."""
    import tensorflow as tf

    class Mixed(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = tf.Variable(tf.random.stateless_normal((6, 3), (3, 4)), name="weight")

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, 6), tf.uint8, name="image"),
                tf.TensorSpec((None, 6), tf.bool, name="keep"),
                tf.TensorSpec((), tf.float32, name="gain"),
            ]
        )
        def __call__(self, image: tf.Tensor, keep: tf.Tensor, gain: tf.Tensor) -> dict[str, tf.Tensor]:
            pixels = tf.where(keep, tf.cast(image, tf.float32) / 255.0, 0.0)
            scores = gain * (pixels @ self.weight)
            return {"scores": scores, "best": tf.argmax(scores, axis=1), "total": tf.reduce_sum(pixels)}

    model = Mixed()
    tf.saved_model.save(model, str(folder / "many_dtypes"))
    rng = np.random.default_rng(4)
    feeds = [
        {
            "image": rng.integers(0, 256, (batch, 6)).astype(np.uint8),
            "keep": rng.random((batch, 6)) > 0.3,
            "gain": np.float32(gain),
        }
        for batch, gain in ((1, 2.0), (3, -0.5), (8, 1.0))
    ]
    ask(folder, "many_dtypes", lambda feed: model(**feed), feeds)


def beyond_tflite(folder: Path) -> None:
    """An operator that TFLite has no built-in for, inside a named scope."""
    import tensorflow as tf

    class Beta(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
        def __call__(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            with tf.name_scope("likelihood"):
                return {"y": tf.math.betainc(1.0 + tf.abs(x), 2.0 + tf.abs(x), tf.sigmoid(x))}

    tf.saved_model.save(Beta(), str(folder / "beyond_tflite"))


def sequential(folder: Path) -> None:
    """A Sequential model, whose input and output have the names that Keras gives them."""
    import keras

    model = keras.Sequential([keras.Input((5,), name="row of five"), keras.layers.Dense(2, name="two.columns")])
    model.save(folder / "sequential.keras")
    feeds = [{"row of five": np.random.default_rng(5).standard_normal((batch, 5), np.float32)} for batch in (1, 6)]
    ask(folder, "sequential", lambda feed: {"two.columns": model(feed["row of five"])}, feeds)


def recurrent(folder: Path) -> None:
    """Loops over a known number of steps, one after the other, one within a model of its own."""
    import keras

    inner = keras.Sequential([keras.Input((9, 6)), keras.layers.GRU(4, return_sequences=True)], name="inner")
    steps = keras.Input((9, 3), name="steps")
    x = keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True))(steps)
    model = keras.Model(steps, keras.layers.SimpleRNN(2, name="last")(inner(x)))
    model.save(folder / "recurrent.keras")
    model.export(folder / "recurrent", verbose=False)
    rng = np.random.default_rng(6)
    feeds = [{"steps": rng.standard_normal((batch, 9, 3), np.float32)} for batch in (1, 2, 5)]
    ask(folder, "recurrent", lambda feed: {"last": model(feed["steps"])}, feeds)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
