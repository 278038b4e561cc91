"""The JSON schema of recipes: it is the code's, every recipe keeps it, and it refuses what the code refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tc_ray.config.json_schema import SCHEMA_FILE, as_text, recipe_schema, schema_of
from tc_ray.config.load import dump_config, load_config
from tc_ray.config.schema import RunConfig
from tc_ray.config.yaml_file import RECIPES, ConfigError, ConfigLoader
from tc_ray.study.file import StudyFile
from tests.support.command_line import tc_ray

SHIPPED = [*sorted(RECIPES.glob("*.yaml")), RECIPES / "start" / "recipe.yaml"]
CHECK = jsonschema.Draft202012Validator(recipe_schema())


def problems(document: Any, check: jsonschema.Draft202012Validator = CHECK) -> list[str]:
    return [error.message for error in check.iter_errors(document)]


def test_the_file_is_what_the_code_says() -> None:
    assert SCHEMA_FILE.read_text() == as_text(recipe_schema()), f"tc-ray config schema > {SCHEMA_FILE}"
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    unknown = re.findall(r'"(ge|gt|le|lt|title)": [\d"]', as_text(recipe_schema() | {"title": None}))
    assert not unknown, "words of pydantic, which mean nothing in a schema"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_recipes_name_the_schema_and_keep_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", first)
    assert (path.parent / named).resolve() == SCHEMA_FILE
    assert problems(yaml.load(path.read_text(), ConfigLoader)) == []


def test_what_the_code_takes_the_schema_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("N", "0.5")
    text = """
pilot:
run: {name: "r${N}"}
data: {validation: {a: a.jsonl, b: {file: b.jsonl, metric: nll}}, test: rows/, max_train_rows: null}
fusion: {lam_grid: [0, "${N}"], max_new_tokens: "${M:-3}"}
copilot: {learning_rate: 1e-3, layers: "${L:-[1, 3]}"}
log: {storage_options: {a: "1"}}
tracking: {enabled: "${T:-false}"}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    load_config(tmp_path / "recipe.yaml")
    assert problems(yaml.load(text, ConfigLoader)) == []
    assert problems(yaml.load(dump_config(RunConfig()), ConfigLoader)) == [], "every default, written out"


@pytest.mark.parametrize(
    "text",
    [
        "pilot: {epoch: 1}",
        "pilots: {}",
        "pilot: {epochs: three}",
        "pilot: {epochs: 0}",
        "pilot: {dtype: fp16}",
        "pilot: 3",
        "fusion: {lam_grid: [0, 11]}",
        "fusion: {lam_grid: 0}",
        "data: {test: {a: {file: b.jsonl, metric: bleu}}}",
        "data: {test: {a: {metric: nll}}}",
        "data: {test: {a: 3}}",
        "tracking: {enabled: 'perhaps'}",
        "log: {storage_options: {a: [1]}}",
    ],
)
def test_what_the_schema_refuses_the_code_refuses(text: str, tmp_path: Path) -> None:
    assert problems(yaml.safe_load(text))
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "recipe.yaml")


def test_the_command_prints_it() -> None:
    assert tc_ray("config", "schema").stdout == SCHEMA_FILE.read_text()
    study = json.loads(tc_ray("config", "schema", "--study").stdout)
    assert study == schema_of(StudyFile, "Study of tc-ray")
    check = jsonschema.Draft202012Validator(study)
    studies = sorted((RECIPES.parents[1] / "jobs" / "studies").glob("*.yaml"))
    assert studies and not any(problems(yaml.load(file.read_text(), ConfigLoader), check) for file in studies)
    assert problems({"name": "x", "recipe": "demo", "seeds": [], "tasks": {"a": {}}, "variants": {"b": {}}}, check)
