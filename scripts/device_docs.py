"""Put what scripts/test_device saw (build/device-lab/*.json) into docs/device-lab.json and the tables of its page.

python scripts/device_docs.py
"""

from __future__ import annotations

import json
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
    if absent := sorted(set(TABLES) - set(seen)):
        raise SystemExit(f"{SEEN} has nothing of {', '.join(absent)}; run scripts/test_device first, all of it")
    FACTS.write_text(json.dumps(seen, indent=1, sort_keys=True) + "\n")
    page = PAGE.read_text("utf-8")
    for name, lines in TABLES.items():
        page = between(page, name, lines(seen[name]))
    PAGE.write_text(page, "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)


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


TABLES: dict[str, Callable[[Cases], list[str]]] = {"provision": provision, "push": push}

if __name__ == "__main__":
    main()
