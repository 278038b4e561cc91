"""docs/promises.md: every row has a test that is there, marked as it is, and names a page or module that is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.page_tests import MARKS, cells_of, functions, named_tests

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "promises.md"
HEAD = "| promise | made in | test |"


@dataclass(frozen=True)
class Promise:
    """A row. line: in the page; topic: the last one above it; tests: (file, function, marks said of it)."""

    line: int
    topic: str
    words: str
    made_in: tuple[str, ...]
    tests: tuple[tuple[str, str, frozenset[str]], ...]


def read(text: str) -> Iterator[Promise]:
    """Rows of the page. Raises ValueError naming the line of one that is not as the page's comment says."""
    lines = text.splitlines()
    if lines.count(HEAD) != 1:
        raise ValueError("the page has one table")
    topic = ""
    for number, line in enumerate(lines[lines.index(HEAD) + 2 :], lines.index(HEAD) + 3):
        cells = cells_of(line)
        if len(cells) != 3:
            raise ValueError(f"line {number}: {len(cells)} cells instead of 3")
        if re.fullmatch(r"\*\*[^*]+\*\*", cells[0]) and not any(cells[1:]):
            topic = cells[0].strip("*")
            continue
        made_in = tuple(re.findall(r"(?<![\w/])[\w./-]+\.(?:md|py|yaml|json|toml)(?![\w:])", cells[1]))
        tests = named_tests(cells[2])
        if not cells[0] or not made_in or not tests or cells[2].count("::") != len(tests):
            raise ValueError(f"line {number}: a promise, where it is made, and tests/FILE.py::test_name; not {line}")
        yield Promise(number, topic, cells[0], made_in, tests)


PROMISES = list(read(PAGE.read_text(encoding="utf-8")))


def test_every_promise_has_a_test_that_is_there() -> None:
    wrong = []
    for promise in PROMISES:
        for file, name, _ in promise.tests:
            if not (ROOT / file).is_file():
                wrong.append(f"line {promise.line}: no {file}")
            elif name not in functions(file):
                wrong.append(f"line {promise.line}: no {name} in {file}")
    assert not wrong, "\n".join(wrong)


def test_slow_and_gpu_tests_are_marked_so() -> None:
    wrong = [
        f"line {promise.line}: {file}::{name} is marked {sorted(functions(file)[name])}, the page says {sorted(said)}"
        for promise in PROMISES
        for file, name, said in promise.tests
        if said & set(MARKS) != functions(file).get(name, said & set(MARKS))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_promise_is_made_where_the_page_says() -> None:
    """As far as a program can tell: the file is there."""
    wrong = [f"line {p.line}: no {place}" for p in PROMISES for place in p.made_in if not (ROOT / place).is_file()]
    assert not wrong, "\n".join(wrong)


def test_no_promise_is_there_twice_or_outside_a_topic() -> None:
    words = [promise.words for promise in PROMISES]
    assert [one for one in words if words.count(one) > 1] == []
    assert all(promise.topic for promise in PROMISES)
    assert len(PROMISES) > 100


@pytest.mark.parametrize(
    "row",
    [
        "| a promise | `docs/config.md` | |",
        "| a promise | `docs/config.md` | tests of the log |",
        "| a promise | | `tests/unit/test_promises.py::test_x` |",
        "| | `docs/config.md` | `tests/unit/test_promises.py::test_x` |",
        "| a promise | `docs/config.md` |",
        "| a promise | `docs/config.md` | `tests/unit/test_promises.py::test_x`, tests/unit::test_y |",
    ],
)
def test_a_row_that_lacks_something_is_found(row: str) -> None:
    with pytest.raises(ValueError, match="line 3"):
        list(read(f"{HEAD}\n| --- | --- | --- |\n{row}"))


def test_rows_may_be_written_plainly() -> None:
    row = "| holds `a | b` | docs/config.md (data), tc_ray/run/job.py | tests/unit/test_a.py::test_b[x], tests/c/test_d.py::test_e (slow) |"
    (found,) = read(f"{HEAD}\n| --- | --- | --- |\n{row}")
    assert found.made_in == ("docs/config.md", "tc_ray/run/job.py")
    assert found.tests == (
        ("tests/unit/test_a.py", "test_b", frozenset()),
        ("tests/c/test_d.py", "test_e", frozenset({"slow"})),
    )
