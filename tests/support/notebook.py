"""Executes the code of a notebook in its order, as a program: `python -m tests.support.notebook FILE [PARAMETERS.json]`.

The parameters replace names that the cell tagged `parameters` sets, right after it, as papermill does. Figures that are open at
the end are written to the current folder as figure-1.png and so on.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

PARAMETERS = "parameters"


def code_cells(path: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook file, each with its `source` as one text."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


def names_set(source: str) -> set[str]:
    """The names that the statements of a cell assign."""
    return {
        target.id
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def execute(path: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Run all cells in one namespace, which is returned. Raises what a cell raises; KeyError: a parameter it does not set."""
    names: dict[str, Any] = {"__name__": "__main__"}
    left = set(parameters)
    for cell in code_cells(path):
        exec(compile(cell["source"], f"{path.name}:{cell['id']}", "exec"), names)  # noqa: S102 - of this repository
        if PARAMETERS in cell["metadata"].get("tags", ()):
            if unknown := left - names_set(cell["source"]):
                raise KeyError(f"{path.name} has no parameter {', '.join(sorted(unknown))}")
            names |= parameters
            left = set()
    if left:
        raise KeyError(f"{path.name} has no cell tagged {PARAMETERS}")
    return names


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    execute(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()) if len(sys.argv) > 2 else {})
    for number in plt.get_fignums():
        plt.figure(number).savefig(f"figure-{number}.png")


if __name__ == "__main__":
    main()
