"""The notebooks of examples/ as files: valid, with outputs of a run, no machine's paths, and code that fits this tc_ray."""

from __future__ import annotations

import ast
import base64
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.notebook import PARAMETERS, code_cells

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MAX_PICTURE_BYTES = 60_000
MAX_OUTPUT_LINES = 40
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(?:home|root|tmp|work|Users|mnt|var|opt|usr)/|\b[A-Z]:\\")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    book: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return book


def outputs(path: Path) -> list[dict[str, Any]]:
    return [output for cell in code_cells(path) for output in cell["outputs"]]


def text_of(output: dict[str, Any]) -> str:
    return "".join(output["text"] if output["output_type"] == "stream" else output["data"].get("text/plain", []))


def test_both_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["first_run", "mistake_log"]


@every_notebook
def test_it_is_a_notebook_of_format_4_5(path: Path) -> None:
    """What the format's schema asks of the kinds of cells and outputs that are used."""
    book = read(path)
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and isinstance(book["metadata"], dict)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one) for one in ids)
    for cell in book["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell["cell_type"] in ("code", "markdown")
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | code
        assert all(isinstance(line, str) for line in cell["source"])
    for output in outputs(path):
        kinds = {"stream": {"name", "text"}, "display_data": {"data", "metadata"}}
        assert set(output) == {"output_type"} | kinds[output["output_type"]]


@every_notebook
def test_its_outputs_are_those_of_one_run_and_brief(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell["id"] for cell in cells if "print(" in cell["source"] and not cell["outputs"]] == []
    for output in outputs(path):
        assert output.get("name") != "stderr" and len(text_of(output).splitlines()) <= MAX_OUTPUT_LINES
        if picture := output.get("data", {}).get("image/png"):
            pixels = base64.b64decode("".join(picture))
            assert pixels.startswith(b"\x89PNG") and len(pixels) < MAX_PICTURE_BYTES


def test_the_log_is_seen_in_a_picture() -> None:
    shown = outputs(ROOT / "examples/mistake_log.ipynb")
    assert sum("image/png" in output.get("data", {}) for output in shown) == 1


@every_notebook
def test_no_path_of_a_machine_is_in_it(path: Path) -> None:
    texts = ["".join(cell["source"]) for cell in read(path)["cells"]] + [text_of(output) for output in outputs(path)]
    assert [found for text in texts if (found := MACHINE_PATH.findall(text))] == []


def test_the_check_of_paths_sees_one() -> None:
    assert MACHINE_PATH.search("run in /home/ann/outputs") and not MACHINE_PATH.search("in .../outputs/first-run/log")


@every_notebook
def test_its_code_fits_this_tc_ray(path: Path) -> None:
    """Each cell compiles, the first one sets the parameters, and each name imported from tc_ray is there."""
    cells = code_cells(path)
    assert [PARAMETERS in cell["metadata"].get("tags", []) for cell in cells] == [True] + [False] * (len(cells) - 1)
    imported = [
        (node.module, alias.name)
        for cell in cells
        for node in ast.walk(ast.parse(cell["source"]))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tc_ray"
        for alias in node.names
    ]
    assert imported
    assert [name for module, name in imported if not hasattr(importlib.import_module(module or ""), name)] == []


@every_notebook
def test_what_it_names_is_there(path: Path) -> None:
    """Links, and pages of docs/."""
    text = "\n".join("".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
    files = [path.parent / link for link in re.findall(r"\]\(([^)#]+)", text)]
    files += [ROOT / page for page in re.findall(r"docs/[\w-]+\.md", text)]
    assert files and [file for file in files if not file.exists()] == []
