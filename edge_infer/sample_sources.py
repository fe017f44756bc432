"""Where samples come from: npz files, folders of arrays or images, the user's own code, or noise asked for by name.

Run in a child. Memory does not grow with the number of samples: arrays are copied in pieces, others come one by one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from edge_infer import user_code
from edge_infer.errors import EdgeInferError, UsageError
from edge_infer.manifest import Preprocessing, TensorSpec, struct
from edge_infer.npy import ArrayFile, read_header, read_pieces
from edge_infer.runtime.preprocess import preprocess
from edge_infer.samples import LABELS_FILE, SEED, Shape, check_array, count_samples, fits, labels_each

Array = np.ndarray[Any, Any]
Members = Mapping[str, Callable[[], IO[bytes]]]

RANDOM = "random"
RANDOM_SAMPLES = 64
#: The size of a dynamic dimension in random samples, the batch aside.
RANDOM_LENGTH = 32
LABEL_NAMES = ("label", "labels", "target", "targets", "y")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
#: The user's code may go on for ever and would fill the disk; calibration takes hundreds, evaluation thousands.
CALLABLE_SAMPLES_MAX = 1_000_000
#: What readers of damaged archives and arrays raise; RuntimeError: a password, or a method that this Python lacks.
READ_ERRORS = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Wanted:
    """What is asked for. ``what`` ("calibration", "evaluation") is for messages; ``labels``: to look for them too."""

    source: str
    inputs: tuple[TensorSpec, ...]
    labels: bool
    what: str

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.inputs]

    @property
    def is_callable(self) -> bool:
        return self.source != RANDOM and not Path(self.source).exists() and user_code.names_callable(self.source)


def spool(request: dict[str, Any]) -> dict[str, Any]:
    """Read ``source`` into the folder ``out`` as ``edge_infer.samples`` has it.

    request: ``source``, ``inputs`` (specs), ``labels`` (whether they are wanted), ``preprocess`` (JSON by input name),
    ``out``, and ``what`` ("calibration" unless given) for messages. Gives ``count``; ``sha256`` over what the samples
    hold; ``labels``, whether there are any; ``classes``, the folders that the labels number, or None; ``random``; and
    ``depends_on``, the SHA-256 of the user's Python files by path. Raises UsageError.
    """
    steps = {name: struct(Preprocessing)(row, "preprocess") for name, row in (request.get("preprocess") or {}).items()}
    inputs = [struct(TensorSpec)(row, "inputs") for row in request["inputs"]]
    specs = tuple(replace(spec, preprocessing=steps.get(spec.name, spec.preprocessing)) for spec in inputs)
    wanted = Wanted(request["source"], specs, bool(request["labels"]), request.get("what", "calibration"))
    folder = Path(request["out"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with Spool(folder, wanted) as out:
            classes = _read(wanted, out)
            answer = out.finish()
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UsageError(f"the samples of {wanted.source} need more storage than {folder} has; free some") from None
    depends_on = user_code.imported_files() if wanted.is_callable else {}
    return {**answer, "classes": classes, "random": wanted.source == RANDOM, "depends_on": depends_on}


def _read(wanted: Wanted, out: Spool) -> list[str] | None:
    """Pass the source's samples to ``out``; gives the names of classes where folders are the labels."""
    path = Path(wanted.source)
    if wanted.source == RANDOM:
        if path.exists():
            raise UsageError(f"--{wanted.what} random asks for noise, but a file of that name is here; write ./random")
        _random(wanted, out)
    elif path.is_dir():
        return _folder(wanted, path, out)
    elif wanted.is_callable:
        _callable(wanted, out)
    else:
        _npz(wanted, path, out)
    return None


# -- the folder written --------------------------------------------------------------------------------------------


class Spool:
    """An array for each input and one of labels, on their way to disk."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self._folder = folder
        self._wanted = wanted
        self._files: dict[str, ArrayFile] = {}
        self._labels: ArrayFile | None = None
        self._added = 0
        self._stack = ExitStack()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def input(self, spec: TensorSpec, row: Shape) -> ArrayFile:
        """Where rows of shape ``row`` go for an input."""
        if spec.name not in self._files:
            file = f"{self._wanted.names.index(spec.name)}.npy"
            self._files[spec.name] = self._open(file, np.dtype(spec.dtype), row)
        return self._files[spec.name]

    def labels(self, where: object, dtype: np.dtype[Any], row: Shape) -> ArrayFile:
        """Where labels of shape ``row`` go."""
        if dtype.kind not in "biuf":
            raise UsageError(f"{where}: the labels have dtype {dtype}, expected numbers")
        if self._labels is None:
            self._labels = self._open(LABELS_FILE, dtype, row)
        return self._labels

    def add(self, where: object, sample: Mapping[str, Array], label: Array | None = None) -> None:
        """One sample, each input with or without the batch axis. ``where`` names it in messages."""
        for spec in self._wanted.inputs:
            entry = _entry(where, spec, sample[spec.name])
            file = self.input(spec, entry.shape)
            if file.row != entry.shape:
                raise UsageError(
                    f"{where}: {spec.name!r} has shape {list(entry.shape)}, in the samples before {list(file.row)}; "
                    "give all samples in one size"
                )
            file.append(entry[None], where)
        if self._added and (label is None) != (self._labels is None):
            raise UsageError(f"{where} has {'no' if label is None else 'a'} label, unlike the samples before")
        if label is not None:
            self._add_label(where, label)
        self._added += 1

    def _add_label(self, where: object, label: Array) -> None:
        file = self.labels(where, label.dtype, label.shape)
        if (file.dtype, file.row) != (label.dtype, label.shape):
            raise UsageError(
                f"{where}: the label is {label.dtype}{list(label.shape)}, those before are {file.dtype}{list(file.row)}"
            )
        file.append(label[None], where)

    def finish(self) -> dict[str, Any]:
        """Complete the files; gives what ``spool`` says of them. Raises UsageError when they do not fit together."""
        source, inputs = self._wanted.source, self._wanted.inputs
        shapes = {name: file.shape for name, file in self._files.items()}
        count = count_samples(source, inputs, {spec.name: shapes.get(spec.name, (0,)) for spec in inputs})
        if self._labels is not None:
            labels_each(source, inputs, shapes, self._labels.rows)
        content = [[spec.name, *self._files[spec.name].finish()] for spec in inputs]
        labels = self._labels.finish() if self._labels is not None else None
        digest = hashlib.sha256(json.dumps([content, labels]).encode())
        return {"count": count, "sha256": digest.hexdigest(), "labels": labels is not None}

    def _open(self, name: str, dtype: np.dtype[Any], row: Shape) -> ArrayFile:
        file = ArrayFile(self._folder / name, dtype, row)
        self._stack.callback(file.close)
        return file


def _entry(where: object, spec: TensorSpec, array: Array) -> Array:
    """One sample as a row where its batch is 1 or not there, otherwise as a full input."""
    if array.dtype != np.dtype(spec.dtype):
        raise UsageError(f"{where}: {spec.name!r} has dtype {array.dtype}, expected {spec.dtype}")
    if fits(spec.shape, array.shape):
        batch_of_one = spec.shape and spec.shape[0] in (None, 1) and len(array) == 1
        return np.asarray(array[0]) if batch_of_one else array
    if spec.shape and fits(spec.shape[1:], array.shape):
        return array
    raise UsageError(f"{where}: {spec.name!r} has shape {list(array.shape)}, expected one sample of {spec}")


# -- arrays of all samples -----------------------------------------------------------------------------------------


def _npz(wanted: Wanted, path: Path, out: Spool) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            files = [name for name in archive.namelist() if name.endswith(".npy")]
            members = {name.removesuffix(".npy"): partial(archive.open, name) for name in files}
            _arrays(wanted, path, members, out)
    except FileNotFoundError:
        raise UsageError(f"there is no {wanted.what} file {path}") from None
    except READ_ERRORS as error:
        raise _unreadable(error, f"{path} is not an npz file of plain arrays") from None


def _unreadable(error: Exception, words: str) -> Exception:
    """What to raise for an error while reading a file; what explains itself stays."""
    stays = isinstance(error, EdgeInferError) or (isinstance(error, OSError) and error.errno in NO_SPACE)
    return error if stays else UsageError(f"{words} ({user_code.first_line(error)})")


def _arrays(wanted: Wanted, where: Path, members: Members, out: Spool) -> None:
    """Copy arrays that hold all samples, after a look at their headers alone."""
    shapes = {}
    for spec in wanted.inputs:
        if spec.name not in members:
            raise UsageError(f"{where} holds arrays named {sorted(members)}, the model's input is {spec.name!r}")
        with members[spec.name]() as file:
            header = read_header(file)
        check_array(where, spec, header.dtype, header.shape)
        shapes[spec.name] = header.shape
    count_samples(where, wanted.inputs, shapes)
    label = _label_name(where, [name for name in members if name not in wanted.names]) if wanted.labels else None
    if label is not None:
        _copy_labels(where / f"{label}.npy", members[label], out)
    for spec in wanted.inputs:
        with members[spec.name]() as file:
            target = out.input(spec, shapes[spec.name][1:])
            for piece in read_pieces(file):
                target.append(piece, f"{where}: {spec.name!r}")


def _label_name(where: object, others: list[str]) -> str | None:
    """Which of the arrays that are no input holds the labels."""
    known = [name for name in LABEL_NAMES if name in others]
    candidates = known or others
    if len(candidates) > 1:
        raise UsageError(f"{where} holds {sorted(candidates)} beside the inputs; call the one of labels 'labels' alone")
    return candidates[0] if candidates else None


def _copy_labels(where: object, opened: Callable[[], IO[bytes]], out: Spool) -> None:
    with opened() as file:
        header = read_header(file)
    if not header.shape:
        raise UsageError(f"{where} is one number, expected one label a sample")
    with opened() as file:
        target = out.labels(where, header.dtype, header.shape[1:])
        for piece in read_pieces(file):
            target.append(piece, where)


# -- folders -------------------------------------------------------------------------------------------------------


def _folder(wanted: Wanted, folder: Path, out: Spool) -> list[str] | None:
    """``NAME.npy`` of each input, or a folder NAME of each with a file a sample, or for one input such files."""
    have = [name for name in wanted.names if (folder / f"{name}.npy").is_file()]
    if len(have) == len(wanted.inputs):
        members = {path.stem: _opener(path) for path in folder.glob("*.npy")}
        members.update({name: _opener(folder / f"{name}.npy") for name in have})
        _readable(folder, lambda: _arrays(wanted, folder, members, out))
        return None
    if all((folder / name).is_dir() for name in wanted.names):
        folders = {name: folder / name for name in wanted.names}
    elif len(wanted.inputs) == 1 and not have:
        folders = {wanted.names[0]: folder}
    else:
        raise UsageError(
            f"{folder} holds neither a file NAME.npy nor a folder NAME for each of the model's inputs {wanted.names}"
        )
    return _files_of_samples(wanted, folder, folders, out)


def _files_of_samples(wanted: Wanted, folder: Path, folders: dict[str, Path], out: Spool) -> list[str] | None:
    label_files = [path for name in LABEL_NAMES if (path := folder / f"{name}.npy").is_file()]
    counts = {name: sum(1 for _ in _files(path, label_files)) for name, path in folders.items()}
    if set(counts.values()) == {0}:
        suffixes = ", ".join((".npy", *IMAGE_SUFFIXES))
        raise UsageError(f"{folder} holds no complete sample: no files {suffixes} and no {wanted.names[0]}.npy")
    if len(set(counts.values())) != 1:
        raise UsageError(f"{folder} holds different numbers of samples ({counts}), expected the same for every input")
    name = _label_name(folder, [path.stem for path in label_files]) if wanted.labels else None
    classes = _classes(folder) if wanted.labels and name is None and [*folders.values()] == [folder] else None
    for paths in zip(*(_files(path, label_files) for path in folders.values()), strict=True):
        sample = {spec.name: _load(spec, path) for spec, path in zip(wanted.inputs, paths, strict=True)}
        out.add(paths[0], sample, _class_of(folder, paths[0], classes) if classes else None)
    if name is not None:
        path = folder / f"{name}.npy"
        _readable(path, lambda: _copy_labels(path, _opener(path), out))
    return classes


def _files(folder: Path, without: Iterable[Path]) -> Iterator[Path]:
    """Files of samples below ``folder``, each level by name; hidden ones and other kinds are not looked at."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path, without)
        elif path.suffix.lower() in (".npy", *IMAGE_SUFFIXES) and path not in without:
            yield path


def _classes(folder: Path) -> list[str] | None:
    """The sub-folders of the first level in alphabetical order; one alone tells nothing apart."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return names if len(names) > 1 else None


def _class_of(folder: Path, path: Path, classes: list[str]) -> Array:
    parts = path.relative_to(folder).parts
    if len(parts) == 1:
        raise UsageError(f"{path} lies beside the folders that name the classes; move it into one of them")
    return np.asarray(classes.index(parts[0]), np.int64)


def _load(spec: TensorSpec, path: Path) -> Array:
    """One sample out of a file: an image, preprocessed, or an array just as the model takes it."""
    if path.suffix.lower() == ".npy":
        array: Array = _readable(path, lambda: np.asarray(np.load(path, allow_pickle=False)))
        return array
    if spec.preprocessing is None:
        raise UsageError(
            f"{path} is an image, and nothing says how it becomes the input {spec}; "
            "give --preprocess resize=256,crop=224,scale=1/255,layout=NCHW or the like"
        )
    try:
        return preprocess(path, spec)
    except UsageError as error:
        raise UsageError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: path.open("rb")


def _readable(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except READ_ERRORS as error:
        raise _unreadable(error, f"{path} is not of plain arrays as numpy saves them") from None


# -- code and noise ------------------------------------------------------------------------------------------------


def _callable(wanted: Wanted, out: Spool) -> None:
    asked = f"--{wanted.what} {wanted.source}"
    function = user_code.resolve(wanted.source, f"--{wanted.what}")
    for number, sample in enumerate(_called(function, asked)):
        where = f"{asked}, sample {number}"
        if number >= CALLABLE_SAMPLES_MAX:
            raise UsageError(f"{asked} gave {CALLABLE_SAMPLES_MAX:,} samples and goes on; let it end")
        if not isinstance(sample, Mapping):
            raise UsageError(f"{where} is a {type(sample).__name__}, expected a dict of arrays by {wanted.names}")
        arrays = {name: _as_array(where, name, value) for name, value in sample.items()}
        for name in wanted.names:
            if name not in arrays:
                raise UsageError(f"{where} has arrays named {sorted(map(str, arrays))}, the model's input is {name!r}")
        others = [name for name in arrays if name in LABEL_NAMES and name not in wanted.names]
        label = _label_name(where, others) if wanted.labels else None
        out.add(where, arrays, None if label is None else arrays[label])


def _called(function: Callable[[], Any], asked: str) -> Iterator[Any]:
    """What the user's code gives one by one; whatever it raises is a sentence that names it."""
    number = 0
    try:
        for sample in function():
            yield sample
            number += 1
    except Exception as error:
        words = f"{type(error).__name__}: {user_code.first_line(error)}"
        raise UsageError(f"{asked} failed at sample {number}: {words}") from error


def _as_array(where: str, name: str, value: Any) -> Array:
    try:
        return np.asarray(value)
    except Exception as error:  # tensors raise their frameworks' own kinds
        raise UsageError(f"{where}: {name!r} is no array ({user_code.first_line(error)})") from None


def _random(wanted: Wanted, out: Spool) -> None:
    """Normal and uniform noise in turn from a fixed seed; whole numbers are 0 or 1, which any table has."""
    rng = np.random.default_rng(SEED)
    for number in range(RANDOM_SAMPLES):
        out.add(RANDOM, {spec.name: _noise(spec, number, rng) for spec in wanted.inputs})


def _noise(spec: TensorSpec, number: int, rng: np.random.Generator) -> Array:
    sizes = [1 if axis == 0 else RANDOM_LENGTH for axis in range(len(spec.shape))]
    shape = tuple(size if known is None else known for known, size in zip(spec.shape, sizes, strict=True))
    dtype = np.dtype(spec.dtype)
    if dtype.kind != "f":
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    return np.asarray(rng.standard_normal(shape) if number % 2 == 0 else rng.random(shape)).astype(dtype)
