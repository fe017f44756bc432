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
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(one)}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


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


#: Tables of their own; whatever else the page names is written plainly.
TABLES: dict[str, Callable[[Cases], list[str]]] = {
    "doctor": doctor,
    "power": power,
    "provision": provision,
    "push": push,
}

if __name__ == "__main__":
    main()
