"""Samples of every source come to the same folder on disk; sets of them have nothing in common."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_infer import user_code, worker
from edge_infer.convert import spec_to_json
from edge_infer.errors import UsageError
from edge_infer.manifest import Preprocessing, TensorSpec, to_json
from edge_infer.runtime.preprocess import preprocess
from edge_infer.samples import Samples, halves, overlap, split, spool

X = TensorSpec("x", "float32", (None, 4))
IDS = TensorSpec("ids", "int64", (None, None))
K = TensorSpec("k", "int32", ())
IMAGE = TensorSpec("image", "float32", (None, 8, 8, 3))
STEPS = Preprocessing(resize=(8, 8), scale=1 / 255)

Made = tuple[Samples, dict[str, Any]]


@pytest.fixture
def spooled(tmp_path: Path) -> Callable[..., Made]:
    """``spooled(source, *inputs, labels=..., ...)``: the samples and what ``spool`` answered."""

    def make(source: object, *inputs: TensorSpec, labels: bool = False, **more: Any) -> Made:
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        request = {"source": str(source), "inputs": [*map(spec_to_json, inputs)], "labels": labels, "out": str(out)}
        answer = json.loads(json.dumps(spool({**request, "preprocess": {}, **more})))
        samples = Samples(out, inputs)
        assert answer["count"] == samples.count
        assert answer["labels"] == (samples.labels is not None)
        assert not list(out.glob("*.tmp"))
        return samples, answer

    return make


def npz(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "samples.npz", **arrays)
    return folder / "samples.npz"


def rows(count: int) -> np.ndarray:
    return np.arange(4 * count, dtype=np.float32).reshape(count, 4)


def values(samples: Samples, name: str) -> list[Any]:
    return [feed[name].tolist() for feed in samples.feeds()]


# -- axes ----------------------------------------------------------------------------------------------------------


def test_rows_are_batches_of_one_where_the_batch_is_dynamic(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    samples, _ = spooled(npz(tmp_path, x=rows(3)), X)
    assert values(samples, "x") == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]]
    assert samples.feed(2, batch=2)["x"].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert [feed["x"][0, 0] for feed in samples.feeds([2, 0])] == [8, 0]


def test_rows_are_cut_into_the_batches_a_fixed_model_takes(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    spec = TensorSpec("x", "float32", (2, 1))
    path = npz(tmp_path, x=np.arange(5, dtype=np.float32)[:, None], label=np.arange(5))
    samples, _ = spooled(path, spec, labels=True)
    assert values(samples, "x") == [[[0], [1]], [[2], [3]]]
    assert samples.labels is not None and samples.labels.tolist() == [0, 1, 2, 3]
    assert [samples.label(index).tolist() for index in range(2)] == [[0, 1], [2, 3]]


def test_one_rank_more_means_full_inputs(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    samples, _ = spooled(npz(tmp_path, x=np.zeros((7, 2, 9), np.float32)), TensorSpec("x", "float32", (2, None)))
    assert samples.count == 7
    assert samples.feed(3, batch=3)["x"].shape == (2, 9)


def test_scalars_come_one_a_sample(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    samples, _ = spooled(npz(tmp_path, k=np.arange(4, dtype=np.int32)), K)
    feeds = list(samples.feeds())
    assert [int(feed["k"]) for feed in feeds] == [0, 1, 2, 3]
    assert all(isinstance(feed["k"], np.ndarray) and feed["k"].shape == () for feed in feeds)


def test_rows_and_full_inputs_beside_each_other_keep_one_batch(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    samples, _ = spooled(npz(tmp_path, x=rows(5), ids=np.zeros((5, 1, 9), np.int64)), X, IDS)
    feed = samples.feed(0, batch=3)
    assert len(feed["x"]) == len(feed["ids"]) == 1


def test_feeds_are_the_callers_own(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    samples, _ = spooled(npz(tmp_path, x=rows(2), k=np.arange(2, dtype=np.int32)), X, K)
    feed = samples.feed(0)
    feed["x"][:], feed["k"][...] = 99, 99
    assert samples.feed(0)["x"].max() == 3 and samples.feed(0)["k"] == 0


@pytest.mark.parametrize("index", [-1, 3])
def test_a_sample_that_is_not_there_is_an_error(tmp_path: Path, spooled: Callable[..., Made], index: int) -> None:
    samples, _ = spooled(npz(tmp_path, x=rows(3)), X)
    with pytest.raises(IndexError):
        samples.feed(index)


# -- npz -----------------------------------------------------------------------------------------------------------


def as_npz(arrays: Mapping[str, np.ndarray], folder: Path) -> Path:
    return npz(folder, **arrays)


def as_compressed_npz(arrays: Mapping[str, np.ndarray], folder: Path) -> Path:
    np.savez_compressed(folder / "samples.npz", **arrays)
    return folder / "samples.npz"


def as_fortran_npz(arrays: Mapping[str, np.ndarray], folder: Path) -> Path:
    return npz(folder, **{name: np.asfortranarray(array) for name, array in arrays.items()})


def as_arrays(arrays: Mapping[str, np.ndarray], folder: Path) -> Path:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def as_files(arrays: Mapping[str, np.ndarray], folder: Path) -> Path:
    """A file a sample, numbered so that their order is that of names; labels in one file."""
    for name, array in arrays.items():
        if name == "labels":
            np.save(folder / "labels.npy", array)
            continue
        (folder / name).mkdir()
        for index, row in enumerate(array):
            np.save(folder / name / f"{index:05}.npy", row)
    return folder


def as_callable(arrays: Mapping[str, np.ndarray], folder: Path) -> str:
    np.savez(folder / "kept.npz", **arrays)
    (folder / "mine.py").write_text(
        "import pathlib, numpy as np\n"
        "def samples():\n"
        "    with np.load(pathlib.Path(__file__).with_name('kept.npz')) as kept:\n"
        "        arrays = dict(kept)\n"
        "    for index in range(len(arrays['x'])):\n"
        "        row = {name: array[index] for name, array in arrays.items()}\n"
        "        if 'labels' in row:\n"
        "            row['label'] = row.pop('labels')\n"
        "        yield row\n"
    )
    return f"{folder}/mine.py:samples"


FORMS = [as_npz, as_compressed_npz, as_fortran_npz, as_arrays, as_files, as_callable]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_to_the_same_files(form: Any, tmp_path: Path, spooled: Callable[..., Made]) -> None:
    """Large enough to go in several pieces: the first input has 12 MB."""
    rng = np.random.default_rng(0)
    wide = TensorSpec("x", "float32", (None, 7, 5000))
    arrays = {
        "x": rng.standard_normal((90, 7, 5000)).astype(np.float32),
        "ids": rng.integers(0, 9, (90, 11)),
        "k": np.arange(90, dtype=np.int32),
        "labels": rng.integers(0, 3, 90),
    }
    (tmp_path / "source").mkdir()
    samples, answer = spooled(form(arrays, tmp_path / "source"), wide, IDS, K, labels=True)
    assert samples.count == 90
    for index in (0, 1, 45, 89):
        feed = samples.feed(index)
        np.testing.assert_array_equal(feed["x"], arrays["x"][index : index + 1])
        np.testing.assert_array_equal(feed["ids"], arrays["ids"][index : index + 1])
        assert feed["k"] == index
    np.testing.assert_array_equal(samples.labels, arrays["labels"])
    (tmp_path / "again").mkdir()
    _, plain = spooled(as_npz(arrays, tmp_path / "again"), wide, IDS, K, labels=True)
    assert answer["sha256"] == plain["sha256"]
    assert (answer["random"], answer["classes"]) == (False, None)


def test_the_hash_tells_any_change(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    path = npz(tmp_path, x=rows(6), label=np.arange(6))
    seen = {spooled(path, X)[1]["sha256"], spooled(path, X, labels=True)[1]["sha256"]}
    seen.add(spooled(npz(tmp_path, x=rows(6), label=np.arange(6)[::-1]), X, labels=True)[1]["sha256"])
    seen.add(spooled(npz(tmp_path, x=rows(6)[::-1]), X)[1]["sha256"])
    seen.add(spooled(npz(tmp_path, x=rows(6).reshape(6, 1, 4)), X)[1]["sha256"])
    assert len(seen) == 5


@pytest.mark.parametrize("name", ["label", "labels", "target", "targets", "y", "digit"])
def test_labels_have_a_usual_name_or_are_the_only_array_left(
    tmp_path: Path, spooled: Callable[..., Made], name: str
) -> None:
    path = npz(tmp_path, **{"x": rows(3), name: np.array([2, 0, 1])})
    assert spooled(path, X, labels=True)[0].labels.tolist() == [2, 0, 1]
    assert spooled(path, X)[0].labels is None


def test_an_input_named_y_is_no_label(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    samples, _ = spooled(npz(tmp_path, y=rows(3)), TensorSpec("y", "float32", (None, 4)), labels=True)
    assert samples.labels is None


def test_a_name_with_a_slash_is_found(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    spec = TensorSpec("left hand/in.0", "float32", (None, 4))
    assert spooled(npz(tmp_path, **{spec.name: rows(3)}), spec)[0].count == 3
    (tmp_path / "left hand").mkdir()
    np.save(tmp_path / "left hand" / "in.0.npy", rows(4))
    assert spooled(tmp_path, spec)[0].count == 4


#: Arrays for an input ``x float32[?, 4]`` and one ``k int32[]``, and what is wrong with them.
UNUSABLE = {
    "wrong name": ({"z": rows(3)}, "holds arrays named ['z'], the model's input is 'x'"),
    "wrong dtype": ({"x": np.zeros((3, 4))}, "'x' has dtype float64, expected float32"),
    "wrong byte order": ({"x": rows(3).astype(">f4")}, "'x' has dtype >f4, expected float32"),
    "wrong size": ({"x": np.zeros((3, 5), np.float32)}, "'x' has shape [3, 5], expected samples"),
    "rank too low": ({"x": np.zeros(4, np.float32)}, "'x' has shape [4]"),
    "rank too high": ({"x": np.zeros((1, 1, 3, 4), np.float32)}, "'x' has shape [1, 1, 3, 4]"),
    "no axis": ({"x": rows(3), "k": np.int32(4)}, "'k' has shape []"),
    "no samples": ({"x": rows(0), "k": np.zeros(0, np.int32)}, "no complete sample"),
    "uneven": ({"x": rows(3), "k": np.zeros(2, np.int32)}, "{'x': 3, 'k': 2}"),
    "nan": ({"x": rows(3) * np.array([1, np.nan, 1, 1], np.float32), "k": np.zeros(3, np.int32)}, "sample 0 has NaN"),
    "objects": ({"x": np.array([None, 1])}, "is not an npz file of plain arrays"),
}
UNUSABLE_LABELS = {
    "too few": ({"labels": np.zeros(2, int)}, "2 labels for 3 samples"),
    "text": ({"labels": np.array(["cat", "dog", "cat"])}, "labels have dtype <U3, expected numbers"),
    "one": ({"labels": np.int64(3)}, "is one number"),
    "two": ({"label": np.zeros(3), "targets": np.zeros(3)}, "['label', 'targets'] beside the inputs"),
    "nobody knows": ({"a": np.zeros(3), "b": np.zeros(3)}, "['a', 'b'] beside the inputs"),
    "nan": ({"labels": np.array([1, 2, np.nan])}, "sample 2 has NaN"),
}


@pytest.mark.parametrize("form", [as_npz, as_arrays])
@pytest.mark.parametrize("kind", [*UNUSABLE, *(f"labels: {kind}" for kind in UNUSABLE_LABELS)])
def test_arrays_that_do_not_fit_are_refused(kind: str, form: Any, tmp_path: Path, spooled: Callable[..., Made]) -> None:
    labels = kind.startswith("labels: ")
    arrays, words = UNUSABLE_LABELS[kind[8:]] if labels else UNUSABLE[kind]
    if form is as_arrays:
        words = {
            "wrong name": "neither a file NAME.npy nor a folder NAME for each of the model's inputs ['x', 'k']",
            "objects": "is not of plain arrays",
        }.get(kind, words)
    have = (
        {"x": rows(3), "k": np.zeros(3, np.int32), **arrays}
        if labels or (form is as_arrays or kind == "objects")
        else arrays
    )
    if kind == "wrong name":
        have = arrays
    with pytest.raises(UsageError) as refusal:
        spooled(form(have, tmp_path), X, K, labels=labels)
    assert words in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def cut_npz(folder: Path) -> Path:
    path = npz(folder, x=rows(1000))
    path.write_bytes(path.read_bytes()[:9000])
    return path


def npz_with_a_wrong_bit(folder: Path) -> Path:
    path = npz(folder, x=rows(1000))
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    return path


def npz_of_a_cut_member(folder: Path) -> Path:
    file = io.BytesIO()
    np.save(file, rows(100))
    with zipfile.ZipFile(folder / "c.npz", "w") as archive:
        archive.writestr("x.npy", file.getvalue()[:900])
    return folder / "c.npz"


def lone_npy(folder: Path) -> Path:
    with (folder / "one.npz").open("wb") as file:
        np.save(file, rows(3))
    return folder / "one.npz"


def text(folder: Path) -> Path:
    (folder / "c.npz").write_text("a,b\n1,2")
    return folder / "c.npz"


@pytest.mark.parametrize("damaged", [cut_npz, npz_with_a_wrong_bit, npz_of_a_cut_member, lone_npy, text])
def test_what_is_no_npz_or_a_damaged_one_is_refused(
    damaged: Callable[[Path], Path], tmp_path: Path, spooled: Callable[..., Made]
) -> None:
    path = damaged(tmp_path)
    with pytest.raises(UsageError) as refusal:
        spooled(path, X)
    assert str(refusal.value).startswith(f"{path} is not an npz file of plain arrays (")


@pytest.mark.parametrize("what", ["calibration", "evaluation"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, spooled: Callable[..., Made], what: str) -> None:
    with pytest.raises(UsageError, match=f"there is no {what} file .*no.npz"):
        spooled(tmp_path / "no.npz", X, what=what)


# -- folders -------------------------------------------------------------------------------------------------------


def test_one_input_takes_a_file_a_sample_in_the_order_of_names(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    for index, name in enumerate(["b", "a", "sub/c"]):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "source" / f"{name}.npy", rows(3)[index] if index else rows(3)[index : index + 1])
    (tmp_path / "source" / "notes.txt").write_text("not a sample")
    (tmp_path / "source" / ".hidden.npy").write_text("not a sample")
    np.save(tmp_path / "source" / "labels.npy", np.array([5, 6, 7]))
    samples, _ = spooled(tmp_path / "source", X, labels=True)
    assert [row[0][0] for row in values(samples, "x")] == [4, 0, 8]
    assert samples.labels is not None and samples.labels.tolist() == [5, 6, 7]
    assert spooled(tmp_path / "source", X)[0].labels is None


def write_images(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Images by name; what is decoded of them, so that lossy kinds compare too."""
    rng = np.random.default_rng(1)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(folder / name)
    return {name: np.asarray(Image.open(folder / name).convert("RGB")) for name in names}


def with_steps(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.name, spec.dtype, spec.shape, STEPS)


def test_images_are_preprocessed_and_their_folders_are_the_labels(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    names = ["cat/1.png", "cat/deeper/2.JPG", "dog/0.bmp", "ant/9.webp", "dog/3.jpeg"]
    images = write_images(tmp_path / "source", names)
    (tmp_path / "source" / "bee").mkdir()
    (tmp_path / "source" / ".cache").mkdir()
    (tmp_path / "source" / "readme.txt").write_text("not an image")
    samples, answer = spooled(tmp_path / "source", IMAGE, labels=True, preprocess={"image": to_json(STEPS)})
    order = ["ant/9.webp", "cat/1.png", "cat/deeper/2.JPG", "dog/0.bmp", "dog/3.jpeg"]
    for feed, name in zip(samples.feeds(), order, strict=True):
        np.testing.assert_array_equal(feed["image"], preprocess(images[name], with_steps(IMAGE)))
    assert answer["classes"] == ["ant", "bee", "cat", "dog"]
    assert samples.labels is not None and samples.labels.tolist() == [0, 2, 2, 3, 3]


def test_preprocessing_of_the_contract_counts_too(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    images = write_images(tmp_path / "source", ["1.png"])
    samples, answer = spooled(tmp_path / "source", with_steps(IMAGE), labels=True)
    np.testing.assert_array_equal(samples.feed(0)["image"], preprocess(images["1.png"], with_steps(IMAGE)))
    assert samples.labels is None and answer["classes"] is None


def test_images_and_arrays_beside_each_other_in_folders_of_inputs(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    images = write_images(tmp_path / "image", ["1.png", "2.png"])
    (tmp_path / "k").mkdir()
    for index in range(2):
        np.save(tmp_path / "k" / f"{index}.npy", np.int32(index + 7))
    samples, _ = spooled(tmp_path, with_steps(IMAGE), K)
    assert [int(feed["k"]) for feed in samples.feeds()] == [7, 8]
    np.testing.assert_array_equal(samples.feed(1)["image"], preprocess(images["2.png"], with_steps(IMAGE)))


def empty(folder: Path) -> None:
    (folder / "notes.txt").write_text("nothing here")


def uneven(folder: Path) -> None:
    as_files({"x": rows(3), "k": np.zeros(2, np.int32)}, folder)


def one_of_two(folder: Path) -> None:
    as_arrays({"x": rows(3)}, folder)


def of_two_sizes(folder: Path) -> None:
    as_files({"ids": np.zeros((2, 3), np.int64)}, folder)
    np.save(folder / "ids" / "last.npy", np.zeros(4, np.int64))


def of_another_dtype(folder: Path) -> None:
    as_files({"x": rows(3)}, folder)
    np.save(folder / "x" / "last.npy", np.zeros(4))


def of_another_size(folder: Path) -> None:
    as_files({"x": rows(3)}, folder)
    np.save(folder / "x" / "last.npy", np.zeros((2, 5), np.float32))


def damaged_file(folder: Path) -> None:
    as_files({"x": rows(3)}, folder)
    (folder / "x" / "last.npy").write_text("dear diary")


def damaged_image(folder: Path) -> None:
    write_images(folder, ["1.png"])
    (folder / "2.png").write_text("dear diary")


def beside_classes(folder: Path) -> None:
    write_images(folder, ["a/1.png", "b/1.png", "c.png"])


def wrong_size_of_image(folder: Path) -> None:
    write_images(folder, ["1.png"])


def too_few_labels(folder: Path) -> None:
    as_files({"x": rows(3), "labels": np.zeros(2)}, folder)


CROPPED = TensorSpec("image", "float32", (None, 11, 11, 3), Preprocessing(crop=(11, 11)))
BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[TensorSpec, ...], tuple[str, ...]]] = {
    "empty": (empty, (X,), ("holds no complete sample", ".npy, .png, .jpg", "no x.npy")),
    "uneven": (uneven, (X, K), ("different numbers of samples ({'x': 3, 'k': 2})",)),
    "one of two": (one_of_two, (X, K), ("for each of the model's inputs ['x', 'k']",)),
    "two sizes": (of_two_sizes, (IDS,), ("last.npy: 'ids' has shape [4], in the samples before [3]", "in one size")),
    "dtype": (of_another_dtype, (X,), ("last.npy: 'x' has dtype float64, expected float32",)),
    "size": (of_another_size, (X,), ("last.npy: 'x' has shape [2, 5], expected one sample of x float32[?, 4]",)),
    "damaged": (damaged_file, (X,), ("last.npy is not of plain arrays",)),
    "image": (damaged_image, (with_steps(IMAGE),), ("2.png is not an image",)),
    "no steps": (damaged_image, (IMAGE,), ("1.png is an image, and nothing says how", "--preprocess resize=")),
    "beside classes": (beside_classes, (with_steps(IMAGE),), ("c.png lies beside the folders that name the classes",)),
    "image size": (wrong_size_of_image, (CROPPED,), ("1.png: the image has 12x10 pixels",)),
    "labels": (too_few_labels, (X,), ("2 labels for 3 samples",)),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_folders_that_do_not_fit_are_refused(kind: str, tmp_path: Path, spooled: Callable[..., Made]) -> None:
    build, inputs, words = BAD_FOLDERS[kind]
    (tmp_path / "source").mkdir()
    build(tmp_path / "source")
    with pytest.raises(UsageError) as refusal:
        spooled(tmp_path / "source", *inputs, labels=True)
    for word in words:
        assert word in str(refusal.value)


# -- code ----------------------------------------------------------------------------------------------------------


def code(folder: Path, body: str) -> str:
    (folder / "given.py").write_text("import numpy as np\n" + body)
    return f"{folder}/given.py:samples"


def test_the_users_code_and_what_it_imports_is_listed(tmp_path: Path) -> None:
    """In a child, as it is run: files of this test run are not the child's."""
    helper = tmp_path / "my_helper.py"
    helper.write_text("import numpy as np\ndef one(n): return np.full((1, 4), n, np.float32)\n")
    body = "import my_helper, json\ndef samples():\n    for n in range(3): yield {'x': my_helper.one(n), 'label': n}\n"
    source = code(tmp_path, body)
    request = {"source": source, "inputs": [spec_to_json(X)], "labels": True, "preprocess": {}}
    answer = worker.run("edge_infer.samples:spool", {**request, "out": str(tmp_path / "out")}, tmp_path / "log")
    files = [tmp_path / "given.py", helper]
    assert answer["depends_on"] == {str(path.resolve()): sha256(path) for path in files}
    samples = Samples(tmp_path / "out", [X])
    assert values(samples, "x") == [[[n] * 4] for n in range(3)]
    assert samples.labels is not None and samples.labels.tolist() == [0, 1, 2]
    assert (tmp_path / "out" / "0.npy").stat().st_size == 128 + 3 * 4 * 4


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_module_of_the_import_path_is_taken_by_name(
    tmp_path: Path, spooled: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pack_of_mine").mkdir()
    (tmp_path / "pack_of_mine" / "inner.py").write_text(
        "import numpy as np\nsamples = lambda: [{'x': np.ones(4, np.float32)}]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    samples, answer = spooled("pack_of_mine.inner:samples", X)
    assert samples.count == 1
    assert str((tmp_path / "pack_of_mine" / "inner.py").resolve()) in answer["depends_on"]


def test_a_file_named_as_a_module_in_use_does_not_take_its_place(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    (tmp_path / "zipfile.py").write_text("import numpy as np\ndef samples(): yield {'x': np.ones(4, np.float32)}\n")
    assert spooled(f"{tmp_path}/zipfile.py:samples", X)[0].count == 1
    assert sys.modules["zipfile"] is zipfile
    sys.path.remove(str(tmp_path))


def test_full_batches_of_a_fixed_model(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    body = "def samples():\n    for n in range(3): yield {'x': np.full((2, 4), n, np.float32), 'label': [n, n + 1]}"
    samples, _ = spooled(code(tmp_path, body), TensorSpec("x", "float32", (2, 4)), labels=True)
    assert samples.count == 3
    assert samples.feed(1)["x"].tolist() == [[1] * 4] * 2
    assert samples.label(1).tolist() == [[1, 2]]


ONE = "{'x': np.ones(4, np.float32)}"
BAD_CODE = {
    "no dict": ("def samples(): yield np.ones(4)", "sample 0 is a ndarray, expected a dict of arrays by ['x']"),
    "no iterable": ("def samples(): return 5", "failed at sample 0: TypeError"),
    "raises": (f"def samples():\n    yield {ONE}\n    raise OSError('disk')", "failed at sample 1: OSError: disk"),
    "nothing": ("def samples(): return []", "no complete sample"),
    "another name": ("def samples(): yield {'z': 1}", "sample 0 has arrays named ['z'], the model's input is 'x'"),
    "dtype": ("def samples(): yield {'x': [1.0] * 4}", "sample 0: 'x' has dtype float64, expected float32"),
    "shape": ("def samples(): yield {'x': np.ones(5, np.float32)}", "sample 0: 'x' has shape [5], expected one sample"),
    "no array": ("def samples(): yield {'x': [[1], [2, 3]]}", "'x' is no array"),
    "label missing": (
        f"def samples():\n    yield {{**{ONE}, 'label': 1}}\n    yield {ONE}",
        "sample 1 has no label, unlike the samples before",
    ),
    "label late": (
        f"def samples():\n    yield {ONE}\n    yield {{**{ONE}, 'label': 1}}",
        "sample 1 has a label, unlike the samples before",
    ),
    "label of another kind": (
        f"def samples():\n    yield {{**{ONE}, 'label': 1}}\n    yield {{**{ONE}, 'label': 1.5}}",
        "the label is float64[], those before are int64[]",
    ),
    "label of text": (f"def samples(): yield {{**{ONE}, 'label': 'cat'}}", "labels have dtype <U3"),
    "no callable": ("", "has no callable 'samples'"),
    "does not import": ("import no_such_module", "cannot import"),
}


@pytest.mark.parametrize("kind", BAD_CODE)
def test_code_that_gives_something_else_is_refused(kind: str, tmp_path: Path, spooled: Callable[..., Made]) -> None:
    body, words = BAD_CODE[kind]
    source = code(tmp_path, body)
    with pytest.raises(UsageError) as refusal:
        spooled(source, X, labels=True)
    assert words in str(refusal.value)
    assert source in str(refusal.value)


def test_a_path_with_a_colon_is_no_code() -> None:
    names = ("nets:make", "a.b:make", "dir/f.py:make", "f.py:make", "dir:x/c.npz", "no.npz", ":x", "a/b:make", "a:b-c")
    assert [user_code.names_callable(name) for name in names] == [True] * 4 + [False] * 5


# -- noise ---------------------------------------------------------------------------------------------------------


def test_noise_comes_when_asked_for_by_name_and_is_the_same_every_time(
    tmp_path: Path, spooled: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    samples, answer = spooled("random", X, IDS, K, labels=True)
    assert (answer["count"], answer["random"], answer["labels"]) == (64, True, False)
    assert samples.feed(0)["x"].shape == (1, 4) and samples.feed(0, batch=3)["ids"].shape == (3, 32)
    everything = np.concatenate([feed["x"] for feed in samples.feeds()])
    assert everything.min() < -1 and everything.max() > 1 and len(np.unique(everything)) == everything.size
    assert set(np.concatenate([feed["ids"].ravel() for feed in samples.feeds()])) == {0, 1}
    assert spooled("random", X, IDS, K)[1]["sha256"] == answer["sha256"]


@pytest.mark.parametrize("source", ["Random", "random.npz", "./random", "rand", ""])
def test_nothing_else_is_taken_for_noise(
    source: str, tmp_path: Path, spooled: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError):
        spooled(source, X)


def test_a_folder_named_random_is_not_passed_over(
    tmp_path: Path, spooled: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random").mkdir()
    as_arrays({"x": rows(3)}, tmp_path / "random")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"write \./random"):
        spooled("random", X)
    samples, answer = spooled("./random", X)
    assert (samples.count, answer["random"]) == (3, False)


# -- parts that have nothing in common -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4, 5, 7, 8, 100, 1001])
def test_a_set_splits_into_half_a_quarter_and_a_quarter(count: int) -> None:
    parts = split(count)
    every = [*parts.calibration, *parts.search, *parts.holdout]
    assert sorted(every) == list(range(count))
    assert len(parts.search) == len(parts.holdout) == max(1, count // 4)
    assert len(parts.calibration) >= 1
    assert parts == split(count)
    assert all(list(part) == sorted(part) for part in (parts.calibration, parts.search, parts.holdout))


def test_a_split_is_not_the_order_they_came_in_and_hangs_on_the_seed() -> None:
    """Folders of classes come one after the other: each part must have some of each."""
    for seed in range(5):
        parts = split(400, seed)
        for part in (parts.calibration, parts.search, parts.holdout):
            shares = np.bincount(np.asarray(part) // 100, minlength=4) / len(part)
            assert shares.min() > 0.1
    assert split(400, 1) != split(400, 2)
    assert split(8, 20).search == (0, 4)  # for ever: the numbers are part of what a user can repeat


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_to_split_is_said(count: int) -> None:
    with pytest.raises(UsageError, match=r"expected at least 3, one each to calibrate.*give more"):
        split(count)


def test_equal_samples_stay_in_one_part() -> None:
    keys = [index % 10 for index in range(100)]
    parts = split(100, keys=keys)
    found = [{keys[index] for index in part} for part in (parts.calibration, parts.search, parts.holdout)]
    assert [len(part) for part in found] == [6, 2, 2] and len(set.union(*found)) == 10
    a, b = halves(100, keys=keys)
    assert not {keys[index] for index in a} & {keys[index] for index in b}
    with pytest.raises(UsageError, match="there is 1 sample"):
        split(5, keys=["same"] * 5)


@pytest.mark.parametrize("labels", [None, np.arange(300) // 100, np.repeat([0, 7, 9], [280, 15, 5])])
def test_halves_have_as_many_of_every_class(labels: np.ndarray | None) -> None:
    a, b = halves(300, labels)
    assert sorted([*a, *b]) == list(range(300)) and len(a) == len(b) == 150
    if labels is not None:
        for name in np.unique(labels):
            assert abs(int((labels[list(a)] == name).sum()) - int((labels[list(b)] == name).sum())) <= 1
    assert (a, b) == halves(300, labels)


def test_halves_of_few() -> None:
    assert sorted(map(len, halves(3))) == [1, 2]
    assert sorted(map(len, halves(2, np.array([4, 4])))) == [1, 1]
    with pytest.raises(UsageError, match="there is 1 sample to evaluate on, expected at least 2"):
        halves(1)


def test_labels_that_are_no_classes_do_not_sort() -> None:
    assert halves(50, np.linspace(0, 1, 50)) == halves(50)


def test_overlap_counts_equal_samples_whatever_form_they_came_in(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    first, _ = spooled(npz(tmp_path, x=rows(10), k=np.zeros(10, np.int32)), X, K)
    both = {"x": rows(14)[4:].reshape(10, 1, 4), "k": np.zeros(10, np.int32)}
    second, _ = spooled(npz(tmp_path, **both), X, K)
    third, _ = spooled(npz(tmp_path, x=rows(10), k=np.ones(10, np.int32)), X, K)
    assert (overlap(first, second), overlap(first, first), overlap(first, third)) == (6, 10, 0)


def test_parts_of_one_set_have_no_key_in_common(tmp_path: Path, spooled: Callable[..., Made]) -> None:
    samples, _ = spooled(npz(tmp_path, x=np.tile(rows(10), (3, 1))), X)
    parts = split(samples.count, keys=samples.all_keys())
    keys = [{samples.key(index) for index in part} for part in (parts.calibration, parts.search, parts.holdout)]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]


# -- memory --------------------------------------------------------------------------------------------------------

WIDE = TensorSpec("x", "float32", (None, 25_000))

MEASURE = """
import json, re, sys
from pathlib import Path
from edge_infer.samples import spool
request = json.loads(sys.argv[1])
spool({**request, "source": request["warm"], "out": request["out"] + "-warm"})
# VmHWM is of this program alone; ru_maxrss would start at what the parent had when it forked.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
spool(request)
print(json.dumps([before, peak()]))
"""


def peak_growth_mb(source: object, warm: object, inputs: Sequence[TensorSpec], out: Path) -> float:
    """How far the peak rises in a child over what a small source of the same kind took."""
    request = {"source": str(source), "warm": str(warm), "inputs": [*map(spec_to_json, inputs)], "labels": True}
    request = {**request, "preprocess": {}, "out": str(out)}
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(request)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    before, after = json.loads(done.stdout)
    shutil.rmtree(out)
    return float(after - before)


def wide_npz(folder: Path, count: int) -> Path:
    path = folder / f"{count}.npz"
    arrays = {"x": np.tile(np.arange(25_000, dtype=np.float32), (count, 1)), "label": np.arange(count)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, array)
    return path


def wide_arrays(folder: Path, count: int) -> Path:
    path = folder / f"arrays-{count}"
    path.mkdir()
    np.save(path / "x.npy", np.zeros((count, 25_000), np.float32))
    return path


def wide_code(folder: Path, count: int) -> str:
    (folder / f"gives_{count}.py").write_text(
        f"import numpy as np\ndef go():\n    for n in range({count}): yield {{'x': np.full(25_000, n, np.float32)}}\n"
    )
    return f"{folder}/gives_{count}.py:go"


def many_files(folder: Path, count: int) -> Path:
    path = folder / f"files-{count}"
    path.mkdir()
    for index in range(count):
        np.save(path / f"{index}.npy", np.full(25_000, index, np.float32))
    return path


@pytest.mark.parametrize("build", [wide_npz, wide_arrays, wide_code, many_files])
def test_memory_does_not_grow_with_the_number_of_samples(build: Any, tmp_path: Path) -> None:
    """Eighty samples have 8 MB; eight hundred 80 MB, of which no more than one is in memory at a time."""
    growth = peak_growth_mb(build(tmp_path, 800), build(tmp_path, 80), [WIDE], tmp_path / "out")
    assert growth < 4
