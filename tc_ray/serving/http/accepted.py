"""Fields that ordinary clients send and that change no answer here: labels, and options at the value that does nothing.

Invariant: a label has any value of its type and is kept nowhere. Another option passes only at its neutral value; any
other is refused by name, with `INSTEAD`, as it would change the answer and is not offered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Nothing = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]

INSTEAD = {
    "presence_penalty": "only 0; `repetition_penalty` is offered",
    "frequency_penalty": "only 0; `repetition_penalty` is offered",
    "response_format": 'only {"type": "text"}: the form of an answer is not enforced',
    "tools": "only an empty list: tools are not offered; describe them in a message",
    "tool_choice": 'only "none" or "auto", as there are no tools',
    "functions": "only an empty list: functions are not offered; describe them in a message",
    "function_call": 'only "none" or "auto", as there are no functions',
    "modalities": 'only ["text"]',
    "audio": "only null: there is no sound",
    "min_p": "only 0; `top_p` and `top_k` are offered",
    "best_of": "only 1; ask for `n` and choose",
    "suffix": "only an empty text: nothing is inserted before it",
    "use_beam_search": "only false; beams are offered offline, by `FusedModel.generate`",
    "length_penalty": "only 1, as there are no beams",
    "skip_special_tokens": "only true",
    "include_stop_str_in_output": "only false",
    "tool_calls": "only an empty list: tools are not offered",
    "refusal": "only null",
    "annotations": "only an empty list",
    "parsed": "only null: the form of an answer is not enforced",
}
"""What is said of a field that has another value."""


class Strict(BaseModel):
    """Base of bodies: unknown fields are refused and no type is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)


class TextFormat(Strict):
    type: Literal["text"]


class Labels(Strict):
    """What a client writes for its own books."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Neutral(Labels):
    """Options of completions and chat at the value that changes nothing."""

    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    min_p: Zero | None = None
    length_penalty: One | None = None
    use_beam_search: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None
    include_stop_str_in_output: Literal[False] | None = None


class NeutralCompletion(Strict):
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


class NeutralChat(Strict):
    response_format: TextFormat | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None


class NeutralMessage(Strict):
    """Of a message: its author's name, and what answers of this and other servers bring back."""

    name: str | None = None
    refusal: None = None
    annotations: Nothing | None = None
    audio: None = None
    tool_calls: Nothing | None = None
    function_call: None = None
    parsed: None = None
