"""What a user asks of the packager, and what is wrong with it before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_infer import quantize
from edge_infer.bundle import refuse_to_overwrite
from edge_infer.errors import UsageError
from edge_infer.evaluate.judge import AGREEMENT, WITHOUT_LABELS, check_metric
from edge_infer.manifest import (
    FORMATS,
    MANIFEST_NAME,
    PLAIN_NAME,
    PRECISIONS,
    SIGNATURE_NAME,
    Postprocessing,
    Preprocessing,
    TensorSpec,
)
from edge_infer.runtime import postprocess
from edge_infer.runtime.predict import read_files
from edge_infer.sample_sources import RANDOM
from edge_infer.search import PREFERENCES, Limit
from edge_infer.store import is_model_name
from edge_infer.target import TargetProfile

GOLDEN = "golden.npz"
RESERVED = {MANIFEST_NAME, SIGNATURE_NAME, GOLDEN, "model.tflite", "model.onnx", "model.torchscript", "weights.bin"}
SCOPES = ("global", "layer")


@dataclass(frozen=True)
class Request:
    """What to package and how; the defaults are the command line's.

    ``target`` is a profile's name or a ``.toml`` file. ``inputs`` gives or overrides the source's inputs.
    ``postprocess`` is what ``Session.predict`` makes of the answers; the files that it names are in ``attach``.
    ``calibration`` and ``evaluation`` are what ``edge_infer.samples`` reads: an ``.npz``, a folder, a callable.
    ``metric`` is what ``edge_infer.evaluate`` knows, on the output ``scored`` where there are several.

    Limits: ``max_size`` and ``max_ram`` in bytes, ``max_latency`` and ``max_load_time`` in milliseconds,
    ``min_score`` in the metric's unit, ``max_drop`` as a share of the source's score; None takes the target's own
    or none. ``sparsity`` is the share of weights to prune. ``device`` is the address of a device to measure on,
    ``python`` the Python there that has an engine, ``self_test_timeout`` the seconds that it has for each self-test and
    each timing (None: 120), ``ssh_options`` go to ``deploy.conversation.open_transport``.
    ``cache=False`` makes everything anew.
    """

    source: Path
    target: str
    output: Path
    format: str = "auto"
    precision: str = "auto"
    calibration: str | Path | None = None
    inputs: tuple[TensorSpec, ...] = ()
    preprocess: tuple[tuple[str | None, Preprocessing], ...] = ()
    postprocess: Postprocessing | None = None
    factory: str | None = None
    signature: str | None = None
    trust_pickle: bool = False
    name: str | None = None
    version: str = "1"
    attach: tuple[Path, ...] = ()
    evaluation: str | Path | None = None
    metric: str = AGREEMENT
    scored: str | None = None
    ranges: str = "minmax"
    max_size: int | None = None
    max_ram: int | None = None
    max_latency: float | None = None
    max_load_time: float | None = None
    min_score: float | None = None
    max_drop: float | None = None
    prefer: str = "target"
    sparsity: float = 0.0
    prune_scope: str = "global"
    device: str | None = None
    python: str | None = None
    self_test_timeout: float | None = None
    ssh_options: Mapping[str, Any] = field(default_factory=dict)
    cache: bool = True

    @property
    def model_name(self) -> str:
        return self.name or self.output.name.removesuffix(".edge")


def check_request(request: Request) -> None:
    """Raise UsageError for what can be told to be wrong without opening the model."""
    for value, known, option in (
        (request.format, ("auto", *FORMATS), "--format"),
        (request.precision, ("auto", *PRECISIONS), "--precision"),
        (request.ranges, quantize.RANGES, "--ranges"),
        (request.prefer, PREFERENCES, "--prefer"),
        (request.prune_scope, SCOPES, "--prune-scope"),
    ):
        if value not in known:
            raise UsageError(f"{option} {value} is not known, expected {', '.join(known)}")
    if not is_model_name(request.model_name):
        raise UsageError(f"{request.model_name!r} cannot name a model; give --name with letters, digits and ._+- only")
    if not PLAIN_NAME.match(request.version):
        raise UsageError(f"--version {request.version!r}, expected letters, digits and ._+- only")
    if len({spec.name for spec in request.inputs}) != len(request.inputs):
        raise UsageError("--input names the same input twice")
    _check_data(request)
    _check_limits(request)
    _check_attached(request)
    refuse_to_overwrite(request.output)


def _check_data(request: Request) -> None:
    check_metric(request.metric)
    if request.precision in quantize.CALIBRATED and request.calibration is None:
        raise UsageError(f"--precision {request.precision} needs real samples; give them with --calibration FILE.npz")
    if request.metric not in WITHOUT_LABELS and request.evaluation is None:
        raise UsageError(f"--metric {request.metric} needs labels; give samples with labels with --evaluate FILE.npz")
    if request.evaluation is not None and str(request.evaluation) == RANDOM:
        raise UsageError("--evaluate random would judge the model on noise; give real samples")
    judged = request.calibration is not None or request.evaluation is not None
    for value, option in (
        (request.min_score, "--min-accuracy"),
        (request.max_drop, "--max-accuracy-drop"),
        (request.sparsity or None, "--prune"),
    ):
        if value is not None and not judged:
            raise UsageError(
                f"{option} needs real samples to judge by; give --evaluate FILE.npz or --calibration FILE.npz"
            )


def _check_limits(request: Request) -> None:
    for value, option in (
        (request.max_size, "--max-size"),
        (request.max_ram, "--max-ram"),
        (request.max_latency, "--max-latency"),
        (request.max_load_time, "--max-load-time"),
        (request.self_test_timeout, "--self-test-timeout"),
    ):
        if value is not None and value <= 0:
            raise UsageError(f"{option} {value}, expected more than 0")
    if request.max_drop is not None and not 0 <= request.max_drop < 1:
        raise UsageError(f"--max-accuracy-drop {request.max_drop}, expected a share of at least 0 and less than 1")
    if not 0 <= request.sparsity < 1:
        raise UsageError(f"--prune {request.sparsity}, expected a share of at least 0 and less than 1")


def _check_attached(request: Request) -> None:
    names = [path.name for path in request.attach]
    for path in request.attach:
        if not path.is_file():
            raise UsageError(f"there is no file {path} to attach")
        if path.name in RESERVED or not PLAIN_NAME.match(path.name) or names.count(path.name) > 1:
            raise UsageError(f"{path.name!r} cannot be attached: the name is taken or not plain; rename the file")


def check_postprocess(request: Request, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Raise UsageError when the postprocessing does not fit the model, or names files that are not attached."""
    if request.postprocess is None:
        return
    attached = {path.name: path for path in request.attach}
    absent = [name for name in request.postprocess.files if name not in attached]
    if absent:
        raise UsageError(
            f"the postprocessing names the file {absent[0]!r}, which is not attached; give it with --attach"
        )
    if len(inputs) != 1 or inputs[0].preprocessing is None:
        raise UsageError("--postprocess is about images, but no image becomes the input; give --preprocess as well")
    postprocess.check(request.postprocess, outputs, *read_files(request.postprocess, attached.__getitem__))


def limits(request: Request, target: TargetProfile) -> list[Limit]:
    """The hard limits but those on the score, which depend on the source's own: the user's, else the target's."""
    own = f"target {target.name}"
    found = [
        _stricter("size", "bytes", request.max_size, "--max-size", target.storage_limit_bytes, own),
        _stricter("memory", "bytes", request.max_ram, "--max-ram", target.ram_limit_bytes, own),
    ]
    if request.max_latency is not None:
        found.append(Limit("latency", request.max_latency, "ms", "--max-latency"))
    if request.max_load_time is not None:
        found.append(Limit("load time", request.max_load_time, "ms", "--max-load-time"))
    return found


def _stricter(name: str, unit: str, asked: int | None, option: str, allowed: int, origin: str) -> Limit:
    if asked is not None and asked <= allowed:
        return Limit(name, asked, unit, option)
    return Limit(name, allowed, unit, origin)
