"""Record shapes: messages, prompt + completion, alpaca; each becomes one `Example`.

Invariant: an Example has at least one turn, the last one from the user, and no empty text. Pure functions, called in
Ray Data tasks by `prepare` and by nobody else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tc_ray.data.sources import BadRow

ROLES = ("system", "user", "assistant")
_SHAPES = "messages, or prompt + completion, or instruction (+ input) + output"


@dataclass(frozen=True)
class Turn:
    """One message before the completion."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """What the model is asked (`turns`), what it should say (`completion`), what counts as right (`answer`)."""

    turns: tuple[Turn, ...]
    completion: str | None
    answer: str | None


class _Refused(Exception):
    def __init__(self, field: str, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.bad = BadRow(field, problem, fix)


def to_example(value: Any, *, held_out: bool) -> Example | BadRow:
    """Turn one parsed record into an Example, or tell what is wrong with it.

    `held_out` rows (validation and test files) may lack the completion if they have an answer; training rows must
    have one.
    """
    try:
        if not isinstance(value, dict):
            raise _Refused("", f"is {_kind(value)}, not an object", f"write an object with {_SHAPES}")
        turns, completion = _split(value, held_out)
        answer = _answer(value)
        if completion is None and answer is None:
            raise _Refused("answer", "neither a completion nor an answer", "give one of them, else nothing to measure")
        return Example(turns, completion, answer)
    except _Refused as refused:
        return refused.bad


def _split(value: dict[str, Any], held_out: bool) -> tuple[tuple[Turn, ...], str | None]:
    if value.get("messages") is not None:
        return _from_messages(value["messages"], held_out)
    for prompt_field, completion_field in (("prompt", "completion"), ("instruction", "output")):
        if prompt_field in value:
            prompt = _text(value, prompt_field)
            if prompt_field == "instruction" and value.get("input") not in (None, ""):
                prompt = f"{prompt}\n{_text(value, 'input')}"
            if held_out and value.get(completion_field) is None:
                return (Turn("user", prompt),), None
            return (Turn("user", prompt),), _text(value, completion_field)
    raise _Refused("", f"has the fields {', '.join(map(str, value)) or '(none)'}", f"give {_SHAPES}")


def _from_messages(messages: Any, held_out: bool) -> tuple[tuple[Turn, ...], str | None]:
    if not isinstance(messages, list) or not messages:
        raise _Refused("messages", f"is {_kind(messages)}", "give a list of {role, content} objects")
    turns = []
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, dict):
            raise _Refused(field, f"is {_kind(message)}, not an object", "give {role, content}")
        role = message.get("role")
        if role not in ROLES:
            raise _Refused(f"{field}.role", f"is {role!r}", f"use one of {', '.join(ROLES)}")
        if role == "system" and index:
            raise _Refused(f"{field}.role", "is a system message after the first", "put the system message first")
        turns.append(Turn(role, _text(message, "content", f"{field}.content")))
    completion = turns.pop().content if turns[-1].role == "assistant" else None
    if completion is None and not held_out:
        raise _Refused("messages", f"ends with a {turns[-1].role} message", "end with what the assistant should say")
    if not turns or turns[-1].role != "user":
        raise _Refused("messages", "has no user message before the end", "put the user's message before the answer")
    return tuple(turns), completion


def _text(value: dict[str, Any], field: str, name: str | None = None) -> str:
    """The stripped, non-empty string in `field`."""
    name = name or field
    if value.get(field) is None:
        raise _Refused(name, "is missing", f"add {name} as text")
    text = value[field]
    if not isinstance(text, str):
        raise _Refused(name, f"is {_kind(text)}, not text", "write it as a string")
    if not text.strip():
        raise _Refused(name, "is empty", "fill it in or leave the record out")
    return text.strip()


def _answer(value: dict[str, Any]) -> str | None:
    answer = value.get("answer")
    if answer is None:
        return None
    if isinstance(answer, bool):
        return str(answer).lower()
    if isinstance(answer, (int, float)):
        return str(answer)
    if not isinstance(answer, str):
        raise _Refused("answer", f"is {_kind(answer)}", "write it as text or a number")
    return answer.strip() or None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
