"""Bundles of every engine and precision: pushed, let in by their golden questions, and as accurate there as here."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import MODELS, SOURCES

from boards.board import TestBoard
from boards.conftest import NewBoard, Provisioned
from boards.record import note
from edge_infer import load
from edge_infer.bundle import Bundle

TARGET = "raspberry-pi-4"
#: What the target's engines take; PyTorch on a processor is offered no float16.
CASES = [
    pytest.param(
        format,
        precision,
        id=f"{format}-{precision}",
        marks=[pytest.mark.long] * (format == "torchscript" or precision == "float16"),
    )
    for format in SOURCES
    for precision in ("float32", "float16", "int8")
    if (format, precision) != ("torchscript", "float16")
]
#: Of 500 test images: one that lies between two classes may fall to the other side where a kernel rounds otherwise.
MOST_OTHER = 2

ANSWER = """
import numpy as np
import edge_infer

def answers(session, images):
    (given,), (asked,) = session.inputs, session.outputs
    parts = [session.run({given.name: images[at:at + 50]})[asked.name] for at in range(0, len(images), 50)]
    return np.concatenate(parts)
"""
THERE = f"""{ANSWER}
import json
with np.load("test.npz") as data, edge_infer.load("digits") as session:
    np.save("answers.npy", answers(session, data["image"]))
    print(json.dumps([session.info.package, session.info.version]))
"""


@pytest.fixture(scope="module")
def board(new_board: NewBoard, provisioned: Provisioned) -> Iterator[TestBoard]:
    board = new_board("pi-4", "pushed-to", card=provisioned.card)
    yield board
    board.emulator.cut_power()


def answers_here(bundle: Bundle, images: np.ndarray) -> tuple[np.ndarray, list[str]]:
    names: dict[str, Any] = {}
    exec(ANSWER, names)
    with load(bundle.path) as session:
        return names["answers"](session, images), [session.info.package, session.info.version]


@pytest.mark.parametrize(("format", "precision"), CASES)
def test_a_pushed_bundle_answers_there_as_it_does_here(
    board: TestBoard, packaged: Callable[..., Bundle], format: str, precision: str
) -> None:
    bundle = packaged(SOURCES[format], format, precision, TARGET)
    test_set = MODELS / ("test.npz" if format == "tflite" else "test_nchw.npz")
    board.edge_infer("push", bundle.path, board.name, "--self-test-timeout", "600")
    assert board.answer("status", board.name)["models"][0]["digest"] == bundle.digest
    board.put(test_set.read_bytes(), "test.npz")
    engine = board.python(THERE)
    there = np.load(io.BytesIO(board.shell("cat answers.npy").stdout))
    with np.load(test_set) as data:
        images, labels = data["image"], data["label"]
    here, engine_here = answers_here(bundle, images)
    other = int((here.argmax(1) != there.argmax(1)).sum())
    note(
        "push",
        f"{format}-{precision}",
        engine=engine,
        engine_here=engine_here,
        difference=float(np.abs(here - there).max() / np.abs(here).max()),
        tolerance={name: float(value) for name, value in bundle.manifest.golden.tolerance.items()},
        right_here=int((here.argmax(1) == labels).sum()),
        right_there=int((there.argmax(1) == labels).sum()),
        other_class=other,
        images=len(labels),
    )
    assert other <= MOST_OTHER
    assert (there.argmax(1) == labels).mean() > 0.95
