"""JSON schemas of a recipe and of a study's file, for editors: completion, help and errors while one types.

Invariant: what `config.load` takes, the schema takes: `${NAME}` in place of any value, and a section without fields.
`recipes/recipe.schema.json` is the one of recipes; a test holds it against this. Called by `tc-ray config schema`.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from tc_ray.config.schema import RunConfig
from tc_ray.config.yaml_file import RECIPES

SCHEMA_FILE = RECIPES / "recipe.schema.json"
"""The schema of recipes, beside those that name it in their first line."""
_REFERENCE = {"$ref": "#/$defs/Reference"}
_OF_A_PROPERTY = ("description", "default", "examples", "deprecated")


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe."""
    schema = schema_of(RunConfig, "Recipe of tc-ray")
    for name, section in schema["properties"].items():
        schema["properties"][name] = {"anyOf": [section, {"type": "null"}]}  # `pilot:` means its defaults
    return schema


def schema_of(model: type[BaseModel], title: str) -> dict[str, Any]:
    """The schema of a file that `model` describes."""
    schema: dict[str, Any] = _without_titles(model.model_json_schema())
    definitions = schema.setdefault("$defs", {})
    for part in [schema, *definitions.values()]:
        for name, value in part.get("properties", {}).items():
            part["properties"][name] = _or_reference(value, definitions)
    definitions["Reference"] = {
        "type": "string",
        "pattern": r"\$\{[A-Za-z_]\w*(:-[^}]*)?\}",
        "description": "${NAME} or ${NAME:-default}: a variable of the environment",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title} | schema


def as_text(schema: dict[str, Any]) -> str:
    """The schema as a file has it."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _without_titles(node: Any) -> Any:
    """Pydantic titles each field with its own name in other letters."""
    if isinstance(node, list):
        return [_without_titles(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    return {
        name: {field: _without_titles(inner) for field, inner in value.items()}
        if name in ("properties", "$defs", "patternProperties")
        else _without_titles(value)
        for name, value in node.items()
        if name != "title"
    }


def _or_reference(value: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a value, or of each in a list, that may be a reference to the environment too."""
    options = value.get("anyOf", [value])
    if any(_is_section(option, definitions) or _is_text(option) for option in options):
        return value
    kept = {name: value[name] for name in _OF_A_PROPERTY if name in value}
    options = [
        {name: inner for name, inner in option.items() if name not in _OF_A_PROPERTY or option is not value}
        for option in options
    ]
    for option in options:
        if isinstance(option.get("items"), dict):
            option["items"] = _or_reference(option["items"], definitions)
    return kept | {"anyOf": [*options, _REFERENCE]}


def _is_section(option: dict[str, Any], definitions: dict[str, Any]) -> bool:
    return "properties" in definitions.get(str(option.get("$ref", "")).rpartition("/")[2], {})


def _is_text(option: dict[str, Any]) -> bool:
    return option.get("type") == "string" and not {"enum", "const", "pattern"} & option.keys()
