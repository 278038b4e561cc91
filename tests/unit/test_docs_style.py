"""How the pages are written: line length, whom a page is for, the house's words, and the picture that a script makes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "cluster/README.md",
    ROOT / "jobs/lm_eval/README.md",
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
MAX_COLUMNS = 120
LONG_ROWS = {"docs/promises.md", "docs/config.md", "docs/comparison.md"}
"""Pages that are read by column, or made by a program: their tables may have long rows."""
OTHER_WORDS = re.compile(
    r"\b(told|tells?|guard|tickets?|catalogues?|upkeep|heldpart|roundqueue|patiently)\b", re.IGNORECASE
)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_lines_are_short(name: str) -> None:
    rows = name in LONG_ROWS
    long = [
        f"line {number}: {len(line)} columns"
        for number, line in enumerate(text_of(name).splitlines(), 1)
        if len(line) > MAX_COLUMNS and not (rows and line.startswith("|"))
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("name", sorted({name for name in NAMES if name.startswith("docs/")}))
def test_the_first_paragraph_says_whom_the_page_is_for(name: str) -> None:
    title, first = text_of(name).split("\n\n")[:2]
    assert title.startswith("# ") and first.startswith("For "), f"{name} begins with {first[:60]!r}"


@pytest.mark.parametrize("name", sorted(set(NAMES) - LONG_ROWS))
def test_pages_use_the_words_of_the_house(name: str) -> None:
    assert OTHER_WORDS.findall(text_of(name)) == []


def test_the_picture_is_what_its_script_makes() -> None:
    script = ROOT / "docs/images/architecture.py"
    made = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert made == (ROOT / "docs/images/architecture.svg").read_text(encoding="utf-8")
