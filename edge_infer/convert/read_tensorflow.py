"""Read SavedModel, ``.keras`` and ``.h5``: a SavedModel with one signature, the source's names, the user's shapes."""

from __future__ import annotations

import keyword
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from edge_infer.convert import ask_source, override, spec_from_json
from edge_infer.errors import ConversionError, UsageError
from edge_infer.manifest import TensorSpec

SIGNATURE = "serving_default"
#: Recurrent layers over at most so many steps are written out step by step as well: the loop that they are otherwise
#: keeps its steps in a list, which TFLite cannot express for a batch of any size, nor TorchScript at all.
LONGEST_UNROLLED = 128


@dataclass
class Loaded:
    """A model as a function of tensors by name to tensors by name. ``tracked`` holds its variables for saving."""

    call: Callable[..., dict[str, tf.Tensor]]
    inputs: list[TensorSpec]
    tracked: Any
    #: The SavedModel that it was read from, and the signature there, if it was.
    saved: tuple[str, str] | None = None
    #: Makes ``call`` run without loops from now on; gives False where there are none to unroll.
    unroll: Callable[[], bool] = lambda: False


def read(request: dict[str, Any]) -> dict[str, Any]:
    load = _load_keras if request["kind"] == "keras" else _load_saved_model
    model = load(Path(request["source"]), request["signature"])
    inputs = override(model.inputs, [spec_from_json(row) for row in request["inputs"]])
    arguments = {spec.name: _argument(index, spec.name) for index, spec in enumerate(inputs)}

    def call(**tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        return model.call(**{name: tensors[argument] for name, argument in arguments.items()})

    def trace() -> Any:
        specs = {arguments[spec.name]: (spec.shape, spec.dtype) for spec in inputs}
        named = {name: tf.TensorSpec(shape, dtype, name=name) for name, (shape, dtype) in specs.items()}
        return tf.function(call, autograph=False).get_concrete_function(**named)

    def save(traced: Any, name: str) -> str:
        folder = _save(Path(request["out"]) / name, model, traced)
        _rename_inputs(folder, {argument: name for name, argument in arguments.items() if argument != name})
        return str(folder)

    function = trace()
    names = sorted(function.structured_outputs)

    def run(feed: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        answer = function(**{arguments[name]: tf.constant(array) for name, array in feed.items()})
        return {name: answer[name].numpy() for name in names}

    answer = ask_source(request, inputs, run)
    if model.saved and inputs == model.inputs:
        folder, signature = model.saved
    else:
        folder, signature = save(function, "saved_model"), SIGNATURE
    unrolled = save(trace(), "unrolled") if model.unroll() else None
    details = {"saved_model": folder, "signature": signature, "unrolled": unrolled}
    return {**answer, "details": details, "tools": {"tensorflow": tf.__version__}}


def _argument(index: int, name: str) -> str:
    """The Python argument for an input: TensorFlow quietly changes names that are no identifiers."""
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"input_{index}_"


def _rename_inputs(folder: Path, names: dict[str, str]) -> None:
    """Give the inputs of a SavedModel's signature names that no Python argument can have."""
    if not names:
        return
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    inputs = saved.meta_graphs[0].signature_def[SIGNATURE].inputs
    for argument, name in names.items():
        inputs[name].CopyFrom(inputs.pop(argument))
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString(deterministic=True))


def _save(folder: Path, model: Loaded, function: Any) -> Path:
    """Write ``function`` as a SavedModel of one signature."""
    module = tf.Module()
    module.tracked = model.tracked
    tf.saved_model.save(module, str(folder), signatures={SIGNATURE: function})
    return folder


def _load_keras(path: Path, signature: str | None) -> Loaded:
    if signature is not None:
        raise UsageError(f"--signature {signature} was given, but {path.name} is a Keras file, which has none")
    import keras

    try:
        model = keras.models.load_model(path, compile=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"Keras cannot load {path}: {str(error).strip().splitlines()[0][:300]}") from error
    if not getattr(model, "inputs", None):
        raise ConversionError(f"{path} is a Keras model without fixed inputs; export it with model.export() instead")
    sequential = isinstance(model, keras.Sequential)  # it has .input only once it was called
    structure = model.inputs[0] if sequential else model.input
    names = [tensor.name for tensor in model.inputs]
    specs = [TensorSpec(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in model.inputs]
    output_names = _keras_output_names(model)

    def call(**tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        packed = keras.tree.pack_sequence_as(structure, [tensors[name] for name in names])
        answers = keras.tree.flatten(model(packed, training=False))
        return dict(zip(output_names, answers, strict=True))

    # The TFLite converter freezes only variables that are TensorFlow's own: with Keras's wrappers tracked instead,
    # it silently drops every weight and the model answers NaN.
    return Loaded(call, specs, [variable.value for variable in model.variables], unroll=lambda: _unroll(model))


def _unroll(model: Any) -> bool:
    """Let recurrent layers over a known and small number of steps run without a loop; they compute the same.

    https://keras.io/api/layers/recurrent_layers/lstm/ (``unroll``)
    """
    from keras import layers

    found = False
    for layer in model._flatten_layers(include_self=False, recursive=True):
        steps = _steps(layer)
        if steps is not None and steps <= LONGEST_UNROLLED:
            both = isinstance(layer, layers.Bidirectional)
            for part in (layer.forward_layer, layer.backward_layer) if both else (layer,):
                part.unroll = found = True
    return found


def _steps(layer: Any) -> int | None:
    """Over how many steps a recurrent layer runs; None for one of any length, and for every other layer."""
    from keras import layers

    nodes = layer._inbound_nodes if isinstance(layer, (layers.RNN, layers.Bidirectional)) else []
    lengths = {tensor.shape[1] for node in nodes for tensor in node.input_tensors[:1]}
    return lengths.pop() if len(lengths) == 1 else None


def _keras_output_names(model: Any) -> list[str]:
    """Names of a Keras model's outputs: the keys of its dictionary, else the layers that make them."""
    if not hasattr(model, "output_names"):
        return [model.layers[-1].name]  # a Sequential model has one output
    if isinstance(model.output, dict):
        return sorted(model.output)  # keras.tree flattens a dictionary by sorted keys
    names = list(model.output_names)
    return [name if names.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(names)]


def _load_saved_model(path: Path, signature: str | None) -> Loaded:
    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:  # a damaged SavedModel raises almost anything
        raise ConversionError(f"TensorFlow cannot load {path}: {str(error).strip().splitlines()[0][:300]}") from error
    key = _choose_signature(path, sorted(loaded.signatures), signature)
    function = loaded.signatures[key]
    _, arguments = function.structured_input_signature
    # Sorted: TensorFlow gives them in another order each time.
    specs = [TensorSpec(name, spec.dtype.name, _shape(path, spec)) for name, spec in sorted(arguments.items())]

    def call(**tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        return dict(function(**tensors))

    return Loaded(call, specs, loaded, (str(path), key))


def _shape(path: Path, spec: tf.TensorSpec) -> tuple[int | None, ...]:
    if spec.shape.rank is None:
        raise UsageError(f"{path}: input {spec.name!r} has no fixed number of dimensions; export it with one")
    return tuple(spec.shape)


def _choose_signature(path: Path, known: list[str], wanted: str | None) -> str:
    if wanted is None:
        wanted = known[0] if len(known) == 1 else SIGNATURE
    if wanted not in known:
        raise UsageError(f"{path} has no signature {wanted!r}, it has: {', '.join(known) or 'none'}; use --signature")
    return wanted
