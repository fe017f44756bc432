"""From a float model to an artifact in one precision: one file an engine family.

Each has ``build(request)``, run in a child process: reads what the converter left in ``work``, writes the engine's
files to ``out``, and says which operators they hold and which engines can run them.
"""

#: format -> the module whose ``build`` makes its artifacts, and the precisions that its engine really has.
BUILDERS = {
    "tflite": "edge_infer.quantize.tflite",
    "onnx": "edge_infer.quantize.onnx",
    "torchscript": "edge_infer.quantize.torchscript",
}
PRECISIONS = {
    "tflite": ("float32", "float16", "int8-dynamic", "int8"),
    "onnx": ("float32", "float16", "int8-dynamic", "int8"),
    "torchscript": ("float32", "int8-dynamic", "int8"),
}
#: Precisions that need calibration data.
CALIBRATED = ("int8",)
