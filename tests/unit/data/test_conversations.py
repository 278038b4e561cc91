"""Conversations through the preparation: joined rows, parts, numbers of targets, hashes, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tc_ray.config.data import DataSection
from tc_ray.data.encode.conversations import chains
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared.folder import PreparedData, rows_hashes
from tc_ray.data.prepared.prepare import prepare
from tests.support.data_writers import lines
from tests.support.shape_cases import tools_tokenizer
from tests.support.tiny_model import make_tokenizer


def talk(number: int, answers: int) -> dict[str, Any]:
    messages = []
    for turn in range(answers):
        messages += [
            {"role": "user", "content": f"{number}.{turn}"},
            {"role": "assistant", "content": "abcdefgh"[turn] * 2},
        ]
    return {"messages": messages}


TALKS = [talk(number, 1 + number % 3) for number in range(30)]


def prepared(folder: Path, rows: list[dict[str, Any]] = TALKS, **data: Any) -> PreparedData:
    file = lines(folder / "t.jsonl", rows)
    return prepare(Encoder(DataSection(train=str(file), **data), tools_tokenizer(), 1), folder / "out")


def part(found: PreparedData, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(found.file(name)).to_pylist()
    return rows


def test_a_conversation_is_one_training_row_and_falls_into_one_part(tmp_path: Path) -> None:
    """Earlier answers are targets of the row, in order; held out, the last answer alone is measured."""
    found = prepared(tmp_path)
    train, decode = part(found, "train"), make_tokenizer().decode
    assert len(train) == 24 and found.rows == {"train": 24, "validation": 3, "test": 3}
    number = 0
    for row in train:
        earlier = row["earlier_targets"] or []
        spans = [*zip(earlier[::2], earlier[1::2], strict=True), (row["target_start"], len(row["input_ids"]))]
        said = [decode(row["input_ids"][start:end]) for start, end in spans]
        assert said == [f"{letter * 2}<eos>" for letter in "abc"[: len(spans)]]
        assert row["sample_id"] == number  # of the first target
        number += len(spans)
        talks = {line.split(": ")[1].split(".")[0] for line in row["prompt"].splitlines() if line.startswith("user")}
        assert len(talks or {row["prompt"].split(".")[0]}) == 1
    begun = {
        row["prompt"].split("\n")[0].removeprefix("user: ")
        for name in ("train", "validation", "test")
        for row in part(found, name)
    }
    assert len(begun) == 30  # each conversation once
    for name in ("validation", "test"):
        for row in part(found, name):
            turns = 1 + int(row["prompt"].removeprefix("user: ").split(".")[0]) % 3
            assert row["completion"] == "abc"[turns - 1] * 2 and row["earlier_targets"] is None


def test_no_answer_is_trained_on_that_a_held_out_row_asks_for(tmp_path: Path) -> None:
    """Half of the conversations are the beginnings of the others."""
    begun = [{"messages": talk(number, 2)["messages"][:2]} for number in range(30)]
    found = prepared(tmp_path, [*begun, *(talk(number, 2) for number in range(30))])
    held_out = {row["prompt"] for name in ("validation", "test") for row in part(found, name)}
    asked = {prompt for prompt in held_out if not prompt.startswith("user")}
    assert asked and found.rows["train"] == 48
    trained = {row["prompt"] for row in part(found, "train")}
    assert not trained & held_out
    decode = make_tokenizer().decode
    for row in part(found, "train"):
        first = row["prompt"].split("\n")[0].removeprefix("user: ")
        if row["prompt"].startswith("user"):
            assert bool(row["earlier_targets"]) == (first not in asked), decode(row["input_ids"])
    assert any("earlier assistant messages answer what a held-out row asks" in note for note in found.notes)


def test_the_last_answer_alone(tmp_path: Path) -> None:
    """The same cut and rows, without the earlier targets; a resume sees that other targets are other rows."""
    every, last = prepared(tmp_path / "all"), prepared(tmp_path / "last", train_on="last")
    plain = [{**row, "earlier_targets": None, "sample_id": at} for at, row in enumerate(part(every, "train"))]
    assert part(last, "train") == plain
    hashes, others = rows_hashes(every.folder), rows_hashes(last.folder)
    assert hashes["train"] != others["train"] and hashes["test"] == others["test"]


def test_answers_that_do_not_fit_are_left_out_and_counted(tmp_path: Path) -> None:
    long = {"messages": [*talk(99, 2)["messages"], {"role": "user", "content": "w" * 300}, TALKS[0]["messages"][1]]}
    found = prepared(tmp_path, [*TALKS, long], validation_size=0.01, test_size=0)
    assert found.long_turns == 1 and found.too_long == 0 and found.records == {"train": 31}
    assert any("longer than data.cutoff_tokens: 1 later assistant messages" in line for line in found.describe())
    kept = [row for row in part(found, "train") if "99.0" in row["prompt"]]
    assert [row["completion"] for row in kept] == ["bb"]


def test_only_rows_that_begin_alike_are_joined() -> None:
    first, second = [5, 6, 7, 1], [5, 6, 7, 1, 8, 9, 1]
    assert list(chains([(first, 2), (second, 5)])) == [(1, [2, 4])]
    assert list(chains([(first, 2), (second, 3)])) == [
        (0, []),
        (1, []),
    ]  # the second one's target begins within the first
    assert list(chains([([5, 6, 8, 1], 2), (second, 5)])) == [(0, []), (1, [])]
    assert list(chains([(first, 2), ([9, *second], 6), ([9, *second, 4, 4], 9)])) == [(0, []), (2, [6, 8])]
