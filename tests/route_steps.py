"""Run conversion steps in one child, many a time: loading a framework takes longer than converting these models."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_infer import probe
from edge_infer.convert import INPUTS_FILE, ask_source, spec_to_json
from edge_infer.errors import EdgeInferError

Json = dict[str, Any]
#: A reader's request without samples.
NO_SAMPLES: Json = {"preprocess": [], "calibration": None, "evaluation": None, "labels": False}
TORCH_MODELS = str(Path(__file__).with_name("torch_models.py"))


def torch_steps(request: Json) -> Json:
    """For each case (name, file, kind, factory, inputs, steps): its contract and what each step gives, or its error.

    One whose name begins with "large" goes to TFLite as large models do.
    """
    return {case["name"]: _torch_case(case, Path(request["folder"]) / case["name"]) for case in request["cases"]}


def _torch_case(case: Json, folder: Path) -> Json:
    from edge_infer.convert import torch_source

    folder.mkdir(parents=True)
    source = {"source": case["file"], "kind": case["kind"], "factory": case.get("factory"), "inputs": case["inputs"]}
    source |= {"signature": None, "trust_pickle": False, "out": str(folder), **NO_SAMPLES}
    model = torch_source.load(source)
    if "torch_to_tflite" in case["steps"]:
        from edge_infer.convert import torch_to_tflite

        torch_to_tflite.LARGE_BYTES = 0 if case["name"].startswith("large") else 2**62
    contract = ask_source(source, model.inputs, model.run)
    return {**contract, **{step: run(step, source, contract, folder) for step in case["steps"]}}


def run(step: str, source: Json, contract: Json, folder: Path, name: str = "") -> Json:
    """The answer of a step, or ``{"error": its sentence}``."""
    work = folder / (name or step)
    work.mkdir()
    request = {"from": source, "out": str(work), "feeds": str(folder / INPUTS_FILE), **contract}
    try:
        return importlib.import_module(f"edge_infer.convert.{step}").convert(request)
    except EdgeInferError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def tensorflow_steps(request: Json) -> Json:
    """Make the TensorFlow models, convert each to ONNX, by TFLite too, and leave the ``.tflite`` files."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(5)
    layers, folder = keras.layers, Path(request["folder"])
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Normalization(mean=(0.1, 0.2, 0.3), variance=(1.0, 0.5, 2.0))(image)  # no variables, tensors held
    x = layers.SeparableConv2D(4, 3, padding="same", activation="gelu")(x)
    x = layers.GlobalAveragePooling2D()(x * layers.Dense(1, activation="sigmoid")(x))
    x = layers.Dense(256, activation="relu")(x)  # large enough to be quantized
    vision = keras.Model(image, layers.Dense(6, name="scores")(x))
    steps = keras.Input((None, 3), name="steps")
    ids = keras.Input((None,), dtype="int64", name="ids")
    y = layers.GRU(4, return_sequences=True)(layers.Bidirectional(layers.LSTM(3, return_sequences=True))(steps))
    words = layers.Embedding(16, 4)(ids)
    words = layers.LayerNormalization()(words + layers.MultiHeadAttention(2, 2)(words, words))
    language = keras.Model({"steps": steps, "ids": ids}, {"each": y, "topic": layers.Dense(2)(words)})
    answers = {}
    for name, model in (("vision", vision), ("language", language)):
        answers[name] = _tensorflow_case(model, [(t.name, t.dtype, t.shape) for t in model.inputs], folder / name)
    spec = [tf.TensorSpec((None, 4), tf.float32, name="x")]
    gate = tf.function(lambda x: {"y": tf.cond(tf.reduce_sum(x) > 0, lambda: x * 2, lambda: x - 1)}, spec)
    strange = tf.function(lambda x: {"y": tf.math.betainc(1 + tf.abs(x), 2 + tf.abs(x), tf.sigmoid(x))}, spec)
    for name, function in (("gate", gate), ("strange", strange)):
        module = tf.Module()
        module.call = function
        answers[name] = _tensorflow_case(module, [("x", "float32", (None, 4))], folder / name)
    answers["tied"] = _tensorflow_case(_tied_weights(), [("ids", "int32", (None, 3))], folder / "tied")
    for name in ("vision", "gate", "tied"):
        _tflites(folder / name, answers[name])
    _as_large_models(folder, answers)
    return answers


def _tied_weights() -> Any:
    """One table looked up in, and multiplied with as it is and transposed; another read twice."""
    import tensorflow as tf

    module = tf.Module()
    module.words = tf.Variable(tf.random.stateless_normal((16, 16), (1, 2)))
    module.twice = tf.Variable(tf.random.stateless_normal((16, 5), (3, 4)))

    def call(ids: Any) -> dict[str, Any]:
        words = tf.gather(tf.convert_to_tensor(module.words), ids)
        mixed = tf.matmul(tf.reshape(words, (-1, 16)), module.words)
        scores = tf.matmul(mixed, module.words, transpose_b=True)
        return {"scores": scores, "two": tf.matmul(scores, module.twice) + tf.reduce_sum(module.twice)}

    module.call = tf.function(call, [tf.TensorSpec((None, 3), tf.int32, name="ids")])
    return module


def _as_large_models(folder: Path, answers: Json) -> None:
    """To ONNX once more as models go that have many weights; ``aside`` tells how many of them no converter saw."""
    from edge_infer.convert import frozen_graphs, saved_model_to_onnx, tflite_to_onnx

    put_back, counted = saved_model_to_onnx.put_back, []

    def count(model: Any, weights: Json) -> None:
        counted.append(len(weights))
        put_back(model, weights)

    frozen_graphs.SMALLEST_BYTES = tflite_to_onnx.SMALLEST_BYTES = 0
    for module in (saved_model_to_onnx, tflite_to_onnx):
        module.LARGE_BYTES, module.put_back = 0, count
    for name in ("vision", "language", "tied"):
        contract, form = _contract(answers[name]), answers[name]["form"]
        answers[name]["large"] = run("saved_model_to_onnx", form, contract, folder / name, "large")
        answers[name]["aside"] = counted[-1]
    for name in ("vision", "tied"):
        contract, form = _contract(answers[name]), {"model": str(folder / name / "float.tflite")}
        answers[name]["large.tflite"] = run("tflite_to_onnx", form, contract, folder / name, "large_lite")
        answers[name]["aside.tflite"] = counted[-1]


def _contract(answer: Json) -> Json:
    return {key: answer[key] for key in ("inputs", "outputs")}


def _tensorflow_case(model: Any, inputs: list[Any], folder: Path) -> Json:
    import tensorflow as tf

    from edge_infer.manifest import TensorSpec

    saved = str(folder / "saved_model")
    if hasattr(model, "export"):
        model.export(saved, verbose=False)
    else:
        tf.saved_model.save(model, saved, signatures={"serving_default": model.call.get_concrete_function()})
    signature = tf.saved_model.load(saved).signatures["serving_default"]
    names = sorted(signature.structured_outputs)

    def ask(feed: Json) -> Json:
        answer = signature(**{name: tf.constant(array) for name, array in feed.items()})
        return {name: answer[name].numpy() for name in names}

    specs = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in inputs]
    contract = ask_source({"out": str(folder), **NO_SAMPLES}, specs, ask)
    form = {"saved_model": saved, "signature": "serving_default"}
    return {**contract, "form": form, "onnx": run("saved_model_to_onnx", form, contract, folder, "onnx")}


def _tflites(folder: Path, answer: Json) -> None:
    """Float and quantized; each to ONNX."""
    import tensorflow as tf

    for name in ("float", "int8"):
        converter = tf.lite.TFLiteConverter.from_saved_model(answer["form"]["saved_model"])
        converter.optimizations = [tf.lite.Optimize.DEFAULT] if name == "int8" else []
        (folder / f"{name}.tflite").write_bytes(converter.convert())
        form = {"model": str(folder / f"{name}.tflite"), "signature": "serving_default"}
        answer[f"{name}.tflite"] = run("tflite_to_onnx", form, _contract(answer), folder, f"{name}_onnx")


def read_tflites(request: Json) -> Json:
    """``read_tflite`` on every file of ``request["cases"]``: name, file, signature and inputs that are given."""
    from edge_infer.convert import read_tflite

    answers: Json = {}
    for name, (file, signature, inputs) in request["cases"].items():
        work = Path(request["folder"]) / name
        work.mkdir(parents=True)
        source = {"source": file, "kind": "tflite", "signature": signature, "inputs": inputs}
        try:
            answers[name] = read_tflite.read({**source, "out": str(work), **NO_SAMPLES})
        except EdgeInferError as error:
            answers[name] = {"error": f"{type(error).__name__}: {error}"}
    return answers


def worst(folder: Path, answer: Callable[[probe.Feed], probe.Feed]) -> float:
    """The largest difference from the source's answers of all outputs and feeds, relative to an output's largest."""
    feeds, expected = (probe.load_feeds(folder / name) for name in (INPUTS_FILE, "probe_answers.npz"))
    observed = [answer(feed) for feed in feeds]
    errors = []
    for name in expected[0]:
        scale = max(float(np.abs(case[name]).max()) for case in expected) or 1.0
        for want, have in zip(expected, observed, strict=True):
            assert (want[name].shape, want[name].dtype) == (have[name].shape, have[name].dtype), name
            errors.append(float(np.abs(want[name].astype(float) - have[name].astype(float)).max()) / scale)
    assert any(not np.array_equal(case[name], expected[0][name]) for case in expected[1:] for name in case)
    return max(errors)


def specs(*rows: tuple[str, str, tuple[int | None, ...]]) -> list[Json]:
    from edge_infer.manifest import TensorSpec

    return [json.loads(json.dumps(spec_to_json(TensorSpec(*row)))) for row in rows]


def sizes(request: Json) -> Json:
    """A model that puts shapes together from sizes, as the converter leaves it and simplified; operators of each."""
    import tensorflow as tf

    from edge_infer.convert import tflite_files, tflite_shapes

    def call(x: Any) -> dict[str, Any]:
        batch, length = tf.shape(x)[0], tf.shape(x)[1]
        flat = tf.reshape(tf.reduce_mean(x, 1), [batch, 2, 4])  # one size is open
        return {"flat": flat, "pairs": tf.reshape(x, [batch, length, 2, 4]) * 2}  # two are

    folder = Path(request["folder"])
    module = tf.Module()
    module.call = tf.function(call, [tf.TensorSpec((None, None, 8), tf.float32, name="x")])
    tf.saved_model.save(module, str(folder / "sizes"), signatures=module.call.get_concrete_function())
    (folder / "before.tflite").write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(folder / "sizes")).convert())
    model = tflite_files.read(folder / "before.tflite")
    before = tflite_files.operators(model)
    tflite_shapes.simplify(model)
    tflite_files.write(model, folder / "after.tflite")
    codes = [model.operatorCodes[operator.opcodeIndex] for operator in model.subgraphs[0].operators]
    kinds = [tflite_files.NAMES[tflite_files.operator_code(code)] for code in codes]
    return {"before": before, "after": kinds}
