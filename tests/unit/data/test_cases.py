"""Odd inputs through the whole preparation: used, quarantined with their place, counted, or refused in one clear message.

Ray's tasks are replaced by a loop in this process; tests/cluster/data/test_prepare.py runs some of the cases in Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tc_ray.config.data import DataSection
from tc_ray.data.encode import encode as encode_module
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared.folder import SCHEMA, PreparedData
from tc_ray.data.prepared.prepare import prepare, prepare_test_file
from tc_ray.data.source.records import DataError
from tests.support.data_cases import CASES as ODD_CASES
from tests.support.data_cases import Case
from tests.support.data_writers import HELD, SUMS, lines
from tests.support.shape_cases import SHAPE_CASES
from tests.support.tiny_model import make_tokenizer

PARTS = ("train", "validation", "test")
CASES = [*ODD_CASES, *SHAPE_CASES]


def section(source: Path, **values: Any) -> DataSection:
    return DataSection(train=str(source), **({"template": "plain", "plain_template": "{prompt}>"} | values))


def prepare_case(case: Case, folder: Path) -> PreparedData:
    return prepare(Encoder(section(case.make(folder), **case.config), case.make_tokenizer(), 1), folder / "out")


def rows_of(prepared: PreparedData) -> Iterator[dict[str, Any]]:
    for part in PARTS:
        yield from pq.read_table(prepared.file(part)).to_pylist()


@pytest.mark.parametrize("case", [case for case in CASES if case.rows], ids=lambda case: case.name)
def test_what_can_be_used_is_used_and_the_rest_is_said(case: Case, tmp_path: Path) -> None:
    """Faults 13, 17, 18 and 19: a bad record is a bad row with its place, a file is a part or named as left out."""
    prepared = prepare_case(case, tmp_path)
    assert tuple(prepared.rows[part] for part in PARTS) == case.rows
    bad = [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["place"], row["field"]) for row in bad] == [(place, name) for place, name, _ in case.bad]
    for row, (_, _, problem) in zip(bad, case.bad, strict=True):
        assert problem in row["problem"] and row["fix"] and row["file"].startswith(str(tmp_path))
    described = "\n".join(prepared.describe())
    assert all(text in described for text in case.said), described
    for row in rows_of(prepared):
        assert "nan" not in (row["answer"] or "") and not (row["answer"] or "").endswith(".0")
        assert len(row["input_ids"]) > row["target_start"]
    trained = pq.read_table(prepared.file("train"))["prompt"].to_pylist()
    assert not any(prompt.startswith("HELD") for prompt in trained)


@pytest.mark.parametrize("case", [case for case in CASES if not case.rows], ids=lambda case: case.name)
def test_what_cannot_be_used_is_refused_in_one_message(case: Case, tmp_path: Path) -> None:
    """Faults 17, 18 and 19: file, row, reason and remedy, before any worker starts."""
    with pytest.raises(DataError) as caught:
        prepare_case(case, tmp_path)
    assert all(text in str(caught.value) for text in case.refused), caught.value
    assert "Traceback" not in str(caught.value)


# -- fault 17: text as it is written --------------------------------------------------------------------------------


def test_text_is_trained_on_exactly_as_it_is_written(tmp_path: Path) -> None:
    """Fault 17: leading blanks and final line ends of prompts and completions stood in the file and not in the tokens."""
    code = [(f"def f{i}(x):\n", f"    y = x + {i}\n    return y\n") for i in range(60)]
    shapes = [
        [{"prompt": prompt, "completion": completion} for prompt, completion in code],
        [{"instruction": prompt, "output": completion} for prompt, completion in code],
        [
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}
            for prompt, completion in code
        ],
    ]
    tokenizer = make_tokenizer()
    for number, rows in enumerate(shapes):
        file = lines(tmp_path / f"{number}.jsonl", rows)
        prepared = prepare(Encoder(section(file, plain_template="{prompt}"), tokenizer, 1), tmp_path / str(number))
        found = {
            (
                tokenizer.decode(row["input_ids"][: row["target_start"]]),
                tokenizer.decode(row["input_ids"][row["target_start"] :]).removesuffix("<eos>"),
            )
            for row in rows_of(prepared)
        }
        assert found == set(code)
        assert all((row["prompt"], row["completion"]) in set(code) for row in rows_of(prepared))


def test_the_training_table_refuses_rows_without_a_target(tmp_path: Path) -> None:
    """Fault 17: the loop divides the loss of a round by its target tokens."""
    from tc_ray.data.prepared.batches import TrainTable

    rows = [
        {"sample_id": 0, "input_ids": [5, 6], "target_start": 1},
        {"sample_id": 1, "input_ids": [5], "target_start": 1},
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet: 1 rows have no target token"):
        TrainTable(tmp_path / "train.parquet")


# -- fault 18: nothing escapes ----------------------------------------------------------------------------------------


def test_any_exception_of_one_record_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 18: whatever a record raises, its type and place stand in the quarantine and the other rows are used."""
    kept = encode_module.to_example

    def raises(value: Any, **held_out: bool) -> Any:
        if isinstance(value, dict) and value["prompt"] == "3+3":
            raise MemoryError("no room for \udcff")
        return kept(value, **held_out)

    monkeypatch.setattr(encode_module, "to_example", raises)
    prepared = prepare(Encoder(section(lines(tmp_path / "t.jsonl", SUMS)), make_tokenizer(), 1), tmp_path / "out")
    (bad,) = [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]
    assert bad["place"] == 28 and "MemoryError: no room for \\udcff" in bad["problem"] and bad["fix"]
    assert sum(prepared.rows.values()) == 63


def test_what_a_reader_raises_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 18: an error of the reader itself ends in one message, not in Ray's traceback."""

    def broken(path: Path) -> Iterator[Any]:
        yield from ()
        raise AssertionError("an unexpected error")

    monkeypatch.setattr("tc_ray.data.prepared.prepare.iter_records", broken)
    with pytest.raises(DataError, match=r"^\S+t\.jsonl: cannot be read: AssertionError: an unexpected error"):
        prepare(Encoder(section(lines(tmp_path / "t.jsonl", SUMS)), make_tokenizer(), 1), tmp_path / "out")


# -- fault 13, 19: parts --------------------------------------------------------------------------------------------


def test_a_test_set_that_ends_empty_is_refused_with_its_arithmetic(tmp_path: Path) -> None:
    """Fault 13: a test file whose rows are all left out."""
    train = lines(tmp_path / "t.jsonl", SUMS)
    test = lines(tmp_path / "test.jsonl", [{"prompt": "w " * 300, "completion": "c"}] * 6)
    arithmetic = "no test row is left: of 6 records 0 are bad, 6 have a prompt longer than data.cutoff_tokens"
    with pytest.raises(DataError, match=arithmetic):
        prepare(Encoder(section(train, test=str(test)), make_tokenizer(), 1), tmp_path / "out")
    with pytest.raises(DataError, match=arithmetic):
        prepare_test_file(Encoder(section(train), make_tokenizer(), 1), str(test), tmp_path / "eval")


def test_too_few_rows_for_a_round_are_refused_with_the_arithmetic(tmp_path: Path) -> None:
    rows = [*SUMS[:12], *({"prompt": "w " * 300, "completion": "x"} for _ in range(52))]
    prepared = prepare(Encoder(section(lines(tmp_path / "t.jsonl", rows)), make_tokenizer(), 1), tmp_path / "out")
    prepared.check_rounds(10)
    with pytest.raises(
        DataError, match=r"10 training rows .* 16: of 64 records 0 are bad, 52 have .* 1 are validation"
    ):
        prepared.check_rounds(16)


def test_a_named_test_file_wins_over_the_names_in_the_folder(tmp_path: Path) -> None:
    lines(tmp_path / "d" / "train.jsonl", SUMS)
    lines(tmp_path / "d" / "test.jsonl", HELD)
    own = lines(tmp_path / "own.jsonl", HELD[:7])
    prepared = prepare(Encoder(section(tmp_path / "d", test=str(own)), make_tokenizer(), 1), tmp_path / "out")
    assert prepared.rows["test"] == 7
    assert any("because data.test is set: test.jsonl" in line for line in prepared.describe())


def test_a_folder_as_test_data_gives_its_test_files(tmp_path: Path) -> None:
    lines(tmp_path / "d" / "train.jsonl", SUMS)
    lines(tmp_path / "d" / "test.jsonl", HELD)
    found = prepare_test_file(
        Encoder(section(tmp_path / "d"), make_tokenizer(), 1), str(tmp_path / "d"), tmp_path / "eval"
    )
    assert found.rows["test"] == 20 and any("train.jsonl" in note for note in found.notes)
