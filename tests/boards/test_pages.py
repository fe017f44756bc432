"""A kernel with 16 KiB pages, as a Raspberry Pi 5's: what is mapped begins on its pages, and is not copied."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from boards import dense
from boards.board import TestBoard
from boards.conftest import NewBoard, Provisioned
from boards.record import note
from edge_infer.bundle import Bundle
from edge_infer.runtime.engines.torchscript import TENSOR_TABLE

PAGE = 16384
#: Engines that keep what they made of a model, and map that.
CACHED = ("tflite", "onnx")
#: PyTorch's kernels for ARM lay a layer out anew while it runs, and malloc keeps the room of one or two of these: as
#: much for two layers as for five. So there are enough for copies of all to be seen beside that.
LAYERS = {"tflite": 2, "onnx": 2, "torchscript": 6}

#: After NAME and HOW.
OPEN = """
import json, os, resource, sys
import edge_infer
from edge_infer.errors import OutOfMemory
from edge_infer.runtime import memory
from edge_infer.runtime.engines import engine_module
from edge_infer.runtime.golden import self_test
from edge_infer.runtime.session import find_bundle
bundle = find_bundle(NAME)
engine_module(bundle).import_engine(bundle)

def opened(**how):
    before = memory.private_bytes()
    with edge_infer.load(NAME, threads=1, **how) as session:
        resident = session.memory()
        difference = self_test(session)
        with open("/proc/self/maps") as file:
            maps = [line.split() for line in file if any(str(path) in line for path in session.files)]
        with open("/proc/self/status") as file:
            (locked,) = [int(line.split()[1]) * 1024 for line in file if line.startswith("VmLck")]
        return {
            "page": resource.getpagesize(),
            "maps": [[*map(lambda word: int(word, 16), [*row[0].split("-"), row[2]]), row[-1]] for row in maps],
            "private": memory.private_bytes() - before,
            "mapped": resident.mapped,
            "resident": resident.resident,
            "locked": locked,
            "difference": max(difference.values()),
            "notes": session.info.notes,
        }

try:
    print(json.dumps(opened(**HOW)))
except OutOfMemory as error:
    print(json.dumps({"refused": str(error)}))
"""


def opened(board: TestBoard, format: str, user: str = "pi", **how: Any) -> dict[str, Any]:
    """A process on the board opens the model in use and asks its golden questions."""
    code = f"NAME, HOW = {name_of(format)!r}, {how!r}\n{OPEN}"
    return board.python(code, python="HOME=/home/pi /home/pi/.edge-infer/venv/bin/python", user=user)


def weights_of(format: str) -> int:
    return LAYERS[format] * dense.LAYER_BYTES


def name_of(format: str) -> str:
    return f"dense-{format}"


@pytest.fixture(scope="module")
def board(new_board: NewBoard, provisioned: Provisioned) -> Iterator[TestBoard]:
    board = new_board("pi-5", "pages", card=provisioned.card)
    yield board
    board.emulator.cut_power()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("dense")
    return {format: dense.dense(folder, format, count, PAGE, name_of(format)) for format, count in LAYERS.items()}


@pytest.fixture(
    scope="module",
    params=[pytest.param(format, marks=pytest.mark.long if format != "onnx" else ()) for format in LAYERS],
)
def pushed(board: TestBoard, bundles: dict[str, Bundle], request: pytest.FixtureRequest) -> Bundle:
    bundle = bundles[request.param]
    board.edge_infer("push", bundle.path, board.name, "--self-test-timeout", "600")
    return bundle


def places(bundle: Bundle) -> dict[str, tuple[int, int]]:
    """Offset and length of each tensor in the file of weights."""
    artifact = bundle.manifest.artifact
    if artifact.format == "onnx":
        model = onnx.load(bundle.file(artifact.model), load_external_data=False)
        rows = {one.name: {entry.key: entry.value for entry in one.external_data} for one in model.graph.initializer}
        return {name: (int(row["offset"]), int(row["length"])) for name, row in rows.items() if row}
    extra = {TENSOR_TABLE: ""}
    torch.jit.load(str(bundle.file(artifact.model)), _extra_files=extra)
    table = json.loads(extra[TENSOR_TABLE])
    return {name: (row["offset"], 4 * row["strides"][0] * row["shape"][0]) for name, row in table.items()}


def test_doctor_tells_the_size_of_the_pages(board: TestBoard) -> None:
    assert board.shell("getconf PAGESIZE").stdout.strip() == b"16384"
    said = board.edge_infer("doctor", board.name).stdout
    assert "16 KiB pages" in said


def test_a_bundle_for_smaller_pages_is_refused(board: TestBoard, tmp_path: Path) -> None:
    bundle = dense.greedy(tmp_path, "small", 1000)
    said = board.edge_infer("push", bundle.path, board.name, status=5).stderr
    assert "the device's pages have 16384 bytes, the weights are aligned to 4096" in said
    assert "package the model for this device instead" in said


def test_weights_are_mapped_and_not_copied(board: TestBoard, pushed: Bundle) -> None:
    format = pushed.manifest.artifact.format
    found, weights = opened(board, format), weights_of(format)
    note("pages", format, weights=weights, **found)
    assert found["page"] == PAGE and found["notes"] == [] and found["difference"] <= dense.TOLERANCE
    covered = sum(end - start for start, end, _, _ in found["maps"])
    assert covered >= weights
    assert all(number % PAGE == 0 for *numbers, _ in found["maps"] for number in numbers)
    assert found["private"] < weights / 2
    if format != "tflite":  # a flatbuffer has an alignment of its own, and XNNPACK reads what it made of it
        placed = places(pushed)
        assert len(placed) == LAYERS[format]
        assert all(offset % PAGE == 0 for offset, length in placed.values() if length >= PAGE)


@pytest.mark.long
def test_pages_are_brought_in_and_kept(board: TestBoard, pushed: Bundle) -> None:
    format = pushed.manifest.artifact.format
    weights = weights_of(format)
    assert opened(board, format, residency="prefault")["resident"] >= weights
    refused = opened(board, format, residency="lock")
    assert "ulimit -l" in refused["refused"] and "residency='prefault'" in refused["refused"]
    kept = opened(board, format, user="root", residency="lock")
    assert kept["locked"] >= weights and kept["resident"] >= weights and kept["difference"] <= dense.TOLERANCE
    assert kept["locked"] % PAGE == 0 and kept["private"] < weights / 2


def entry_of(found: dict[str, Any]) -> set[str]:
    """The entries of the engine cache that a process has mapped."""
    return {Path(path).parent.name for *_, path in found["maps"] if "/cache/" in path}


@pytest.mark.long
@pytest.mark.parametrize("pushed", CACHED, indirect=True)
def test_what_an_engine_made_goes_with_the_processor_and_not_with_the_card(
    board: TestBoard, pushed: Bundle, new_board: NewBoard, tmp_path: Path
) -> None:
    """The card goes to a board with another processor and 4 KiB pages, and back. TorchScript keeps nothing aside."""
    format = pushed.manifest.artifact.format
    here = opened(board, format)
    card = board.copy_card(tmp_path / "card.qcow2")
    other = new_board("pi-4", f"moved-{format}", card=card)
    there = opened(other, format)
    card = other.copy_card(tmp_path / "back.qcow2")
    home = new_board("pi-5", f"home-{format}", card=card)
    back = opened(home, format)
    home.emulator.stop()
    board.start()
    note("pages", f"moved-{format}", pages=[found["page"] for found in (here, there, back)])
    assert (here["page"], there["page"], back["page"]) == (PAGE, 4096, PAGE)
    assert all(found["notes"] == [] and found["difference"] <= dense.TOLERANCE for found in (here, there, back))
    assert entry_of(here) and entry_of(there) and not entry_of(here) & entry_of(there)
    assert entry_of(back) == entry_of(here)
