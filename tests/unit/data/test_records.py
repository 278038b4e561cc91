"""Files, record shapes, prompts, tokens and the split: what needs no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tc_ray.config.data import DataSection
from tc_ray.data.encode.encode import Encoder, cut, prompt_key
from tc_ray.data.encode.prompts import render_prompt
from tc_ray.data.encode.tokenize import encode
from tc_ray.data.source.embedded import write_embedded
from tc_ray.data.source.readers import iter_records
from tc_ray.data.source.records import BadRow, DataError
from tc_ray.data.source.shapes import Example, Turn, to_example
from tc_ray.evaluation.answers.numbers import evaluate_expression

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(*, begin: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, so that expected ids can be counted by eye."""
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"[bos]": 256, "[eos]": 257}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if begin:
        backend.post_processor = processors.TemplateProcessing(single="[bos] $A", special_tokens=[("[bos]", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[bos]", eos_token="[eos]", pad_token="[eos]", chat_template=CHAT
    )


def test_bad_lines_are_single_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\nnot json\n\xff\xfe\n{"b": 2}')
    records = list(iter_records(path))
    assert [(record.place, record.unit) for record in records] == [(1, "line"), (3, "line"), (4, "line"), (5, "line")]
    assert [isinstance(record.value, BadRow) for record in records] == [False, True, True, False]
    assert "UTF-8" in records[2].value.problem


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_no_encoding_is_guessed(tmp_path: Path, encoding: str) -> None:
    """A fault found by attack: json guessed the encoding line by line, so that some lines of such a file were rows."""
    rows = "".join(f'{{"prompt": "{i}", "completion": "c"}}\n' for i in range(20))
    (tmp_path / "x.jsonl").write_bytes(rows.encode(encoding))
    assert all(isinstance(record.value, BadRow) for record in iter_records(tmp_path / "x.jsonl"))
    (tmp_path / "x.json").write_bytes('[{"a": 1}]'.encode(encoding))
    try:
        records = list(iter_records(tmp_path / "x.json"))
    except DataError as error:
        assert "x.json: not JSON" in str(error)
    else:  # it does not begin with a bracket
        assert all(isinstance(record.value, BadRow) for record in records)


def test_json_array_and_lines_in_one_suffix(tmp_path: Path) -> None:
    array, lines = tmp_path / "a.json", tmp_path / "b.json"
    array.write_text('\n [{"a": 1}, {"a": 2}]')
    lines.write_text('{"a": 1}\n{"a": 2}\n')
    assert [record.value for record in iter_records(array)] == [record.value for record in iter_records(lines)]
    array.write_text('[{"a": 1},\n {"a" 2}]')
    with pytest.raises(DataError, match=r"a\.json: not JSON .*line 2 column 7"):
        list(iter_records(array))


def test_parquet_rows_and_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["p", "q"], "completion": ["c", None]}), path)
    records = list(iter_records(path))
    assert [(record.place, record.unit) for record in records] == [(1, "row"), (2, "row")]
    assert to_example(records[1].value, held_out=False) == BadRow("completion", "is missing", "add completion as text")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"x\.parquet: not a readable Parquet file"):
        list(iter_records(path))


@pytest.mark.parametrize(
    ("value", "example"),
    [
        ({"prompt": " p ", "completion": "  c\n"}, Example((Turn("user", " p "),), "  c\n", None)),
        ({"instruction": "i", "input": "n", "output": "o", "answer": 7}, Example((Turn("user", "i\nn"),), "o", "7")),
        ({"instruction": "i", "input": "", "output": "o", "answer": True}, Example((Turn("user", "i"),), "o", "true")),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            Example((Turn("system", "s"), Turn("user", "u")), "a", None),
        ),
        # a Parquet file with the union of two shapes leaves the other columns null
        ({"messages": None, "prompt": "p", "completion": "c"}, Example((Turn("user", "p"),), "c", None)),
    ],
)
def test_shapes(value: dict[str, Any], example: Example) -> None:
    assert to_example(value, held_out=False) == example


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ([], ""),
        ({"texts": "t"}, ""),
        ({"prompt": "p"}, "completion"),
        ({"prompt": "", "completion": "c"}, "prompt"),
        ({"prompt": 3, "completion": "c"}, "prompt"),
        ({"instruction": "i", "input": ["x"], "output": "o"}, "input"),
        ({"instruction": "i", "output": "  "}, "output"),
        ({"prompt": "p", "completion": "c", "answer": {}}, "answer"),
        ({"messages": "m"}, "messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "u"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
    ],
)
def test_bad_shapes_name_the_field(value: Any, field: str) -> None:
    bad = to_example(value, held_out=False)
    assert isinstance(bad, BadRow)
    assert bad.field == field and bad.problem and bad.fix


def test_held_out_rows_may_lack_the_completion_but_not_the_answer_too() -> None:
    row = {"prompt": "p", "answer": "1"}
    assert to_example(row, held_out=True) == Example((Turn("user", "p"),), None, "1")
    assert isinstance(to_example(row, held_out=False), BadRow)
    assert to_example({"prompt": "p"}, held_out=True) == BadRow(
        "answer", "neither a completion nor an answer", "give one of them, else nothing to measure"
    )
    messages = [{"role": "user", "content": "u"}]
    assert to_example({"messages": messages, "answer": "1"}, held_out=True) == Example((Turn("user", "u"),), None, "1")


def test_chat_prompt_with_configured_system() -> None:
    tokenizer = byte_tokenizer()
    user, own = Turn("user", "u"), Turn("system", "own")
    assert render_prompt([user], DataSection(), tokenizer) == "<user>u<assistant>"
    assert render_prompt([user], DataSection(system="s"), tokenizer) == "<system>s<user>u<assistant>"
    assert render_prompt([own, user], DataSection(system="s"), tokenizer) == "<system>own<user>u<assistant>"


def test_encode_loss_begins_after_the_prompt_and_ends_with_the_end_token() -> None:
    tokenizer = byte_tokenizer()
    config = DataSection(template="plain", plain_template="Q {prompt} {x}\n")
    tokens = encode(Example((Turn("user", "u {y}"),), "ab", None), config, tokenizer)
    assert tokens is not None
    assert tokenizer.decode(tokens.input_ids[: tokens.target_start]) == "Q u {y} {x}\n"
    assert tokenizer.decode(tokens.input_ids[tokens.target_start :]) == "ab[eos]"
    chat = encode(Example((Turn("user", "u"),), "ab", None), DataSection(), tokenizer)
    assert chat is not None
    assert tokenizer.decode(chat.input_ids) == "<user>u<assistant>ab[eos]"
    asked = encode(Example((Turn("user", "u"),), None, "1"), DataSection(), tokenizer)
    assert asked is not None and asked.input_ids == chat.input_ids[: chat.target_start]
    assert asked.target_start == len(asked.input_ids)


def test_plain_prompt_begins_as_the_tokenizer_does() -> None:
    config = DataSection(template="plain", plain_template="{prompt}")
    tokens = encode(Example((Turn("user", "u"),), "a", None), config, byte_tokenizer(begin=True))
    assert tokens is not None
    assert tokens.input_ids[0] == 256 and tokens.target_start == 2 and tokens.input_ids.count(256) == 1


def test_cutoff_cuts_completions_and_refuses_long_prompts() -> None:
    tokenizer = byte_tokenizer()
    example, asked = Example((Turn("user", "12345"),), "abc", None), Example((Turn("user", "12345"),), None, "1")

    def at(cutoff: int, example: Example = example) -> Any:
        config = DataSection(template="plain", plain_template="{prompt}", cutoff_tokens=cutoff)
        return encode(example, config, tokenizer)

    assert at(9).was_cut is False and len(at(9).input_ids) == 9
    assert at(8).was_cut and tokenizer.decode(at(8).input_ids) == "12345abc"
    assert tokenizer.decode(at(6).input_ids) == "12345a"
    assert at(5) is None
    assert len(at(5, asked).input_ids) == 5 and at(4, asked) is None


def test_template_is_checked() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    Encoder(DataSection(template="plain"), tokenizer, 0).check()
    with pytest.raises(DataError, match=r"data\.template=plain"):
        Encoder(DataSection(), tokenizer, 0).check()


def test_split_keeps_prompts_together_and_follows_the_seed_not_the_order() -> None:
    prompts = [f"prompt {index % 80}" for index in range(100)]
    keys = [prompt_key(prompt, 1) for prompt in prompts]
    parts = cut(keys, 0.1, 5)
    assert 10 <= parts.count("validation") <= 11 and 5 <= parts.count("test") <= 6
    assert all(len({part for key, part in zip(keys, parts, strict=True) if key == one}) == 1 for one in set(keys))
    assert cut(keys[::-1], 0.1, 5) == parts[::-1]
    assert cut([prompt_key(prompt, 2) for prompt in prompts], 0.1, 5) != parts
    assert prompt_key("What  is\nIT", 1) == prompt_key("what is it", 1) != prompt_key("what is -it", 1)
    assert "test" not in cut(keys, 0.1, 0)
    assert cut(["a", "b"], 0.01, 0).count("validation") == 1
    with pytest.raises(DataError, match="nothing to train on"):
        cut(["a", "a", "a"], 0.1, 0)


def test_embedded_rows_are_repeatable_and_right(tmp_path: Path) -> None:
    config = DataSection(embedded_rows=30)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_embedded(config, tmp_path / name, seed)
    a, b, c = ((tmp_path / name).read_text() for name in "abc")
    assert a == b != c
    rows = [json.loads(line) for line in a.splitlines()]
    assert len(rows) == 30
    for row in rows:
        expression = row["prompt"].split(":")[1].rstrip("= ")
        assert evaluate_expression(expression) == int(row["answer"])
        assert row["completion"] == f"The answer is {row['answer']}"
    with pytest.raises(DataError, match="embedded_task 'nope'"):
        write_embedded(DataSection(embedded_task="nope"), tmp_path / "d", 1)
    with pytest.raises(DataError, match="unexpected keyword"):
        write_embedded(DataSection(embedded_task_options={"nope": 1}), tmp_path / "d", 1)
