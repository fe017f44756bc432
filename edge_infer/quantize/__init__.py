"""From a float model to an artifact in one precision: one file an engine family.

Each has ``build(request)``, run in a child process: reads the float model, writes the engine's files to ``out``, and
says which operators they hold and which engines can run them. Those that quantize statically have ``sensitivity``.
"""

from edge_infer.manifest import PRECISIONS as ALL_PRECISIONS

#: format -> the module whose ``build`` makes its artifacts, and the precisions that its engine really has.
BUILDERS = {
    "tflite": "edge_infer.quantize.tflite",
    "onnx": "edge_infer.quantize.onnx",
    "torchscript": "edge_infer.quantize.torchscript",
}
PRUNERS = {
    "tflite": "edge_infer.quantize.prune_tflite",
    "onnx": "edge_infer.quantize.prune_onnx",
    "torchscript": "edge_infer.quantize.prune_torchscript",
}
PRECISIONS = {
    "tflite": ALL_PRECISIONS,
    "onnx": ("float32", "float16", "int8-dynamic", "int8-weights", "int4-weights", "int8", "int8-mixed"),
    "torchscript": ("float32", "int8-dynamic", "int8"),
}
#: Precisions that need calibration data.
CALIBRATED = ("int8", "int8-mixed", "int16x8")
#: Formats whose builder has ``sensitivity``.
SENSITIVE = ("tflite", "onnx")
#: How the ranges of activations are taken from calibration data.
RANGES = ("minmax", "percentile", "entropy")
