"""The values inside an ONNX model on calibration samples, one sample in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from edge_infer.convert import spec_from_json
from edge_infer.errors import ConversionError, UsageError
from edge_infer.quantize.onnx_prepare import first_line, session_options
from edge_infer.quantize.ranges import Ranges
from edge_infer.samples import Samples

Feed = dict[str, np.ndarray[Any, Any]]


def feeds(request: dict[str, Any], most: int | None = None) -> Iterator[Feed]:
    """The request's calibration samples, the first ``most`` of them. Raises UsageError when there are none."""
    calibration = request["calibration"]
    if not calibration:
        raise UsageError(f"{request['precision']} needs calibration samples, none were given; give --calibration")
    inputs = [spec_from_json(row) for row in request["inputs"]]
    return Samples(Path(calibration["samples"]), inputs).feeds(calibration["indices"][:most])


def calibrate(
    path: Path, model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], request: dict[str, Any]
) -> dict[str, tuple[float, float]]:
    """Least and largest value of what ``nodes`` read and give; one sample's values are in memory at a time."""
    known = {value for node in model.graph.node for value in node.output} | {item.name for item in model.graph.input}
    constants = {tensor.name for tensor in model.graph.initializer}
    wanted = {name for node in nodes for name in (*node.input, *node.output) if name in known - constants}
    samples = feeds(request)
    found = Ranges(request["calibration"]["ranges"])
    seen: set[str] = set()
    probe = Probe(path, model, wanted)
    for feed in samples:
        values = probe.run(feed)
        found.update(values)
        seen.update(values)
    # A tensor without finite values has no scale of its own; it gets that of zeros.
    return dict.fromkeys(sorted(seen), (0.0, 0.0)) | found.result()


class Probe:
    """Runs a model in ``path``'s folder and gives the float values of ``names``, inputs among them."""

    def __init__(self, path: Path, model: onnx.ModelProto, names: Iterable[str]) -> None:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        given = {item.name for item in model.graph.input}
        outputs = {item.name for item in model.graph.output}
        wanted = set(names)
        # Without a type: ONNX Runtime finds it.
        copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted - outputs - given))
        probing = path.with_name(f"{path.stem}-probing.onnx")
        onnx.save(copy, probing)
        options = session_options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(str(probing), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ConversionError(f"ONNX Runtime cannot watch the model's values: {first_line(error)}") from error
        self._inputs = [
            item.name for item in self._session.get_inputs() if item.name in wanted and item.type == "tensor(float)"
        ]
        self._outputs = [
            item.name for item in self._session.get_outputs() if item.name in wanted and item.type == "tensor(float)"
        ]

    def run(self, feed: Feed) -> Feed:
        try:
            values = self._session.run(self._outputs, feed)
        except Exception as error:
            raise ConversionError(f"the model fails on a calibration sample: {first_line(error)}") from error
        return dict(zip(self._outputs, values, strict=True)) | {name: feed[name] for name in self._inputs}
