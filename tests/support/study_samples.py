"""Studies in miniature: a recipe over the tiny Llama, a STUDY.yaml beside it, and results that nobody trained."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tc_ray.study.cells import Cell, Cells
from tc_ray.study.file import Study, load_study
from tc_ray.study.results import Answers, Model, Result
from tests.support.tiny_run import SETTINGS


def write_study(folder: Path, /, **changes: Any) -> Path:
    """STUDY.yaml and the recipe and model that it names, in `folder`. changes: of the study's fields."""
    if not (folder / "model").exists():
        from tests.support.tiny_model import make_tiny_llama  # pretended cells, each a process, need no torch

        make_tiny_llama(folder / "model")
    recipe = {name: dict(fields) for name, fields in SETTINGS.items() if name != "run"}
    recipe["model"] = {"pilot": "./model"}
    recipe["pilot"] |= {"epochs": 2, "max_rounds": 6}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    study = {
        "name": "tiny",
        "folder": str(folder / "study"),
        "recipe": "tiny.yaml",
        "seeds": [1, 2],
        "tasks": {"sums": {}},
        "variants": {"copilot": {}},
    }
    file = folder / "STUDY.yaml"
    file.write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return file


def tiny_study(folder: Path, /, **changes: Any) -> Study:
    """`write_study`, read."""
    return load_study(write_study(folder, **changes))


def answers(right: list[bool], *, rows_id: str = "rows", nll: float = 0.5) -> Answers:
    """Of exact match, two gold tokens a row."""
    return Answers.of("exact_match", rows_id, 0, right, [float(r) for r in right], [nll] * len(right), [2] * len(right))


def made_up(cell: Cell, models: Mapping[str, Model], *, pilot: float = 100.0, copilot: float = 20.0) -> Result:
    """The result of a cell that never ran."""
    made = {"machine": "none", "tc_ray": "0", "command": "tc-ray study STUDY.yaml"}
    return Result(cell.key, cell.kind, cell.name, {}, dict(models), pilot, copilot, 10, 1000, 500, 3600.0, made)


def random_results(cells: Cells, rows: int, seed: int = 0) -> dict[str, Result]:
    """Results for all cells; the lines differ in how often they are right."""
    draw = random.Random(seed)
    found = {}
    for key, cell in cells.by_key.items():
        share = {"run": 0.5, "longer": 0.6}.get(cell.kind, 0.55)
        pilot = [draw.random() < share for _ in range(rows)]
        fused = [right or draw.random() < 0.3 for right in pilot]
        models = {"pilot": Model({"test": answers(pilot)})}
        if cell.config.log.enabled and cell.kind not in ("ensemble", "temperature"):
            models["fused"] = Model({"test": answers(fused, nll=0.4)}, 0.5, "logits", None, 0.9, 0.02)
        found[key] = made_up(cell, models)
    return found


def read_rows(file: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]
