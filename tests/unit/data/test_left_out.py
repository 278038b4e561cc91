"""What is missing from a held-out part is counted: in its file, in the report's lines, in its Markdown and its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tc_ray.config.data import DataSection
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared.folder import SCHEMA, LeftOut, PreparedData
from tc_ray.data.prepared.prepare import prepare, prepare_test_file
from tc_ray.evaluation.compare import line_of
from tc_ray.evaluation.report import Report
from tc_ray.evaluation.rows import RowResult, RowSet, read_sets
from tests.support.data_writers import SUMS, lines
from tests.support.evaluation_samples import report_of
from tests.support.tiny_model import make_tokenizer

LONG = [{"prompt": "w " * 300 + str(i), "completion": "c"} for i in range(3)]
TEST = [*({"prompt": f"t{i}", "completion": str(i)} for i in range(6)), *LONG, {"prompt": "", "completion": "c"}]


def prepared(folder: Path, **values: Any) -> PreparedData:
    config = DataSection(template="plain", plain_template="{prompt}>", max_bad_fraction=0.2, **values)
    return prepare(Encoder(config, make_tokenizer(), 1), folder / "out")


def read(file: Path, part: str, limit: int | None = None) -> tuple[int, LeftOut]:
    return len(read_sets(file, limit)[part]), LeftOut.read(file, limit)[part]


def report(rows: int, missing: LeftOut) -> Report:
    results = [RowResult(i, i, True, 1.0, 0.5, 1, "x", 0.1, 1) for i in range(rows)]
    lines = [
        line_of(model, RowSet("test", "exact_match", [], "t.jsonl", missing), results, results, ("logits", 0.0), [10])
        for model in ("m/pilot", "m")
    ]
    return report_of(lines, [], 0.0)


def test_rows_of_own_files_are_counted_from_file_to_report(tmp_path: Path) -> None:
    """Fault 13: prompts above data.cutoff_tokens left the test and the validation set without a word."""
    train, test = lines(tmp_path / "t.jsonl", SUMS), lines(tmp_path / "x.jsonl", TEST)
    data = prepared(tmp_path, train=str(train), test=str(test), validation=str(test))
    for part in ("test", "validation"):
        assert read(data.file(part), part) == (6, LeftOut(prompt_too_long=3, bad=1))
    assert read(data.file("test"), "test", 4) == (4, LeftOut(3, 1, not_measured=2))

    other = prepare_test_file(
        Encoder(DataSection(template="plain", plain_template="{prompt}>", max_bad_fraction=0.2), make_tokenizer(), 1),
        str(test),
        tmp_path / "eval",
        "mine",
    )
    assert read(other.file("test"), "mine")[1] == LeftOut(3, 1), "tc-ray eval --data"


def test_named_sets_are_counted_each_by_itself(tmp_path: Path) -> None:
    """Two sets of one part: their rows in order, under their names, with what is missing from each."""
    good = [{"prompt": f"g{i}", "completion": str(i)} for i in range(4)]
    files = {"one": str(lines(tmp_path / "x.jsonl", TEST)), "two": str(lines(tmp_path / "y.jsonl", good))}
    data = prepared(tmp_path, train=str(lines(tmp_path / "t.jsonl", SUMS)), test=files, validation=files)
    for part in ("test", "validation"):
        assert read(data.file(part), "one") == (6, LeftOut(3, 1)) and read(data.file(part), "two") == (4, LeftOut())
        assert [row.prompt for row in read_sets(data.file(part))["two"]] == ["g0", "g1", "g2", "g3"]
    assert read(data.file("test"), "two", 3) == (3, LeftOut(not_measured=1))
    assert data.rows["test"] == 10


def test_a_set_has_a_task_of_its_own(tmp_path: Path) -> None:
    raw = [{"goal": f"g{i}", "sol1": "a", "sol2": "b", "label": i % 2} for i in range(4)]
    piqa = {"file": str(lines(tmp_path / "p.jsonl", raw)), "task": "piqa"}
    data = prepared(tmp_path, train=str(lines(tmp_path / "t.jsonl", SUMS)), test={"piqa": piqa})
    rows = read_sets(data.file("test"))["piqa"]
    assert [row.answer for row in rows] == ["solution1", "solution2"] * 2
    assert rows[0].options == ("the correct answer is solution1", "the correct answer is solution2")


def test_a_row_without_answer_has_its_completion(tmp_path: Path) -> None:
    def write(**changes: Any) -> Path:
        row = {"sample_id": 1, "input_ids": [2, 3, 4], "target_start": 2, "completion": "x = 4", "answer": None}
        row |= {"prompt": "2 + 2", "options": None, "set": "test"}
        pq.write_table(pa.Table.from_pylist([row | changes] * 3, schema=SCHEMA), tmp_path / "rows.parquet")
        return tmp_path / "rows.parquet"

    assert [row.answer for row in read_sets(write(answer="4"), 2)["test"]] == ["4", "4"]
    (first, *_) = read_sets(write())["test"]
    assert (first.answer, first.prompt_ids, first.prompt) == ("x = 4", [2, 3], "2 + 2")
    with pytest.raises(ValueError, match="row 0: neither `answer` nor `completion`"):
        read_sets(write(completion=None))


def test_the_report_says_so_beside_the_accuracy(tmp_path: Path) -> None:
    """Fault 13: "3 of 6" in the line of the accuracy, and why."""
    found = report(3, LeftOut(prompt_too_long=2, bad=1))
    said = found.lines()
    assert sum("3 of 6" in line for line in said if line.startswith(("m/pilot ", "m "))) == 2
    why = "3 of 6 test rows (2 with a prompt longer than data.cutoff_tokens, 1 bad, see quarantine.jsonl)"
    assert f"test: {why} of rows" in said
    assert why in found.markdown()
    found.save(tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text())["results"]["m"]["test"]
    assert saved["left_out"] == {"prompt_too_long": 2, "bad": 1, "not_measured": 0}


def test_rows_that_are_not_measured_are_named_as_that(tmp_path: Path) -> None:
    data = prepared(tmp_path, train=str(lines(tmp_path / "t.jsonl", [*SUMS, *LONG])))
    rows, missing = read(data.file("test"), "test")
    assert missing == LeftOut() and rows == 6, "what is left out before the cut was no test row"
    assert LeftOut(not_measured=4).counted(2, "test") == "2 of 6 test rows (4 not measured: fusion.max_test_rows)"
    assert LeftOut().counted(5, "test") == "5 test rows"
    assert all("6 of" not in line for line in report(6, missing).lines())


def test_a_bad_line_of_sequences_is_a_missing_row_of_its_user(tmp_path: Path) -> None:
    users = [f"u{i} {' '.join(f'i{(i + n) % 30}' for n in range(5))}" for i in range(30)]
    file = lines(tmp_path / "s.txt", [*users, "u31 i1 i2"])
    data = prepared(tmp_path, train=str(file), format="sequences")
    for part in ("test", "validation"):
        assert read(data.file(part), part)[1] == LeftOut(bad=1)
