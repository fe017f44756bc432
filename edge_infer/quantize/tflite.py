"""TFLite artifacts in every precision, by TensorFlow's converter with built-in operators only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

from edge_infer.convert import spec_from_json
from edge_infer.errors import ConversionError
from edge_infer.quantize.calibration import Calibration

MODEL = "model.tflite"
#: TensorFlow Lite's versions go on as ai-edge-litert's, whose first release holds all operators of TensorFlow 2.17.
#: https://ai.google.dev/edge/litert/migration
LITERT_FIRST = "1.0.1"


def build(request: dict[str, Any]) -> dict[str, Any]:
    model = _convert(request)
    Path(request["out"], MODEL).write_bytes(model)
    parsed = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(model, 0))
    operators = _operators(parsed)
    return {
        "model": MODEL,
        "weights": None,
        "signature": request["details"]["signature"],
        "prepack": False,
        "operators": operators,
        "requires": [["ai-edge-litert", LITERT_FIRST], ["tflite-runtime", _oldest_runtime(parsed)]],
        "tools": {"tensorflow": tf.__version__},
    }


def _convert(request: dict[str, Any]) -> bytes:
    converter = tf.lite.TFLiteConverter.from_saved_model(
        request["details"]["saved_model"], signature_keys=[request["details"]["signature"]]
    )
    precision = request["precision"]
    if precision != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if precision == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if precision == "int8":
        inputs = [spec_from_json(row) for row in request["inputs"]]
        calibration = Calibration(Path(request["calibration"]), inputs)
        converter.representative_dataset = lambda: _samples(calibration)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    try:
        model: bytes = converter.convert()
    except Exception as error:  # ConverterError and what the calibrator raises
        raise explain(error) from error
    return model


def _samples(calibration: Calibration) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    yield from calibration.feeds()


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
    first = (text.strip().splitlines() or [type(error).__name__])[0][:400]
    return ConversionError(f"the TFLite converter fails: {first}; run again with -v to see all it says")


def _operators(model: Any) -> list[str]:
    """Names of the built-in operators. Custom and Flex ones, which plain engines lack, are refused by name."""
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    custom = [code.customCode.decode() for code in model.operatorCodes if code.customCode]
    if custom:
        raise ConversionError(f"the TFLite model needs the custom operators {', '.join(sorted(custom))}; refused")
    codes = {max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes}
    return sorted(names[code] for code in codes)


def _oldest_runtime(model: Any) -> str:
    """The converter's own word on the oldest TFLite that has these operator versions (metadata of the model)."""
    for entry in model.metadata or []:
        if entry.name == b"min_runtime_version":
            version = bytes(model.buffers[entry.buffer].data).rstrip(b"\0").decode("ascii")
            if version:
                return version
    return "2.14.0"
