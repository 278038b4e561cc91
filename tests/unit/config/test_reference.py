"""docs/config.md is what the schema says."""

from __future__ import annotations

from pathlib import Path

from jobs.config_page import page
from tc_ray.config.fields import config_fields

PAGE = Path(__file__).resolve().parents[3] / "docs" / "config.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m jobs.config_page > docs/config.md"


def test_every_field_has_a_row() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [field.path for field in config_fields().values()]
    unescaped = [row.replace("\\|", "") for row in rows]
    assert all(row.count("|") == 6 for row in unescaped)


def test_every_field_has_a_meaning() -> None:
    silent = [field.path for field in config_fields().values() if not field.info.description]
    assert not silent, f"fields without a description: {silent}"


def test_the_page_says_what_may_change_on_resume() -> None:
    rows = {row.split("`")[1]: "| may change |" in row for row in page().splitlines() if row.startswith("| `")}
    assert rows["resources.pilot_threads"] and rows["log.keep_rounds"]
    assert rows["fusion.lam_grid"], "a whole section is marked"
    assert not rows["pilot.learning_rate"] and not rows["run.seed"]
