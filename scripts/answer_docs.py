"""The page docs/device-answers.md: what scripts/device_answers.py found, and the tolerances that follow from it."""

from __future__ import annotations

from typing import Any

import numpy as np
from answer_rule import LEAST, LEAST_OF_OTHERS, MARGIN, Row, figure, largest, measured
from pages import markdown

from edge_infer.measure import TOLERANCES
from edge_infer.target import read_target

Report = dict[str, Any]
HERE, BESIDE = "here", "beside"
ENGINES = {"tflite": "LiteRT", "onnx": "ONNX Runtime", "torchscript": "PyTorch"}


def page(report: Report) -> str:
    parts = (head(report), differences(report), tolerances(report), silicon())
    return "\n".join(line for part in parts for line in part)


def head(report: Report) -> list[str]:
    engines = ", ".join(f"{ENGINES[format]} {engine[1]}" for format, engine in report["engines"].items())
    hosts = len({row["host"] for row in report["rows"]})
    networks = list(dict.fromkeys(row["network"] for row in report["rows"]))
    return [
        "# Answers of ARM kernels",
        "",
        "Made by `python scripts/device_answers.py --docs`, which says what is measured: how far a bundle's answers on",
        "a board may lie from those of the machine that packages although nothing is wrong.",
        "",
        f"Here: {engines}. What the boards have is in the table of the differences.",
        *(["Here was more than one machine; each trained the networks anew."] if hosts > 1 else []),
        "",
        *markdown(
            ["machine", "processor", "what engines choose kernels by"],
            [[place, row["processor"], row["features"]] for place, row in report["machines"].items()],
        ),
        "",
        f"Networks: {', '.join(networks)}. The first {report['single']} questions were asked one by one, the others "
        f"{report['batch']} at once.",
        *(f"Not made: {name}: {reason}." for name, reason in report["refused"].items()),
        "",
    ]


def differences(report: Report) -> list[str]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in report["rows"]:
        key = tuple(row[name] for name in ("format", "precision", "place", "version"))
        groups.setdefault(key, []).append(row)
    columns = ["engine", "precision", "machine", "version", "largest>", "99 %>", "median>", "network", "here"]
    return [
        "## Differences",
        "",
        "Shares of an output's largest value: the largest of all questions, networks and machines here, and of those",
        "that it was seen with, what 99 % of the questions and half of them stay below. Then how many of all answers",
        "fell to another class, and how many were right.",
        "",
        *markdown([*columns, "other class>", "right here>", "right there>"], [line(*item) for item in groups.items()]),
        "",
    ]


def line(key: tuple[str, ...], rows: list[Row]) -> list[str]:
    worst = max(rows, key=lambda row: float(row["largest"]))
    asked = sum(row["questions"] for row in rows)
    right = (f"{sum(row[name] for row in rows) / asked:.2%}" for name in ("right_here", "right_there"))
    figures = (scientific(worst[name]) for name in ("largest", "p99", "median"))
    other = f"{sum(row['other_class'] for row in rows)} of {asked:,}"
    return [ENGINES[key[0]], *key[1:], *figures, worst["network"], worst["host"], other, *right]


def tolerances(report: Report) -> list[str]:
    rows = []
    for name in measured(report["rows"]):
        for engine in read_target(name).engines:
            for precision in engine.precisions:
                seen = largest(report["rows"], engine.format, precision, name)
                if seen is not None:
                    usual = TOLERANCES[precision].golden
                    own = engine.golden_tolerance.get(precision, usual)
                    figures = [scientific(seen), *(f"{value:g}" for value in (usual, figure(seen, precision), own))]
                    rows.append([name, ENGINES[engine.format], precision, *figures])
    return [
        "## Tolerances",
        "",
        f"The largest share seen, {MARGIN} times, rounded up to one digit: of float16 on the processor of the target,",
        "of the others on any board, for a reason that `scripts/answer_rule.py` gives; at least",
        f"{', '.join(f'{least:g} ({kind})' for kind, least in LEAST.items())} and {LEAST_OF_OTHERS:g} for the others.",
        "",
        *markdown(["target", "engine", "precision", "largest>", "usual>", "by the rule>", "allowed>"], rows),
        "",
    ]


def silicon() -> list[str]:
    return [
        "## What an emulated board shows of a real one",
        "",
        "QEMU computes integers and IEEE floats bit by bit as the processor does, so the differences are those of the",
        "kernels that an engine chooses for it. Engines choose them by the features that the processor tells, which",
        "are those of the real one, and some by its name or by the sizes of its caches, which an emulated board may",
        "not tell. Its number of cores is two, where a Raspberry Pi has four. What a driver, a firmware or an",
        "overclocked processor does is not seen here. Another version of an engine has other kernels.",
        "",
    ]


def scientific(value: float) -> str:
    return f"{value:.1e}" if np.any(value) else "0"
