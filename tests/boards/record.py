"""What the tests saw on the boards, for docs/device-lab.md, which scripts/device_docs.py writes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import ROOT

FOLDER = ROOT / "build" / "device-lab"


def note(proof: str, case: str, **facts: Any) -> None:
    """Keep ``facts``, plain values, of one case of a proof; a later run of the same case replaces them."""
    path = FOLDER / f"{proof}.json"
    cases = json.loads(path.read_text()) if path.is_file() else {}
    cases[case] = facts
    FOLDER.mkdir(parents=True, exist_ok=True)
    aside: Path = path.with_suffix(".new")
    aside.write_text(json.dumps(cases, indent=1, sort_keys=True) + "\n")
    aside.replace(path)
