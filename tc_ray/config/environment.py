"""`${NAME}` and `${NAME:-default}` in the values of a recipe, a study or a Serve config file.

Invariant: a reference that cannot be followed is a ConfigError that names file, line and field. A saved configuration holds
values, not references, and is never expanded: it may come from anybody, and could send the caller's secrets elsewhere.
Called by `config.load`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from tc_ray.config.fields import members, types_at
from tc_ray.config.redact import names_secret, remember
from tc_ray.config.yaml_file import ConfigError, ConfigLoader, KeyPath

PATHS = (
    ("data", "train"),
    ("data", "validation"),
    ("data", "test"),
    ("data", "task"),
    ("model", "pilot"),
    ("model", "copilot"),
)
"""Fields of files and models, relative to the current folder or to that of the recipe."""

# `$${` is `${`; `${{` belongs to templates; any other `${` must be a whole reference
_REFERENCE = re.compile(r"\$\$\{|\$\{(?!\{)(?:([A-Za-z_]\w*)(?::-([^}]*))?\})?")


def expand(
    value: Any,
    key: KeyPath,
    places: Mapping[KeyPath, str],
    place: str = "config",
    replaced: Collection[KeyPath] = (),
) -> Any:
    """A value of a file with its references replaced by what the environment says, in lists and mappings too.

    A text with a reference is read as on the command line: as it is for a text or path field, else as YAML.

    Args:
        key: the value's field. places: file and line by field; place: where none is known. replaced: fields that get
            another value anyhow, whose references are not followed.
    """
    if key in replaced:
        return value
    place = places.get(key, place)
    if isinstance(value, dict):
        return {name: expand(inner, (*key, str(name)), places, place, replaced) for name, inner in value.items()}
    return _leaf(value, key, place, types_at(key) if key else set())


def _leaf(value: Any, key: KeyPath, place: str, kinds: set[Any]) -> Any:
    if isinstance(value, list):
        inside = {member for kind in kinds if get_origin(kind) is list for member in members(get_args(kind)[0])}
        return [_leaf(inner, key, place, inside) for inner in value]
    if isinstance(value, dict):  # an entry of a list: with the fields of the model that the list takes
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        fields = {name: members(info.annotation) for model in models for name, info in model.model_fields.items()}
        return {
            name: _leaf(inner, (*key, str(name)), place, fields.get(str(name), set())) for name, inner in value.items()
        }
    if not isinstance(value, str) or "${" not in value:
        return value
    where = f"{place}: {'.'.join(key)}"
    text, names = _filled(value, where)
    if not names:
        return text
    return typed(text, key, kinds, f"{where}, with {', '.join(names)} from the environment,")


def _filled(text: str, where: str) -> tuple[str, list[str]]:
    """The text with values in place of its references, and the names that stood in them."""
    names: list[str] = []

    def value_of(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if match[0] == "$${":
            return "${"
        if name is None:
            raise ConfigError(
                f"{where} has ${{ without a name and }}: write ${{NAME}} or ${{NAME:-default}} for a variable of the "
                "environment, $${ for the two characters themselves"
            )
        found = os.environ.get(name)
        # as in a shell, :- also stands in for a variable that is set to nothing
        if default is not None and not found:
            found = default
        if found is None:
            raise ConfigError(
                f"{where} needs the environment variable {name}, which is not set: set it, or write ${{{name}:-default}} "
                f"($${{{name}}} for these characters themselves)"
            )
        if names_secret(name):
            remember([found])
        names.append(name)
        return found

    return _REFERENCE.sub(value_of, text), names


def typed(text: str, key: KeyPath, kinds: set[Any], where: str) -> Any:
    """The value that a text stands for in a field: text and paths as they are, the rest as YAML.

    kinds: types that the field takes. where: begins the message of a ConfigError.
    """
    plain = kinds - {type(None)}
    # a path, unless it is a mapping of names to paths, as `data.test` may be
    if plain <= {str, Path} or (
        key in PATHS and not text.lstrip().startswith(("{", "[{"))
    ):  # also of an unknown key, which is refused by its name whatever its value is
        if text == "null" and type(None) in kinds:
            return None
        if (Path in plain or key in PATHS) and not text.strip():
            remedy = "write null for the default" if type(None) in kinds else "name a file or folder"
            raise ConfigError(f"{where}: the path is empty; {remedy}")
        return text
    try:
        return yaml.load(text, ConfigLoader) if text.strip() else ""
    except yaml.YAMLError:
        raise ConfigError(f"{where}: not a YAML value; quote what is text in it") from None
