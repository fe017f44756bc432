"""A short run of scripts/fuzz_bundles.py: damaged bundles are refused, or answer rightly."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from handmade import rebuild

from edge_infer.bundle import Bundle, open_bundle, verify
from edge_infer.manifest import Boxes, Classes, Postprocessing, Preprocessing
from edge_infer.runtime.engine_cache import SMALLEST_BYTES

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
VARIANTS = {
    "tflite": ("keras.keras", "int8"),
    "onnx": ("torch.onnx", "float32"),
    "torchscript": ("torch_script.pt", "float32"),
}
COUNT, CACHE_COUNT = 120, 24
LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("fuzz_bundles")


def with_pictures(bundle: Bundle, path: Path, ballast: int = 0) -> Bundle:
    """The digits network that takes pictures and names classes; with ``ballast`` bytes, which may make the bundle so
    large that an engine cache is kept."""
    (spec,) = bundle.manifest.inputs
    layout = "NHWC" if spec.shape[-1] == 1 else "NCHW"
    steps = Preprocessing(resize=(8, 8), color="L", scale=1 / 255, mean=(0.1,), std=(0.9,), layout=layout)

    def attach(folder: Path) -> None:
        (folder / "labels.txt").write_text("\n".join(LABELS))
        (folder / "ballast").write_bytes(bytes(ballast))

    return rebuild(
        bundle,
        path,
        attach,
        inputs=(replace(spec, preprocessing=steps),),
        postprocessing=Postprocessing(Classes(top=3, threshold=0.0, labels="labels.txt")),
    )


def tried(bundle: Bundle, *options: str) -> dict[str, dict[str, int]]:
    """Outcomes by family. In a process of its own, since engines that have threads do not survive a fork."""
    command = [sys.executable, str(SCRIPTS / "fuzz_bundles.py"), str(bundle.path), "--seed", "11", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("failed: 0\n"), done.stdout + done.stderr
    found: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        if header := re.fullmatch(r"\S+?, (.+): \d+", line):
            rows = found.setdefault(header[1], {})
        elif row := re.fullmatch(r" +(\d+)  (.+)", line):
            rows[row[2]] = int(row[1])
    return found


@pytest.mark.parametrize("format", VARIANTS)
def test_damaged_bundles_are_refused_or_answer_rightly(
    packaged: Callable[..., Bundle], tmp_path: Path, format: str
) -> None:
    source, precision = VARIANTS[format]
    bundle = with_pictures(packaged(source, format, precision), tmp_path / "digits.edge")
    found = tried(bundle, "--count", str(COUNT))
    each = COUNT // 4
    assert found["lying"]["refused: BundleError"] > each * 0.8
    assert found["manifest"]["refused: BundleError"] > each * 0.4
    assert found["contents"]["refused: BundleError"] > each * 0.1
    # The engine saw the sealed ones: some it refused, and one went through verify().
    assert sum(count for outcome, count in found["sealed"].items() if outcome != "answers rightly") > each * 0.1
    assert sum(found["sealed, by verify"].values()) == 1


@pytest.mark.parametrize("format", ["tflite", "onnx"])
def test_a_damaged_engine_cache_never_answers_wrongly(
    packaged: Callable[..., Bundle], tmp_path: Path, format: str
) -> None:
    source = VARIANTS[format][0]
    bundle = with_pictures(packaged(source, format, "float32"), tmp_path / "one.edge", SMALLEST_BYTES)
    other = with_pictures(packaged(source, format, "float16"), tmp_path / "other.edge", SMALLEST_BYTES)
    found = tried(bundle, "--count", str(CACHE_COUNT), "--cache-of", str(other.path))
    for family in ("cache", "next open"):
        assert sum(found[family].values()) == CACHE_COUNT
        assert found[family]["answers rightly, entry as it was"] > CACHE_COUNT * 0.2
        assert found[family]["answers rightly, entry made anew"] > CACHE_COUNT * 0.2


def test_what_is_said_of_pictures_and_answers_is_among_the_damaged(
    fuzz: Any, packaged: Callable[..., Bundle], tmp_path: Path
) -> None:
    """Each field of the manifest's newer parts is hit at least once in a thousand."""
    bundle = with_pictures(packaged("torch.onnx", "onnx", "float32"), tmp_path / "classes.edge")
    boxes = Postprocessing(boxes=Boxes("digit", "digit", "digit", anchors="labels.txt", labels="labels.txt", top=9))
    true = json.loads(bundle.manifest.to_bytes()) | {
        "boxes": json.loads(replace(bundle.manifest, postprocessing=boxes).to_bytes())["postprocessing"]
    }
    sound, hit = leaves(true), set()
    for number in range(1000):
        content = json.loads(json.dumps(true))
        fuzz.mutations.replace_fields(content, fuzz.mutations.ODD_VALUES, fuzz.random.Random(number))
        found = leaves(content)
        hit |= {name for name, value in sound.items() if found.get(name, fuzz) != value}
    assert set(sound) - hit == set()
    assert {"inputs.0.preprocessing.scale", "postprocessing.classes.threshold", "boxes.boxes.anchors"} < hit


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {name: item for key, inner in items for name, item in leaves(inner, f"{path}.{key}".lstrip(".")).items()}
    return found or {path: value}


def test_a_mutation_is_made_again_from_its_number(fuzz: Any, packaged: Callable[..., Bundle], tmp_path: Path) -> None:
    true = fuzz.Truth(packaged("keras.keras", "tflite", "int8"), [])
    for number in range(12):
        copies = []
        for way in ("first", "second"):
            folder = tmp_path / f"{way}{number}"
            folder.mkdir()
            copies.append(listing(fuzz.mutation(true, 3, number, folder).path))
        assert copies[0] == copies[1] != listing(true.bundle.path)


def test_half_of_those_that_lie_have_a_stamp_that_was_right(
    fuzz: Any, packaged: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = fuzz.Truth(packaged("keras.keras", "tflite", "int8"), [])
    monkeypatch.setitem(fuzz.FAMILIES, "lying", lambda folder, rng: None)
    hashed = []
    for number in range(0, 80, 4):
        (tmp_path / str(number)).mkdir()
        found = fuzz.mutation(true, 3, number, tmp_path / str(number))
        hashed.append(verify(open_bundle(found.path), found.mode, found.cache))
    assert 5 < sum(hashed) < 15


def listing(folder: Path) -> dict[str, object]:
    return {
        path.name: path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.iterdir()
    }


def test_wrong_answers_and_strange_errors_are_seen(
    fuzz: Any, packaged: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_pictures(packaged("keras.keras", "tflite", "float32"), tmp_path / "sound.edge")
    true = fuzz.truth(bundle.path)
    sound = fuzz.Damaged("lying", bundle.path, tmp_path / "cache", "full")
    assert fuzz.opened(sound, true) == "answers rightly"
    assert fuzz.opened(sound, replace(true, prediction=[])) == "FAILED: another prediction"
    monkeypatch.setattr(fuzz, "largest_difference", lambda expected, observed: 1.0)
    assert fuzz.opened(sound, true) == "FAILED: a wrong answer"
    monkeypatch.setattr(fuzz, "self_test", lambda session: 1 / 0)
    assert fuzz.opened(sound, true) == "FAILED: ZeroDivisionError: division by zero"


def test_damaged_files_of_a_cache_that_are_used_are_seen(
    fuzz: Any, packaged: Callable[..., Bundle], tmp_path: Path
) -> None:
    """As whoever may write stamps can bring about; the weights answer rightly, only a byte beside them differs."""
    bundle = with_pictures(packaged("keras.keras", "tflite", "float32"), tmp_path / "sound.edge", SMALLEST_BYTES)
    true = fuzz.truth(bundle.path, bundle.path, tmp_path)
    cache = true.caches[0]
    entry = fuzz._entry(cache)
    sound = fuzz.Damaged("cache", bundle.path, cache, "auto", fuzz._made(entry))
    copies = replace(true, caches=(tmp_path / "other", tmp_path / "other"))
    assert fuzz.opened(sound, copies) == fuzz.AS_IT_WAS
    (weights,) = (tmp_path / "other" / entry.name).glob("*.weights")
    weights.write_bytes(weights.read_bytes() + b"x")
    assert fuzz.opened(sound, copies) == "FAILED: damaged files of the cache were used"
    assert fuzz.opened(replace(sound, made=(0, 0)), copies) == fuzz.ANEW


def test_crashes_and_hangs_are_seen(
    fuzz: Any, packaged: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fuzz.in_child(os.abort) == "ended by SIGABRT"
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    assert fuzz.in_child(signal.pause) == "ended by SIGALRM"
    monkeypatch.setattr(fuzz, "in_child", lambda call: "ended by SIGSEGV")
    true = fuzz.Truth(packaged("keras.keras", "tflite", "float32"), [])
    assert [fuzz.try_one(true, 1, number)[0] for number in range(4, 8)] == [
        ("lying", "FAILED: ended by SIGSEGV"),
        ("manifest", "FAILED: ended by SIGSEGV"),
        ("contents", "FAILED: ended by SIGSEGV"),
        ("sealed", "ended by SIGSEGV"),  # only a faulty or evil packager makes these
    ]


def test_the_page_is_what_its_figures_give_and_nothing_failed(fuzz: Any) -> None:
    report, text = json.loads(fuzz.DATA.read_text()), fuzz.PAGE.read_text()
    assert fuzz.page(report, text) == text
    assert list(report) == [*fuzz.FILE_CASES, *fuzz.CACHE_CASES]
    outcomes = [said for row in report.values() for family in row["families"].values() for said in family]
    assert outcomes and not [said for said in outcomes if said.startswith("FAILED")]
    for case in fuzz.FILE_CASES:
        families = report[case]["families"]
        assert sum(sum(families[name].values()) for name in fuzz.FAMILIES) == fuzz.COUNT
