"""The README's commands are run, and what it shows is what they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from readme import CONSOLE, README, ROOT, Tour, masked, quickstart_table, rerun, section


@pytest.fixture(scope="module")
def quickstart(models: Path) -> str:
    """The table of scripts/quickstart, which also leaves the bundles that the tour speaks of."""
    return quickstart_table()


@pytest.mark.timeout(600)
def test_quickstart_ends_with_the_table(quickstart: str) -> None:
    assert masked(quickstart) == masked(section("quickstart", README.read_text()))
    kept = [float(share) for share in re.findall(r"% +([\d.]+)% +[\d.]+ ms", quickstart)]
    assert len(kept) == 4 and min(kept) >= 99


@pytest.mark.timeout(600)
def test_the_tour_prints_what_the_readme_shows(quickstart: str, tmp_path: Path) -> None:
    text = README.read_text()
    with Tour(tmp_path) as tour:
        now = rerun(text, tour)
    assert masked(now) == masked(text)


def test_the_readme_has_a_tour() -> None:
    commands = re.findall(r"^\$ edge-infer (\w+)", "".join(CONSOLE.findall(README.read_text())), re.MULTILINE)
    assert {"package", "push", "status", "rollback", "inspect", "verify", "bench"} <= set(commands)


@pytest.mark.parametrize("page", sorted([README, *(ROOT / "docs").rglob("*.md")]), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"
