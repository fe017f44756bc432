"""The record of one packaging: plain data that the page, the terminal's table and ``--json`` are made from."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from edge_infer import __version__
from edge_infer.bundle import Bundle
from edge_infer.evaluate.loss import Loss
from edge_infer.evaluate.score import Score
from edge_infer.request import Request
from edge_infer.search import Candidate, Limit, Verdict
from edge_infer.sets import Sets

#: Fields of a request that say nothing when they have these values.
UNSAID: tuple[Any, ...] = (None, False, (), {}, 0.0)
#: What a benchmark measures of a candidate.
MEASURED = (
    "peak_bytes",
    "private_bytes",
    "load_ms",
    "p50_ms",
    "p95_ms",
    "runs",
    "first_look",
    "throttled",
    "temperature_c",
    "emulated",
)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a packaging found out besides its candidates. ``layers`` and ``outputs`` are of the chosen one."""

    kind: str
    hashes: Mapping[str, str]
    source_scores: Mapping[str, Score]
    sets: Sets
    layers: Sequence[Mapping[str, Any]] = ()
    outputs: Sequence[Mapping[str, Any]] = ()
    trials: Sequence[Mapping[str, Any]] = ()


def make_record(
    request: Request,
    candidates: Sequence[Candidate],
    limits: Sequence[Limit],
    verdict: Verdict,
    findings: Findings,
    bundle: Bundle | None,
) -> dict[str, Any]:
    """Everything as JSON can hold it; docs/report.md states the fields."""
    manifest = bundle.manifest if bundle else None
    target = manifest.target.name if manifest else request.target
    return {
        "title": f"{request.model_name} for {target}",
        "made_with": {"edge-infer": __version__, "python": f"{sys.version_info.major}.{sys.version_info.minor}"},
        "request": _request(request, findings.kind),
        "limits": [_limit(limit) for limit in limits],
        "metric": _metric(findings.source_scores),
        "samples": _samples(request, findings.sets),
        "candidates": [_candidate(item, verdict) for item in candidates],
        "chosen": verdict.chosen.id if verdict.chosen else None,
        "nothing_fits": _nothing_fits(verdict),
        "layers": [dict(row) for row in findings.layers],
        "outputs": [{**row, "what": f"{findings.kind} source against the chosen"} for row in findings.outputs],
        "trials": [dict(row) for row in findings.trials],
        "checks": [dataclasses.asdict(check) for check in manifest.checks] if manifest else [],
        "files": [
            {"name": name, "size": entry.size, "sha256": entry.sha256} for name, entry in sorted(manifest.files.items())
        ]
        if manifest
        else [],
        "hashes": {**findings.hashes, **({"bundle": bundle.digest} if bundle else {})},
        "versions": dict(manifest.provenance["tools"]) if manifest else {},
    }


def _request(request: Request, kind: str) -> dict[str, Any]:
    """What was asked, in the words of the options; what was left unsaid is left out."""
    said = {
        item.name: getattr(request, item.name)
        for item in dataclasses.fields(request)
        if item.name
        not in ("source", "output", "inputs", "attach", "preprocess", "postprocess", "ssh_options", "cache", "target")
        and getattr(request, item.name) not in UNSAID
    }
    inputs = [str(spec) for spec in request.inputs]
    attached = [path.name for path in request.attach]
    return {
        "source": request.source.name,
        "kind": kind,
        "target": request.target,
        **{name: value if isinstance(value, (int, float)) else str(value) for name, value in said.items()},
        **({"inputs": ", ".join(inputs)} if inputs else {}),
        **({"attached": ", ".join(attached)} if attached else {}),
    }


def _limit(limit: Limit) -> dict[str, Any]:
    return {"name": limit.name, "allowed": limit.allowed, "unit": limit.unit, "from": limit.origin}


def _metric(scores: Mapping[str, Score]) -> dict[str, Any] | None:
    found = scores.get("holdout") or scores.get("search")
    if found is None:
        return None
    return {
        "name": found.name,
        "kind": found.kind,
        "higher_is_better": found.higher_is_better,
        "unit": "dB" if found.name.endswith("-db") else None,
        # How far the source agrees with itself says nothing.
        "source": None if found.kind == "agreement" else _score(found),
    }


def _score(score: Score | None) -> dict[str, Any] | None:
    if score is None:
        return None
    return {"value": score.value, "low": score.low, "high": score.high, "count": score.count}


def _loss(loss: Loss | None) -> dict[str, Any] | None:
    return None if loss is None else dataclasses.asdict(loss)


def _samples(request: Request, sets: Sets) -> dict[str, Any]:
    judged = request.evaluation if sets.kind == "evaluation" else request.calibration
    rows = {"calibration": (sets.calibration, request.calibration)}
    rows |= {"search": (sets.search, judged), "holdout": (sets.holdout, judged)}
    return {
        name: {"count": len(found), "from": str(origin)} if found else None for name, (found, origin) in rows.items()
    }


def _candidate(item: Candidate, verdict: Verdict) -> dict[str, Any]:
    chosen = verdict.chosen is not None and item.id == verdict.chosen.id
    reason = verdict.reasons.get(item.id)
    made = item.error is None
    return {
        "id": item.id,
        "format": item.format,
        "precision": item.precision,
        "status": "chosen" if chosen else "dropped" if reason else "fits",
        "reason": reason,
        "pareto": item.id in verdict.front,
        "route": list(item.way),
        "size_bytes": item.size if made else None,
        "download_bytes": item.download if made else None,
        **{name: item.measured.get(name) for name in MEASURED},
        "measured_on": item.measured_on or None,
        "search": _score(item.search),
        "holdout": _score(item.holdout),
        "loss": _loss(item.loss),
        "kept_float": {"layers": list(item.kept_float), "share_of_weights": item.kept_share}
        if item.kept_float
        else None,
        "sparsity": item.sparsity,
    }


def _nothing_fits(verdict: Verdict) -> dict[str, Any] | None:
    found = verdict.nothing_fits
    if found is None:
        return None
    return {
        "binding": found.binding.name,
        "nearest": found.nearest.id,
        "observed": found.binding.observed(found.nearest),
        "allowed": found.binding.allowed,
        "relax": found.relax,
    }
