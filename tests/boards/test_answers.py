"""Answers of a board lie no farther from those here than its target's golden tolerance, over many questions."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from conftest import MODELS, SOURCES

from boards.board import TestBoard
from boards.record import note
from edge_infer import load
from edge_infer.bundle import Bundle

TARGET = "raspberry-pi-zero-2w"
CASES = [("tflite", "int8"), ("tflite", "float16"), ("onnx", "float32"), ("onnx", "int8")]
SHORT = ("onnx", "int8")
COUNT = 60
THERE = """
import numpy as np
import edge_infer

def each(session, images):
    (given,), (asked,) = session.inputs, session.outputs
    return np.concatenate([session.run({given.name: image[None]})[asked.name] for image in images])

with edge_infer.load("asked/model.edge") as session, np.load("asked.npz") as data:
    np.save("answers.npy", each(session, data["image"]))
print("{}")
"""


@pytest.mark.parametrize(
    ("format", "precision"),
    [pytest.param(*case, id="-".join(case), marks=() if case == SHORT else pytest.mark.long) for case in CASES],
)
def test_answers_differ_by_no_more_than_the_target_allows(
    zero: TestBoard, packaged: Callable[..., Bundle], format: str, precision: str
) -> None:
    bundle = packaged(SOURCES[format], format, precision, TARGET)
    with np.load(MODELS / ("test.npz" if format == "tflite" else "test_nchw.npz")) as data:
        images = data["image"][:COUNT]
    zero.shell("rm -rf asked && mkdir -p asked/model.edge")
    for path in bundle.path.iterdir():
        zero.put(path.read_bytes(), f"asked/model.edge/{path.name}")
    asked = io.BytesIO()
    np.savez(asked, image=images)
    zero.put(asked.getvalue(), "asked.npz")
    zero.python(THERE)
    there = np.load(io.BytesIO(zero.shell("cat answers.npy").stdout))
    with load(bundle.path, threads=1) as session:
        (given,), (output,) = session.inputs, session.outputs
        here = np.concatenate([session.run({given.name: image[None]})[output.name] for image in images])
    difference = float(np.abs(here - there).max())
    allowed = bundle.manifest.golden.tolerance[output.name]
    note("answers", f"{format}-{precision}", difference=difference, allowed=float(allowed), questions=COUNT)
    assert here.shape == there.shape
    assert difference <= allowed
