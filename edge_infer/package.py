"""From a source model to a bundle that computes the same and fits its target."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_infer import __version__, convert, measure, quantize, worker
from edge_infer.bundle import Bundle, describe_files, hash_file, refuse_to_overwrite, write_bundle
from edge_infer.convert import Converted, ConvertOptions
from edge_infer.convert.source import Source, read_source
from edge_infer.errors import ConversionError, EdgeInferError, EngineError, LimitError, UsageError
from edge_infer.manifest import (
    FORMATS,
    MANIFEST_NAME,
    PLAIN_NAME,
    PRECISIONS,
    SCHEMA,
    Artifact,
    Check,
    Golden,
    Manifest,
    Requirement,
    TensorSpec,
)
from edge_infer.probe import Feed
from edge_infer.runtime.golden import write_golden
from edge_infer.runtime.threads import default_threads
from edge_infer.store import is_model_name
from edge_infer.target import EngineProfile, TargetProfile, read_target

GOLDEN = "golden.npz"


@dataclass(frozen=True)
class Request:
    """What to package and how; the defaults are the command line's.

    ``target`` is a profile's name or a ``.toml`` file. ``inputs`` gives or overrides the source's inputs.
    ``calibration`` is an ``.npz`` with samples along the first axis of one array an input.
    """

    source: Path
    target: str
    output: Path
    format: str = "auto"
    precision: str = "auto"
    calibration: Path | None = None
    inputs: tuple[TensorSpec, ...] = ()
    factory: str | None = None
    signature: str | None = None
    trust_pickle: bool = False
    name: str | None = None
    version: str = "1"
    attach: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One artifact that was tried. ``error`` says why it was dropped; ``measured`` is of this machine."""

    format: str
    precision: str
    size: int | None = None
    checks: tuple[Check, ...] = ()
    measured: dict[str, Any] = field(default_factory=dict)
    error: EdgeInferError | None = None


@dataclass(frozen=True)
class Packaged:
    """The bundle written, the candidate it is, and those dropped on the way."""

    bundle: Bundle
    chosen: Candidate
    dropped: tuple[Candidate, ...]


Progress = Callable[[str], None]


def package(request: Request, progress: Progress = lambda step: None, log: Path | None = None) -> Packaged:
    """Package a model.

    With ``auto`` the target's engines and precisions are tried in its order of preference, and the first artifact
    that passes its checks and the target's limits is taken. ``progress`` is told each step; the converters'
    output goes to ``log``.

    Raises UsageError (the request), ConversionError and ParityError (the converters), LimitError (nothing fits).
    On any error nothing is left behind, and an older bundle at ``output`` stays.
    """
    target = read_target(request.target)
    _check_request(request)
    source = read_source(request.source)
    plan = _plan(request, target, source)
    with tempfile.TemporaryDirectory(prefix="edge-infer-package-") as folder:
        work = Path(folder)
        packaging = _Packaging(request, target, source, work, log or work / "log.txt", progress)
        return packaging.first_that_fits(plan)


def _check_request(request: Request) -> None:
    for value, known, option in (
        (request.format, FORMATS, "--format"),
        (request.precision, PRECISIONS, "--precision"),
    ):
        if value not in ("auto", *known):
            raise UsageError(f"{option} {value} is not known, expected auto, {', '.join(known)}")
    if not is_model_name(_name(request)):
        raise UsageError(f"{_name(request)!r} cannot name a model; give --name with letters, digits and ._+- only")
    if not PLAIN_NAME.match(request.version):
        raise UsageError(f"--version {request.version!r}, expected letters, digits and ._+- only")
    if request.calibration is not None and not request.calibration.is_file():
        raise UsageError(f"there is no calibration file {request.calibration}")
    if request.precision in quantize.CALIBRATED and request.calibration is None:
        raise UsageError(f"--precision {request.precision} needs real samples; give them with --calibration FILE.npz")
    if len({spec.name for spec in request.inputs}) != len(request.inputs):
        raise UsageError("--input names the same input twice")
    reserved = {MANIFEST_NAME, GOLDEN, "model.tflite", "model.onnx", "model.torchscript", "weights.bin"}
    names = [path.name for path in request.attach]
    for path in request.attach:
        if not path.is_file():
            raise UsageError(f"there is no file {path} to attach")
        if path.name in reserved or not PLAIN_NAME.match(path.name) or names.count(path.name) > 1:
            raise UsageError(f"{path.name!r} cannot be attached: the name is taken or not plain; rename the file")
    refuse_to_overwrite(request.output)


def _name(request: Request) -> str:
    return request.name or request.output.name.removesuffix(".edge")


def _plan(request: Request, target: TargetProfile, source: Source) -> list[tuple[EngineProfile, str]]:
    """Engine and precision pairs to try, in order. Raises UsageError when a named one is not to be had."""
    reachable = convert.formats_for(source)
    if request.format == "auto":
        engines = [engine for engine in target.engines if engine.format in reachable]
        if not engines:
            raise UsageError(
                f"{target.name} runs {', '.join(engine.format for engine in target.engines)}, and {source.kind} models "
                f"become {', '.join(reachable)} only; choose another target or export the model differently"
            )
    else:
        engines = [target.engine(request.format)]
    plan = []
    for engine in engines:
        precisions = engine.precisions if request.precision == "auto" else (request.precision,)
        for precision in precisions:
            usable = precision in quantize.PRECISIONS[engine.format]
            calibrated = precision not in quantize.CALIBRATED or request.calibration is not None
            if usable and calibrated:
                plan.append((engine, precision))
    if not plan:
        raise UsageError(
            f"{request.format if request.format != 'auto' else engines[0].format} has no {request.precision} here; "
            f"it has: {', '.join(quantize.PRECISIONS[engines[0].format])}"
        )
    return plan


@dataclass
class _Built:
    """An artifact in one precision with its answers to the probe inputs."""

    folder: Path
    facts: dict[str, Any]
    answers: list[Feed]
    checks: tuple[Check, ...]


class _Packaging:
    """One run: what was converted and built so far, so that candidates share it."""

    def __init__(
        self, request: Request, target: TargetProfile, source: Source, work: Path, log: Path, progress: Progress
    ) -> None:
        self.request, self.target, self.source = request, target, source
        self.work, self.log, self.progress = work, log, progress
        self._results: dict[tuple[str, ...], Any] = {}

    def first_that_fits(self, plan: Sequence[tuple[EngineProfile, str]]) -> Packaged:
        dropped: list[Candidate] = []
        for engine, precision in plan:
            try:
                draft, candidate = self._candidate(engine, precision)
            except (ConversionError, EngineError, LimitError) as error:
                if len(plan) == 1:
                    raise
                dropped.append(Candidate(engine.format, precision, error=error))
                continue
            bundle = write_bundle(draft.manifest, draft.path, self.request.output)
            return Packaged(bundle, candidate, tuple(dropped))
        raise _nothing_fits(self.target, dropped)

    def _candidate(self, engine: EngineProfile, precision: str) -> tuple[Bundle, Candidate]:
        built = self._build(engine.format, precision)
        bundle = self._bundle(built, engine, precision)
        # Here and not where artifacts are made: float32 is also built to compare with, whatever engine it needs.
        _check_engine(bundle.manifest.artifact.requires[0], engine, self.target)
        _check_size(bundle.manifest, self.target)
        self.progress(f"measuring {engine.format} {precision}")
        measured = measure.bench(bundle, min(self.target.cores, default_threads()), self.work)
        _check_memory(measured, self.target)
        size = bundle.manifest.size
        return bundle, Candidate(engine.format, precision, size, bundle.manifest.checks, measured)

    def _once(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        """What ``make`` gives, or the error it raised, remembered: candidates share conversions."""
        if key not in self._results:
            try:
                self._results[key] = make()
            except (ConversionError, EngineError) as error:
                self._results[key] = error
        result = self._results[key]
        if isinstance(result, EdgeInferError):
            raise result
        return result

    def _convert(self, format: str) -> Converted:
        def make() -> Converted:
            self.progress(f"converting {self.source.path.name} to {format}")
            calibration = self.request.calibration
            options = ConvertOptions(
                self.request.inputs,
                self.request.factory,
                self.request.signature,
                self.request.trust_pickle,
                calibration.resolve() if calibration else None,
            )
            return convert.convert(self.source, format, options, self.work / format, self.log)

        converted: Converted = self._once(("convert", format), make)
        return converted

    def _build(self, format: str, precision: str) -> _Built:
        built: _Built = self._once(("build", format, precision), lambda: self._build_checked(format, precision))
        return built

    def _build_checked(self, format: str, precision: str) -> _Built:
        """Make and check an artifact: float32 against the source, any other precision against float32."""
        converted = self._convert(format)
        base = None if precision == "float32" else self._build(format, "float32")
        self.progress(f"building {format} {precision}")
        folder = self.work / format / precision
        folder.mkdir()
        request = self._build_request(converted, precision, folder)
        facts = worker.run(f"{quantize.BUILDERS[format]}:build", request, self.log)
        self.progress(f"checking {format} {precision}")
        expected = base.answers if base else converted.source_answers()
        built = _Built(folder, facts, expected, ())
        draft = self._bundle(built, self.target.engine(format), precision)
        built.answers = measure.answers(draft, converted.work / convert.INPUTS_FILE, folder, self.log)
        what = f"{precision} against float32" if base else "float32 against the source"
        built.checks = (*(base.checks if base else ()), *measure.compare(what, expected, built.answers, precision))
        return built

    def _build_request(self, converted: Converted, precision: str, folder: Path) -> dict[str, Any]:
        return {
            "work": str(converted.work),
            "out": str(folder),
            "details": converted.details,
            "inputs": [convert.spec_to_json(spec) for spec in converted.inputs],
            "precision": precision,
            "calibration": str(self.request.calibration.resolve()) if self.request.calibration else None,
            "page_size_bytes": self.target.page_size_bytes,
            "architecture": self.target.architecture,
            "cpu_features": list(self.target.cpu_features),
        }

    def _bundle(self, built: _Built, engine: EngineProfile, precision: str) -> Bundle:
        """A complete bundle in the work folder, with the answers known so far as its golden ones."""
        converted = self._convert(engine.format)
        feeds = converted.probe_inputs()
        choice = measure.choose_golden(feeds, built.answers, precision)
        files = {name: built.folder / name for name in (built.facts["model"], built.facts["weights"]) if name}
        files |= {path.name: path for path in self.request.attach}
        folder = Path(tempfile.mkdtemp(dir=self.work))
        for name, path in files.items():
            shutil.copyfile(path, folder / name)
        cases = [(feeds[case], built.answers[case]) for case in choice.cases]
        write_golden(folder / GOLDEN, converted.inputs, converted.outputs, cases)
        manifest = Manifest(
            schema=SCHEMA,
            name=_name(self.request),
            version=self.request.version,
            target=self.target.facts(),
            artifact=self._artifact(built, engine, precision),
            inputs=converted.inputs,
            outputs=converted.outputs,
            golden=Golden(GOLDEN, len(choice.cases), choice.tolerance, choice.blind),
            checks=built.checks,
            files=describe_files(folder, [*files, GOLDEN]),
            provenance=self._provenance(converted, built),
        )
        return write_bundle(manifest, folder, folder / "bundle")

    def _artifact(self, built: _Built, engine: EngineProfile, precision: str) -> Artifact:
        facts = built.facts
        requires = [Requirement(package, version) for package, version in facts["requires"]]
        # The device's own package first: it is the one that error messages tell people to install.
        requires.sort(key=lambda item: item.package != engine.package)
        return Artifact(
            format=engine.format,
            precision=precision,
            model=facts["model"],
            requires=tuple(requires),
            operators=tuple(facts["operators"]),
            providers=engine.providers,
            weights=facts["weights"],
            signature=facts["signature"],
            prepack=facts["prepack"],
        )

    def _provenance(self, converted: Converted, built: _Built) -> dict[str, Any]:
        calibration = self.request.calibration
        return {
            "source": {"file": self.source.path.name, "kind": self.source.kind, "sha256": self.source.sha256},
            "calibration_sha256": hash_file(calibration.resolve()) if calibration else None,
            "tools": {
                "edge-infer": __version__,
                "python": f"{sys.version_info.major}.{sys.version_info.minor}",
                **converted.details["tools"],
                **built.facts["tools"],
            },
        }


def _check_engine(requirement: Requirement, engine: EngineProfile, target: TargetProfile) -> None:
    from edge_infer.runtime.engines import at_least

    if requirement.package == engine.package and not at_least(engine.version, requirement.version):
        raise LimitError(
            f"the artifact needs {requirement}, {target.name} has {engine.package} {engine.version}; "
            "choose another precision or format, or a target with a newer engine"
        )


def _check_size(manifest: Manifest, target: TargetProfile) -> None:
    size = manifest.size + len(manifest.to_bytes())
    if size > target.storage_limit_bytes:
        raise LimitError(
            f"the {manifest.artifact.precision} bundle has {size:,} bytes, {target.name} allows "
            f"{target.storage_limit_bytes:,} ({target.model_storage_share:.0%} of its storage); "
            "choose a smaller precision or another target"
        )


def _check_memory(measured: dict[str, Any], target: TargetProfile) -> None:
    if measured["peak_bytes"] > target.ram_limit_bytes:
        raise LimitError(
            f"running it took {measured['peak_bytes']:,} bytes of memory at its peak (engine included, measured here), "
            f"{target.name} allows {target.ram_limit_bytes:,} ({target.model_ram_share:.0%} of its memory); "
            "choose a smaller precision, another format or another target"
        )


def _nothing_fits(target: TargetProfile, dropped: Sequence[Candidate]) -> EdgeInferError:
    """The error for a plan of which nothing was left: a limit when one was the reason, else the conversions."""
    if len({str(item.error) for item in dropped}) == 1 and dropped[0].error:
        return dropped[0].error  # the source cannot even be read
    reasons = "; ".join(f"{item.format} {item.precision}: {item.error}" for item in dropped)
    limited = any(isinstance(item.error, LimitError) for item in dropped)
    if limited:
        return LimitError(f"nothing fits {target.name}: {reasons}")
    logs = [item.error.log for item in dropped if isinstance(item.error, ConversionError)]
    log = next((log for log in reversed(logs) if log), "")
    return ConversionError(f"no conversion for {target.name} succeeded: {reasons}", log)
