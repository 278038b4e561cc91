"""Record shapes: messages, prompt + completion, alpaca; each becomes one `Example`.

Invariant: an Example has at least one turn, the last one from the user, and no empty text. Texts are as they were written,
blanks and line ends included. Pure functions, called by `encode`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tc_ray.data.source.records import ONE_OBJECT, BadRow

ROLES = ("system", "user", "assistant")
_SHOWN_FIELDS = 10
_WHOLE = 2.0**53
"""From here on not every whole number is a float."""
_SHAPES = "messages, or prompt + completion, or instruction (+ input) + output"


@dataclass(frozen=True)
class Turn:
    """One message before the completion."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """The prompt (`turns`), the text to learn (`completion`), and the answer that counts as right (`answer`)."""

    turns: tuple[Turn, ...]
    completion: str | None
    answer: str | None
    options: tuple[str, ...] = ()
    """Completions that the right one is chosen from."""


class _Refused(Exception):
    def __init__(self, field: str, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.bad = BadRow(field, problem, fix)


def to_example(value: Any, *, held_out: bool) -> Example | BadRow:
    """One parsed record as an Example, or what is wrong with it.

    A row of a validation or test file (`held_out`) may lack the completion if it has an answer.
    """
    try:
        if not isinstance(value, dict):
            raise _Refused("", f"is {type(value).__name__}, not an object", f"write an object with {_SHAPES}")
        turns, completion = _split(value, held_out)
        answer, options = _answer(value), _options(value)
        if isinstance(number := value.get("answer"), int) and options and answer not in options:
            answer = options[number] if 0 <= number < len(options) else answer
        if completion is None and answer is None:
            raise _Refused("answer", "neither a completion nor an answer", "give one of them, else nothing to measure")
        return Example(turns, completion, answer, options)
    except _Refused as refused:
        return refused.bad


def _get(value: dict[str, Any], field: str) -> Any:
    """The field's value; None where it is absent, or NaN, which pandas writes for that."""
    found = value.get(field)
    return None if isinstance(found, float) and math.isnan(found) else found


def _split(value: dict[str, Any], held_out: bool) -> tuple[tuple[Turn, ...], str | None]:
    if _get(value, "messages") is not None:
        return _from_messages(value["messages"], held_out)
    for prompt_field, completion_field in (("prompt", "completion"), ("instruction", "output")):
        if prompt_field in value:
            prompt = _text(value, prompt_field)
            if prompt_field == "instruction" and _get(value, "input") not in (None, ""):
                prompt = f"{prompt}\n{_text(value, 'input')}"
            if held_out and _get(value, completion_field) is None:
                return (Turn("user", prompt),), None
            return (Turn("user", prompt),), _text(value, completion_field)
    raise _Refused(
        "",
        f"has the fields {', '.join(map(str, list(value)[:_SHOWN_FIELDS])) or '(none)'}",
        f"give {_SHAPES}; {ONE_OBJECT}",
    )


def _from_messages(messages: Any, held_out: bool) -> tuple[tuple[Turn, ...], str | None]:
    if not isinstance(messages, list) or not messages:
        raise _Refused("messages", f"is {type(messages).__name__}", "give a list of {role, content} objects")
    turns = []
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, dict):
            raise _Refused(field, f"is {type(message).__name__}, not an object", "give {role, content}")
        role = message.get("role")
        if role not in ROLES:
            raise _Refused(f"{field}.role", f"is {role!r}", f"use one of {', '.join(ROLES)}")
        if role == "system" and index:
            raise _Refused(f"{field}.role", "is a system message after the first", "put the system message first")
        turns.append(Turn(role, _text(message, "content", f"{field}.content")))
    completion = turns.pop().content if turns[-1].role == "assistant" else None
    if completion is None and not held_out:
        raise _Refused("messages", f"ends with a {turns[-1].role} message", "end with the assistant's message")
    if not turns or turns[-1].role != "user":
        raise _Refused("messages", "has no user message before the end", "put the user's message before the answer")
    return tuple(turns), completion


def _text(value: dict[str, Any], field: str, name: str | None = None) -> str:
    """The string in `field`, unchanged; it must hold more than blanks."""
    name = name or field
    text = _get(value, field)
    if text is None:
        raise _Refused(name, "is missing", f"add {name} as text")
    if not isinstance(text, str):
        raise _Refused(name, f"is {type(text).__name__}, not text", "write it as a string")
    if not text.strip():
        raise _Refused(name, "is empty", "fill it in or leave the record out")
    _check_unicode(text, name)
    return text


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Refused(
            name, f"is not valid Unicode at character {error.start + 1}", "write the text as UTF-8, surrogates in pairs"
        ) from None


def _options(value: dict[str, Any]) -> tuple[str, ...]:
    options = _get(value, "options")
    if options is None or (isinstance(options, list) and not options):
        return ()
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise _Refused("options", "is no list of texts", "write the completions to choose from as a list of strings")
    for option in options:
        _check_unicode(option, "options")
    if len(set(options)) < max(2, len(options)):
        raise _Refused("options", "has one text, or one twice", "give at least two different ones")
    return tuple(options)


def _answer(value: dict[str, Any]) -> str | None:
    answer = _get(value, "answer")
    if answer is None:
        return None
    if isinstance(answer, bool):
        return str(answer).lower()
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < _WHOLE:
        return str(int(answer))  # pandas writes whole numbers as floats where one is absent
    if isinstance(answer, (int, float)):
        return str(answer)
    if not isinstance(answer, str):
        raise _Refused("answer", f"is {type(answer).__name__}", "write it as text or a number")
    _check_unicode(answer, "answer")
    return answer.strip() or None
