"""Config files as YAML: their sections as they are written, and where each key stands.

Invariant: every refusal is a ConfigError that names the file, shows no secret, and comes before work on the file grows beyond
its length (`config.bounds`). Called by `config.load` and, for a run's log, by `inspection.source`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tc_ray.config.bounds import BeyondBoundsError, BoundedLoader, check_values, read_text
from tc_ray.config.redact import STRUCK_OUT, redact
from tc_ray.config.schema import RunConfig
from tc_ray.text import first_line

KeyPath = tuple[str, ...]
"""Names of a field from the section down."""


class ConfigError(ValueError):
    """The configuration cannot be used; the message says where and what to write instead."""


class ConfigLoader(BoundedLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-4 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML does, after the check. Raises ConfigError."""
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in first_line:
                raise ConfigError(
                    f"{key.start_mark.name}, line {line}: {key.value} stands already in line {first_line[key.value]}; "
                    f"keep one of them"
                )
            first_line[key.value] = line
        return super().construct_mapping(node, deep)


ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_sections(path: Path, origins: dict[KeyPath, str] | None = None) -> dict[str, Any]:
    """The sections of a config file, unchecked.

    Args:
        origins: takes the place (file and line) of each key.

    Raises:
        ConfigError: it cannot be read, is no YAML of sections, or stands for more than a config can hold.
    """
    text = text_of(path)
    try:
        loader = ConfigLoader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: must hold sections ({', '.join(RunConfig.model_fields)}), each with its fields")
        check_values(node)
        _note_lines(node, (), path, {} if origins is None else origins)
        values: dict[str, Any] = loader.construct_document(node)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {_yaml_problem(error)}") from None
    except BeyondBoundsError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, TypeError) as error:  # a number of 5000 digits, a date that is none, a list as key
        raise ConfigError(f"{path}: holds a value that is none: {redact(first_line(error))}") from None
    # An empty section ("pilot:" with all fields commented out) means its defaults.
    return {key: {} if value is None else value for key, value in values.items()}


def text_of(path: Path) -> str:
    """The text of a config file. Raises ConfigError where it cannot be read or is too long."""
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError, BeyondBoundsError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None


def _note_lines(node: yaml.MappingNode, above: KeyPath, path: Path, origins: dict[KeyPath, str]) -> None:
    for key, value in node.value:
        here = (*above, str(key.value))
        origins[here] = f"{path}, line {key.start_mark.line + 1}"
        if isinstance(value, yaml.MappingNode):
            _note_lines(value, here, path, origins)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, without what PyYAML quotes of the text: it may hold a secret (`*word` is an alias to it)."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
    return place + re.sub(r"'[^'<]{4,}'", f"'{STRUCK_OUT}'", str(what))
