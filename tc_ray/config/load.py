"""Load a `RunConfig` from YAML and dotted overrides, and write one back.

Invariant: every refusal is a ConfigError of readable lines that name where the value stands (file and line, or the
override), the key, and what is allowed instead, and no secret; nothing unknown is ever ignored. Called by the command line,
the job entry scripts and the tests. Imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from tc_ray.config.recipes import find_recipe
from tc_ray.config.redact import STRUCK_OUT, given_by_environment, redact_override, remember
from tc_ray.config.schema import EMBEDDED, TRACKING_VARIABLE, RunConfig
from tc_ray.config.yaml_file import ConfigError, ConfigLoader, read_sections, text_of
from tc_ray.files import write_file

_Path = tuple[str, ...]
_PATHS = (("data", "train"), ("data", "validation"), ("data", "test"), ("model", "pilot"), ("model", "copilot"))
_END = "# end of the saved configuration"


@dataclass(frozen=True)
class FieldDoc:
    """One field for the documentation: dotted path, allowed values, default and meaning, all as text."""

    path: str
    allowed: str
    default: str
    description: str


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, apply overrides such as `pilot.learning_rate=1e-4`, each given once, and check it all.

    The value of an override of a text or path field is taken as typed (`null` is none where the field may be null); other
    values are YAML: numbers, true/false, null, lists. Relative paths of data and model folders start at the current
    folder, else at the folder of the recipe. Secrets that are struck out in a saved config are left to the environment
    where it has them.

    Args:
        path: file, name of a recipe that comes with tc-ray, or None for the defaults.
        overrides: `section.field=value`, applied in order.

    Raises:
        ConfigError: the file or an override cannot be used; the message names file, line and field.
    """
    path = None if path is None else find_recipe(Path(path))
    origins: dict[_Path, str] = {}
    values = read_sections(path, origins) if path else {}
    names = [override.partition("=")[0].strip() for override in overrides]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"override {twice[0]} is given {names.count(twice[0])} times: give it once")
    for index, name in enumerate(names):
        lost = next((earlier for earlier in names[:index] if earlier.startswith(f"{name}.")), None)
        if lost:
            raise ConfigError(
                f"override {name} replaces all of {name}, and {lost} before it would be lost: give {lost} after it"
            )
    for override in overrides:
        _apply(override, values, origins)
    unknown = [_unknown_message(key, origins) for key in _unknown_keys(values, RunConfig)]
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_validation_message(error, origins, path)) from None
    _refuse_fallback_for_given_files(config, origins)
    _leave_to_environment(config)
    remember(config.secrets())
    _place_paths(config, path)
    return config


def require_secrets(config: RunConfig) -> None:
    """Refuse a config that came back from a file in which its secrets are struck out: `***` is not used as if it were one.

    Raises:
        ConfigError: names the fields.
    """
    missing = config.secrets_to_give()
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: {STRUCK_OUT} stands where a secret was; secrets are not saved with a run. Give the value "
            f"again ({missing[0]}=...), or leave it to the environment"
        )


def dump_config(config: RunConfig) -> str:
    """The whole config as YAML, every default written out; `load_config` reads it back equal."""
    return yaml.safe_dump(config.public_dump(), sort_keys=False, allow_unicode=True)


def save_config(config: RunConfig, path: Path) -> None:
    """Write `dump_config` to `path`, atomically and durably, with a last line that `load_saved_config` looks for."""
    write_file(path, f"{dump_config(config)}{_END}\n")


def load_saved_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """As `load_config`, for what `save_config` wrote: a file that was cut off is refused.

    Half a config is one too: every section that is gone would have its defaults.
    """
    if not text_of(path).rstrip().endswith(_END):
        raise ConfigError(
            f"{path} is cut off or damaged: its last line {_END!r} is missing. Remove the file: `tc-ray train` with the same "
            "recipe and overrides writes it anew"
        )
    return load_config(path, overrides)


def describe_fields() -> list[FieldDoc]:
    """Every field of the config in the order of the schema, for `docs/` and the command line."""
    return [
        FieldDoc(".".join(path), _allowed(info.annotation, info.metadata), _default(info), info.description or "")
        for path, info in _fields(RunConfig)
    ]


def _refuse_fallback_for_given_files(config: RunConfig, origins: Mapping[_Path, str]) -> None:
    """Files named by an override are meant: a recipe's fallback, made for its own files, does not stand in for them."""

    def is_override(name: str) -> bool:
        return origins.get(("data", name), "").startswith("override")

    given = [getattr(config.data, name) for name in ("train", "validation", "test") if is_override(name)]
    if any(source not in (None, EMBEDDED) for source in given) and not is_override("fallback"):
        config.data.fallback = None


# Overrides


def _apply(override: str, values: dict[str, Any], origins: dict[_Path, str]) -> None:
    shown = redact_override(override)
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(f"override {shown!r}: write section.field=value, for instance pilot.learning_rate=1e-4")
    place: Any = values
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise ConfigError(f"override {shown!r}: {key} is a single value and has no field {keys[-1]}")
    place[keys[-1]] = _override_value(text, keys, shown)
    for stale in [key for key in origins if key[: len(keys)] == keys]:
        del origins[stale]
    origins[keys] = f"override {shown!r}"


def _override_value(text: str, keys: _Path, shown: str) -> Any:
    """Text and paths as they were typed, the rest as YAML."""
    kinds = _kinds(keys)
    plain = kinds - {type(None)}
    if plain <= {str, Path}:  # also of an unknown key: it is refused by its name, whatever its value is
        if text == "null" and type(None) in kinds:
            return None
        if (Path in plain or keys in _PATHS) and not text.strip():
            raise ConfigError(f"override {shown!r}: {_empty_path(kinds)}")
        return text
    try:
        return yaml.load(text, ConfigLoader) if text.strip() else ""
    except yaml.YAMLError:
        raise ConfigError(f"override {shown!r}: not a YAML value; quote what is text in it") from None


def _empty_path(kinds: set[Any]) -> str:
    return "the path is empty; " + ("write null for the default" if type(None) in kinds else "name a file or folder")


def _kinds(keys: _Path) -> set[Any]:
    """Types that the field at `keys` takes, entries of a mapping counted as fields; empty: there is no such field."""
    found: Any = RunConfig
    for key in keys:
        section = _section(found)
        if section and key in section.model_fields:
            found = section.model_fields[key].annotation
        elif get_origin(found) is dict:
            found = get_args(found)[1]
        else:
            return set()
    return _members(found)


def _members(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return {kind for member in get_args(annotation) for kind in _members(member)}
    return {annotation}


# Checking


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _fields(model: type[BaseModel], above: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for name, info in model.model_fields.items():
        section = _section(info.annotation)
        if section:
            yield from _fields(section, (*above, name))
        else:
            yield (*above, name), info


def _unknown_keys(values: Mapping[str, Any], model: type[BaseModel], above: _Path = ()) -> Iterator[_Path]:
    for key, value in values.items():
        here = (*above, str(key))
        if key not in model.model_fields:
            yield here
            continue
        section = _section(model.model_fields[key].annotation)
        if section and isinstance(value, Mapping):
            yield from _unknown_keys(value, section, here)


def _unknown_message(key: _Path, origins: dict[_Path, str]) -> str:
    where = _origin(key, origins)
    nearest = _nearest(key)
    advice = f"did you mean {' or '.join(nearest)}?" if nearest else f"valid here: {', '.join(_valid_at(key[:-1]))}"
    return f"{where}: unknown key {'.'.join(key)}; {advice}"


def _valid_at(section: _Path) -> list[str]:
    model: type[BaseModel] = RunConfig
    for name in section:
        model = _section(model.model_fields[name].annotation) or model
    return list(model.model_fields)


def _nearest(key: _Path) -> list[str]:
    """Up to three valid dotted names: close ones of the same section, else the same or a close name in any section."""
    here, leaf = key[:-1], key[-1]
    same_section = difflib.get_close_matches(leaf, _valid_at(here), n=2, cutoff=0.6)
    if same_section:
        return [".".join((*here, name)) for name in same_section]
    paths = [path for path, _ in _fields(RunConfig)]
    exact = [".".join(path) for path in paths if path[-1] == leaf]
    if exact:
        return exact[:3]
    close = difflib.get_close_matches(leaf, {path[-1] for path in paths}, n=2, cutoff=0.7)
    return [".".join(path) for name in close for path in paths if path[-1] == name][:3]


def _validation_message(error: ValidationError, origins: dict[_Path, str], path: Path | None) -> str:
    infos = dict(_fields(RunConfig))
    lines = []
    for problem in error.errors(include_url=False):
        text = str(problem["msg"]).removeprefix("Value error, ")
        location = tuple(str(part) for part in problem["loc"])
        known = next((location[:size] for size in range(len(location), 0, -1) if location[:size] in infos), None)
        if known is None:  # a rule over several fields, or a value where a section should stand
            where = _origin(location, origins) if location else str(path or "config")
            prefix = f"{'.'.join(location)}: " if location else ""
            if problem["type"] == "model_type":
                text = f"is {_shown(location, problem['input'])}, but it is a section with the fields "
                text += ", ".join(_valid_at(location))
            lines.append(f"{where}: {prefix}{text}")
            continue
        info = infos[known]
        meaning = f" ({info.description})" if info.description else ""
        finite = "finite: " if problem["type"] == "finite_number" else ""
        lines.append(
            f"{_origin(known, origins)}: {'.'.join(known)} is {_shown(known, problem['input'])}, "
            f"allowed: {finite}{_allowed(info.annotation, info.metadata)}{meaning}"
        )
    return "\n".join(dict.fromkeys(lines))  # the members of a union each complain


def _shown(key: _Path, value: Any) -> str:
    """A refused value for a message, as an override of it would be shown."""
    return redact_override(f"{'.'.join(key)}={value!r}").partition("=")[2]


def _leave_to_environment(config: RunConfig) -> None:
    """Secrets that are struck out are not used as if they were real: what the environment has comes from there."""
    options = config.log.storage_options
    for name in [name for name, value in options.items() if value == STRUCK_OUT and given_by_environment(name)]:
        del options[name]
    if STRUCK_OUT in (config.tracking.uri or "") and TRACKING_VARIABLE in os.environ:
        config.tracking.uri = None


def _origin(key: _Path, origins: dict[_Path, str]) -> str:
    for size in range(len(key), 0, -1):
        if key[:size] in origins:
            return origins[key[:size]]
    below = (where for other, where in origins.items() if other[: len(key)] == key)
    return next(below, "config")


def _place_paths(config: RunConfig, recipe: Path | None) -> None:
    """Make paths of data and model folders absolute, looking from the current folder and then from the recipe's folder.

    What is found nowhere stays as it is written: a hub id, or a path that an error message will name.
    """
    roots = [Path.cwd(), *([recipe.absolute().parent] if recipe else [])]
    for section, name in _PATHS:
        source = getattr(getattr(config, section), name)
        if source is None or source == EMBEDDED or (section == "model" and "/" not in source):  # a builtin name
            continue
        found = (root / Path(source).expanduser() for root in roots)
        place = next((os.path.normpath(path) for path in found if path.exists()), None)
        if place:
            setattr(getattr(config, section), name, place)


# Describing


def _allowed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_allowed(argument) for argument in arguments))
    if origin is Literal:
        return ", ".join(str(argument) for argument in arguments)
    if origin is list:
        return f"a list of {_allowed(arguments[0])}"
    if origin is dict:
        return (
            f"a mapping of names to {'text (true, false and numbers in quotes)' if arguments[1] is str else 'values'}"
        )
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        type(None): "null",
    }
    bounds = "".join(_bounds(item) for item in metadata)
    return names.get(annotation, str(annotation)) + bounds


def _bounds(item: Any) -> str:
    nested = getattr(item, "metadata", None)  # a pydantic Field inside Annotated
    if nested:
        return "".join(_bounds(part) for part in nested)
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    told = [f" {word} {getattr(item, name):g}" for name, word in words.items() if getattr(item, name, None) is not None]
    pattern = getattr(item, "pattern", None)
    return " and".join(told) + (f" matching `{pattern}`" if pattern else "")


def _default(info: Any) -> str:
    value = info.default_factory() if info.default_factory else info.default
    if value is PydanticUndefined:
        return "required"
    style = '"' if isinstance(value, str) and "\n" in value else None  # one line, whatever is in it
    return yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10**6).split("\n")[0]
