"""What follows from a record: which candidate is shown, what each limit has seen, and the verdict in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_infer.report import units

Record = Mapping[str, Any]

#: The figure of a candidate that a limit is about; a limit may name another in ``figure``.
FIGURES = {"size": "size_bytes", "memory": "peak_bytes", "latency": "p50_ms", "load time": "load_ms"}
#: The limits on figures that are a board's only where they were taken on one.
OF_THE_MACHINE = ("memory", "latency", "load time")


@dataclass(frozen=True)
class Limit:
    """A limit and what the shown candidate has. ``kept`` is None where nothing was measured."""

    name: str
    allowed: float
    observed: float | None
    unit: str
    origin: str
    at_least: bool
    kept: bool | None


@dataclass(frozen=True)
class Verdict:
    """``state`` is chosen, nothing-fits or open; ``headline`` is one sentence, ``more`` those after it."""

    state: str
    headline: str
    more: tuple[str, ...]


def candidate(record: Record, name: Any) -> Record | None:
    """The candidate with this id."""
    return next((item for item in record.get("candidates") or [] if name is not None and item.get("id") == name), None)


def shown(record: Record) -> Record | None:
    """The chosen candidate, or the nearest when nothing fits."""
    return candidate(record, record.get("chosen")) or candidate(
        record, (record.get("nothing_fits") or {}).get("nearest")
    )


def target(record: Record) -> str:
    return str((record.get("request") or {}).get("target") or "the target")


def higher_is_better(record: Record) -> bool:
    metric = record.get("metric") or {}
    return bool(metric.get("higher_is_better", metric.get("kind") != "error"))


def final_score(item: Record | None) -> tuple[Record, str] | None:
    """A candidate's score and the samples it is of: held-out samples before those of the search."""
    for key, samples in (("holdout", "held-out"), ("search", "search")):
        answer = (item or {}).get(key)
        if answer and units.is_number(answer.get("value")):
            return answer, samples
    return None


def limits(record: Record) -> list[Limit]:
    """All limits that state a number, against the shown candidate."""
    item = shown(record)
    stated = [row for row in record.get("limits") or [] if units.is_number(row.get("allowed"))]
    return [_limit(record, row, item) for row in stated]


def _limit(record: Record, row: Record, item: Record | None) -> Limit:
    is_score = row.get("name") == "score"
    at_least = is_score and higher_is_better(record)
    observed = observed_for(row, item)
    kept = None
    if observed is not None:
        kept = observed >= row["allowed"] if at_least else observed <= row["allowed"]
    unit = "score" if is_score else str(row.get("unit") or "")
    return Limit(str(row.get("name")), row["allowed"], observed, unit, str(row.get("from") or ""), at_least, kept)


def observed_for(row: Record, item: Record | None) -> float | None:
    """What a candidate has of a limit's figure."""
    if row.get("name") == "score":  # limits hold on the samples of the search; those held out are only reported
        scores = [(item or {}).get(samples) or {} for samples in ("search", "holdout")]
        return next((score["value"] for score in scores if units.is_number(score.get("value"))), None)
    value = (item or {}).get(row.get("figure") or FIGURES.get(str(row.get("name")), ""))
    return value if units.is_number(value) else None


def quantity(value: Any, unit: str, record: Record) -> str:
    """As units.quantity, and scores as the metric has them."""
    return units.score(value, record.get("metric")) if unit == "score" else units.quantity(value, unit)


def verdict(record: Record) -> Verdict:
    item = candidate(record, record.get("chosen"))
    if item is not None:
        return Verdict("chosen", f"{item['id']} was chosen for {target(record)}.", _why_chosen(record, item))
    nothing = record.get("nothing_fits")
    if nothing:
        return Verdict("nothing-fits", _nothing_fits(record, nothing), _relax(nothing))
    return Verdict("open", f"Nothing was chosen for {target(record)}.", ())


def _why_chosen(record: Record, item: Record) -> tuple[str, ...]:
    sentences = [_sentence(item["reason"])] if item.get("reason") else []
    rows = limits(record)
    over = [row.name for row in rows if row.kept is False]
    unknown = [row.name for row in rows if row.kept is None]
    if over:
        sentences.append(f"It does not keep the limit on {_listed(over)}.")
    elif rows and not unknown:
        every = "the limit" if len(rows) == 1 else f"all {len(rows)} limits"
        sentences.append(f"It keeps {every}.")
    if unknown:
        sentences.append(f"Not measured against a limit: {_listed(unknown)}.")
    if item.get("emulated"):
        sentences.append("Its times and memory are those of an emulated machine.")
    return (*sentences, *_score_sentence(record, item))


def _score_sentence(record: Record, item: Record) -> tuple[str, ...]:
    final = final_score(item)
    if final is None:
        return ()
    metric = record.get("metric") or {}
    answer, samples = final
    of = units.interval(answer, metric)
    text = (
        f"Its {metric.get('name') or 'score'} on {_samples(answer, samples)} is {units.score(answer['value'], metric)}"
    )
    text += f" ({of})" if of else ""
    source = metric.get("source") or {}
    if units.is_number(source.get("value")):
        on = f" on {units.count(source['count'], 'sample')}" if units.is_number(source.get("count")) else ""
        text += f"; the source has {units.score(source['value'], metric)}{on}"
    lost = units.loss(item.get("loss"))
    text += f"; the loss against it is {lost}" if lost else ""
    return (f"{text}.",)


def _samples(answer: Record, samples: str) -> str:
    return units.count(answer.get("count"), f"{samples} sample") if answer.get("count") else f"{samples} samples"


def timing_notes(record: Record) -> list[str]:
    """Sentences on where, how long and under which conditions candidates were timed."""
    items = [item for item in record.get("candidates") or [] if item.get("measured_on")]
    if not items:
        return []
    notes = [f"Time and memory: {'; '.join(sorted({str(item['measured_on']) for item in items}))}."]
    looked = [str(item["id"]) for item in items if item.get("first_look")]
    if looked:
        notes.append(f"A few runs were enough to see that these would not be chosen: {_listed(looked)}.")
    emulators = sorted({str(item["emulated"]) for item in items if item.get("emulated")})
    if emulators:
        notes.append(
            f"That machine is emulated ({'; '.join(emulators)}): its times and memory are no board's. What was dropped "
            "or preferred for them has to be measured on a board."
        )
    slowed = [str(item["id"]) for item in items if item.get("throttled")]
    if slowed:
        notes.append(
            f"The processor was throttled while these were timed: {_listed(slowed)}; cool the machine or mend its "
            "power supply, and measure again."
        )
    return notes


def _nothing_fits(record: Record, nothing: Record) -> str:
    binding = nothing.get("binding")
    row: Record = next((row for row in record.get("limits") or [] if row.get("name") == binding), {})
    unit = "score" if binding == "score" else str(row.get("unit") or "")
    text = f"Nothing fits {target(record)}"
    if not binding:
        return f"{text}."
    text += f": {binding} is the limit that stops it"
    if not (units.is_number(nothing.get("observed")) and units.is_number(nothing.get("allowed"))):
        return f"{text}."
    who = f"the nearest, {nothing['nearest']}, has" if nothing.get("nearest") else "the nearest has"
    at_least = "at least " if binding == "score" and higher_is_better(record) else ""
    mark = " as emulated" if binding in OF_THE_MACHINE and (shown(record) or {}).get("emulated") else ""
    observed, allowed = (quantity(nothing[key], unit, record) for key in ("observed", "allowed"))
    return f"{text}; {who} {observed}{mark}, allowed is {at_least}{allowed}."


def _relax(nothing: Record) -> tuple[str, ...]:
    return (_sentence(nothing["relax"]),) if nothing.get("relax") else ()


def _sentence(text: Any) -> str:
    text = str(text).strip()
    if not text.startswith(("tflite", "onnx", "torchscript")):  # names keep their case
        text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
