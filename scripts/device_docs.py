"""Put what scripts/test_device saw (build/device-lab/*.json) into docs/device-lab.json and the tables of its page.

python scripts/device_docs.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pages import between, markdown

ROOT = Path(__file__).resolve().parent.parent
SEEN = ROOT / "build" / "device-lab"
PAGE, FACTS = ROOT / "docs" / "device-lab.md", ROOT / "docs" / "device-lab.json"

Cases = Mapping[str, Mapping[str, Any]]


def main() -> None:
    seen = {path.stem: json.loads(path.read_text()) for path in sorted(SEEN.glob("*.json"))}
    page = PAGE.read_text("utf-8")
    wanted = re.findall(r"^<!-- (\w+) -->$", page, re.MULTILINE)
    if absent := sorted(set(wanted) - set(seen)):
        raise SystemExit(f"{SEEN} has nothing of {', '.join(absent)}; run scripts/test_device first, all of it")
    FACTS.write_text(json.dumps({name: seen[name] for name in wanted}, indent=1, sort_keys=True) + "\n")
    for name in wanted:
        page = between(page, name, TABLES.get(name, plain)(seen[name]))
    PAGE.write_text(page, "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)


def plain(cases: Cases) -> list[str]:
    """A row for each case, a column for each fact."""
    columns = list(dict.fromkeys(name for facts in cases.values() for name in facts))
    rows = [[case, *(_said(facts.get(name, "")) for name in columns)] for case, facts in cases.items()]
    return markdown(["case", *(f"{name.replace('_', ' ')}>" for name in columns)], rows)


def _said(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def boards(cases: Cases) -> list[str]:
    emulators = sorted({facts["emulator"] for facts in cases.values()})
    rows = [
        [
            f"`{name}`",
            facts["cpu"],
            str(facts["cores"]),
            f"{facts['memory'] >> 20} MiB",
            facts["pages"],
            facts["kernel"],
        ]
        for name, facts in cases.items()
    ]
    columns = ["board", "processor", "cores>", "memory>", "pages>", "Linux"]
    return [*markdown(columns, rows), "", f"{', '.join(emulators)}."]


def tests(cases: Cases) -> list[str]:
    """A row for each file of tests, and one for all."""
    rows = [[f"`{name}.py`", str(facts["passed"]), str(facts["failed"])] for name, facts in cases.items()]
    sums = [str(sum(facts[name] for facts in cases.values())) for name in ("passed", "failed")]
    return markdown(["tests", "passed>", "failed>"], [*rows, ["**all**", *sums]])


def doctor(cases: Cases) -> list[str]:
    return ["```", *cases["provisioned"]["lines"], "```"]


def power(cases: Cases) -> list[str]:
    """A row for each operation, and one for all."""
    by_operation: dict[str, list[Mapping[str, Any]]] = {}
    for facts in cases.values():
        by_operation.setdefault(facts["operation"], []).append(facts)
    rows = [_cuts(name, found) for name, found in by_operation.items()]
    columns = ["cut in", "cuts>", "at a flush>", "sectors lost>", "kept without a flush>", "old>", "new>", "torn>"]
    return markdown(columns, [*rows, _cuts("**all**", list(cases.values()))])


def _cuts(name: str, cuts: list[Mapping[str, Any]]) -> list[str]:
    found = [facts["found"] for facts in cuts]
    return [
        name,
        str(len(cuts)),
        str(sum(facts["where"].startswith("flush") for facts in cuts)),
        *(f"{sum(facts['card'][key] for facts in cuts):,}" for key in ("sectors_dropped", "sectors_kept")),
        *(str(found.count(which)) for which in ("old", "new")),
        str(sum(which not in ("old", "new") for which in found)),
    ]


def provision(cases: Cases) -> list[str]:
    rows = []
    for engines, facts in cases.items():
        packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
        rows.append([engines, facts["python"], packages, f"{facts['sent_bytes'] / 1e6:.1f} MB"])
    return markdown(["engines", "Python", "packages", "sent>"], rows)


def push(cases: Cases) -> list[str]:
    rows = []
    for case, facts in cases.items():
        here, there = (" ".join(facts[name]) for name in ("engine_here", "engine"))
        rows.append(
            [
                case,
                there if there == here else f"{there} (here {here})",
                f"{facts['difference']:.1e}",
                f"{facts['right_here']} / {facts['right_there']} of {facts['images']}",
                str(facts["other_class"]),
            ]
        )
    return markdown(["bundle", "engine", "largest difference>", "right here / there>", "other class>"], rows)


def link(cases: Cases) -> list[str]:
    rows = []
    for case, facts in cases.items():
        again = facts.get("twice_bytes", facts.get("again_bytes"))
        rows.append(
            [case, *(f"{number:,}" for number in (facts["cuts"], facts["file_bytes"], facts["passed_bytes"], again))]
        )
    return markdown(["cut", "times>", "bytes of files>", "bytes passed>", "of files, again>"], rows)


def faults(cases: Cases) -> list[str]:
    return markdown(["fault", "what was said"], [[case, facts["said"]] for case, facts in cases.items()])


def fleet(cases: Cases) -> list[str]:
    rows = [
        [row["step"], f"{row['board']} ({row['kind']})", row["state"], _serves(row), row["said"] or ""]
        for row in cases["rollout"]["steps"]
    ]
    return markdown(["step", "board", "state", "serves", "what was said"], rows)


def _serves(row: Mapping[str, Any]) -> str:
    return f"{row['digest'][:12]}, {row['engine']}, {row['right_of_50']} of 50 right" if row["digest"] else "off"


def memory(cases: Cases) -> list[str]:
    """Models that are larger than what their board has, processes that share one, and how the rest ended."""
    larger, shared, ends = [], [], []
    for case, facts in cases.items():
        kind, _, name = case.partition("-")
        if kind == "larger":
            opened, engine = facts["open"], facts["engine"]
            private = opened["RssAnon"] - engine["RssAnon"]
            sizes = (_megabytes(facts["weights"]), f"{facts['board'] >> 20} MiB", _megabytes(facts["linux_has"]))
            larger.append([name, *sizes, facts["plain"], _megabytes(private), _megabytes(facts["mapped"])])
        elif kind == "processes":
            for count, each in (("1", [facts["one"]]), (str(len(facts["each"])), facts["each"])):
                private, resident = (max(one[key] for one in each) for key in ("RssAnon", "VmRSS"))
                all_of_them = sum(one["Pss"] for one in each)
                shared.append([name, count, *map(_megabytes, (facts["weights"], private, resident, all_of_them))])
        elif case == "refused":
            ends += [[f"load where {how} is too little", facts[key]] for how, key in REFUSALS.items()]
        else:
            ends.append([case, facts["said"]])
    columns = ["model", "weights>", "board>", "Linux has>", "plain engine", "mapped: private more>", "mapped>"]
    columns_shared = [
        "model",
        "processes>",
        "weights>",
        "private of one, most>",
        "resident of one, most>",
        "all together>",
    ]
    return [
        *markdown(columns, larger),
        "",
        *markdown(columns_shared, shared),
        "",
        *markdown(["memory that runs out", "what was said"], ends),
    ]


#: What limits a load in tests/boards/test_memory.py.
REFUSALS = {"the system's memory": "system", "`max_memory`": "allowed"}


def pages(cases: Cases) -> list[str]:
    rows = []
    for case, facts in cases.items():
        if "mapped" in facts:
            sizes = (facts["weights"], facts["mapped"], facts["private"])
            rows.append([case, f"{facts['page']:,}", *map(_megabytes, sizes), f"{facts['difference']:.1e}"])
    return markdown(["engine", "page>", "weights>", "mapped>", "private>", "difference>"], rows)


def measured(cases: Cases) -> list[str]:
    rows = [
        [name, facts["measured_on"], facts["emulated"], facts["status"], str(facts["runs"])]
        for name, facts in cases["package"]["candidates"].items()
    ]
    table = markdown(["candidate", "measured on", "emulated", "status", "runs>"], rows)
    return [*table, "", f"A limit that no candidate keeps: {cases['limit']['refusal']}"]


#: Tables of their own; whatever else the page names is written plainly.
TABLES: dict[str, Callable[[Cases], list[str]]] = {
    "boards": boards,
    "doctor": doctor,
    "faults": faults,
    "fleet": fleet,
    "link": link,
    "measured": measured,
    "memory": memory,
    "pages": pages,
    "power": power,
    "provision": provision,
    "push": push,
    "tests": tests,
}

if __name__ == "__main__":
    main()
