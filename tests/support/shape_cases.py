"""Small inputs in the shapes of other tools, and what is right for each; beside `data_cases`, for the same tests."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.support.data_cases import CHAT, SAYS, USER, Case
from tests.support.data_writers import one_file
from tests.support.tiny_model import make_tokenizer


def weather(number: int) -> dict[str, Any]:
    """A conversation with a call of the tool `w` and its answer."""
    call = {"type": "function", "function": {"name": "w", "arguments": "{}"}}
    return {
        "messages": [
            {"role": "user", "content": f"weather {number}"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "sun"},
            {"role": "assistant", "content": "It is sunny"},
        ]
    }


TOOLS_TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for c in m['tool_calls'] or [] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Writes tools, calls and, as most templates do, the end token after each answer."""


def tools_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOLS_TEMPLATE
    return tokenizer


SHAPE_CASES = [
    Case(
        "preference",
        one_file(lambda: [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(60)]),
        refused=(
            "60 of 60",
            "is a preference file (chosen and rejected)",
            "write prompt and chosen as prompt + completion",
        ),
    ),
    Case(
        "tools_plain",
        one_file(lambda: [weather(i) for i in range(60)]),
        refused=("field messages: holds tool calls", "set data.template=chat"),
    ),
    Case(
        "tools_unknown_to_the_template",
        one_file(lambda: [weather(i) for i in range(60)]),
        refused=("field messages: the chat template does not write 'w'", "whose chat template knows tools"),
        config=CHAT,
        tokenizer=make_tokenizer,
    ),
    Case(
        "no_shape",
        one_file(lambda: [{"texts": f"Q: {i}"} for i in range(60)]),
        refused=("has the fields texts", "give messages (or conversations), or prompt + completion"),
    ),
    # -- the shapes of other tools
    Case("text", one_file(lambda: [{"text": f"Q: {i} A: {i}"} for i in range(60)]), (48, 6, 6)),
    Case(
        "sharegpt",
        one_file(
            lambda: [
                {"conversations": [{"from": "human", "value": f"Say {i}"}, {"from": "gpt", "value": str(i)}]}
                for i in range(60)
            ]
        ),
        (48, 6, 6),
    ),
    Case(
        "trl_conversation",
        one_file(lambda: [{"prompt": [{**USER, "content": f"u{i}"}], "completion": [SAYS]} for i in range(60)]),
        (48, 6, 6),
    ),
    Case("question_answer", one_file(lambda: [{"question": f"q{i}", "answer": i} for i in range(60)]), (48, 6, 6)),
    Case(
        "tools",
        one_file(lambda: [weather(i) for i in range(60)]),
        (48, 6, 6),
        said=("96 assistant messages of 48 training records are trained on, in 48 rows",),
        config=CHAT,
        tokenizer=tools_tokenizer,
    ),
    Case(
        "history",
        one_file(
            lambda: [
                {"instruction": f"i{i}", "input": "", "output": "o", "system": "S", "history": [["hi", "ahoy"]]}
                for i in range(60)
            ]
        ),
        (48, 6, 6),
        said=("96 assistant messages of 48 training records are trained on, in 48 rows",),
        config=CHAT,
        tokenizer=tools_tokenizer,
    ),
    Case(
        "multiturn",
        one_file(lambda: [{"messages": [USER, SAYS, {**USER, "content": f"u{i}"}, SAYS]} for i in range(60)]),
        (48, 6, 6),
        said=("96 assistant messages of 48 training records are trained on, in 48 rows",),
        config=CHAT,
        tokenizer=tools_tokenizer,
    ),
    Case(
        "multiturn_without_ends",  # the template writes no end token after earlier answers, which are trained with one
        one_file(lambda: [{"messages": [USER, SAYS, {**USER, "content": f"u{i}"}, SAYS]} for i in range(60)]),
        (96, 6, 6),
        said=("96 assistant messages of 48 training records are trained on, in 96 rows",),
        config=CHAT,
    ),
    Case(
        "multiturn_last",
        one_file(lambda: [{"messages": [USER, SAYS, {**USER, "content": f"u{i}"}, SAYS]} for i in range(60)]),
        (48, 6, 6),
        config={**CHAT, "train_on": "last"},
    ),
]
