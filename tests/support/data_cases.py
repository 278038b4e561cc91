"""Inputs that went wrong for users of this and other tools, as small files made here; `CASES` says what is right for each.

Each writes its data below a folder and returns what `data.train` names. Used by tests/unit/data/test_cases.py, in this
process, and by tests/cluster/data/test_prepare.py, in Ray's tasks.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from tests.support.data_writers import (
    HELD,
    SUMS,
    bad_utf8,
    folder_of,
    one_file,
    parquet,
    saved_by_datasets,
    text,
    with_links,
)
from tests.support.tiny_model import make_tokenizer

STRICT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """make: writes the data. rows: (train, validation, test) where it is used, else `refused` in the one message.

    bad: (place, field, problem) of the quarantined rows; said: texts that stand in what the run says of its data.
    """

    name: str
    make: Callable[[Path], Path]
    rows: tuple[int, int, int] | None = None
    refused: tuple[str, ...] = ()
    bad: tuple[tuple[int, str, str], ...] = ()
    said: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[], PreTrainedTokenizerFast] | None = None

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        """The case's own, else by its template."""
        return (self.tokenizer or (strict_tokenizer if self.config.get("template") == "chat" else make_tokenizer))()


def with_odd(row: Any, at: int = 3) -> Callable[[], list[Any]]:
    """The sums with one odd row as line `at` + 1."""
    return lambda: [*SUMS[:at], row, *SUMS[at:]]


def chats(odd: list[dict[str, str]]) -> Callable[[], list[Any]]:
    good = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(60)
    ]
    return lambda: [*good[:7], {"messages": odd}, *good[7:]]


def strict_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = STRICT_TEMPLATE
    return tokenizer


USER, SAYS = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
ROWS = (52, 6, 6)
ONE_OBJECT = "write one JSON object per line, or a list of them"
CHAT = {"template": "chat"}

CASES = [
    # -- one odd row among good ones: quarantined with its place, the others are used (fault 18)
    Case(
        "template_raises",
        one_file(chats([USER, USER, SAYS])),
        (48, 6, 6),
        bad=((8, "", "cannot be encoded: TemplateError: Roles must alternate"),),
        config=CHAT,
    ),
    Case(
        "system_refused",
        one_file(chats([{"role": "system", "content": "s"}, USER, SAYS])),
        (48, 6, 6),
        bad=((8, "", "cannot be encoded: TemplateError: System role not supported"),),
        config=CHAT,
    ),
    Case(
        "surrogate",
        one_file(with_odd('{"prompt": "smile", "completion": "ok \\ud83d"}')),
        ROWS,
        bad=((4, "completion", "not valid Unicode at character 4"),),
    ),
    Case(
        "surrogate_in_list",
        lambda folder: text(json.dumps([*SUMS, {"prompt": "\udcff", "completion": "c"}]), "t.json")(folder),
        ROWS,
        bad=((65, "prompt", "not valid Unicode"),),
    ),
    Case(
        "latin1",
        one_file(with_odd('{"prompt":"café","completion":"x"}'.encode("latin-1"))),
        ROWS,
        bad=((4, "", "not UTF-8 at byte 15"),),
    ),
    Case(
        "long_integer",
        one_file(with_odd('{"prompt": "p", "completion": "c", "answer": ' + "7" * 5000 + "}")),
        ROWS,
        bad=((4, "", "cannot be read: Exceeds the limit"),),
    ),
    Case("too_deep", one_file(with_odd("[" * 100_000)), ROWS, bad=((4, "", "cannot be read"),)),
    Case(
        "empty_completions",
        one_file(lambda: [*SUMS, {"prompt": "e", "completion": ""}]),
        ROWS,
        bad=((65, "completion", "is empty"),),
    ),
    Case("nul", one_file(lambda: [{"prompt": f"a\0{i}", "completion": "c\0d"} for i in range(60)]), (48, 6, 6)),
    # -- too many of them: refused with file, row, reason and remedy
    Case(
        "two_per_cent_empty",
        one_file(lambda: [*SUMS[:62], {"prompt": "e", "completion": ""}, {"prompt": "f", "completion": "  "}]),
        refused=("2 of 64 rows are bad", "t.jsonl, line 63, field completion: is empty; fill it in"),
    ),
    Case(
        "bytes",
        parquet(prompt=[b"p"] * 60, completion=["c"] * 60),
        refused=("60 of 60", "row 1, field prompt: is bytes, not text"),
    ),
    Case(
        "one_bad_row_alone", one_file(lambda: ["{broken"]), refused=("1 of 1", "t.jsonl, line 1: not JSON", ONE_OBJECT)
    ),
    Case("nested", text(json.dumps({"version": "1", "data": SUMS}), "t.json"), refused=("t.json, line 1", ONE_OBJECT)),
    Case(
        "pretty",
        text("\n".join(json.dumps(row, indent=2) for row in SUMS), "t.json"),
        refused=("t.json, line 1", ONE_OBJECT),
    ),
    # -- nothing is left: refused with the arithmetic
    Case("empty", one_file(list), refused=("no row is left: its files hold no record; correct the path",)),
    Case(
        "one_row",
        one_file(lambda: SUMS[:1]),
        refused=(
            "data.test_size 0.1 (1 rows) is 2 rows, more than the 1 usable rows of data.train",
            "of 1 records 0 are bad",
        ),
    ),
    Case(
        "parts_larger_than_the_rows",
        one_file(lambda: SUMS[:50]),
        refused=(
            "data.validation_size 200 + data.test_size 300 is 500 rows, more than the 50 usable rows of data.train",
        ),
        config={"validation_size": 200, "test_size": 300},
    ),
    Case(
        "same_prompt",
        one_file(lambda: [{"prompt": "Write a haiku", "completion": f"h{i}"} for i in range(60)]),
        refused=("60 rows with 1 different prompts leave nothing to train on",),
    ),
    Case(
        "all_prompts_too_long",
        one_file(lambda: [{"prompt": "w " * 300, "completion": "x"}] * 60),
        refused=("of 60 records 0 are bad, 60 have a prompt longer than data.cutoff_tokens",),
    ),
    Case(
        "some_prompts_too_long",
        one_file(lambda: [*SUMS[:12], *({"prompt": "w " * 300 + str(i), "completion": "x"} for i in range(52))]),
        (10, 1, 1),
        said=("the prompt is longer than data.cutoff_tokens: 52 rows",),
    ),
    # -- targets (fault 17)
    Case(
        "pattern_optional",
        one_file(
            lambda: [{"prompt": f"p{i}", "completion": f"answer {i}" if i % 9 else "dont know"} for i in range(60)]
        ),
        (43, 5, 5),
        bad=tuple((place, "completion", "takes no text of it") for place in range(1, 61, 9)),
        config={"completion_pattern": r"answer (\d+)|dont know", "max_bad_fraction": 0.2},
    ),
    Case(
        "pattern_never",
        one_file(lambda: [{"prompt": f"p{i}", "completion": "dont know"} for i in range(60)]),
        refused=("60 of 60 rows are bad", "field completion: data.completion_pattern", "takes no text of it"),
        config={"completion_pattern": r"answer (\d+)|dont know", "max_bad_fraction": 1.0},
    ),
    # -- files of a folder (fault 19)
    Case(
        "eval_file",
        folder_of({"train.jsonl": SUMS, "eval.jsonl": HELD}),
        (58, 20, 6),
        said=("validation rows by their names: eval.jsonl",),
    ),
    Case(
        "split_dirs",
        folder_of({"train/part-0.jsonl": SUMS, "test/part-0.jsonl": HELD}),
        (58, 6, 20),
        said=("test/part-0.jsonl",),
    ),
    Case(
        "gsm_test",
        folder_of({"gsm.jsonl": SUMS, "gsm_test.jsonl": HELD}),
        (58, 6, 20),
        said=("test rows by their names: gsm_test",),
    ),
    Case(
        "other_words",
        folder_of(
            {"d.jsonl": SUMS, "testSet.jsonl": HELD[:10], "my_held-out.jsonl": HELD[10:], "devset/a.jsonl": HELD}
        ),
        (64, 20, 20),
        said=("devset/a.jsonl", "my_held-out.jsonl, testSet.jsonl"),
    ),
    Case(
        "hold_out",
        folder_of(
            {"d.jsonl": SUMS, "hold_out.jsonl": HELD[:7], "held-out.jsonl": HELD[7:13], "hold_out/a.jsonl": HELD[13:]}
        ),
        (58, 6, 20),
        said=("test rows by their names: held-out.jsonl, hold_out/a.jsonl, hold_out.jsonl",),
    ),
    Case(
        "links",
        with_links,
        ROWS,
        said=("left out of", "gone.jsonl, more"),
    ),
    Case(
        "only_held_out_beside_a_sheet",
        folder_of({"train.xlsx": ["PK"], "test.jsonl": SUMS}),
        refused=("file of train rows, only test.jsonl, train.xlsx; convert",),
    ),
    Case(
        "three_parts",
        folder_of({"train-00000-of-00001.jsonl": SUMS, "dev2.jsonl": HELD, "x.test.jsonl.gz": HELD}),
        (64, 20, 20),
        said=("dev2.jsonl", "x.test.jsonl.gz"),
    ),
    Case("testimonials", folder_of({"reviews.jsonl": SUMS[:40], "testimonials.jsonl": SUMS[40:]}), ROWS),
    Case(
        "devops", folder_of({"cooking.jsonl": SUMS[:20], "devops.jsonl": SUMS[20:40], "values.jsonl": SUMS[40:]}), ROWS
    ),
    Case(
        "only_held_out",
        folder_of({"test.jsonl": SUMS}),
        refused=("only test.jsonl", "name the file itself"),
    ),
    Case(
        "two_words", folder_of({"train_test.jsonl": SUMS}), refused=("train_test.jsonl", "words of test and train rows")
    ),
    Case("gz_file", one_file(lambda: SUMS, "t.jsonl.gz"), ROWS),
    Case("gz_folder", folder_of({"part-0.jsonl": SUMS[:40], "part-1.jsonl.gz": SUMS[40:]}), ROWS),
    Case("gz_cut", text(gzip.compress(b"x" * 5000)[:-12], "t.jsonl.gz"), refused=("t.jsonl.gz: cannot be read",)),
    Case(
        "csv_folder",
        folder_of({"a.jsonl": SUMS[:60], "b.csv": ["prompt,completion", *(f'"{i}, ""q""",c' for i in range(4))]}),
        ROWS,
    ),
    Case("sheet", folder_of({"a.jsonl": SUMS, "b.xlsx": ["PK"]}), ROWS, said=("left out of", "b.xlsx")),
    Case(
        "hub_folder",
        folder_of({"README.md": ["# rows"], "data/train-0.jsonl": SUMS, "dataset_infos.json": ['{"default": {}}']}),
        ROWS,
        said=("README.md, dataset_infos.json",),
    ),
    Case(
        "saved_by_datasets",
        saved_by_datasets,
        (58, 6, 20),
        said=("test rows by their names: test/data-00000-of-00001.arrow", "train/dataset_info.json, train/state.json"),
    ),
    Case(
        "no_arrow_file",
        folder_of({"data-00000-of-00001.arrow": ["x"], "state.json": ["{}"]}),
        refused=("data-00000-of-00001.arrow: not a readable Arrow file",),
    ),
    Case(
        "parquet_badutf8",
        bad_utf8,
        ROWS,
        bad=((4, "prompt", "not UTF-8 at byte 4"),),
    ),
    Case(
        "double",
        one_file(lambda: [f'{{"prompt":"a{i}","prompt":"b{i}","completion":"c"}}' for i in range(64)]),
        ROWS,
        said=("t.jsonl, line 1: the key prompt stands twice in one object; the last one counts",),
    ),
    # -- values, and what is not read
    Case(
        "nan_answer",
        one_file(lambda: [{"prompt": f"q{i}", "completion": f"c{i}", "answer": float("nan")} for i in range(60)]),
        (48, 6, 6),
    ),
    Case(
        "float_answer",
        parquet(
            prompt=[f"p{i}" for i in range(60)],
            completion=[str(i) for i in range(60)],
            answer=[float("nan") if i % 5 == 0 else float(i) for i in range(60)],
        ),
        (48, 6, 6),
    ),
    Case(
        "nan_prompt", one_file(with_odd('{"prompt": NaN, "completion": "c"}')), ROWS, bad=((4, "prompt", "is missing"),)
    ),
    Case(
        "bom_crlf",
        text(
            "\ufeff" + "\r\n\r\n".join([*map(json.dumps, SUMS[1:]), '{"prompt": "a\u2028b", "completion": "c"}']),
            "t.jsonl",
        ),
        ROWS,
    ),
    Case(
        "parquet_both",
        parquet(
            prompt=[f"p{i}" for i in range(60)], completion=["c"] * 60, messages=pa.nulls(60, pa.list_(pa.string()))
        ),
        (48, 6, 6),
    ),
]
