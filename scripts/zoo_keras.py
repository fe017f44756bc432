"""The zoo's networks in Keras, and the one with control flow as a tf.Module. Each function builds one.

Layouts are Keras's own: images are [batch, height, width, channels].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from zoo_rows import (
    DIGITS_EFFICIENTNET,
    DIGITS_MOBILENET,
    SHIFT,
    WILD_BODY,
    WILD_DENSE,
    WILD_PAIR,
    WILD_STEM,
    Shape,
)

CLASSES, DIGITS = 1000, 10
#: Keras's EfficientNet divides its input by this; the zoo's noise has a size of 1.
EFFICIENTNET_RANGE = 255.0


def mlp(size: int) -> keras.Model:
    x = keras.Input((32,), name="x")
    y = x
    for _ in range(2):
        y = layers.Dense(64, activation="relu")(y)
    return keras.Model(x, layers.Dense(DIGITS, name="scores")(y))


def lenet(size: int) -> keras.Model:
    image = keras.Input((28, 28, 1), name="image")
    x = image
    for filters, padding in ((6, "same"), (16, "valid")):
        x = layers.AveragePooling2D(2)(layers.Conv2D(filters, 5, padding=padding, activation="tanh")(x))
    x = layers.Flatten()(x)
    for units in (120, 84):
        x = layers.Dense(units, activation="tanh")(x)
    return keras.Model(image, layers.Dense(DIGITS, name="scores")(x))


def _application(build: Callable[..., keras.Model], size: int) -> keras.Model:
    """A network of keras.applications with an input and an output of the zoo's names."""
    image = keras.Input((size, size, 3), name="image")
    body = build(weights=None, include_top=False, pooling="avg", input_tensor=image)
    return keras.Model(image, layers.Dense(CLASSES, name="scores")(body.output))


def mobilenet_v2(size: int) -> keras.Model:
    return _application(keras.applications.MobileNetV2, size)


def resnet50(size: int) -> keras.Model:
    return _application(keras.applications.ResNet50, size)


def efficientnet_b0(size: int) -> keras.Model:
    return _application(keras.applications.EfficientNetB0, size)


def transformer(size: int) -> keras.Model:
    """Two encoder layers over 16 tokens."""
    tokens = keras.Input((16,), name="tokens", dtype="int32")
    places = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    x = layers.Embedding(64, 32)(tokens) + layers.Embedding(16, 32)(places)
    for _ in range(2):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 8)(x, x))
        wide = layers.Dense(64, activation="gelu")(x)
        x = layers.LayerNormalization()(x + layers.Dense(32)(wide))
    return keras.Model(tokens, layers.Dense(DIGITS, name="scores")(layers.GlobalAveragePooling1D()(x)))


def lstm(size: int) -> keras.Model:
    return _recurrent(layers.LSTM)


def gru(size: int) -> keras.Model:
    return _recurrent(layers.GRU)


def _recurrent(cell: Callable[..., Any]) -> keras.Model:
    sequence = keras.Input((20, 8), name="sequence")
    return keras.Model(sequence, layers.Dense(DIGITS, name="scores")(cell(32)(sequence)))


def two_in_two_out(size: int) -> keras.Model:
    """An image and measurements beside it; classes and an embedding come out."""
    image, features = keras.Input((16, 16, 3), name="image"), keras.Input((6,), name="features")
    x: Any = image
    for filters in (16, 32):
        x = layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    read = layers.Dense(32, activation="relu")(features)
    joined = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), read])
    outputs = {"kind": layers.Dense(5, name="kind")(joined)}
    outputs["place"] = layers.Dense(4, activation="tanh", name="place")(joined)
    return keras.Model({"image": image, "features": features}, outputs)


def any_length(size: int) -> keras.Model:
    """Sequences of any length in any number: an answer for each step, and one pooled by attention."""
    sequence = keras.Input((None, 8), name="sequence")
    steps = layers.Conv1D(32, 5, padding="same", activation="relu")(sequence)
    steps = layers.Conv1D(32, 3, padding="same", activation="relu")(steps)
    attention = layers.Softmax(axis=1)(layers.Dense(1)(steps))
    pooled = keras.ops.sum(attention * steps, axis=1)
    outputs = {"each": layers.Dense(4, name="each")(steps), "pooled": layers.Dense(6, name="pooled")(pooled)}
    return keras.Model({"sequence": sequence}, outputs)


class Control(tf.Module):
    """Halves until small, then one of two heads: how often and which depends on the values.

    No Keras layer holds such a thing except with custom code, so there is no ``.keras`` file of it.
    """

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(5)
        self.tables = [
            tf.Variable(rng.normal(0, (2 / size[0]) ** 0.5, size).astype(np.float32), name=f"table_{index}")
            for index, size in enumerate(((8, 16), (16, 4), (16, 4)))
        ]

    @tf.function(input_signature=[tf.TensorSpec((None, 8), tf.float32, name="x")], autograph=False)
    def __call__(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        dense, warm, cold = self.tables
        (h,) = tf.while_loop(lambda h: tf.reduce_max(tf.abs(h)) > 1.0, lambda h: (h * 0.5,), (x @ dense,))
        return {"scores": tf.cond(tf.reduce_mean(x) > 0.0, lambda: h @ warm, lambda: h @ cold)}


def control(size: int) -> tf.Module:
    return Control()


def conv_norm(x: Any, filters: int, kernel: int, stride: int = 1) -> Any:
    x = layers.Conv2D(filters, kernel, strides=stride, padding="same", use_bias=False)(x)
    return layers.BatchNormalization(momentum=0.9)(x)


def _inverted_residual(x: Any, outputs: int, expand: int, stride: int, kernel: int, squeeze: bool) -> Any:
    inputs, act = x.shape[-1], "swish" if squeeze else "relu6"
    y = layers.Activation(act)(conv_norm(x, inputs * expand, 1)) if expand > 1 else x
    y = layers.DepthwiseConv2D(kernel, strides=stride, padding="same", use_bias=False)(y)
    y = layers.Activation(act)(layers.BatchNormalization(momentum=0.9)(y))
    if squeeze:
        gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
        gate = layers.Conv2D(max(1, inputs // 4), 1, activation="swish")(gate)
        y = layers.Multiply()([y, layers.Conv2D(y.shape[-1], 1, activation="sigmoid")(gate)])
    y = conv_norm(y, outputs, 1)
    return layers.Add()([x, y]) if stride == 1 and inputs == outputs else y


def inverted_residuals(shape: Shape, activation: str | None = "softmax") -> keras.Model:
    """A network of the digits from a table; zoo_torch.inverted_residuals is its like, without the ``activation``."""
    act = "swish" if shape.squeeze else "relu6"
    image = keras.Input((8, 8, 1), name="image")
    x = layers.Activation(act)(conv_norm(image, shape.stem, 3, shape.stem_stride))
    for row in shape.rows:
        for index in range(row.repeats):
            stride = row.stride if index == 0 else 1
            x = _inverted_residual(x, row.channels, row.expand, stride, row.kernel, shape.squeeze)
    x = layers.Activation(act)(conv_norm(x, shape.head, 1))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(DIGITS, activation=activation, name="digit")(x))


def digits_mobilenet() -> keras.Model:
    return inverted_residuals(DIGITS_MOBILENET)


def digits_efficientnet() -> keras.Model:
    return inverted_residuals(DIGITS_EFFICIENTNET)


def digits_wild() -> keras.Model:
    """Plain convolutions; train_nets.py makes the first of the pair wild after training."""
    image = keras.Input((8, 8, 1), name="image")
    x = image
    for filters, stride in zip((WILD_STEM, *WILD_PAIR, *WILD_BODY), (1, 1, 1, 2, 1), strict=True):
        x = layers.ReLU()(conv_norm(x, filters, 3, stride))
    x = layers.Dense(WILD_DENSE, activation="relu")(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(DIGITS, activation="softmax", name="digit")(x))


def randomize(model: keras.Model, seed: int) -> None:
    """Weights that keep the variance of what passes: He's for filters, size 1 for tables of words."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, (layers.Conv1D, layers.Conv2D, layers.Dense, layers.DepthwiseConv2D)):
            kernel = layer.kernel
            taken = kernel.shape[:2] if isinstance(layer, layers.DepthwiseConv2D) else kernel.shape[:-1]
            kernel.assign(rng.normal(0, (2 / np.prod(taken)) ** 0.5, kernel.shape))
            if layer.use_bias:
                layer.bias.assign(rng.normal(0, 0.1, layer.bias.shape))
        elif isinstance(layer, layers.BatchNormalization):
            layer.beta.assign(np.full(layer.beta.shape, SHIFT))
        elif isinstance(layer, layers.Embedding):
            layer.embeddings.assign(rng.normal(0, 1, layer.embeddings.shape))


def calibrate(model: keras.Model, feed: dict[str, np.ndarray]) -> None:
    """One pass in which every normalisation takes the statistics of what arrives."""
    if any(isinstance(layer, layers.Rescaling) for layer in model.layers):
        stem = next(layer for layer in model.layers if isinstance(layer, layers.Conv2D))
        stem.kernel.assign(stem.kernel * EFFICIENTNET_RANGE)
    normalisations = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    # Dropped values have another variance than the same ones kept: statistics with both would be nobody's.
    dropouts = [layer for layer in model.layers if isinstance(layer, layers.Dropout)]
    kept = [layer.momentum for layer in normalisations], [layer.rate for layer in dropouts]
    for layer in normalisations:
        layer.momentum = 0.0
    for layer in dropouts:
        layer.rate = 0.0
    if normalisations:
        model(arguments(model, feed), training=True)
    for layer, momentum in zip(normalisations, kept[0], strict=True):
        layer.momentum = momentum
    for layer, rate in zip(dropouts, kept[1], strict=True):
        layer.rate = rate


def arguments(model: Any, feed: dict[str, np.ndarray]) -> Any:
    """A feed as the model takes it: by name, or the one tensor alone."""
    tensors = {name: tf.constant(array) for name, array in feed.items()}
    by_name = isinstance(model, keras.Model) and isinstance(model.input, dict)
    return tensors if by_name else next(iter(tensors.values()))


def ask(model: Any, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Answers by name, in the order in which Keras exports them."""
    answers = model(arguments(model, feed))
    if not isinstance(answers, dict):
        answers = {model.output_names[0]: answers}
    return {name: answers[name].numpy() for name in sorted(answers)}
