#!/usr/bin/env python3
"""How far the answers of ARM kernels lie from those of this machine, by engine, precision and processor.

    python scripts/device_answers.py --cards FOLDER [--work build/answers] [--board KIND]... [--beside PYTHON] [--docs]

FOLDER has the provisioned card that `scripts/test_device --keep-card FOLDER` keeps. The networks are trained and
packaged the first time, which takes some 20 minutes; each board is asked once and what it answered is kept. ``--board``
asks these alone, and the rest another time. ``--beside``: a Python of this machine with the boards' version of PyTorch,
to tell what another version changes from what another processor does.

The bundles are in scripts/answer_cases.py. They are asked the 500 test digits here, with one thread as the packager
does for the golden answers, and on one emulated board of each kind. This machine has kernels of its own too, by what
its processor can: what was seen from machines that can other things stays in the docs beside it. A question's
``share`` is what golden questions are judged by: the largest absolute difference of an output over the largest value
that it had when it was packaged; of several outputs that which differs most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import answer_cases
import answer_docs
import numpy as np
from answer_cases import ROOT, Case
from answer_docs import BESIDE, HERE
from ask_bundles import BATCH, SINGLE
from lab.boards import KINDS, Board, Lab
from lab.emulator import Emulator
from make_models import split_digits

from edge_infer.bundle import Bundle, open_bundle

ASKER = ROOT / "scripts" / "ask_bundles.py"
PYTHON = ".edge-infer/venv/bin/python"
#: The class that a digit is taken for is told by the output of this width.
CLASSES = 10

Answers = dict[str, np.ndarray]


# -- asking ------------------------------------------------------------------------------------------------------------


class Asked:
    """What one machine answered, an .npz for each engine in ``work/answers``; ``place``: here, beside or a board."""

    def __init__(self, work: Path, place: str) -> None:
        self.work = work
        self.place = place
        (work / "answers").mkdir(exist_ok=True)

    def path(self, format: str) -> Path:
        return self.work / "answers" / f"{self.place}-{format}.npz"

    def facts(self, format: str) -> dict[str, Any]:
        """The engine there, and the bundles that were asked."""
        path = self.path(format).with_suffix(".json")
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return found

    def is_missing(self, format: str) -> bool:
        return self.facts(format).get("bundles") != digests(self.work, format)

    def keep(self, format: str, said: str, **machine: str) -> None:
        engine = json.loads(said.splitlines()[-1])
        facts = {"engine": engine, "bundles": digests(self.work, format), **machine}
        self.path(format).with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")

    def answers(self, format: str) -> Answers:
        with np.load(self.path(format)) as data:
            return {name: data[name] for name in data.files}


def bundles(work: Path, format: str) -> Iterator[tuple[Case, Bundle]]:
    for case in answer_cases.cases():
        path = work / "bundles" / case.file
        if case.format == format and path.exists():
            yield case, open_bundle(path)


def digests(work: Path, format: str) -> dict[str, str]:
    return {case.file: bundle.digest for case, bundle in bundles(work, format)}


def ask_here(work: Path, place: str, python: str, formats: list[str]) -> None:
    """By a Python of this machine."""
    asked = Asked(work, place)
    for format in filter(asked.is_missing, formats):
        print(f"  asking {format} {place}", file=sys.stderr, flush=True)
        command = [python, str(ASKER), str(work / "bundles"), format, str(asked.path(format)), "--threads", "1"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        asked.keep(format, done.stdout, processor=processor_here(), features=features_here())


def ask_board(work: Path, lab: Lab, kind: str, card: Path) -> None:
    """On a board that is made for it: everything there in one stream, one process for each engine."""
    asked = Asked(work, kind)
    formats = [format for format in answer_cases.FORMS if asked.is_missing(format)]
    if not formats:
        return
    board = lab.new_board(kind, f"answers-{kind}", card)
    emulator = Emulator(board)
    try:
        emulator.start()
        emulator.wait()
        packed = subprocess.run(["tar", "-C", str(work), "-cf", "-", "bundles"], check=True, capture_output=True)
        on(board, "tar -xf -", packed.stdout)
        on(board, f"cat > {ASKER.name}", ASKER.read_bytes())
        features = on(board, "grep -m 1 Features /proc/cpuinfo").decode().partition(":")[2].strip()
        for format in formats:
            print(f"  asking {format} on {kind}", file=sys.stderr, flush=True)
            said = on(board, f"{PYTHON} {ASKER.name} bundles {format} answers.npz").decode()
            asked.path(format).write_bytes(on(board, "cat answers.npz"))
            asked.keep(format, said, processor=board.kind.cpu, features=features)
    finally:
        emulator.cut_power()
        board.remove()


def on(board: Board, script: str, given: bytes = b"") -> bytes:
    done = subprocess.run(Emulator(board).ssh("pi", script), input=given, stdout=subprocess.PIPE, check=True)
    return done.stdout


def processor_here() -> str:
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"(?m)^model name\s*: (.*)$", text)
    return found[1] if found else platform.machine()


def features_here() -> str:
    """What engines choose kernels by."""
    found = re.search(r"(?m)^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text())
    flags = found[1].split() if found else []
    return " ".join(flag for flag in flags if re.match(r"avx|fma|f16c|amx|vnni", flag))


# -- comparing ---------------------------------------------------------------------------------------------------------


def host() -> str:
    """What this machine's kernels are chosen by, in a word."""
    features = features_here().split()
    names = {"avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}
    return next((name for feature, name in names.items() if feature in features), platform.machine())


def compared(work: Path, format: str, there: Asked, target: str | None) -> Iterator[tuple[Case, np.ndarray, Any]]:
    """Each bundle that ``target`` gets (None: all) with the share of every question, and what became of classes."""
    here, labels = Asked(work, HERE).answers(format), split_digits()["test"][1]
    answered = there.answers(format)
    for case, bundle in bundles(work, format):
        if target is not None and not answer_cases.asked_of(case, target):
            continue
        largest = bundle.manifest.golden.tolerance
        names = [spec.name for spec in bundle.manifest.outputs]
        pairs = {name: (here[f"{case.file}/{name}"], answered[f"{case.file}/{name}"]) for name in names}
        shares = np.max([share(*pairs[name], largest[name]) for name in names], axis=0)
        classes = next(pair for pair in pairs.values() if pair[0].shape[1:] == (CLASSES,))
        ours, theirs = (answer.argmax(1) for answer in classes)
        counts = {
            "other_class": int((ours != theirs).sum()),
            "right_here": int((ours == labels).sum()),
            "right_there": int((theirs == labels).sum()),
        }
        yield case, shares, counts


def share(here: np.ndarray, there: np.ndarray, largest: float) -> np.ndarray:
    """Of each question: the largest difference over the largest value."""
    assert here.shape == there.shape and np.isfinite(here).all() and np.isfinite(there).all()
    apart = np.abs(here.astype(np.float64) - there.astype(np.float64))
    found: np.ndarray = apart.reshape(len(apart), -1).max(1) / largest
    return found


def rows(work: Path, format: str, there: Asked, target: str | None) -> list[dict[str, Any]]:
    facts, found = there.facts(format), []
    for case, shares, counts in compared(work, format, there, target):
        found.append(
            {
                "network": case.network,
                "format": format,
                "precision": case.precision,
                "place": there.place,
                "host": host(),
                "processor": facts["processor"],
                "version": facts["engine"][1],
                **spread(shares),
                **counts,
                "questions": len(shares),
            }
        )
    return found


def spread(shares: np.ndarray) -> dict[str, float]:
    figures = {"largest": shares.max(), "p99": np.quantile(shares, 0.99), "median": np.median(shares)}
    return {name: float(f"{value:.3g}") for name, value in figures.items()}


def report(work: Path, refused: dict[str, str]) -> dict[str, Any]:
    found, machines = [], {}
    for place in (*KINDS, BESIDE):
        there = Asked(work, place)
        for format in answer_cases.FORMS:
            if there.facts(format) and not there.is_missing(format):
                found += rows(work, format, there, KINDS[place].target if place in KINDS else None)
                machines[place] = {name: there.facts(format)[name] for name in ("processor", "features")}
    here = {format: Asked(work, HERE).facts(format) for format in answer_cases.FORMS}
    machines[f"{HERE}: {host()}"] = {name: here["onnx"][name] for name in ("processor", "features")}
    return {
        "engines": {format: here[format]["engine"] for format in here},
        "machines": machines,
        "single": SINGLE,
        "batch": BATCH,
        "refused": refused,
        "rows": found,
    }


def beside_others(found: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """``found`` with what is ``kept`` from other hosts, unless that is of other engines."""
    if kept.get("engines") != found["engines"]:
        return found
    rows = [row for row in kept["rows"] if row["host"] != host()]
    return {
        **found,
        "machines": {**kept["machines"], **found["machines"]},
        "refused": {**kept["refused"], **found["refused"]},
        "rows": [*rows, *found["rows"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=Path, help="the folder with the provisioned card; without: no board is asked")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "answers", help="what it makes is kept there")
    parser.add_argument("--board", action="append", choices=KINDS, help="ask this one; default: each kind")
    parser.add_argument("--beside", metavar="PYTHON", help="another Python of this machine, for torchscript")
    parser.add_argument("--docs", action="store_true", help="write docs/device-answers.md and docs/device-answers.json")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("EDGE_INFER_CACHE", str(work / "cache"))
    answer_cases.make_networks(work)
    refused = answer_cases.make_bundles(work)
    ask_here(work, HERE, sys.executable, list(answer_cases.FORMS))
    if args.beside:
        ask_here(work, BESIDE, args.beside, ["torchscript"])
    if args.cards:
        card = args.cards / "provisioned.qcow2"
        if not card.is_file():
            raise SystemExit(f"there is no {card}; make it with scripts/test_device --keep-card {args.cards}")
        for kind in args.board or KINDS:
            ask_board(work, Lab(work / "boards"), kind, card)
    facts = ROOT / "docs" / "device-answers.json"
    found = beside_others(report(work, refused), json.loads(facts.read_text()) if facts.is_file() else {})
    text = answer_docs.page(found)
    print(text)
    if args.docs:
        (ROOT / "docs" / "device-answers.md").write_text(text)
        facts.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
