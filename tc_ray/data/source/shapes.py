"""Record shapes, each becomes one `Example`: conversations, prompt + completion, alpaca, question + answer, text alone.

Invariant: an Example has at least one turn before its completion, the last one from the user or a tool, unless it is a text
alone. Texts are as they were written, blanks and line ends included. Pure functions, called by `encode`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tc_ray.data.source.fields import Refused, check_unicode, get, text
from tc_ray.data.source.messages import Conversation, Turn, conversation, said, tool_definitions
from tc_ray.data.source.records import ONE_OBJECT, BadRow

__all__ = ["SHAPES", "Example", "Turn", "to_example"]

_SHOWN_FIELDS = 10
_WHOLE = 2.0**53
"""From here on not every whole number is a float."""
_CONVERSATIONS = ("messages", "conversations")
SHAPES = (
    "messages (or conversations), or prompt + completion, or instruction (+ input) + output, or question + answer, "
    "or text alone"
)
_NOT_READ = {
    "text": ("label", "labels", "completion", "output", "answer", "options", "input", "system", "tools"),
    "question": ("context", "choices", "passage", "input", "options", "completion", "output"),
    "prompt": ("input", "context"),
    "instruction": ("context",),
}
"""Fields that belong to a row but have no place in a shape: to leave them out without a word would train on something else."""


@dataclass(frozen=True)
class Example:
    """The prompt (`turns`), the text to learn (`completion`), and the answer that counts as right (`answer`).

    options: completions that the right one is chosen from. more: of the message to learn, what a chat template writes besides its
    content (tool calls); completion may be empty then. earlier: places in `turns` of assistant messages that are to be learned too.
    tools: definitions that the chat template gets. whole: a text alone, without turns.
    """

    turns: tuple[Turn, ...]
    completion: str | None
    answer: str | None
    options: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    earlier: tuple[int, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    whole: bool = False

    @property
    def renders(self) -> bool:
        """Whether only a chat template can write it: it has tools, or reasoning apart from the content."""
        return bool(self.tools or self.more or any(turn.more or turn.role == "tool" for turn in self.turns))

    def replies(self) -> tuple[Example, ...]:
        """One example for each message to learn, with the messages before it as its prompt; the last one is this example."""
        before = (
            Example(self.turns[:at], self.turns[at].content or "", None, (), self.turns[at].more, (), self.tools)
            for at in self.earlier
        )
        return (*before, replace(self, earlier=()))


def to_example(value: Any, *, held_out: bool) -> Example | BadRow:
    """One parsed record as an Example, or what is wrong with it.

    A row of a validation or test file (`held_out`) may lack the completion if it has an answer.
    """
    try:
        if not isinstance(value, dict):
            raise Refused("", f"is {type(value).__name__}, not an object", f"write an object with {SHAPES}")
        _check_preference(value)
        if (only := _text_alone(value)) is not None:
            return Example((), only, None, whole=True)
        example = _example(value, held_out)
        if example.completion is None and example.answer is None:
            raise Refused("answer", "neither a completion nor an answer", "give one of them, else nothing to measure")
        return example
    except Refused as refused:
        return refused.bad


def _example(value: dict[str, Any], held_out: bool) -> Example:
    found, own_answer = _conversation(value, held_out)
    tools = () if get(value, "tools") is None else tool_definitions(value["tools"])
    answer, options = _answer(value) if own_answer else None, _options(value)
    number = value.get("answer")
    if isinstance(number, int) and not isinstance(number, bool) and options and answer not in options:
        answer = options[number] if 0 <= number < len(options) else answer
    turns, trained = found.turns, found.trained
    if turns[-1].role == "assistant":
        last = len(trained) - 1 - trained[::-1].index(True)  # what follows the last message to learn has no use
        reply, before = turns[last], turns[:last]
        earlier = tuple(i for i in range(last) if trained[i] and any(turn.role == "user" for turn in before[:i]))
        return Example(before, reply.content or "", answer, options, reply.more, earlier, tools)
    return Example(turns, None, answer, options, tools=tools)


def _check_preference(value: dict[str, Any]) -> None:
    if get(value, "chosen") is not None and get(value, "rejected") is not None:
        raise Refused(
            "rejected",
            "is a preference file (chosen and rejected)",
            "tc-ray learns from right completions only: write prompt and chosen as prompt + completion, and leave rejected out",
        )
    if get(value, "kto_tag") is not None:
        raise Refused(
            "kto_tag",
            "is a preference file (right and wrong completions)",
            "tc-ray learns from right completions only: keep the rows whose kto_tag is true, without that field",
        )


def _text_alone(value: dict[str, Any]) -> str | None:
    """The text of a row that has no prompt; None: it has another shape."""
    others = (*_CONVERSATIONS, "prompt", "instruction", "question")
    if get(value, "text") is None or any(get(value, name) is not None for name in others):
        return None
    _check_read(value, "text")
    return text(value, "text")


def _check_read(value: dict[str, Any], shape: str) -> None:
    for name in _NOT_READ[shape]:
        if get(value, name) not in (None, "", [], {}):
            fix = "write prompt + completion that hold it, or leave the field out"
            raise Refused(name, f"stands beside {shape} and would not be read", fix)


def _conversation(value: dict[str, Any], held_out: bool) -> tuple[Conversation, bool]:
    """The turns of a record, the completion among them, and whether its field `answer` is what is counted as right."""
    for name in _CONVERSATIONS:
        if get(value, name) is not None:
            return _ended(_with_system(value, conversation(value[name], name)), name, held_out), True
    # of columns that are null in this row another shape may be the row's
    pairs = sorted((("prompt", "completion"), ("instruction", "output")), key=lambda pair: get(value, pair[0]) is None)
    for prompt, completion in pairs:
        if prompt in value and (get(value, prompt) is not None or get(value, "question") is None):
            _check_read(value, prompt)
            asked = _asked(value, prompt)
            if held_out and get(value, completion) is None:
                return _with_system(value, asked), True
            return _with_system(value, asked + _reply(value, completion)), True
    if get(value, "question") is not None:
        _check_read(value, "question")
        asked = said("user", text(value, "question"))
        answer = _answer(value)
        if answer is None:
            raise Refused("answer", "is missing", "add answer as text or a number")
        # of numbers and choices the text that is learned is the answer itself
        return _with_system(value, asked + said("assistant", _written(value, answer))), False
    raise Refused(
        "",
        f"has the fields {', '.join(map(str, list(value)[:_SHOWN_FIELDS])) or '(none)'}",
        f"give {SHAPES}; {ONE_OBJECT}",
    )


def _written(value: dict[str, Any], answer: str) -> str:
    return value["answer"] if isinstance(value["answer"], str) else answer


def _asked(value: dict[str, Any], name: str) -> Conversation:
    """The turns before the completion: a text with alpaca's input and history, or messages."""
    if isinstance(value[name], list):
        found = conversation(value[name], name).untrained()
        if found.turns[-1].role not in ("user", "tool"):
            raise Refused(name, f"ends with a {found.turns[-1].role} message", "end it with the user's message")
        return found
    prompt = text(value, name)
    if name == "instruction" and get(value, "input") not in (None, ""):
        prompt = f"{prompt}\n{text(value, 'input')}"
    asked = said("user", prompt)
    history = get(value, "history") if name == "instruction" else None
    if history in (None, "", []):
        return asked
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Refused("history", "is no list of [question, answer] pairs", "give [[question, answer], ...]")
    before = Conversation((), ())
    for index, (question, reply) in enumerate(history):
        pair = {f"history[{index}][{at}]": one for at, one in enumerate((question, reply))}
        first, second = (text(pair, place) for place in pair)
        before += said("user", first) + said("assistant", second)
    return before + asked


def _reply(value: dict[str, Any], name: str) -> Conversation:
    """The completion: a text, or messages of which the assistant's are to be learned."""
    if not isinstance(value.get(name), list):
        return said("assistant", text(value, name))
    found = conversation(value[name], name)
    if found.turns[0].role != "assistant":
        raise Refused(f"{name}[0].role", f"is {found.turns[0].role!r}", "begin with the assistant's message")
    return _ended(found, name, False, asked=True)


def _ended(found: Conversation, name: str, held_out: bool, *, asked: bool = False) -> Conversation:
    """The conversation, which must end with the assistant (or, held out, with what it is to answer), after a user's message."""
    role = found.turns[-1].role
    if role != "assistant" and not held_out:
        raise Refused(name, f"ends with a {role} message", "end with the assistant's message")
    if not asked and not any(turn.role == "user" for turn in found.turns[: -1 if role == "assistant" else None]):
        raise Refused(name, "has no user message before the end", "put the user's message before the answer")
    if role == "assistant" and True not in found.trained:
        raise Refused(name, "has no assistant message with a weight of 1", "give one of them the weight 1")
    return found


def _with_system(value: dict[str, Any], found: Conversation) -> Conversation:
    """The turns after the record's field `system`."""
    if get(value, "system") in (None, ""):
        return found
    system = text(value, "system")
    if found.turns[0].role != "system":
        return said("system", system) + found
    if found.turns[0].content != system:
        raise Refused("system", "differs from the system message of the conversation", "leave one of them out")
    return found


def _options(value: dict[str, Any]) -> tuple[str, ...]:
    options = get(value, "options")
    if options is None or (isinstance(options, list) and not options):
        return ()
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise Refused("options", "is no list of texts", "write the completions to choose from as a list of strings")
    for option in options:
        check_unicode(option, "options")
    if len(set(options)) < max(2, len(options)):
        raise Refused("options", "has one text, or one twice", "give at least two different ones")
    return tuple(options)


def _answer(value: dict[str, Any]) -> str | None:
    answer = get(value, "answer")
    if answer is None:
        return None
    if isinstance(answer, bool):
        return str(answer).lower()
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < _WHOLE:
        return str(int(answer))  # pandas writes whole numbers as floats where one is absent
    if isinstance(answer, (int, float)):
        return str(answer)
    if not isinstance(answer, str):
        raise Refused("answer", f"is {type(answer).__name__}", "write it as text or a number")
    check_unicode(answer, "answer")
    return answer.strip() or None
