"""docs/comparison.md: each cell of tc-ray names a test or a command that is there, or says no and leads to the limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from tc_ray.cli.main import app
from tc_ray.config.schema import RunConfig
from tests.support.page_tests import MARKS, cells_of, functions, named_tests

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
HEAD = "| feature | tc-ray | LLaMA-Factory | Axolotl | TRL | OpenRLHF | verl |"


def rows() -> list[list[str]]:
    """The table's rows without those that are headings."""
    lines = PAGE.splitlines()
    table = [cells_of(line) for line in lines[lines.index(HEAD) + 2 :] if line.startswith("|")]
    return [cells for cells in table if any(cells[1:])]


def commands_of(cell: str) -> list[list[str]]:
    return [words.split() for words in re.findall(r"`tc-ray ([^`]+)`", cell)]


def wrong_with(cell: str) -> list[str]:
    """What a cell of tc-ray names that is not there."""
    found = []
    for file, name, said in named_tests(cell):
        there = functions(file) if (ROOT / file).is_file() else {}
        if name not in there:
            found.append(f"no {name} in {file}")
        elif said & set(MARKS) != there[name]:
            found.append(f"{name} is marked {sorted(there[name])}")
    for words in commands_of(cell):
        command: Any = typer.main.get_command(app)
        for word in words:
            if not hasattr(command, "commands"):
                break
            if word not in command.commands:
                found.append(f"no command {' '.join(words)}")
                break
            command = command.commands[word]
        files = [word for word in words if word.endswith(".yaml")]
        files += [f"tc_ray/recipes/{words[1]}.yaml"] if words[0] == "train" else []
        found += [f"no file {file}" for file in files if not (ROOT / file).is_file()]
    sections: dict[str, Any] = RunConfig.model_fields
    for section, field in re.findall(r"`(\w+)\.(\w+)[:`]", cell):
        if section not in sections or field not in sections[section].annotation.model_fields:
            found.append(f"no field {section}.{field}")
    return found


@pytest.mark.parametrize("cells", [pytest.param(cells, id=cells[0]) for cells in rows()])
def test_each_cell_of_tc_ray_is_shown(cells: list[str]) -> None:
    assert len(cells) == 7 and all(cells)
    own = cells[1]
    lacks = own.startswith("no ") and "[limits](status.md)" in own
    assert lacks or named_tests(own) or commands_of(own) or "`make test-gpu`" in own, own
    assert own.count("::") == len(named_tests(own)) and wrong_with(own) == []


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("`tests/unit/test_comparison.py::test_x`", "no test_x"),
        ("`tests/unit/no_such.py::test_x`", "no test_x"),
        ("`tests/faults/run/test_driver_killed.py::test_same_command_finishes_the_run`", "is marked"),
        ("`tc-ray trane demo`", "no command"),
        ("`tc-ray log stat outputs/demo`", "no command"),
        ("`tc-ray train no-such-recipe`", "no file"),
        ("`data.train_one: last`", "no field"),
    ],
)
def test_what_is_not_there_is_found(cell: str, words: str) -> None:
    (found,) = wrong_with(cell)
    assert words in found


def test_the_page_says_what_tc_ray_lacks() -> None:
    lacking = {cells[0] for cells in rows() if cells[1].startswith("no")}
    assert {"images, sound", "reinforcement learning", "preference learning"} <= lacking
    assert "never run" in {cells[0]: cells[1] for cells in rows()}["flash attention"]
