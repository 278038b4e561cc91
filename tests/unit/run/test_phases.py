"""The phases of a run, their order, and the page that lists them."""

from __future__ import annotations

from pathlib import Path

from tc_ray.run.job import PHASES

PAGE = Path(__file__).resolve().parents[3] / "docs" / "architecture.md"


def test_the_page_lists_the_phases() -> None:
    rows = [f"| {p.status} | `{p.work.__name__}` | {p.needs} | {p.leaves} | " for p in PHASES]
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(tuple(rows))]
    assert [line.split("`")[1] for line in lines] == [phase.work.__name__ for phase in PHASES]
