"""docs/config.md is what the schema says."""

from __future__ import annotations

from pathlib import Path

from tc_ray.config.load import describe_fields
from tc_ray.config.reference import page

PAGE = Path(__file__).resolve().parents[3] / "docs" / "config.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tc_ray.config.reference > docs/config.md"


def test_every_field_has_a_row() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [field.path for field in describe_fields()]
    unescaped = [row.replace("\\|", "") for row in rows]
    assert all(row.count("|") == 5 for row in unescaped)
