"""Messages of a conversation in the forms in which people have them, as turns: OpenAI's role/content, ShareGPT's from/value.

Invariant: a turn's content is as it was written, the texts of several content parts joined. What a chat template reads besides
(tool calls, the name of a tool, reasoning) stays on the turn. Pure; called by `shapes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tc_ray.data.source.fields import Refused, check_unicode, checked, get

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of roles in files, and the role that a chat template gets. Few templates know a developer, OpenAI's later name."""
_SHOWN_ROLES = "system, developer, user (human), assistant (gpt), tool (function, observation), function_call"
_RENDERED = {"assistant": ("tool_calls", "reasoning_content"), "tool": ("name", "tool_call_id")}
"""Fields that chat templates read besides role and content, by role."""
_CALLS = 'give [{"type": "function", "function": {"name": ..., "arguments": {...}}}]'


@dataclass(frozen=True)
class Turn:
    """One message. more: what the chat template gets besides. content: None in a message of tool calls alone."""

    role: str
    content: str | None
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """turns: in order, a system message only first. trained: of each turn, whether it is an answer to learn (OpenAI's `weight`
    0 says it is not)."""

    turns: tuple[Turn, ...]
    trained: tuple[bool, ...]

    def __add__(self, other: Conversation) -> Conversation:
        return Conversation(self.turns + other.turns, self.trained + other.trained)

    def untrained(self) -> Conversation:
        """The same turns, none of them to learn."""
        return Conversation(self.turns, (False,) * len(self.turns))


def said(role: str, content: str) -> Conversation:
    """A conversation of one message."""
    return Conversation((Turn(role, content),), (role == "assistant",))


def conversation(messages: Any, name: str) -> Conversation:
    """The messages in the record's field `name`. Raises Refused."""
    if not isinstance(messages, list) or not messages:
        kind = "an empty list" if messages == [] else type(messages).__name__
        raise Refused(name, f"is {kind}", "give a list of {role, content} objects")
    turns = [_turn(message, f"{name}[{index}]") for index, message in enumerate(messages)]
    for index, (turn, before) in enumerate(zip(turns[1:], turns, strict=False), start=1):
        if turn.role == "system":
            raise Refused(
                f"{name}[{index}].role", "is a system message after the first", "put the system message first"
            )
        if turn.role == before.role == "assistant":
            raise Refused(f"{name}[{index}].role", "is a second assistant message in a row", "make one message of both")
    weights = [_weight(message, f"{name}[{index}]") for index, message in enumerate(messages)]
    return Conversation(
        tuple(turns), tuple(turn.role == "assistant" and w for turn, w in zip(turns, weights, strict=True))
    )


def _turn(message: Any, place: str) -> Turn:
    if not isinstance(message, dict):
        raise Refused(place, f"is {type(message).__name__}, not an object", "give {role, content}")
    role_field, content_field = ("from", "value") if get(message, "from") is not None else ("role", "content")
    named = message.get(role_field)
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise Refused(f"{place}.{role_field}", f"is {named!r}", f"use one of {_SHOWN_ROLES}")
    more = {name: message[name] for name in _RENDERED.get(role, ()) if get(message, name) not in (None, [], "")}
    for name in more.keys() - {"tool_calls"}:
        checked(more[name], f"{place}.{name}")
    if role == "assistant" and get(message, "function_call") is not None:  # OpenAI's older form of one call
        more["tool_calls"] = [message["function_call"]]
    found = get(message, content_field)
    if named == "function_call":
        more["tool_calls"], found = _from_text(found, f"{place}.{content_field}"), None
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], f"{place}.tool_calls")
    place = f"{place}.{content_field}"
    if found is None or found == "":
        # templates ask for null in a message of calls; a tool may answer nothing
        if "tool_calls" not in more and not (role == "tool" and found == ""):
            if found is None:
                raise Refused(place, "is missing", f"add {place} as text")
            checked(found, place)
        return Turn(role, found, more)
    return Turn(role, _content(found, place, blank=role == "tool" or "tool_calls" in more), more)


def _content(found: Any, place: str, *, blank: bool) -> str:
    """A message's content: a text, or the joined texts of its parts."""
    if isinstance(found, list):
        for index, part in enumerate(found):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                problem = f"is a part of type {kind}"
                raise Refused(
                    f"{place}[{index}]", problem, 'only {"type": "text", "text": ...} parts can be trained on'
                )
        found = "".join(part["text"] for part in found)
    if blank and isinstance(found, str):
        check_unicode(found, place)
        return found
    return checked(found, place)


def _weight(message: dict[str, Any], place: str) -> bool:
    weight = get(message, "weight")
    if weight not in (None, 0, 1):
        raise Refused(f"{place}.weight", f"is {weight!r}", "use 1 for an answer to learn and 0 for one that is not")
    return weight != 0


def _from_text(found: Any, place: str) -> Any:
    """The calls that ShareGPT writes as the JSON text of one call, or of a list of them."""
    calls = _json(found) if isinstance(found, str) else found
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise Refused(place, "is no tool call as JSON", 'write {"name": ..., "arguments": {...}}')
    return calls


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates want them: each with its function, the arguments an object.

    A null in an object of arguments is left out: Arrow gives each row the arguments of all rows. In JSON text it stays.
    """
    if not isinstance(calls, list):
        raise Refused(place, f"is {type(calls).__name__}", _CALLS)
    made = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Refused(f"{place}[{index}]", "has no function with a name", _CALLS)
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # OpenAI writes them as JSON text, which a template would quote once more
            read = _json(arguments)
            arguments = read if isinstance(read, dict) else arguments
        else:
            arguments = _without_nulls(arguments)
        shown = {"name": function["name"], "arguments": {} if arguments in (None, "") else arguments}
        identity = {"id": call["id"]} if call.get("id") is not None else {}
        made.append({**identity, "type": "function", "function": shown})
    check_texts(made, place)
    return made


def tool_definitions(found: Any) -> tuple[dict[str, Any], ...]:
    """Definitions of tools in a record's field `tools`, each {type: function, function: {name, ...}}. Raises Refused."""
    if isinstance(found, str):
        found = _json(found) if found.strip() else []
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list):
        raise Refused("tools", f"is {type(found).__name__}", "give a list of tools, or that list as JSON text")
    made = []
    for index, one in enumerate(found):
        one = _json(one) if isinstance(one, str) else one
        function = one.get("function", one) if isinstance(one, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            fix = 'give {"type": "function", "function": {"name": ..., "parameters": {...}}}'
            raise Refused(f"tools[{index}]", "has no function with a name", fix)
        made.append({"type": "function", "function": _without_nulls(function)})
    check_texts(made, "tools")
    return tuple(made)


def check_texts(value: Any, place: str) -> None:
    """Raise Refused where a text anywhere in a JSON value is not valid Unicode."""
    for found in texts_in(value):
        check_unicode(found, place)


def texts_in(value: Any) -> list[str]:
    """All texts of a JSON value, names included, in the order in which `with_texts` takes them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [found for pair in value.items() for one in pair for found in texts_in(one)]
    if isinstance(value, (list, tuple)):
        return [found for one in value for found in texts_in(one)]
    return []


def _without_nulls(value: Any) -> Any:
    """A JSON value without its null fields: a column of Parquet gives every row the fields of all rows."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _json(found: str) -> Any:
    try:
        return json.loads(found)
    except (ValueError, RecursionError):
        return None
