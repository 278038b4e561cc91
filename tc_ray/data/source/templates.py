"""Rows of any columns as records: `data.prompt`, `data.completion` and `data.answer` are Jinja templates over a row.

Invariant: nothing is rendered that the row does not hold. A column that it lacks, a null (also in a filter or a
concatenation), a list and a method are bad rows, never empty text. Templates run in Jinja's sandbox. Pure; called by `encode`, after `data.convert`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from tc_ray.data.source.records import BadRow
from tc_ray.text import first_line

if TYPE_CHECKING:
    from jinja2 import Template

_KEPT = ("system", "prompt", "completion", "answer", "options")
"""Columns that mean what they mean without templates; a template replaces its own."""
_SHOWN_COLUMNS = 20


class _Unprintable(Exception):
    """A template prints what is no text."""


class _Null:
    """A null of a row: false, equal to none, and nothing that can become text, by whatever way."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Null)

    def __hash__(self) -> int:
        return hash(None)

    def __str__(self) -> str:
        raise _Unprintable(
            "it prints a null; write {{ COLUMN or '' }} or {% if COLUMN %} where a row may lack the text"
        )

    __repr__ = __str__


_NULL = _Null()


def filled(row: Any, templates: Mapping[str, str]) -> Any:
    """A row as a record, or what is wrong with it; what is no object is left to `to_example`, as is all without templates.

    templates: by the field of the record that each makes (prompt, completion, answer).
    """
    if not templates or not isinstance(row, dict):
        return row
    made = {name: row[name] for name in _KEPT if name in row}
    columns = _marked(row)
    for name, text in templates.items():
        try:
            made[name] = _compiled(text).render({"row": columns} | columns)
        except Exception as error:  # noqa: BLE001 - a template is a program; what it raises is its row's
            names = ", ".join(map(str, list(row)[:_SHOWN_COLUMNS])) or "(none)"
            more = f" and {len(row) - _SHOWN_COLUMNS} more" if len(row) > _SHOWN_COLUMNS else ""
            return BadRow(
                f"data.{name}",
                f"{first_line(error)}; the row has the columns {names}{more}",
                "correct the template (a column with other characters in its name is row['NAME']) or the row",
            )
    return made


@cache
def _compiled(text: str) -> Template:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=_printable, keep_trailing_newline=True, autoescape=False
    )
    environment.tests["none"] = lambda value: value is None or value is _NULL
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "default": _as_json}
    return environment.from_string(text)


def _marked(value: Any) -> Any:
    """A row's value with _NULL for its nulls, and for NaN, which pandas writes for them."""
    if isinstance(value, dict):
        return {name: _marked(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(_marked, value)] if isinstance(value, list) else (*map(_marked, value),)
    return _NULL if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _as_json(value: Any) -> None:
    """What the filter tojson writes for what JSON lacks: null for a null."""
    if value is not _NULL:
        raise TypeError(f"{type(value).__name__} is nothing that JSON has")


def _printable(value: Any) -> Any:
    """What a template may print."""
    from jinja2 import Undefined

    if isinstance(value, Undefined):
        return str(value)  # raises its own error
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return str(_NULL)  # raises its own error
    if callable(value):
        name = getattr(value, "__name__", "?")
        raise _Unprintable(f"it prints the method {name} of a value; write ['{name}'] for a key of that name")
    if isinstance(value, (Mapping, bytes, list, tuple, set, Iterator)):
        raise _Unprintable(f"it prints {type(value).__name__}; name the field in it, or use the filter join or tojson")
    return value
