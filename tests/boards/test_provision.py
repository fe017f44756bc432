"""From a board with nothing but Debian's Python to environments for every engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from boards.board import TestBoard
from boards.conftest import FACTS, NewBoard, Provisioned, environments
from boards.record import note

#: The packages that an engine comes in.
PACKAGES = {"tflite": "ai-edge-litert", "tflite-runtime": "tflite-runtime", "onnx": "onnxruntime", "torch": "torch"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engines" in metafunc.fixturenames:
        chosen = environments(metafunc.config)
        metafunc.parametrize("engines", chosen, ids=["+".join(engines) for engines in chosen])


@pytest.fixture(scope="module")
def board(new_board: NewBoard, provisioned: Provisioned) -> Iterator[TestBoard]:
    board = new_board("pi-4", "provisioned", card=provisioned.card)
    yield board
    board.emulator.cut_power()


def test_a_doctor_says_what_a_bare_board_misses_and_what_mends_it(new_board: NewBoard) -> None:
    board = new_board("pi-zero-2w", "bare")
    said = board.edge_infer("doctor", board.name, status=5).stdout
    board.emulator.cut_power()
    assert "aarch64, glibc 2.36" in said and "4 KiB pages" in said
    assert f"mend: edge-infer provision {board.name}" in said


def test_engines_are_provisioned_offline_and_import_there(provisioned: Provisioned, engines: list[str]) -> None:
    said, found = provisioned.steps["+".join(engines)]
    assert found["machine"] == "aarch64" and found["environment"] == said["environment"]
    names = {PACKAGES[engine] for engine in engines}
    assert names == set(PACKAGES.values()) & set(found["packages"])
    kept = {name: found["packages"][name] for name in sorted({*names, "edge-infer", "numpy"})}
    note("provision", "+".join(engines), sent_bytes=said["sent_bytes"], **{**found, "packages": kept})


def test_environments_are_switched_and_rolled_back(board: TestBoard, provisioned: Provisioned) -> None:
    *_, before, last = (found["environment"] for _, found in provisioned.steps.values())
    assert board.python(FACTS)["environment"] == last
    for expected in (before, last):
        board.edge_infer("provision", board.name, "--rollback")
        assert board.python(FACTS)["environment"] == expected


def test_a_doctor_finds_nothing_wrong_with_a_provisioned_board(board: TestBoard, provisioned: Provisioned) -> None:
    lines = board.answer("doctor", board.name)["lines"]
    assert [line for line in lines if line["state"] == "wrong"] == []
    (engines,) = [line["text"] for line in lines if line["topic"] == "engines"]
    note("doctor", "provisioned", lines=[f"{line['state']} {line['topic']}: {line['text']}" for line in lines])
    last = list(provisioned.steps)[-1]
    assert all(PACKAGES[engine] in engines for engine in last.split("+"))
