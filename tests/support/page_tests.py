"""Tests that pages name in their tables: which a cell names, and which there are, with their marks."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARKS = ("slow", "gpu")


def cells_of(line: str) -> list[str]:
    """Of a row; a bar inside code or with a backslash before it is none of the table's."""
    bare = re.sub(r"`[^`]*`", lambda code: code[0].replace("|", "\0"), line)
    return [cell.strip().replace("\0", "|") for cell in re.split(r"(?<!\\)\|", bare)[1:-1]]


def named_tests(cell: str) -> tuple[tuple[str, str, frozenset[str]], ...]:
    """(file, function, marks said of it) of each `tests/FILE.py::test_name` (mark) of a cell."""
    found = re.findall(r"(tests/[\w/]+\.py)::(\w+)(?:\[[^\]]*\])?`?((?: \([\w-]+\))*)", cell)
    return tuple((file, name, frozenset(re.findall(r"\(([\w-]+)\)", marks))) for file, name, marks in found)


@cache
def functions(file: str) -> dict[str, frozenset[str]]:
    """Test functions of a file with their marks, and those of the whole file. Parameters' own marks do not count."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    whole = {mark for node in tree.body for mark in _named(node, "pytestmark")}

    def marks(function: ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str]:
        own = {ast.unparse(decorator).removeprefix("pytest.mark.") for decorator in function.decorator_list}
        return frozenset((own | whole) & set(MARKS))

    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name: marks(node) for node in tree.body if isinstance(node, kinds) and node.name.startswith("test_")}


def _named(node: ast.stmt, variable: str) -> list[str]:
    """Marks in an assignment to `variable`."""
    if not isinstance(node, ast.Assign) or ast.unparse(node.targets[0]) != variable:
        return []
    return re.findall(r"pytest\.mark\.(\w+)", ast.unparse(node.value))
