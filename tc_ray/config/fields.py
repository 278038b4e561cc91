"""The fields of the configuration as a table: dotted name, type, default, meaning, may it change on resume.

Invariant: all of it is read from the schema, so nothing is listed twice. Called by `config.load` (checks and messages),
`jobs/config_page.py` (docs/config.md), `run.state` (what a resume may change) and `tracking.mlflow_writer`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, reduce
from operator import getitem
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tc_ray.config.schema import RunConfig
from tc_ray.config.section import ON_RESUME
from tc_ray.config.yaml_file import KeyPath


@dataclass(frozen=True)
class ConfigField:
    """One field. path: its dotted name. may_change: a resumed run may have another value than its first start."""

    path: str
    info: FieldInfo
    may_change: bool


@cache
def config_fields() -> dict[KeyPath, ConfigField]:
    """Every field by its path, in the order of the schema."""
    return dict(_walk(RunConfig))


def public_values(config: RunConfig) -> dict[str, Any]:
    """The value of every field by its dotted name, JSON-ready and with secrets struck out."""
    dump = config.public_dump()
    return {field.path: reduce(getitem, path, dump) for path, field in config_fields().items()}


def names_in(section: KeyPath) -> list[str]:
    """Names of the fields and sections directly in a section; () is the whole config. Empty where it is no section."""
    below = (path[len(section)] for path in config_fields() if path[: len(section)] == section and path != section)
    return list(dict.fromkeys(below))


def types_at(key: KeyPath) -> set[Any]:
    """Types that the field at `key` takes, entries of a mapping counted as fields; empty: there is no such field."""
    if key in config_fields():
        return members(config_fields()[key].info.annotation)
    mapping = config_fields().get(key[:-1])
    if mapping is not None and get_origin(mapping.info.annotation) is dict:
        return members(get_args(mapping.info.annotation)[1])
    return {dict} if names_in(key) else set()


def _walk(model: type[BaseModel], above: KeyPath = (), free: bool = False) -> Iterator[tuple[KeyPath, ConfigField]]:
    for name, info in model.model_fields.items():
        path, may_change = (*above, name), free or ON_RESUME in info.metadata
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _walk(info.annotation, path, may_change)
        else:
            yield path, ConfigField(".".join(path), info, may_change)


def members(annotation: Any) -> set[Any]:
    """The types that an annotation joins."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return {kind for member in get_args(annotation) for kind in members(member)}
    return {annotation}
