"""SavedModel to a float32 ``.tflite`` with built-in operators only, by TensorFlow's own converter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.lite.python import lite
from tensorflow.python.saved_model import loader_impl

from edge_infer.convert import tflite_files, tflite_shapes
from edge_infer.errors import ConversionError

MODEL = "model.tflite"


def convert(request: dict[str, Any]) -> dict[str, Any]:
    """One signature of a SavedModel. Raises ConversionError naming operator and layer where TFLite lacks one."""
    start = request["from"]
    folder = start.get("unrolled") or start["saved_model"]
    try:
        content = _converted(folder, start["signature"])
    except Exception as error:  # ConverterError and whatever else TensorFlow raises
        raise explain(error) from error
    model = tflite_files.read(content)
    tflite_files.operators(model)
    tflite_shapes.simplify(model)
    tflite_files.strip(model)
    path = Path(request["out"]) / MODEL
    tflite_files.write(model, path)
    details = {"model": str(path), "signature": start["signature"]}
    return {"details": details, "tools": {"tensorflow": tf.__version__}}


def _converted(folder: str, signature: str) -> bytes:
    """What ``tf.lite.TFLiteConverter.from_saved_model`` gives, from the folder alone.

    That loads the model into Python twice, for layer names in a trace that we do not show, and keeps one of them while
    the converter loads it once more: 500 MB of weights took 4.1 GB of memory, and 2.2 GB like this (TensorFlow 2.21).
    """
    converter = lite.TFLiteSavedModelConverterV2(folder, {tf.saved_model.SERVING}, [signature])
    # Each of these would unpack the whole model in Python and pack it anew, for what `tflite_files` does or drops.
    converter.exclude_conversion_metadata = True
    converter._experimental_use_buffer_offset = True
    graph = loader_impl.SavedModelLoader(folder).get_meta_graph_def_from_tags({tf.saved_model.SERVING}).graph_def
    content: bytes = converter._convert_from_saved_model(graph)
    return content


def explain(error: BaseException) -> ConversionError:
    """The converter's pages as one sentence with operator and layer."""
    text = str(error)
    operators = sorted(set(re.findall(r"'tf\.(\w+)' op is neither a custom op nor a flex op", text)))
    if operators:
        layer = re.search(rf'fused\["{operators[0]}:", "([^"@]+)', text)
        where = f" in layer {layer[1]!r}" if layer else ""
        return ConversionError(
            f"TFLite has no built-in operator for {', '.join(operators)}{where}; replace it, or export the "
            "model to ONNX and package that"
        )
    loop = re.search(r'fused\["TensorListReserve:", "([^"@]+)/', text)
    if loop:
        return ConversionError(
            f"the layer {loop[1]!r} loops over steps, which the TFLite converter cannot express for a batch of any "
            "size; give the .keras file that the SavedModel was made from, or dynamic dimensions one size with --input"
        )
    first = (text.strip().splitlines() or [type(error).__name__])[0][:400]
    return ConversionError(f"the TFLite converter fails: {first}; run again with -v to see all it says")
