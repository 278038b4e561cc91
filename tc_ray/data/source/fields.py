"""Fields of a parsed record: text that is there and valid, or `Refused` with what is wrong.

Invariant: text is returned as it was written, blanks and line ends included. Pure; called by `messages` and `shapes`.
"""

from __future__ import annotations

import math
from typing import Any

from tc_ray.data.source.records import BadRow


class Refused(Exception):
    """A record that cannot be used: `bad` names field, problem and remedy."""

    def __init__(self, field: str, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.bad = BadRow(field, problem, fix)


def get(value: dict[str, Any], field: str) -> Any:
    """The field's value; None where it is absent, or NaN, which pandas writes for that."""
    found = value.get(field)
    return None if isinstance(found, float) and math.isnan(found) else found


def text(value: dict[str, Any], field: str, name: str | None = None) -> str:
    """The string in `field`, unchanged; it must hold more than blanks. name: the field's name in messages."""
    name = name or field
    found = get(value, field)
    if found is None:
        raise Refused(name, "is missing", f"add {name} as text")
    return checked(found, name)


def checked(found: Any, name: str) -> str:
    """A value that must be a string of valid Unicode with more than blanks in it."""
    if not isinstance(found, str):
        raise Refused(name, f"is {type(found).__name__}, not text", "write it as a string")
    if not found.strip():
        raise Refused(name, "is empty", "fill it in or leave the record out")
    check_unicode(found, name)
    return found


def check_unicode(found: str, name: str) -> None:
    """Raise Refused where a text cannot be written as UTF-8."""
    try:
        found.encode()
    except UnicodeEncodeError as error:
        problem = f"is not valid Unicode at character {error.start + 1}"
        raise Refused(name, problem, "write the text as UTF-8, surrogates in pairs") from None
