"""Load a `RunConfig` from YAML and dotted overrides, and write one back.

Invariant: every refusal is a ConfigError of readable lines that name the place (file and line, or the override), the key and
what is allowed instead, and show no secret; nothing unknown is ever ignored. Called by the command line, the entry scripts
and the tests. Imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tc_ray.config.data import EMBEDDED
from tc_ray.config.environment import PATHS, expand, typed
from tc_ray.config.fields import config_fields, names_in, types_at
from tc_ray.config.redact import STRUCK_OUT, redact_override, remember
from tc_ray.config.schema import RunConfig
from tc_ray.config.serving import ServingSection
from tc_ray.config.training import PAPER_FORM
from tc_ray.config.yaml_file import ConfigDumper, ConfigError, KeyPath, find_recipe, read_sections, text_of
from tc_ray.files import write_file

SERVING = "serving"
_END = "# end of the saved configuration"


@dataclass(frozen=True)
class Layer:
    """Values that replace those of a recipe, by dotted field. places: file and line of each. folder: of that file."""

    values: Mapping[str, Any]
    places: Mapping[str, str]
    folder: Path


def load_config(
    path: Path | str | None = None, overrides: Sequence[str] = (), layers: Sequence[Layer] = ()
) -> RunConfig:
    """Read a config file, apply layers and overrides and check it all; docs/config.md has the rules.

    Args:
        path: file, name of a recipe that comes with tc-ray, or None for the defaults.
        overrides: `section.field=value`, each field once.
        layers: of another file, such as a study; a later one replaces an earlier one, overrides replace all.

    Raises ConfigError: the file, a layer or an override cannot be used; the message names file, line and field.
    """
    path = None if path is None else find_recipe(Path(path))
    origins: dict[KeyPath, str] = {}
    given = [_key(override) for override in overrides]
    replaced = {*given, *(tuple(name.split(".")) for layer in layers for name in layer.values)}
    values = _followed(read_sections(path, origins), path, origins, replaced) if path else {}
    in_file = dict(origins)
    for layer in layers:
        _drop_what_a_preset_sets(layer.values, values, origins)
        for name, value in layer.values.items():
            key, place = tuple(name.split(".")), layer.places[name]
            _set(key, expand(value, key, {}, place, given), place, values, origins)
    _drop_what_a_preset_sets([".".join(key) for key in given], values, origins)
    _apply_all(overrides, values, origins)
    config = _checked(values, origins, path)
    _drop_fallback_for_given_files(config, {key for key, where in origins.items() if in_file.get(key) != where})
    remember(config.secrets())
    _place_paths(config, [*([path.absolute().parent] if path else []), *(layer.folder for layer in layers)])
    return config


def load_serving(
    path: Path | None, overrides: Sequence[str] = (), fields: Mapping[str, Any] | None = None
) -> ServingSection:
    """The `serving` section of a config file alone: a server neither uses nor checks the other sections.

    Args:
        path: None: defaults. fields: of the section, from a Serve config file; they replace those of `path`, and overrides
            replace both.
    """
    origins: dict[KeyPath, str] = {}
    read = read_sections(path, origins) if path else {}
    values = {name: section for name, section in read.items() if name == SERVING or not names_in((str(name),))}
    origins |= {(SERVING, name): f"args.{name}" for name in fields or {}}
    given = [_key(override) for override in overrides]
    if path:
        values = _followed(values, path, origins, {*given, *((SERVING, name) for name in fields or {})})
    if isinstance(section := values.setdefault(SERVING, {}), dict):
        section |= expand(dict(fields or {}), (SERVING,), origins, replaced=given)
    for override in overrides:
        if not override.startswith(f"{SERVING}."):
            raise ConfigError(f"override {redact_override(override)!r}: a server takes {SERVING}.FIELD=VALUE only")
    _apply_all(overrides, values, origins)
    return _checked(values, origins, path).serving


def _followed(
    values: dict[str, Any], path: Path, origins: dict[KeyPath, str], replaced: Collection[KeyPath]
) -> dict[str, Any]:
    """The values of a file with its references to the environment followed; a saved config holds none."""
    if text_of(path).rstrip().endswith(_END):
        return values
    followed: dict[str, Any] = expand(values, (), origins, str(path), replaced)
    return followed


def _key(override: str) -> KeyPath:
    return tuple(override.partition("=")[0].strip().split("."))


def _apply_all(overrides: Sequence[str], values: dict[str, Any], origins: dict[KeyPath, str]) -> None:
    names = [override.partition("=")[0].strip() for override in overrides]
    for index, (name, override) in enumerate(zip(names, overrides, strict=True)):
        if any(earlier == name or earlier.startswith(f"{name}.") for earlier in names[:index]):
            raise ConfigError(f"override {name} replaces an earlier one: give each field once")
        _apply(override, values, origins)


def _drop_what_a_preset_sets(given: Container[str], values: dict[str, Any], origins: dict[KeyPath, str]) -> None:
    """Where `copilot.preset` is among the fields given, it replaces what is there in those that it sets; a saved config has all of
    them."""
    section = values.get("copilot")
    if isinstance(section, dict) and "copilot.preset" in given:
        for name in PAPER_FORM:
            section.pop(name, None)
            origins.pop(("copilot", name), None)


def _checked(values: dict[str, Any], origins: dict[KeyPath, str], path: Path | None) -> RunConfig:
    unknown = [_unknown_message(key, origins) for key in _unknown_keys(values)]
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_validation_message(error, origins, path)) from None


def require_secrets(config: RunConfig) -> None:
    """Raise ConfigError if secrets are struck out in the file that a config was read from: `***` is never used as a secret."""
    missing = config.secrets_to_give()
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: {STRUCK_OUT} stands in place of a secret; secrets are not saved with a run. Give the value "
            f"again ({missing[0]}=...)"
        )


def dump_config(config: RunConfig) -> str:
    """The whole config as YAML, every default written out; `load_config` reads it back equal."""
    return yaml.dump(config.public_dump(), Dumper=ConfigDumper, sort_keys=False, allow_unicode=True)


def save_config(config: RunConfig, path: Path) -> None:
    """Write `dump_config` to `path`, atomically and durably, with a last line that `load_saved_config` looks for."""
    write_file(path, f"{dump_config(config)}{_END}\n")


def load_saved_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """As `load_config`, for what `save_config` wrote. A file that was cut off is refused: its lost sections would be defaults."""
    _check_whole(path)
    return load_config(path, overrides)


def load_saved_serving(
    path: Path, overrides: Sequence[str] = (), fields: Mapping[str, Any] | None = None
) -> ServingSection:
    """As `load_serving`, for what `save_config` wrote."""
    _check_whole(path)
    return load_serving(path, overrides, fields)


def _check_whole(path: Path) -> None:
    if not text_of(path).rstrip().endswith(_END):
        raise ConfigError(
            f"{path} is cut off or damaged: its last line {_END!r} is missing. Remove the file: `tc-ray train` with the same "
            "recipe and overrides writes it anew"
        )


def _drop_fallback_for_given_files(config: RunConfig, given: set[KeyPath]) -> None:
    """Drop a recipe's fallback if other files are given: the fallback replaces the recipe's own files only.

    given: fields that are not the recipe's.
    """
    sources = [getattr(config.data, name) for name in ("train", "validation", "test") if ("data", name) in given]
    if any(source not in (None, EMBEDDED) for source in sources) and ("data", "fallback") not in given:
        config.data.fallback = None


def _apply(override: str, values: dict[str, Any], origins: dict[KeyPath, str]) -> None:
    shown = redact_override(override)
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(f"override {shown!r}: write section.field=value, for instance pilot.learning_rate=1e-4")
    where = f"override {shown!r}"
    _set(keys, typed(text, keys, types_at(keys), where), where, values, origins)


def _set(keys: KeyPath, value: Any, where: str, values: dict[str, Any], origins: dict[KeyPath, str]) -> None:
    """Put a value in the place of the file's. where: it comes from, for messages."""
    place: Any = values
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{where}: {key} is a single value and has no field {keys[-1]}")
    place[keys[-1]] = value
    for stale in [key for key in origins if key[: len(keys)] == keys]:
        del origins[stale]
    # a rule over a section is broken by whoever changed it last
    origins.update(dict.fromkeys((keys[:size] for size in range(1, len(keys) + 1)), where))


def _unknown_keys(values: Mapping[str, Any], above: KeyPath = ()) -> Iterator[KeyPath]:
    for key, value in values.items():
        here = (*above, str(key))
        if here in config_fields():
            continue
        if not names_in(here):
            yield here
        elif isinstance(value, Mapping):
            yield from _unknown_keys(value, here)


def _unknown_message(key: KeyPath, origins: dict[KeyPath, str]) -> str:
    where = _origin(key, origins)
    nearest = _nearest(key)
    advice = f"did you mean {' or '.join(nearest)}?" if nearest else f"valid here: {', '.join(names_in(key[:-1]))}"
    return f"{where}: unknown key {'.'.join(key)}; {advice}"


def _nearest(key: KeyPath) -> list[str]:
    """Up to three valid dotted names: a close one of the same section, else those of the same name in any section."""
    close = difflib.get_close_matches(key[-1], names_in(key[:-1]), n=2)
    return [".".join((*key[:-1], name)) for name in close] or [
        ".".join(path) for path in config_fields() if path[-1] == key[-1]
    ][:3]


def _validation_message(error: ValidationError, origins: dict[KeyPath, str], path: Path | None) -> str:
    fields = config_fields()
    lines = []
    for problem in error.errors(include_url=False):
        text = str(problem["msg"]).removeprefix("Value error, ")
        location = tuple(str(part) for part in problem["loc"])
        known = next((location[:size] for size in range(len(location), 0, -1) if location[:size] in fields), None)
        if known is None:  # a rule over several fields, or a value in place of a section
            where = _origin(location, origins) if location else str(path or "config")
            prefix = f"{'.'.join(location)}: " if location else ""
            if problem["type"] == "model_type":
                text = f"is {_shown(location, problem['input'])}, but it is a section with the fields "
                text += ", ".join(names_in(location))
            lines.append(f"{where}: {prefix}{text}")
            continue
        field, text = fields[known], text.replace("Input should", "it should")
        shown = f"{_origin(known, origins)}: {field.path} is {_shown(known, problem['input'])}"
        lines.append(f"{shown}: {text} ({field.info.description})")
    return "\n".join(dict.fromkeys(lines))


def _shown(key: KeyPath, value: Any) -> str:
    return redact_override(f"{'.'.join(key)}={value!r}").partition("=")[2]


def _origin(key: KeyPath, origins: dict[KeyPath, str]) -> str:
    for size in range(len(key), 0, -1):
        if key[:size] in origins:
            return origins[key[:size]]
    below = (where for other, where in origins.items() if other[: len(key)] == key)
    return next(below, "config")


def _place_paths(config: RunConfig, folders: Sequence[Path]) -> None:
    """Make paths of data and models absolute, from the current folder or the files' own; one not found may be a hub id."""
    roots = [Path.cwd(), *folders]

    def placed(source: str) -> str:
        for root in roots:
            path = root / Path(source).expanduser()
            if path.exists() or (glob.has_magic(source) and glob.glob(str(path))):
                return os.path.normpath(path)
        return source

    for section, name in PATHS:
        source = getattr(getattr(config, section), name)
        if isinstance(source, list):
            for one in source:
                one.file = placed(one.file)
        elif isinstance(source, dict):
            for held_out in source.values():
                held_out.file = placed(held_out.file)
                held_out.task = held_out.task and placed(held_out.task)
        elif source not in (None, EMBEDDED) and (section != "model" or "/" in source):  # else a builtin name
            setattr(getattr(config, section), name, placed(source))
