"""From a source model to the bundle that fits its target best, with the evidence."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_infer import convert, quantize, steps
from edge_infer.bundle import Bundle, replace_file, write_bundle
from edge_infer.convert import ReadOptions
from edge_infer.convert.source import Source, read_source
from edge_infer.errors import (
    ConversionError,
    EdgeInferError,
    EngineError,
    EngineMissing,
    LimitError,
    ParityError,
    UsageError,
)
from edge_infer.evaluate.judge import WITHOUT_LABELS
from edge_infer.evaluate.loss import allowed
from edge_infer.evaluate.score import Score
from edge_infer.quantize import mixed
from edge_infer.report import html
from edge_infer.report.record import Findings, make_record
from edge_infer.request import Request, check_postprocess, check_request, limits
from edge_infer.search import Candidate, Limit, Verdict, decide, promising
from edge_infer.sets import Sets, choose_sets
from edge_infer.steps import Steps
from edge_infer.target import EngineProfile, TargetProfile, read_target
from edge_infer.workshop import Built, Workshop

Plan = list[tuple[EngineProfile, str]]
#: Artifacts that the search for mixed precision may build and run.
MIXED_BUDGET = 32
#: Smaller constants are no weights: shapes, axes, scales.
SMALLEST_LAYER_BYTES = 64
#: Precisions whose report shows what quantization costs each layer.
MEASURED_LAYERS = ("int8", "int8-mixed")


@dataclass(frozen=True)
class Packaged:
    """The bundle written, the candidate it is, all candidates with the verdict on them, the record and its page."""

    bundle: Bundle
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    verdict: Verdict
    record: dict[str, Any]
    report: Path

    @property
    def dropped(self) -> tuple[Candidate, ...]:
        """Those that did not fit."""
        return tuple(item for item in self.candidates if item.id in self.verdict.reasons)


Progress = Callable[[str], None]


def package(request: Request, progress: Progress = lambda step: None, log: Path | None = None) -> Packaged:
    """Package a model.

    Every engine and precision asked for (with ``auto``: all that the target lists) is made, run with the device's own
    runtime and measured; of those within the limits the preferred one becomes the bundle, and a report lies beside it.
    ``progress`` is told each step; the converters' output goes to ``log``.

    Raises UsageError (the request), ConversionError and ParityError (the converters), LimitError (nothing fits).
    On any error no bundle is left behind, and an older one at ``output`` stays.
    """
    target = read_target(request.target)
    check_request(request)
    source = read_source(request.source)
    plan = _plan(request, target, source)
    with _cache(request) as root, tempfile.TemporaryDirectory(prefix=".", dir=root) as scratch:
        run = Steps(root, log or Path(scratch) / "log.txt", progress)
        try:
            packaged = _Packaging(request, target, source, run, Path(scratch)).package(plan)
        finally:
            steps.trim(root, steps.MAX_BYTES, run.used)
    return packaged


@contextmanager
def _cache(request: Request) -> Iterator[Path]:
    if request.cache:
        root = steps.cache_root()
        root.mkdir(parents=True, exist_ok=True)
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="edge-infer-") as folder:
        yield Path(folder)


def _plan(request: Request, target: TargetProfile, source: Source) -> Plan:
    """Engine and precision pairs to try, in the target's order. Raises UsageError when a named one is not to be had."""
    reachable = convert.formats_for(source)
    if request.format == "auto":
        engines = [engine for engine in target.engines if engine.format in reachable]
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


class _Packaging:
    """One run: the source that was read, the candidates so far, the artifacts behind them."""

    def __init__(self, request: Request, target: TargetProfile, source: Source, run: Steps, scratch: Path) -> None:
        self.request, self.target = request, target
        calibration = _data(request.calibration)
        evaluation = _data(request.evaluation)
        options = ReadOptions(
            request.inputs,
            request.preprocess,
            request.factory,
            request.signature,
            request.trust_pickle,
            calibration,
            evaluation,
            request.metric not in WITHOUT_LABELS,
        )
        self.model = convert.read(source, options, run)
        check_postprocess(request, self.model.inputs, self.model.outputs)
        self.sets: Sets = choose_sets(
            self.model.samples("calibration"), self.model.samples("evaluation"), self.model.made.answer["samples"]
        )
        self.shop = Workshop(request, target, self.model, self.sets, run, scratch)
        self.limits = [*limits(request, target), *self._score_limits()]
        self.candidates: list[Candidate] = []
        self.built: dict[str, Built] = {}
        self.trials: dict[str, Sequence[dict[str, Any]]] = {}

    def package(self, plan: Plan) -> Packaged:
        plan = self._as_it_is(plan)
        for order, (engine, precision) in enumerate(plan):
            # A place between this one and the next is for the mixed precision that may stand in for int8.
            tried = self._try(engine, precision, 2 * order)
            if precision == "int8" and self.request.precision == "auto" and self._asks_for_mixed(tried):
                self._try(engine, "int8-mixed", 2 * order + 1)
        verdict = decide(self.candidates, self.limits, self.request.prefer)
        if verdict.chosen is None:
            raise self._nothing_fits(verdict)
        chosen = verdict.chosen
        draft = self.shop.draft(self.built[chosen.id])
        findings = self._findings(self.built[chosen.id], chosen)
        bundle = write_bundle(draft.manifest, draft.path, self.request.output)
        record = make_record(self.request, self.candidates, self.limits, verdict, findings, bundle)
        report = report_path(self.request.output)
        replace_file(report, html.render(record).encode(), durable=False)
        return Packaged(bundle, chosen, tuple(self.candidates), verdict, record, report)

    def _as_it_is(self, plan: Plan) -> Plan:
        """A source in the target's format that is quantized already is tried in its own precision and no other."""
        own, format = self.model.precision, self.model.form
        if own == "float32" or self.request.precision != "auto":
            return plan
        kept = [pair for pair in plan if pair[0].format != format]
        return [(self.target.engine(format), own), *kept] if len(kept) < len(plan) else plan

    def _findings(self, built: Built, chosen: Candidate) -> Findings:
        """What the report says of the chosen artifact besides its figures."""
        source = self.model.source
        samples = self.model.made.answer["samples"]
        return Findings(
            kind=source.kind,
            hashes={"source": source.sha256, **{kind: row["sha256"] for kind, row in samples.items() if row}},
            source_scores=self.shop.source_scores(),
            sets=self.sets,
            layers=self._layers(built, chosen),
            outputs=built.judged.answer["outputs"] if built.judged else (),
            trials=self.trials.get(chosen.id, ()),
        )

    def _layers(self, built: Built, chosen: Candidate) -> list[dict[str, Any]]:
        """Size by layer, and for int8 what it costs each. Empty for engines that do not tell."""
        stored = _stored(built)
        rows: list[dict[str, Any]] = []
        measured = chosen.precision in MEASURED_LAYERS and self.model.precision == "float32"
        if measured and built.engine.format in quantize.SENSITIVE:
            with suppress(ConversionError):  # evidence that cannot be had is missing from the report, no more
                rows = self.shop.sensitivity(built.engine)
        if rows:
            kept = set(chosen.kept_float)
            return [{**row, "stored_bytes": stored.get(row["name"]), "kept_float": row["name"] in kept} for row in rows]
        base = self.shop.float_model(built.engine)
        floats = _stored(base) if base.precision == "float32" else {}
        return [
            {**row, "bytes": floats.get(row["name"])}
            for row in built.made.answer.get("layers", ())
            if row["stored_bytes"] >= SMALLEST_LAYER_BYTES
        ]

    def _try(self, engine: EngineProfile, precision: str, order: int) -> Candidate:
        try:
            kept, share = self._mixed(engine) if precision == "int8-mixed" else ((), 0.0)
            built = self.shop.artifact(engine, precision, kept)
            candidate = self.shop.candidate(built, order, self._promising, kept, share)
            self.built[candidate.id] = built
        except (ConversionError, EngineError, EngineMissing, LimitError) as error:
            candidate = Candidate(engine.format, precision, order, error=error)
        self.candidates.append(candidate)
        return candidate

    def _promising(self, looked: Candidate) -> bool:
        return promising(looked, self.candidates, self.limits, self.request.prefer)

    # ---- the score

    def _score_limits(self) -> list[Limit]:
        """The floor (for errors: the ceiling) of the score: the user's own, and what may be lost of the source's."""
        source = self.shop.source_scores().get("search")
        if source is None:
            return []
        found = []
        if self.request.min_score is not None:
            found.append(_score_limit(source, self.request.min_score, "--min-accuracy"))
        drop = self.target.max_accuracy_drop if self.request.max_drop is None else self.request.max_drop
        origin = f"target {self.target.name}" if self.request.max_drop is None else "--max-accuracy-drop"
        found.append(_score_limit(source, allowed(source, drop), f"{origin}: a loss of {drop:.2%}"))
        return found

    def _asks_for_mixed(self, candidate: Candidate) -> bool:
        """Whether int8 computes something else, or too badly, and there is a score that says what is good enough."""
        scored = [limit for limit in self.limits if limit.name == "score"]
        bad = isinstance(candidate.error, ParityError) or any(limit.excess(candidate) > 0 for limit in scored)
        return bool(scored) and bad and "int8-mixed" in quantize.PRECISIONS[candidate.format]

    # ---- mixed precision

    def _mixed(self, engine: EngineProfile) -> tuple[tuple[str, ...], float]:
        """The layers to keep in float so that the score's limits are met, and their share of the weights' bytes."""
        wanted = [limit for limit in self.limits if limit.name == "score"]
        if not wanted:
            raise UsageError("--precision int8-mixed needs samples to judge by; give --calibration or --evaluate")
        strictest = max(wanted, key=lambda limit: limit.allowed if limit.least else -limit.allowed)
        sign = 1.0 if strictest.least else -1.0

        layers = [mixed.Layer(**row) for row in self.shop.sensitivity(engine)]

        def score(keep: frozenset[str]) -> float:
            # With every layer in float it is float32, which builders refuse to call int8.
            whole = len(keep) == len(layers)
            built = self.shop.artifact(engine, *(("float32",) if whole else ("int8-mixed", sorted(keep))))
            found = built.score("search")
            assert found is not None  # there are limits on it, so it is measured
            return sign * found.value

        found = mixed.search(layers, score, sign * strictest.allowed, MIXED_BUDGET)
        self.trials[f"{engine.format} int8-mixed"] = [asdict(trial) for trial in found.trials]
        if found.bytes_share == 1:
            raise ConversionError("int8 costs too much in every layer that has weights; float32 is what is left")
        return found.keep_float, found.bytes_share

    # ---- when nothing fits

    def _nothing_fits(self, verdict: Verdict) -> EdgeInferError:
        if verdict.nothing_fits is None:
            return self._nothing_measured([item.error for item in self.candidates if item.error])
        found = verdict.nothing_fits
        error = LimitError(
            f"nothing fits {self.target.name}: nearest is {found.nearest.id}, whose "
            f"{verdict.reasons[found.nearest.id]}; {found.relax}"
        )
        findings = self._findings(self.built[found.nearest.id], found.nearest)
        error.record = make_record(self.request, self.candidates, self.limits, verdict, findings, None)
        return error

    def _nothing_measured(self, errors: Sequence[EdgeInferError]) -> EdgeInferError:
        """The error for a plan of which nothing was made: a limit when one was the reason, else the conversions."""
        if len({str(error) for error in errors}) == 1:
            return errors[0]
        by_reason: dict[str, list[str]] = {}
        for item in self.candidates:
            by_reason.setdefault(str(item.error), []).append(item.id)
        reasons = "; ".join(f"{', '.join(ids)}: {reason}" for reason, ids in by_reason.items())
        if any(isinstance(error, LimitError) for error in errors):
            return LimitError(f"nothing fits {self.target.name}: {reasons}")
        if all(isinstance(error, EngineMissing) for error in errors):
            return EngineMissing(reasons)
        log = next((error.log for error in errors if isinstance(error, ConversionError) and error.log), "")
        return ConversionError(f"no conversion for {self.target.name} succeeded: {reasons}", log)


def _stored(built: Built) -> dict[str, int]:
    """The bytes of weights by layer."""
    return {row["name"]: row["stored_bytes"] for row in built.made.answer.get("layers", ())}


def _score_limit(source: Score, allowed: float, origin: str) -> Limit:
    return Limit("score", allowed, source.name, origin, least=source.higher_is_better)


def report_path(output: Path) -> Path:
    """The report lies beside the bundle: ``digits.report.html`` for ``digits.edge``."""
    return output.with_name(f"{output.name.removesuffix('.edge')}.report.html")


def _data(where: str | Path | None) -> str | None:
    """Files by their full path, as children may run elsewhere; a callable stays as it is."""
    if where is None:
        return None
    path = Path(where)
    return str(path.resolve()) if path.exists() else str(where)
