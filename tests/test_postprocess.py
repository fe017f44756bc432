"""Answers become classes and boxes: against other implementations, and through a whole bundle."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edge_infer import load
from edge_infer.cli.postprocess import parse_postprocess
from edge_infer.cli.preprocess import parse_preprocess
from edge_infer.errors import EngineError, UsageError
from edge_infer.manifest import Boxes, Classes, Postprocessing, Preprocessing, TensorSpec
from edge_infer.package import Request, package
from edge_infer.runtime.postprocess import activate, check, classes, detections, suppress
from edge_infer.runtime.preprocess import placement, preprocess

Array = np.ndarray[Any, Any]
#: A 200 x 400 image in a square of 100 x 100: half its size, 25 pixels of grey above and below.
WIDE = placement(Preprocessing(resize=(100, 100), mode="letterbox"), (200, 400))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_activations_are_torchs_even_for_large_numbers(activation: str) -> None:
    scores = np.concatenate([rng().normal(0, 300, (5, 7)), [[1e4, -1e4, 0, 1, 2, 3, 4]]]).astype(np.float32)
    wanted = getattr(torch, activation)(torch.tensor(scores, dtype=torch.float64), *([1] * (activation == "softmax")))
    np.testing.assert_allclose(activate(scores, activation), wanted.numpy(), atol=1e-15)


def test_the_best_classes_best_first_and_no_nan() -> None:
    answers = {"scores": np.array([[0.1, 0.7, np.nan, 0.7, 0.2]], np.float32)}
    found = classes(answers, Classes(top=3, threshold=0.15), list("abcde"))
    assert [(row.index, row.label) for row in found] == [(1, "b"), (3, "d"), (4, "e")]
    assert [row.score for row in found] == pytest.approx([0.7, 0.7, 0.2])
    assert classes(answers, Classes(threshold=0.9), None) == []


# -- boxes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_suppression_keeps_what_tensorflow_keeps(seed: int) -> None:
    import tensorflow as tf

    first = rng(seed).uniform(0, 80, (300, 2))
    corners = np.concatenate([first, first + rng(seed + 50).uniform(1, 40, (300, 2))], axis=1)
    scores = rng(seed + 100).random(300)
    same = np.zeros(300, np.int64)
    for iou in (0.2, 0.5, 0.8):
        wanted = tf.image.non_max_suppression(
            corners[:, [1, 0, 3, 2]].astype(np.float32), scores.astype(np.float32), 40, iou
        )
        assert suppress(corners, scores, same, iou, 40).tolist() == wanted.numpy().tolist()
    ids = rng(seed).integers(0, 3, 300)
    whole = suppress(corners, scores, ids, 0.3, 1000)
    for one in range(3):  # classes do not meet
        rows = np.flatnonzero(ids == one)
        alone = rows[suppress(corners[rows], scores[rows], ids[rows], 0.3, 1000)]
        assert sorted(alone) == sorted(whole[ids[whole] == one])


#: One box in a picture of 100 x 100, from 10, 20 to 50, 80, in each form.
FORMS = {"xyxy": (10, 20, 50, 80), "yxyx": (20, 10, 80, 50), "xywh": (10, 20, 40, 60), "cxcywh": (30, 50, 40, 60)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unit", ["pixels", "share"])
def test_every_form_says_the_same_box_in_the_image(form: str, unit: str) -> None:
    box = np.array([[FORMS[form]]], np.float32) / (100 if unit == "share" else 1)
    steps = Boxes(scores="s", boxes="b", form=form, unit=unit)
    (found,) = detections({"s": np.array([[[0.1, 0.9]]], np.float32), "b": box}, steps, ["cat", "dog"], None, WIDE)
    assert (found.index, found.label, found.score) == (1, "dog", pytest.approx(0.9))
    # x: times 4; y: 20 lies in the grey above the image, 80 below it.
    assert (found.left, found.top, found.right, found.bottom) == pytest.approx((40, 0, 200, 200))


def test_one_table_with_objectness_either_way_round() -> None:
    table = np.array(
        [[[50, 50, 20, 20, 0.5, 0.9, 0.2], [50, 51, 20, 20, 0.5, 0.8, 0.1], [20, 50, 8, 8, 0.9, 0.1, 0.9]]]
    )
    steps = Boxes(form="cxcywh", objectness=True, threshold=0.3)
    plain = detections({"out": table}, steps, None, None, WIDE)
    assert [(row.index, row.label, round(row.score, 3)) for row in plain] == [(1, None, 0.81), (0, None, 0.45)]
    turned = {"out": table.transpose(0, 2, 1)}
    assert detections(turned, dataclasses.replace(steps, transposed=True), None, None, WIDE) == plain
    assert len(detections({"out": table}, dataclasses.replace(steps, iou=1.0), None, None, WIDE)) == 3
    assert len(detections({"out": table}, dataclasses.replace(steps, top=1), None, None, WIDE)) == 1


def test_a_detector_that_has_done_it_all_itself() -> None:
    answers = {
        "boxes": np.array([[[0.2, 0.1, 0.8, 0.5], [0, 0, 1, 1]]], np.float32),
        "ids": np.array([[3, 1]], np.float32),
        "scores": np.array([[0.9, 0.1]], np.float32),
    }
    steps = Boxes(scores="scores", boxes="boxes", ids="ids", form="yxyx", unit="share")
    (found,) = detections(answers, steps, list("abcd"), None, WIDE)
    assert (found.label, found.left, found.right) == ("d", pytest.approx(40), pytest.approx(200))


def test_offsets_from_anchors_and_a_background_class() -> None:
    anchors = np.array([[0.3, 0.5, 0.4, 0.6], [0.5, 0.5, 0.2, 0.2]])
    logits = np.array([[[0.0, 0.0, 5.0], [9.0, 0.0, 0.0]]], np.float32)
    steps = Boxes("s", "b", unit="share", activation="softmax", background=True, anchors="a.npz")
    still = {"s": logits, "b": np.zeros((1, 2, 4), np.float32)}
    (found,) = detections(still, steps, None, anchors, WIDE)
    assert (found.index, found.left, found.right) == (2, pytest.approx(40), pytest.approx(200))
    # By half a width to the right, and twice as wide.
    moved = {"s": logits, "b": np.array([[[5, 0, np.log(2) / 0.2, 0], [0] * 4]], np.float32)}
    (found,) = detections(moved, steps, None, anchors, WIDE)
    assert (found.left, found.right) == pytest.approx(((0.5 - 0.4) * 400, (0.5 + 0.4) * 400))
    with pytest.raises(EngineError, match="2 boxes for 3 anchors"):
        detections(moved, steps, None, np.zeros((3, 4)), WIDE)


def test_numbers_that_are_none_are_no_boxes_and_other_shapes_are_an_error() -> None:
    steps = Boxes("s", "b")
    boxes = np.array([[[1, 1, np.nan, 5], [1, 1, 9, 9], [1, 1, 9, 9]]], np.float32)
    scores = np.array([[[0.9], [np.nan], [np.inf]]], np.float32)
    assert [row.score for row in detections({"s": scores, "b": boxes}, steps, None, None, WIDE)] == [np.inf]
    for wrong in ({"s": scores[:, :2], "b": boxes}, {"s": scores, "b": boxes[:, :, :3]}, {"s": scores[0], "b": boxes}):
        with pytest.raises(EngineError):
            detections(wrong, steps, None, None, WIDE)


# -- where the image lies ----------------------------------------------------------------------------------------------


def test_letterbox_fits_the_whole_image_on_grey() -> None:
    image = rng().integers(0, 256, (200, 400, 3)).astype(np.uint8)
    steps = Preprocessing(resize=(100, 100), mode="letterbox")
    given = preprocess(image, TensorSpec("image", "float32", (None, 100, 100, 3), steps))[0]
    small = np.asarray(Image.fromarray(image).resize((100, 50), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(given[25:75], small, atol=1)
    assert (given[:25] == 114).all() and (given[75:] == 114).all()
    assert parse_preprocess("resize=100x100,mode=letterbox,fill=0")[1].fill == 0
    for wrong in ("resize=9,fill=256", "resize=9,fill=-1", "resize=9,fill=a"):
        with pytest.raises(UsageError, match="whole number of 0 to 255"):
            parse_preprocess(wrong)
    cropped = dataclasses.replace(steps, crop=(50, 50))
    with pytest.raises(UsageError, match="after letterbox fitted it"):
        preprocess(image, TensorSpec("image", "float32", (None, 50, 50, 3), cropped))


@pytest.mark.parametrize("mode", ["stretch", "shortest-side", "letterbox"])
def test_a_box_around_a_white_square_comes_back_where_it_was(mode: str) -> None:
    image = np.zeros((300, 500, 3), np.uint8)
    image[120:180, 200:320] = 255
    steps = Preprocessing(resize=(96, 96), mode=mode, crop=(80, 80) if mode == "shortest-side" else None)
    size = (None, 80, 80, 3) if steps.crop else (None, 96, 96, 3)
    seen = preprocess(image, TensorSpec("image", "float32", size, steps))[0, :, :, 0]
    rows, columns = np.flatnonzero((seen > 180).any(axis=1)), np.flatnonzero((seen > 180).any(axis=0))
    box = np.array([[[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]], np.float32)
    answers = {"b": box, "s": np.ones((1, 1, 1), np.float32)}
    (found,) = detections(answers, Boxes("s", "b"), None, None, placement(steps, (300, 500)))
    assert (found.left, found.top, found.right, found.bottom) == pytest.approx((200, 120, 320, 180), abs=5)


# -- what is refused ---------------------------------------------------------------------------------------------------

SCORES = (TensorSpec("digit", "float32", (None, 10)),)
DETECTOR = (TensorSpec("b", "float32", (1, 20, 4)), TensorSpec("s", "float32", (1, 20, 3)))
UNFIT: dict[str, tuple[Postprocessing, Any, Any, Any, str]] = {
    "nothing": (Postprocessing(), SCORES, None, None, "expected one of them"),
    "both": (Postprocessing(Classes(), Boxes()), SCORES, None, None, "expected one of them"),
    "another output": (
        Postprocessing(Classes("x")),
        SCORES,
        None,
        None,
        "names the output 'x', the model has ['digit']",
    ),
    "no output": (Postprocessing(Classes()), DETECTOR, None, None, "names no output, the model has ['b', 's']"),
    "labels": (Postprocessing(Classes(labels="l")), SCORES, ["a"], None, "l has 1 labels, the output has 10 classes"),
    "box labels": (
        Postprocessing(None, Boxes("s", "b", labels="l")),
        DETECTOR,
        ["a"],
        None,
        "1 labels, the output has 3",
    ),
    "anchors": (
        Postprocessing(None, Boxes("s", "b", anchors="a")),
        DETECTOR,
        None,
        np.zeros((9, 4)),
        "expected [20, 4]",
    ),
    "ids alone": (Postprocessing(None, Boxes("s", ids="b")), DETECTOR, None, None, "names ids but no boxes"),
    "a batch": (Postprocessing(Classes()), (TensorSpec("d", "float32", (8, 10)),), None, None, "a batch of 1"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_steps_that_do_not_fit_the_outputs_are_refused(kind: str) -> None:
    *given, words = UNFIT[kind]
    with pytest.raises(UsageError) as caught:
        check(*given)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("top=3", "expected classes:activation"),
        ("classes:best=3", "'best=3', expected KEY=VALUE with output, activation, top"),
        ("classes:top=3,top=4", "gives top twice"),
        ("classes:top=0", "top is 0, expected a whole number of at least 1"),
        ("classes:top=many", "top 'many', expected a number"),
        ("classes:activation=relu", "activation is 'relu', expected one of none, softmax, sigmoid"),
        ("boxes:transposed=yes", "'transposed=yes', expected KEY=VALUE"),
        ("boxes:iou=-1", "iou is -1.0, expected a number, zero or more"),
    ],
)
def test_a_wrong_word_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_postprocess(text)
    assert words in str(caught.value) and text in str(caught.value)


def test_the_small_language() -> None:
    steps, files = parse_postprocess(
        "boxes:form=cxcywh,transposed,variances=0.1:0.3,labels=a/b.txt,anchors=c.npz,top=7"
    )
    wanted = Boxes(form="cxcywh", transposed=True, variances=(0.1, 0.3), labels="b.txt", anchors="c.npz", top=7)
    assert (steps, files) == (Postprocessing(boxes=wanted), (Path("a/b.txt"), Path("c.npz")))
    assert parse_postprocess("classes:") == (Postprocessing(Classes()), ())


# -- a whole bundle ----------------------------------------------------------------------------------------------------

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
IMAGES = parse_preprocess("resize=8x8,color=L,scale=1/255,layout=NCHW")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "labels.txt"
    path.write_text("\n".join(NAMES) + "\n\n")
    return path


def request(models: Path, output: Path, text: str, **options: Any) -> Request:
    steps, files = parse_postprocess(text)
    given = {"preprocess": (IMAGES,), "attach": files, "postprocess": steps, **options}
    return Request(models / "torch.onnx", "cpu-x86_64", output, "onnx", "float32", **given)


def test_a_picture_of_a_digit_becomes_its_name(models: Path, labels: Path, tmp_path: Path) -> None:
    path = package(request(models, tmp_path / "digits.edge", f"classes:top=2,labels={labels}")).bundle.path
    with np.load(models / "test_nchw.npz") as data:
        pixels, truth = np.rint(data["image"][:, 0] * 255).astype(np.uint8), data["label"]
    with load(path) as session:
        found = [session.predict(image) for image in pixels]
        given = session.run({"image": pixels[:1, None].astype(np.float32) / 255})["digit"][0]
    assert np.mean([rows[0].label == NAMES[label] for rows, label in zip(found, truth)]) >= 0.97
    assert all(len(rows) == 2 and rows[0].score >= rows[1].score for rows in found)
    assert found[0][0].score == pytest.approx(given.max(), abs=1e-6)

    Image.fromarray(pixels[1]).save(tmp_path / "digit.png")
    command = [sys.executable, "-m", "edge_infer", "predict", str(path), str(tmp_path / "digit.png")]
    said = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    assert json.loads(said)["predictions"] == [dataclasses.asdict(row) for row in found[1]]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[0] == f"{found[1][0].score:.4f}  {found[1][0].label}"
    command[3:] = ["info", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "classes top=2, labels=labels.txt" in said and "resize=8:8, color=L" in said


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("classes:output=x", {}, "names the output 'x'"),
        ("classes:labels=labels.txt", {"attach": ()}, "names the file 'labels.txt', which is not attached"),
        ("classes:", {"preprocess": ()}, "no image becomes the input; give --preprocess"),
    ],
)
def test_a_package_that_could_not_predict_is_not_made(
    models: Path, tmp_path: Path, text: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        package(request(models, tmp_path / "x.edge", text, **options))
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_more_pixels_than_there_is_memory_for_are_refused() -> None:
    """In a process of its own, whose memory can be limited."""
    code = """
import resource, numpy as np
from edge_infer.errors import OutOfMemory
from edge_infer.manifest import Preprocessing, TensorSpec
from edge_infer.runtime.predict import Predictor
from types import SimpleNamespace
spec = TensorSpec("image", "float32", (None, None, None, 3), Preprocessing((32768, 32768), "letterbox"))
bundle = SimpleNamespace(manifest=SimpleNamespace(inputs=(spec,), outputs=(), postprocessing=None), file=None)
resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
try:
    Predictor(bundle)(lambda arrays: {}, np.zeros((9, 9, 3), np.uint8))
except OutOfMemory as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "there is no memory to make image float32[?, ?, ?, 3] of the image; close other programs\n"


def test_a_bundle_that_says_nothing_of_images_says_so(packaged: Any) -> None:
    with (
        load(packaged("torch.onnx", "onnx", "float32").path) as session,
        pytest.raises(UsageError, match="'image' has no preprocessing"),
    ):
        session.predict(np.zeros((8, 8), np.uint8))
