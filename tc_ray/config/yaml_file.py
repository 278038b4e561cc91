"""Config files: the recipes that come with the package, and a file's sections as they are written, with each key's place.

Invariant: every refusal is a ConfigError that names the file and shows no secret. Called by `config.load` and, for a run's
log, by `inspection.source`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tc_ray.config.redact import STRUCK_OUT, redact
from tc_ray.config.schema import RunConfig
from tc_ray.text import first_line

KeyPath = tuple[str, ...]
"""Names of a field from the section down."""

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
"""One YAML file a recipe; models/ has what they name; start/ is what `tc-ray init` copies."""


class ConfigError(ValueError):
    """The configuration cannot be used; the message says where and what to write instead."""


class ConfigLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-4 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there twice. Raises ConfigError."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ConfigError(
                    f"{key.start_mark.name}, line {line}: {key.value} is already set in line {seen[key.value]}; "
                    f"keep one of them"
                )
            seen[key.value] = line
        return super().construct_mapping(node, deep)


class ConfigDumper(yaml.SafeDumper):
    """Writes what `ConfigLoader` reads back equal: a text such as 1e5 in quotes."""


for _language in (ConfigLoader, ConfigDumper):
    _language.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def find_recipe(path: Path) -> Path:
    """The file at `path`, or for a bare name such as `demo` the recipe of the package; a file of that name goes first."""
    if path.is_file() or path.name != str(path) or path.suffix in (".yaml", ".yml"):
        return path
    shipped = RECIPES / f"{path.name}.yaml"
    if not shipped.is_file():
        names = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise ConfigError(f"{path} is neither a file here nor a recipe of tc-ray; the recipes are {names}")
    return shipped


def read_sections(
    path: Path, origins: dict[KeyPath, str] | None = None, names: Iterable[str] = tuple(RunConfig.model_fields)
) -> dict[str, Any]:
    """The sections of a config file, unchecked. origins: takes the place (file and line) of each key.

    names: what may stand at the top, for the message.
    Raises ConfigError: it cannot be read, or is no YAML of sections.
    """
    text = text_of(path)
    try:
        loader = ConfigLoader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: must hold sections ({', '.join(names)}), each with its fields")
        _note_lines(node, (), path, {} if origins is None else origins)
        values: dict[str, Any] = loader.construct_document(node)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {_yaml_problem(error)}") from None
    except (
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # 5000 digits, an impossible date, a list as key, deep nesting
        raise ConfigError(f"{path}: holds an impossible value: {redact(first_line(error))}") from None
    # An empty section ("pilot:" with all fields commented out) means its defaults.
    return {key: {} if value is None else value for key, value in values.items()}


def text_of(path: Path) -> str:
    """The text of a config file. Raises ConfigError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None


def _note_lines(node: yaml.MappingNode, above: KeyPath, path: Path, origins: dict[KeyPath, str]) -> None:
    for key, value in node.value:
        here = (*above, str(key.value))
        origins[here] = f"{path}, line {key.start_mark.line + 1}"
        if isinstance(value, yaml.MappingNode):
            _note_lines(value, here, path, origins)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, without PyYAML's quotes of the text: they may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
    return place + re.sub(r"'[^'<]{4,}'", f"'{STRUCK_OUT}'", str(what))
