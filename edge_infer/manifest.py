"""What a bundle says about itself, and its one JSON form.

Both halves use this file, and a push sends it along to devices with nothing installed: standard library only,
Python >= 3.8. Each class is a dataclass that is never changed; how a field is read from JSON stands beside the field.
Fields that this version does not know are kept in ``extra`` and written back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Type, TypeVar, Union, cast

from edge_infer.errors import BundleError
from edge_infer.records import Record

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
#: Who made the bundle, if they signed it: beside the manifest, since it says something of the manifest's hash.
SIGNATURE_NAME = "manifest.sig"
#: The field of a sealed JSON object that holds its own hash.
SEAL = "sha256"
#: A manifest larger than this is refused unread: it names files and tensors, it holds no data.
MANIFEST_MAX_BYTES = 4 * 1024 * 1024

#: Each value of a JSON text takes some hundred bytes of memory, of which a board has little.
MOST_VALUES = 500_000
#: More than any number that means something has. Python before 3.11 needs hours for one of megabytes.
INT_DIGITS = 1000

FORMATS = ("tflite", "onnx", "torchscript")
PRECISIONS = (
    "float32",
    "float16",
    "int8-dynamic",
    "int8-weights",
    "int4-weights",
    "int16x8",
    "int8",
    "int8-mixed",
)
PROVIDERS = ("tensorrt", "cuda", "cpu")
IMAGE_SIDE_MAX = 32768
RESIZE_MODES = ("stretch", "shortest-side", "letterbox")
#: The grey that YOLO detectors are trained with: https://github.com/ultralytics/yolov5/blob/master/utils/augmentations.py
FILL = 114
ACTIVATIONS = ("none", "softmax", "sigmoid")
BOX_FORMS = ("xyxy", "yxyx", "xywh", "cxcywh")
BOX_UNITS = ("pixels", "share")
DTYPES = (
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)

#: File and model names: no separators, no leading dot or dash, nothing a shell or another system reads differently.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}\Z")
SHA256 = re.compile(r"[0-9a-f]{64}\Z")

#: No other line has just this indent; one of the later fields is always there.
SEAL_LINE = re.compile(rb'\n "sha256": "([0-9a-f]{64})",(?=\n)')
NOT_CANONICAL = (
    "the manifest is not in its canonical form or lacks the hash of itself, so its digest means nothing; package again"
)

T = TypeVar("T")
Decoder = Callable[[Any, str], T]


def _expect(condition: bool, where: str, expected: str, value: object) -> None:
    if not condition:
        raise BundleError(f"the manifest's {where} is {_short(value)}, expected {expected}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def text(value: Any, where: str) -> str:
    _expect(isinstance(value, str) and len(value) <= 4096, where, "a string of at most 4096 characters", value)
    return cast(str, value)


def plain_name(value: Any, where: str) -> str:
    _expect(isinstance(value, str) and bool(PLAIN_NAME.match(value)), where, "a plain name", value)
    return cast(str, value)


def sha256(value: Any, where: str) -> str:
    _expect(isinstance(value, str) and bool(SHA256.match(value)), where, "64 lowercase hexadecimal digits", value)
    return cast(str, value)


def boolean(value: Any, where: str) -> bool:
    _expect(isinstance(value, bool), where, "true or false", value)
    return cast(bool, value)


def count(value: Any, where: str) -> int:
    valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    _expect(valid, where, "a whole number, zero or more", value)
    return cast(int, value)


def number(value: Any, where: str) -> float:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max
    _expect(valid, where, "a number, zero or more", value)
    return float(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def signed(value: Any, where: str) -> float:
    _expect(_is_finite(value), where, "a finite number", value)
    return cast(float, value)


def positive(value: Any, where: str) -> float:
    _expect(_is_finite(value) and value > 0, where, "a number above zero", value)
    return cast(float, value)


def pixel(value: Any, where: str) -> int:
    valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255
    _expect(valid, where, "a whole number of 0 to 255", value)
    return cast(int, value)


def at_least_one(value: Any, where: str) -> int:
    _expect(count(value, where) > 0, where, "a whole number of at least 1", value)
    return cast(int, value)


def image_size(value: Any, where: str) -> Tuple[int, int]:
    """Height and width in pixels."""
    valid = isinstance(value, list) and len(value) == 2
    valid = valid and all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= IMAGE_SIDE_MAX for n in value)
    _expect(valid, where, f"height and width, each 1 to {IMAGE_SIDE_MAX} pixels", value)
    return (value[0], value[1])


def one_of(*allowed: str) -> Decoder[str]:
    def decode(value: Any, where: str) -> str:
        _expect(isinstance(value, str) and value in allowed, where, "one of " + ", ".join(allowed), value)
        return cast(str, value)

    return decode


def optional(inner: Decoder[T]) -> Decoder[Optional[T]]:
    def decode(value: Any, where: str) -> Optional[T]:
        return None if value is None else inner(value, where)

    return decode


def tuple_of(inner: Decoder[T], most: int = 1024) -> Decoder[Tuple[T, ...]]:
    def decode(value: Any, where: str) -> Tuple[T, ...]:
        _expect(isinstance(value, list) and len(value) <= most, where, f"a list of at most {most}", value)
        return tuple(inner(item, f"{where}[{index}]") for index, item in enumerate(value))

    return decode


def mapping_of(key: Decoder[str], inner: Decoder[T], most: int = 1024) -> Decoder[Mapping[str, T]]:
    def decode(value: Any, where: str) -> Mapping[str, T]:
        _expect(isinstance(value, dict) and len(value) <= most, where, f"an object of at most {most}", value)
        return {key(name, f"{where} key"): inner(item, f"{where}[{name!r}]") for name, item in value.items()}

    return decode


def anything(value: Any, where: str) -> Any:
    return value


def struct(cls: Type[T]) -> Decoder[T]:
    """Reads a dataclass: known fields by their decoders, the others into ``extra``."""

    def decode(value: Any, where: str) -> T:
        _expect(isinstance(value, dict), where, "an object", value)
        known: Dict[str, Any] = {}
        for item in dataclasses.fields(cast(Any, cls)):
            if item.name == "extra":
                continue
            if item.name in value:
                known[item.name] = item.metadata["read"](value[item.name], f"{where}.{item.name}".lstrip("."))
            elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                raise BundleError(f"the manifest has no field {f'{where}.{item.name}'.lstrip('.')!r}")
        known["extra"] = {name: item for name, item in value.items() if name not in known}
        return cls(**known)

    return decode


def read(decoder: Decoder[Any], **options: Any) -> Any:
    """A dataclass field that is read from JSON by ``decoder``."""
    return field(metadata={"read": decoder}, **options)


def extra() -> Any:
    """Where fields of newer versions are kept."""
    return field(default_factory=dict)


@dataclass(eq=False, repr=False)
class Preprocessing(Record):
    """How an image becomes an input: colour, resize, centre crop, then ``(pixel * scale - mean) / std``, in this order.

    Pixels are 0 to 255. ``resize`` and ``crop`` are (height, width). ``mode`` "stretch" gives ``resize`` exactly;
    "shortest-side" keeps the aspect ratio and just covers ``resize``, and is cropped to ``crop`` or else ``resize``;
    "letterbox" keeps it too, just fits into ``resize``, and is centred there on pixels of the value ``fill``.
    ``mean`` and ``std`` have one number, or one a channel in the order of ``color``; empty means 0 and 1.
    """

    resize: Optional[Tuple[int, int]] = read(optional(image_size), default=None)
    mode: str = read(one_of(*RESIZE_MODES), default="stretch")
    fill: int = read(pixel, default=FILL)
    crop: Optional[Tuple[int, int]] = read(optional(image_size), default=None)
    color: str = read(one_of("RGB", "BGR", "L"), default="RGB")
    scale: float = read(positive, default=1.0)
    mean: Tuple[float, ...] = read(tuple_of(signed, most=3), default=())
    std: Tuple[float, ...] = read(tuple_of(positive, most=3), default=())
    layout: str = read(one_of("NHWC", "NCHW"), default="NHWC")
    extra: Mapping[str, Any] = extra()


@dataclass(eq=False, repr=False)
class TensorSpec(Record):
    """One input or output as the source model has it. ``None`` in ``shape`` is a dynamic dimension.

    ``preprocessing`` says how an image becomes this input, where the user said so.
    """

    name: str = read(text)
    dtype: str = read(one_of(*DTYPES))
    shape: Tuple[Optional[int], ...] = read(tuple_of(optional(count), most=32))
    preprocessing: Optional[Preprocessing] = read(optional(struct(Preprocessing)), default=None)
    extra: Mapping[str, Any] = extra()

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join('?' if n is None else str(n) for n in self.shape)}]"


@dataclass(eq=False, repr=False)
class Classes(Record):
    """How an output with a score a class becomes the likeliest: activation, then the ``top`` of at least ``threshold``.

    ``output`` may be left out where there is one. ``labels`` is a file of the bundle with a label a line.
    """

    output: Optional[str] = read(optional(text), default=None)
    activation: str = read(one_of(*ACTIVATIONS), default="none")
    top: int = read(at_least_one, default=5)
    threshold: Optional[float] = read(optional(signed), default=None)
    labels: Optional[str] = read(optional(plain_name), default=None)
    extra: Mapping[str, Any] = extra()


@dataclass(eq=False, repr=False)
class Boxes(Record):
    """How the N candidates of a detector become boxes: scores of at least ``threshold``, then of those that overlap by
    more than ``iou`` (intersection over union) within a class the best, ``top`` at most.

    ``scores`` [1, N, classes] and ``boxes`` [1, N, 4] are outputs; without ``boxes`` the first four columns of
    ``scores`` are the box, and with ``objectness`` a factor of all scores comes next. ``transposed``: [1, columns, N].
    With ``ids`` [1, N] the class is there, and ``scores`` is [1, N]. ``background``: class 0 is no object.

    ``form`` and ``unit`` say what the four numbers are: corners (x, y, x, y or y, x, y, x), or left, top or the centre
    with width and height; in pixels of the model's input or as a share of it. With ``anchors``, a file of the bundle
    with an array ``anchors`` [N, 4] (centre x and y, width, height, in ``unit``), they are offsets from these: the
    centre by ``variances[0]`` widths and heights, the size by a factor of ``exp(variances[1] * offset)``
    (https://arxiv.org/abs/1512.02325, section 2.2).
    """

    scores: Optional[str] = read(optional(text), default=None)
    boxes: Optional[str] = read(optional(text), default=None)
    ids: Optional[str] = read(optional(text), default=None)
    activation: str = read(one_of(*ACTIVATIONS), default="none")
    form: str = read(one_of(*BOX_FORMS), default="xyxy")
    unit: str = read(one_of(*BOX_UNITS), default="pixels")
    transposed: bool = read(boolean, default=False)
    objectness: bool = read(boolean, default=False)
    background: bool = read(boolean, default=False)
    anchors: Optional[str] = read(optional(plain_name), default=None)
    variances: Tuple[float, ...] = read(tuple_of(positive, most=2), default=(0.1, 0.2))
    threshold: float = read(signed, default=0.25)
    iou: float = read(number, default=0.5)
    top: int = read(at_least_one, default=100)
    labels: Optional[str] = read(optional(plain_name), default=None)
    extra: Mapping[str, Any] = extra()


@dataclass(eq=False, repr=False)
class Postprocessing(Record):
    """How the answers to one image become what ``Session.predict`` gives: one of the two."""

    classes: Optional[Classes] = read(optional(struct(Classes)), default=None)
    boxes: Optional[Boxes] = read(optional(struct(Boxes)), default=None)
    extra: Mapping[str, Any] = extra()

    @property
    def kind(self) -> Union[Classes, Boxes, None]:
        return self.classes or self.boxes

    @property
    def files(self) -> Tuple[str, ...]:
        """What of the bundle it reads."""
        kind = self.kind
        return tuple(name for name in (kind and kind.labels, self.boxes and self.boxes.anchors) if name)


@dataclass(eq=False, repr=False)
class Requirement(Record):
    """An engine package able to run the artifact, in the oldest ``version`` that can."""

    package: str = read(plain_name)
    version: str = read(plain_name)
    extra: Mapping[str, Any] = extra()

    def __str__(self) -> str:
        return f"{self.package}>={self.version}"


@dataclass(eq=False, repr=False)
class Artifact(Record):
    """The engine's own files and how to run them.

    ``requires`` are alternatives: any one of them runs the artifact. ``providers`` are tried in order
    (``tensorrt``, ``cuda``, ``cpu``). ``prepack`` (ONNX) lets the engine repack weights into private memory.
    """

    format: str = read(one_of(*FORMATS))
    precision: str = read(one_of(*PRECISIONS))
    model: str = read(plain_name)
    requires: Tuple[Requirement, ...] = read(tuple_of(struct(Requirement)))
    operators: Tuple[str, ...] = read(tuple_of(text))
    providers: Tuple[str, ...] = read(tuple_of(one_of(*PROVIDERS)))
    weights: Optional[str] = read(optional(plain_name), default=None)
    signature: Optional[str] = read(optional(text), default=None)
    prepack: bool = read(boolean, default=False)
    extra: Mapping[str, Any] = extra()


@dataclass(eq=False, repr=False)
class FileEntry(Record):
    """Length in bytes and SHA-256 of one file of the bundle."""

    size: int = read(count)
    sha256: str = read(sha256)
    extra: Mapping[str, Any] = extra()


@dataclass(eq=False, repr=False)
class TargetFacts(Record):
    """What a device must have to take this bundle; a push compares it with the device's own facts."""

    name: str = read(plain_name)
    architecture: str = read(text)
    cpu_features: Tuple[str, ...] = read(tuple_of(text))
    ram_bytes: int = read(count)
    page_size_bytes: int = read(count)
    python: str = read(text)
    extra: Mapping[str, Any] = extra()


@dataclass(eq=False, repr=False)
class Golden(Record):
    """The self-test: ``file`` is an npz with arrays ``in.INDEX.CASE`` and ``out.INDEX.CASE`` for ``cases`` cases.

    ``tolerance`` gives for each output the largest absolute difference that still passes. ``blind`` names the
    outputs that do not tell golden inputs apart, so that they prove little.
    """

    file: str = read(plain_name)
    cases: int = read(count)
    tolerance: Mapping[str, float] = read(mapping_of(text, number))
    blind: Tuple[str, ...] = read(tuple_of(text), default=())
    extra: Mapping[str, Any] = extra()


@dataclass(eq=False, repr=False)
class Check(Record):
    """One comparison made while packaging: ``observed`` against ``allowed`` in ``unit``, at the worst output."""

    what: str = read(text)
    output: str = read(text)
    observed: float = read(number)
    allowed: float = read(number)
    unit: str = read(text)
    extra: Mapping[str, Any] = extra()


@dataclass(eq=False, repr=False)
class SetScore(Record):
    """How the artifact did on one set of samples, with the 95 % interval, and the source model on the same set.

    ``samples`` is ``search`` (the choice was made with it) or ``holdout`` (it was only reported). ``metric`` says
    what the figures are: an accuracy or an error with labels, else an agreement with the source.
    """

    samples: str = read(text)
    metric: str = read(text)
    value: float = read(signed)
    low: float = read(signed)
    high: float = read(signed)
    count: int = read(count)
    source: float = read(signed)
    extra: Mapping[str, Any] = extra()


@dataclass(eq=False, repr=False)
class Manifest(Record):
    """All of ``manifest.json``. ``provenance`` says where the artifact comes from and is for people to read."""

    schema: int = read(count)
    name: str = read(plain_name)
    version: str = read(plain_name)
    target: TargetFacts = read(struct(TargetFacts))
    artifact: Artifact = read(struct(Artifact))
    inputs: Tuple[TensorSpec, ...] = read(tuple_of(struct(TensorSpec)))
    outputs: Tuple[TensorSpec, ...] = read(tuple_of(struct(TensorSpec)))
    golden: Golden = read(struct(Golden))
    checks: Tuple[Check, ...] = read(tuple_of(struct(Check)))
    files: Mapping[str, FileEntry] = read(mapping_of(plain_name, struct(FileEntry)))
    provenance: Mapping[str, Any] = read(mapping_of(text, anything), default_factory=dict)
    scores: Tuple[SetScore, ...] = read(tuple_of(struct(SetScore)), default=())
    postprocessing: Optional[Postprocessing] = read(optional(struct(Postprocessing)), default=None)
    extra: Mapping[str, Any] = extra()

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, UTF-8, one space of indent, no field at its default, a newline at the end.

        ``sha256`` in it is that of the same bytes without it: a bundle that is opened by its path has no other word
        for its manifest's being sound.
        """
        return seal(to_json(self))

    @property
    def digest(self) -> str:
        """The bundle's identity: SHA-256 of the canonical manifest, which holds the hash of every other file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files, the manifest not counted."""
        return sum(entry.size for entry in self.files.values())


def read_json(data: bytes) -> Any:
    """The value of a JSON text from elsewhere, in bounded memory and time. Raises ValueError, RecursionError."""
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES} values")
    return json.loads(data.decode("utf-8"), parse_int=_whole_number)


def _whole_number(digits: str) -> int:
    if len(digits) > INT_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, expected at most {INT_DIGITS}")
    return int(digits)


def canonical_json(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()


def seal(content: Mapping[str, Any]) -> bytes:
    """Canonical JSON of ``content`` and, as ``sha256``, the hash of its canonical JSON without that."""
    rest = {name: item for name, item in content.items() if name != SEAL}
    return canonical_json({**rest, SEAL: hashlib.sha256(canonical_json(rest)).hexdigest()})


def _is_default(item: Any, value: Any) -> bool:
    """A field at its default is left out: one that a later version adds then changes no older bundle's digest."""
    if item.default_factory is not dataclasses.MISSING:
        return bool(value == item.default_factory())
    return item.default is not dataclasses.MISSING and bool(value == item.default)


def to_json(value: Any) -> Any:
    """Plain JSON data of a dataclass of this file, without its fields at their default."""
    if dataclasses.is_dataclass(value):
        fields = {
            item.name: to_json(getattr(value, item.name))
            for item in dataclasses.fields(value)
            if item.name != "extra" and not _is_default(item, getattr(value, item.name))
        }
        return {**cast(Any, value).extra, **fields}
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def parse(data: bytes) -> Manifest:
    """Read ``manifest.json``.

    Raises BundleError when it is too large, not canonical JSON, of a newer schema, not what its own hash says, or when
    a field is missing, of the wrong type, or names what the bundle does not hold.
    """
    if len(data) > MANIFEST_MAX_BYTES:
        raise BundleError(f"the manifest has {len(data)} bytes, expected at most {MANIFEST_MAX_BYTES}")
    try:
        return _parse(data)
    except BundleError:
        raise
    except (ValueError, RecursionError) as error:
        # Not JSON at all, or what JSON can say and its canonical form cannot: NaN, half a surrogate, endless nesting.
        raise BundleError(f"the manifest is not canonical JSON ({error}); package or push the model again") from None


def _parse(data: bytes) -> Manifest:
    value = read_json(data)
    _expect(isinstance(value, dict), "content", "an object", value)
    schema = count(value.get("schema"), "schema")
    if schema > SCHEMA:
        raise BundleError(
            f"the manifest has schema {schema}, this edge_infer reads up to {SCHEMA}; upgrade edge-infer here"
        )
    rest = _unsealed(data)
    value.pop(SEAL, None)
    manifest = struct(Manifest)(value, "")
    _check_references(manifest)
    if canonical_json(to_json(manifest)) != rest:
        raise BundleError(NOT_CANONICAL)
    return manifest


def _unsealed(data: bytes) -> bytes:
    """What was sealed, told from the bytes alone. Raises BundleError when its hash is another."""
    found = SEAL_LINE.search(data)
    if found is None:
        raise BundleError(NOT_CANONICAL)
    rest = data[: found.start()] + data[found.end() :]
    observed, expected = hashlib.sha256(rest).hexdigest(), found.group(1).decode()
    if observed != expected:
        raise BundleError(
            f"the manifest has SHA-256 {observed[:16]}..., expected {expected[:16]}..., as it says itself: it is "
            "damaged; package or push the model again"
        )
    return rest


def _check_references(manifest: Manifest) -> None:
    named = [manifest.artifact.model, manifest.artifact.weights, manifest.golden.file]
    named += manifest.postprocessing.files if manifest.postprocessing else ()
    for name in named:
        if name is not None and name not in manifest.files:
            raise BundleError(f"the manifest names the file {name!r} but lists no length and hash for it")
    for name in (MANIFEST_NAME, SIGNATURE_NAME):
        if name in manifest.files:
            raise BundleError(f"the manifest lists {name}, whose hash it cannot hold")
    for kind, specs in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        names = [spec.name for spec in specs]
        _expect(len(set(names)) == len(names) and bool(names), kind, "at least one, each name once", names)
    _expect(bool(manifest.artifact.requires), "artifact.requires", "at least one engine", [])
    # A self-test that asks nothing or compares nothing would always pass.
    golden, outputs = manifest.golden, [spec.name for spec in manifest.outputs]
    _expect(golden.cases > 0, "golden.cases", "at least one", golden.cases)
    _expect(sorted(golden.tolerance) == sorted(outputs), "golden.tolerance", "one for each output", [*golden.tolerance])
