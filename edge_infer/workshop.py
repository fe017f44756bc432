"""Make and measure candidates: one model, one target, every step run once.

The packager asks for a candidate by engine and precision; what candidates share (the source's answers, a float model)
is a step that is run for the first and found for the others.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_infer import __version__, convert, measure, quantize
from edge_infer.bundle import Bundle, describe_files, open_bundle
from edge_infer.convert import Converted, Read, Way, spec_to_json
from edge_infer.errors import ConversionError, ConverterMissing, EdgeInferError, LimitError, NotApplicable
from edge_infer.evaluate.loss import Loss
from edge_infer.evaluate.score import Score
from edge_infer.manifest import MANIFEST_NAME, SCHEMA, Artifact, Check, Golden, Manifest, Requirement, SetScore
from edge_infer.probe import Feed, load_feeds
from edge_infer.request import GOLDEN, Request
from edge_infer.runtime.golden import write_golden
from edge_infer.runtime.threads import default_threads
from edge_infer.search import Candidate
from edge_infer.sets import Sets
from edge_infer.steps import Made, Steps
from edge_infer.target import EngineProfile, TargetProfile
from edge_infer.transfer import transfer_size


@dataclass(frozen=True)
class Built:
    """An artifact in one precision, what it answered, and how it scored on each set of samples."""

    converted: Converted
    engine: EngineProfile
    precision: str
    made: Made
    answers: tuple[Feed, ...] = ()
    checks: tuple[Check, ...] = ()
    judged: Made | None = None

    def score(self, name: str) -> Score | None:
        """On the ``search`` or the ``holdout`` set; None where there are no samples."""
        row = self.judged.answer["scores"].get(name) if self.judged else None
        return Score(**row) if row else None

    @property
    def loss(self) -> Loss | None:
        """Against the source on the ``holdout`` set; None where there are no labels, or nothing to compare."""
        row = self.judged.answer["loss"] if self.judged else None
        return Loss(**row) if row else None


class Workshop:
    """Candidates of one request. ``work`` is a scratch folder on the cache's file system."""

    def __init__(self, request: Request, target: TargetProfile, model: Read, sets: Sets, steps: Steps, work: Path):
        self.request, self.target, self.model, self.sets = request, target, model, sets
        self.steps, self.work = steps, work
        self._floats: dict[str, Built | EdgeInferError] = {}
        calibration = model.made.answer["samples"]["calibration"]
        self._calibration = {str(model.made.folder / "calibration"): calibration["sha256"] if calibration else ""}

    # ---- float models

    def float_model(self, engine: EngineProfile) -> Built:
        """The float32 artifact, by the first way whose result computes the same as the source.

        Of a source in the engine's own format that is quantized already, that as it is.

        Raises ConversionError that names each way and why it failed.
        """
        if engine.format not in self._floats:
            self._floats[engine.format] = self._try_ways(engine)
        found = self._floats[engine.format]
        if isinstance(found, EdgeInferError):
            raise found
        return found

    def _try_ways(self, engine: EngineProfile) -> Built | EdgeInferError:
        failures: list[tuple[Way, ConversionError]] = []
        for way in convert.ways(self.model.form, engine.format):
            try:
                converted = convert.convert(self.model, way, self.steps)
                precision = "float32" if way.modules else self.model.precision
                return self._judged(self._build(converted, engine, precision), f"{precision} against the source")
            except ConversionError as error:
                failures.append((way, error))
        return no_way(failures)

    # ---- artifacts

    def artifact(self, engine: EngineProfile, precision: str, keep_float: Sequence[str] = ()) -> Built:
        """An artifact, compared with float32 and scored. Raises ConversionError, ParityError, EngineError."""
        base = self.float_model(engine)
        pruned = self._pruned(base)
        if pruned is not base.converted:
            base = self._judged(self._build(pruned, engine, base.precision), None)
        if precision == base.precision:
            return base
        built = self._build(pruned, engine, precision, keep_float)
        return self._judged(built, f"{precision} against float32", base)

    def _pruned(self, base: Built) -> Converted:
        """The float model with the smallest weights set to zero; the same model when none are to be."""
        if not self.request.sparsity:
            return base.converted
        call = f"{quantize.PRUNERS[base.engine.format]}:prune"
        request = {
            "from": base.converted.details,
            "sparsity": self.request.sparsity,
            "scope": self.request.prune_scope,
        }
        made = self.steps.run(call, request, f"pruning {base.engine.format}", base.converted.identity)
        tools = {**base.converted.tools, **made.answer["tools"]}
        return replace(base.converted, details=made.answer["details"], tools=tools)

    def _build(
        self, converted: Converted, engine: EngineProfile, precision: str, keep_float: Sequence[str] = ()
    ) -> Built:
        call = f"{quantize.BUILDERS[engine.format]}:build"
        request = self._build_request(converted, engine, precision, keep_float)
        kept = f" with {len(keep_float)} layers in float" if keep_float else ""
        title = f"building {engine.format} {precision}{kept}"
        made = self.steps.run(call, request, title, {**converted.identity, **self._calibration})
        return Built(converted, engine, precision, made)

    def _build_request(
        self, converted: Converted, engine: EngineProfile, precision: str, keep_float: Sequence[str]
    ) -> dict[str, Any]:
        # A source that is quantized already needs no samples.
        calibrated = precision in quantize.CALIBRATED and self.sets.calibration
        return {
            "from": converted.details,
            "inputs": [spec_to_json(spec) for spec in self.model.inputs],
            "outputs": [spec_to_json(spec) for spec in self.model.outputs],
            "feeds": str(self.model.made.folder / convert.EXAMPLES_FILE),
            "precision": precision,
            "calibration": {
                "samples": str(self.model.made.folder / "calibration"),
                "indices": list(self.sets.calibration),
                "ranges": self.request.ranges,
            }
            if calibrated
            else None,
            "keep_float": sorted(keep_float),
            "target": {
                "engine": engine.package,
                "architecture": self.target.architecture,
                "cpu_features": list(self.target.cpu_features),
                "page_size_bytes": self.target.page_size_bytes,
            },
        }

    def sensitivity(self, engine: EngineProfile) -> list[dict[str, Any]]:
        """The layers that int8 quantizes, in execution order, with the error that it adds at each."""
        converted = self._pruned(self.float_model(engine))
        call = f"{quantize.BUILDERS[engine.format]}:sensitivity"
        request = self._build_request(converted, engine, "int8", ())
        title = f"measuring what int8 costs each layer of {engine.format}"
        made = self.steps.run(call, request, title, {**converted.identity, **self._calibration})
        layers: list[dict[str, Any]] = made.answer["layers"]
        return layers

    # ---- judgement

    def source_scores(self) -> dict[str, Score]:
        """The source model's own score on each set; empty without samples to judge by."""
        request = measure.scoring(self.request, self.model, self.sets)
        if not request["sets"]:
            return {}
        made = self.steps.run("edge_infer.measure:judge_source", request, "scoring the source model")
        return {name: Score(**row) for name, row in made.answer["scores"].items()}

    def _judged(self, built: Built, what: str | None, base: Built | None = None) -> Built:
        """Run it with the device's own runtime: against the source or ``base``, and on the samples.

        Raises ParityError when it computes something else; with ``what=None`` it may.
        """
        name = f"{built.engine.format} {built.precision}"
        expected = list(base.answers) if base else self.model.answers()
        draft = self.draft(replace(built, answers=tuple(expected)))
        request = {
            "bundle": str(draft.path),
            "feeds": str(self.model.made.folder / convert.INPUTS_FILE),
            **measure.scoring(self.request, self.model, self.sets),
        }
        identity = {str(draft.path): draft.digest}
        made = measure.judged(self.steps, request, f"checking {name}", identity, draft)
        answers = tuple(load_feeds(made.folder / convert.ANSWERS_FILE))
        checks = measure.compare(what, expected, answers, built.precision, same_model=base is None) if what else ()
        return replace(built, answers=answers, checks=(*(base.checks if base else ()), *checks), judged=made)

    def candidate(
        self,
        built: Built,
        order: int,
        promising: Callable[[Candidate], bool],
        keep_float: Sequence[str] = (),
        share: float = 0.0,
    ) -> Candidate:
        """The finished bundle of an artifact, measured; on a device to the end only if it is ``promising``.

        Raises LimitError when the target's engine is too old, and what a device says against the bundle.
        """
        bundle = self.draft(built)
        _check_engine(bundle.manifest.artifact.requires, built.engine, self.target)
        unmeasured = Candidate(
            built.engine.format,
            built.precision,
            order,
            built.converted.way,
            bundle.manifest.size + len(bundle.manifest.to_bytes()),
            transfer_size([bundle.file(name) for name in bundle.manifest.files]),
            search=built.score("search"),
            holdout=built.score("holdout"),
            loss=built.loss,
            checks=built.checks,
            kept_float=tuple(keep_float),
            kept_share=share,
            sparsity=self.request.sparsity,
        )
        measured, where = self._measured(bundle, lambda look: promising(replace(unmeasured, measured=look)))
        return replace(unmeasured, measured=measured, measured_on=where)

    def _measured(self, bundle: Bundle, promising: Callable[[dict[str, Any]], bool]) -> tuple[dict[str, Any], str]:
        artifact = bundle.manifest.artifact
        title = f"measuring {artifact.format} {artifact.precision}"
        if self.request.device:
            self.steps.progress(f"{title} on {self.request.device}")
            measured = measure.bench_on(self.request, bundle, promising)
            return measured, f"{self.request.device}{_emulated(measured)}"
        request = {"bundle": str(bundle.path), "threads": min(self.target.cores, default_threads())}
        identity = {str(bundle.path): f"{bundle.digest} on {platform.node()}"}
        made = self.steps.run("edge_infer.measure:bench", request, title, identity)
        same = platform.machine() == self.target.architecture
        note = "" if same else f", an estimate for {self.target.name}"
        return made.answer, f"this machine ({platform.machine()}){_emulated(made.answer)}{note}"

    # ---- bundles

    def draft(self, built: Built) -> Bundle:
        """A complete bundle in the scratch folder, with the answers known so far as its golden ones."""
        facts = built.made.answer
        feeds = self.model.probe_inputs()
        share = built.engine.golden_tolerance.get(built.precision)
        choice = measure.choose_golden(feeds, built.answers, built.precision, share)
        folder = Path(tempfile.mkdtemp(dir=self.work))
        names = [name for name in (facts["model"], facts["weights"]) if name]
        for name in names:
            os.link(built.made.folder / name, folder / name)
        for path in self.request.attach:
            shutil.copyfile(path, folder / path.name)
        cases = [(feeds[case], built.answers[case]) for case in choice.cases]
        write_golden(folder / GOLDEN, self.model.inputs, self.model.outputs, cases)
        files = [*names, *(path.name for path in self.request.attach), GOLDEN]
        manifest = Manifest(
            schema=SCHEMA,
            name=self.request.model_name,
            version=self.request.version,
            target=self.target.facts(),
            artifact=_artifact(built),
            inputs=self.model.inputs,
            outputs=self.model.outputs,
            golden=Golden(GOLDEN, len(choice.cases), choice.tolerance, choice.blind),
            checks=built.checks,
            files=describe_files(folder, files),
            provenance=self._provenance(built),
            scores=self._set_scores(built),
            postprocessing=self.request.postprocess,
        )
        (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
        return open_bundle(folder)

    def _set_scores(self, built: Built) -> tuple[SetScore, ...]:
        """Rounded: the last digits of a mean may differ between machines, and so would the bundle's digest."""
        sources = self.source_scores()
        found = [(name, built.score(name)) for name in ("search", "holdout")]
        return tuple(
            SetScore(
                samples=name,
                metric=score.name,
                value=_rounded(score.value),
                low=_rounded(score.low),
                high=_rounded(score.high),
                count=score.count,
                source=_rounded(sources[name].value),
            )
            for name, score in found
            if score is not None
        )

    def _provenance(self, built: Built) -> dict[str, Any]:
        source = self.model.source
        return {
            "source": {"file": source.path.name, "kind": source.kind, "sha256": source.sha256},
            "way": list(built.converted.way),
            "samples_sha256": {
                kind: found["sha256"] for kind, found in self.model.made.answer["samples"].items() if found
            },
            "tools": {
                "edge-infer": __version__,
                "python": f"{sys.version_info.major}.{sys.version_info.minor}",
                **built.converted.tools,
                **built.made.answer["tools"],
            },
        }


def _emulated(measured: Mapping[str, Any]) -> str:
    return ", emulated" if measured.get("emulated") else ""


def _rounded(figure: float) -> float:
    return float(f"{figure:.6g}")


def _artifact(built: Built) -> Artifact:
    facts = built.made.answer
    requires = [Requirement(package, version) for package, version in facts["requires"]]
    # The device's own package first: it is the one that error messages tell people to install.
    requires.sort(key=lambda item: item.package != built.engine.package)
    return Artifact(
        format=built.engine.format,
        precision=built.precision,
        model=facts["model"],
        requires=tuple(requires),
        operators=tuple(facts["operators"]),
        providers=built.engine.providers,
        weights=facts["weights"],
        signature=facts["signature"],
        prepack=facts["prepack"],
    )


def _check_engine(requires: Sequence[Requirement], engine: EngineProfile, target: TargetProfile) -> None:
    from edge_infer.runtime.engines import at_least

    own = next((item for item in requires if item.package == engine.package), None)
    if own is None or not at_least(engine.version, own.version):
        needed = own or " or ".join(map(str, requires))
        raise LimitError(
            f"the artifact needs {needed}, {target.name} has {engine.package} {engine.version}; "
            "choose another precision or format, or a target with a newer engine"
        )


def no_way(failures: Sequence[tuple[Way, ConversionError]]) -> ConversionError:
    """One error for all ways that are for this kind of source, each reason once."""
    told: dict[str, tuple[Way, ConversionError]] = {}
    for way, error in failures:
        if not isinstance(error, NotApplicable):
            told.setdefault(str(error), (way, error))
    if len(told) == 1:
        return next(error for _, error in told.values())
    reasons = "; ".join(f"{way} ({way.modules[-1].rpartition('.')[2]}): {words}" for words, (way, _) in told.items())
    errors = [error for _, error in told.values()]
    # Installing what is missing may be all that is needed.
    missing = any(isinstance(error, ConverterMissing) for error in errors)
    kind: Callable[[str], ConversionError] = ConverterMissing if missing else ConversionError
    error = kind(f"no way leads there: {reasons}")
    error.log = next((error.log for error in errors if error.log), "")
    return error
