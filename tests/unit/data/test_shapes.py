"""Record shapes of other tools as examples, and as token ids: conversations, tools, content parts, texts alone."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from tc_ray.config.data import DataSection
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.source.messages import Turn
from tc_ray.data.source.records import BadRow, Record
from tc_ray.data.source.shapes import Example, to_example
from tests.support.shape_cases import tools_tokenizer, weather
from tests.support.tiny_model import make_tokenizer

USER, SAYS = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
ASKED, SYSTEM = Turn("user", "u"), Turn("system", "s")
EARLIER = Example((ASKED, Turn("assistant", "a"), Turn("user", "again")), "b", None, earlier=(1,))


def rows_of(record: dict[str, Any], held_out: bool = False, **data: Any) -> list[dict[str, Any]]:
    return Encoder(DataSection(**data), tools_tokenizer(), 1).rows(Record(1, "line", "", record), held_out=held_out)


def learned(record: dict[str, Any], **data: Any) -> list[tuple[str, str]]:
    """Prompt and target of each row as text."""
    rows, decode = rows_of(record, **data), make_tokenizer().decode
    return [(decode(r["input_ids"][: r["target_start"]]), decode(r["input_ids"][r["target_start"] :])) for r in rows]


@pytest.mark.parametrize(
    ("value", "example"),
    [
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            Example((ASKED,), "a", None),
        ),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            Example((SYSTEM, ASKED), "a", None),
        ),
        ({"messages": [{"role": "developer", "content": "s"}, USER, SAYS]}, Example((SYSTEM, ASKED), "a", None)),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]},
                    SAYS,
                ]
            },
            Example((Turn("user", "uv"),), "a", None),
        ),
        ({"prompt": [USER], "completion": [SAYS]}, Example((ASKED,), "a", None)),
        ({"prompt": [USER], "completion": "a"}, Example((ASKED,), "a", None)),
        ({"prompt": "u", "completion": [SAYS], "system": "s"}, Example((SYSTEM, ASKED), "a", None)),
        # of a prompt with earlier answers only the completion is learned, as TRL does
        (
            {"prompt": [USER, SAYS, {"role": "user", "content": "again"}], "completion": [{**SAYS, "content": "b"}]},
            Example(EARLIER.turns, "b", None),
        ),
        ({"messages": [USER, SAYS, {"role": "user", "content": "again"}, {**SAYS, "content": "b"}]}, EARLIER),
        ({"instruction": "again", "output": "b", "history": [["u", "a"]]}, EARLIER),
        ({"instruction": "u", "input": "", "output": "a", "system": "", "history": []}, Example((ASKED,), "a", None)),
        (
            {"messages": [USER, {**SAYS, "weight": 0}, {"role": "user", "content": "again"}, {**SAYS, "content": "b"}]},
            Example(EARLIER.turns, "b", None),
        ),
        (
            {"messages": [USER, SAYS, {"role": "user", "content": "again"}, {**SAYS, "content": "b", "weight": 0}]},
            Example((ASKED,), "a", None),
        ),
        # a greeting answers nothing
        (
            {
                "conversations": [
                    {"from": "gpt", "value": "hi"},
                    {"from": "human", "value": "u"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            Example((Turn("assistant", "hi"), ASKED), "a", None),
        ),
        ({"question": "u", "answer": "a b"}, Example((ASKED,), "a b", None)),
        ({"question": "u", "answer": 3.0}, Example((ASKED,), "3", None)),
        ({"prompt": None, "completion": None, "question": "u", "answer": "a"}, Example((ASKED,), "a", None)),
        ({"text": " t\n"}, Example((), " t\n", None, whole=True)),
        ({"text": "t", "output": None, "answer": "", "tools": []}, Example((), "t", None, whole=True)),
        ({"prompt": "u", "completion": "a", "input": "", "context": None}, Example((ASKED,), "a", None)),
        (
            {"prompt": "u", "completion": "a", "options": ["a", "b"], "answer": 1},
            Example((ASKED,), "a", "b", ("a", "b")),
        ),
        (
            {"prompt": "u", "completion": "a", "options": ["a", "b"], "answer": True},
            Example((ASKED,), "a", "true", ("a", "b")),
        ),
    ],
)
def test_shapes_of_other_tools(value: dict[str, Any], example: Example) -> None:
    assert to_example(value, held_out=False) == example


def test_calls_in_three_spellings_are_one() -> None:
    """OpenAI's, its older one, and ShareGPT's function_call; arguments become an object, as templates want them."""
    function = {"name": "w", "arguments": '{"city": "Bonn"}'}
    spellings = [
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
            ]
        },
        {"messages": [USER, {"role": "assistant", "content": None, "function_call": function}]},
        {
            "conversations": [
                {"from": "human", "value": "u"},
                {"from": "function_call", "value": '{"name": "w", "arguments": {"city": "Bonn"}}'},
            ]
        },
    ]
    call = {"type": "function", "function": {"name": "w", "arguments": {"city": "Bonn"}}}
    for value in spellings:
        assert to_example(value, held_out=False) == Example((ASKED,), "", None, more={"tool_calls": [call]})


def test_a_call_has_its_own_arguments_after_a_table_too() -> None:
    """Arrow gives each row the arguments of all rows, as null; a null in JSON text was written by someone."""

    def made(arguments: Any) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": "w", "arguments": arguments}}]
        return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}]}

    rows = pa.Table.from_pylist([made({"city": "Bonn", "at": {"day": 1}}), made({"unit": "C", "at": {"hour": 2}})])
    found = [to_example(row, held_out=False) for row in rows.to_pylist()]
    found.append(to_example(made('{"city": null}'), held_out=False))
    assert [example.more["tool_calls"][0]["function"]["arguments"] for example in found] == [
        {"city": "Bonn", "at": {"day": 1}},
        {"unit": "C", "at": {"hour": 2}},
        {"city": None},
    ]


@pytest.mark.parametrize(
    ("value", "field", "problem"),
    [
        ({"chosen": [USER, SAYS], "rejected": [USER, SAYS]}, "rejected", "is a preference file"),
        ({"prompt": "p", "completion": "c", "kto_tag": True}, "kto_tag", "is a preference file"),
        ({"messages": [USER, SAYS, SAYS]}, "messages[2].role", "second assistant message in a row"),
        ({"messages": [USER, {**SAYS, "weight": 0}]}, "messages", "no assistant message with a weight of 1"),
        ({"messages": [USER, {**SAYS, "weight": 0.5}]}, "messages[1].weight", "is 0.5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAYS]},
            "messages[0].content[0]",
            "image_url",
        ),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content", "is missing"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0]", "no function"),
        ({"conversations": [{"from": "human", "value": "u"}]}, "conversations", "ends with a user message"),
        ({"conversations": [{"from": "narrator", "value": "u"}]}, "conversations[0].from", "is 'narrator'"),
        (
            {"conversations": [{"from": "function_call", "value": "w()"}]},
            "conversations[0].value",
            "no tool call as JSON",
        ),
        ({"prompt": [USER, SAYS], "completion": "c"}, "prompt", "ends with a assistant message"),
        ({"prompt": [USER], "completion": [USER, SAYS]}, "completion[0].role", "is 'user'"),
        ({"instruction": "i", "output": "o", "history": ["a"]}, "history", "no list of [question, answer] pairs"),
        ({"instruction": "i", "output": "o", "history": [["a", None]]}, "history[0][1]", "is missing"),
        ({"messages": [SYSTEM.__dict__, USER, SAYS], "system": "t"}, "system", "differs"),
        ({"messages": [USER, SAYS], "tools": "w"}, "tools", "is NoneType"),
        ({"question": "q", "answer": "a", "context": "c"}, "context", "would not be read"),
        ({"question": "q"}, "answer", "is missing"),
        ({"text": "t", "label": 1}, "label", "would not be read"),
        *(
            ({"text": "t", name: "x"}, name, "stands beside text and would not be read")
            for name in ("completion", "output", "answer", "options", "input", "system", "tools")
        ),
        *(
            ({"question": "q", "answer": "a", name: "x"}, name, "stands beside question")
            for name in ("completion", "output")
        ),
        *(
            ({"prompt": "p", "completion": "c", name: "x"}, name, "stands beside prompt")
            for name in ("input", "context")
        ),
        ({"instruction": "i", "output": "o", "context": "c"}, "context", "stands beside instruction"),
    ],
)
def test_what_no_shape_has_is_named(value: dict[str, Any], field: str, problem: str) -> None:
    bad = to_example(value, held_out=False)
    assert isinstance(bad, BadRow) and bad.field == field and problem in bad.problem and bad.fix


def test_a_held_out_conversation_that_ends_with_the_user_is_asked_for_its_answer() -> None:
    value = {"messages": [USER, SAYS, {"role": "user", "content": "again"}], "answer": "b"}
    assert to_example(value, held_out=True) == Example(EARLIER.turns, None, "b")


# -- as tokens ------------------------------------------------------------------------------------------------------


def test_every_answer_of_a_conversation_is_a_target_after_what_was_said_before_it() -> None:
    value = {"messages": [USER, SAYS, {"role": "user", "content": "again"}, {**SAYS, "content": "b"}]}
    first, second = (
        ("<user>u<assistant>", "a<eos>"),
        ("<user>u<assistant>a<eos><user>again<assistant>", "b<eos>"),
    )
    assert learned(value) == [first, second]
    assert learned(value, train_on="last") == [second]
    assert [row["turn"] for row in rows_of(value)] == [0, 1] and len({row["key"] for row in rows_of(value)}) == 2
    assert [row["completion"] for row in rows_of(value, held_out=True)] == ["b"]
    # what no longer fits is left out: the answers before it stay
    assert [row["kind"] for row in rows_of(value, cutoff_tokens=40)] == ["row", "long"]


def test_tools_are_as_the_chat_template_writes_them() -> None:
    """Definitions, a call as the target, the tool's answer, and a text."""
    value = weather(7) | {"tools": '[{"name": "w", "parameters": {"unit": null}}]'}
    begin = '<tools>{"type": "function", "function": {"name": "w", "parameters": {}}}<user>weather 7<assistant>'
    call = '<call>{"name": "w", "arguments": {}}</call><eos>'
    assert learned(value) == [(begin, call), (f"{begin}{call}<tool>sun<assistant>", "It is sunny<eos>")]
    asked, _ = rows_of(value)
    assert asked["completion"] == call.removesuffix("<eos>") and asked["prompt"] == "weather 7"


def test_the_name_of_a_special_token_in_a_call_is_text() -> None:
    tokenizer = tools_tokenizer()
    value = weather(1)
    value["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"<eos>": "<eos>"}'
    for row in rows_of(value):
        assert row["input_ids"].count(tokenizer.eos_token_id) == row["turn"] + 1
        assert tokenizer.decode(row["input_ids"]).count("<eos>") == row["turn"] + 3


def test_of_a_text_alone_every_token_is_a_target() -> None:
    """All but the first, which nothing predicts where the tokenizer has no begin token."""
    assert learned({"text": "one two"}) == [("o", "ne two<eos>")]
    assert len({rows_of({"text": text})[0]["key"] for text in "abc"}) == 3
    (bad,) = rows_of({"text": "one"}, completion_pattern="o")
    assert bad["kind"] == "bad" and bad["field"] == "text"
    (bad,) = Encoder(DataSection(), make_tokenizer(), 1, encoder_decoder=True).rows(
        Record(1, "line", "", {"text": "one"}), held_out=False
    )
    assert bad["field"] == "text" and "encoder" in bad["problem"]
