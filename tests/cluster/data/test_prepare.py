"""`prepare` on a real local Ray: files in, Parquet out, bad rows counted, work reused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tc_ray.config.data import DataSection
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared.folder import SCHEMA, PreparedData
from tc_ray.data.prepared.prepare import cpus, prepare, prepare_test_file
from tc_ray.data.source.files import DataFile
from tc_ray.data.source.readers import shares
from tc_ray.data.source.records import DataError
from tc_ray.data.source.sequences import read_items
from tc_ray.run.job import JobError, run_job
from tc_ray.tracking.statusfile import read_status
from tests.support.data_cases import CASES, strict_tokenizer
from tests.support.local_ray import local_ray
from tests.support.tiny_model import make_tokenizer
from tests.support.tiny_run import tiny_config

cluster = local_ray(cpus=2)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def section(**values: Any) -> DataSection:
    return DataSection(template="plain", plain_template="{prompt}>", **values)


def write_rows(path: Path, first: int, count: int) -> Path:
    rows = [{"prompt": f"prompt {n}", "completion": f"answer {n}", "answer": n} for n in range(first, first + count)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(prepared: PreparedData) -> dict[str, list[dict[str, Any]]]:
    return {part: pq.read_table(prepared.file(part)).to_pylist() for part in ("train", "validation", "test")}


def test_a_folder_of_all_kinds_is_read_in_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "a.parquet", 0, 20)
    write_rows(data / "b.jsonl", 20, 20)
    write_rows(data / "c.json", 40, 20)
    prepared = prepare(Encoder(section(train=str(data)), tokenizer, 1), tmp_path / "out")
    parts = read(prepared)
    assert prepared.rows == {"train": 48, "validation": 6, "test": 6}
    assert pq.read_schema(prepared.file("train")) == SCHEMA
    numbers = [int(row["answer"]) for row in parts["train"]]
    assert numbers == sorted(numbers)
    assert sorted(int(row["answer"]) for rows in parts.values() for row in rows) == list(range(60))
    assert [row["sample_id"] for row in parts["train"]] == list(range(48))
    row = parts["train"][5]
    assert tokenizer.decode(row["input_ids"][: row["target_start"]]) == row["prompt"] + ">"
    assert tokenizer.decode(row["input_ids"][row["target_start"] :]) == row["completion"] + "<eos>"
    assert any("48 train rows" in line for line in prepared.describe())


def test_bad_rows_are_quarantined_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "x.jsonl", 0, 50)
    lines = path.read_text().splitlines()
    lines[6] = "{broken"
    lines[9] = json.dumps({"prompt": "p"})
    path.write_text("\n".join(lines))
    out = tmp_path / "out"
    prepared = prepare(Encoder(section(train=str(path), max_bad_fraction=0.05), tokenizer, 1), out)
    assert prepared.quarantined == 2 and sum(prepared.rows.values()) == 48
    bad = [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["file"], row["unit"], row["place"], row["field"]) for row in bad] == [
        (str(path), "line", 7, ""),
        (str(path), "line", 10, "completion"),
    ]
    assert bad[0]["raw"] == "{broken"
    with pytest.raises(DataError) as caught:
        prepare(Encoder(section(train=str(path)), tokenizer, 1), out)
    message = str(caught.value)
    assert "2 of 50" in message and f"{path}, line 7" in message and "field completion" in message


def test_held_out_files_and_long_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train = write_rows(tmp_path / "train.jsonl", 0, 30)
    with train.open("a") as file:
        file.write(json.dumps({"prompt": "long " * 20, "completion": "c"}) + "\n")
        file.write(json.dumps({"prompt": "short", "completion": "c" * 100}) + "\n")
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"prompt": "prompt 3", "answer": 3}) + "\n")
    config = section(train=str(train), test=str(test), cutoff_tokens=50, validation_size=5, max_train_rows=20)
    prepared = prepare(Encoder(config, tokenizer, 1), tmp_path / "out")
    assert prepared.rows == {"train": 20, "validation": 5, "test": 1}
    assert prepared.too_long == 1 and prepared.cut_completions == 1
    row = read(prepared)["test"][0]
    assert row["completion"] is None and row["target_start"] == len(row["input_ids"])
    assert any("1 training rows have a prompt that also stands in data.test" in line for line in prepared.notes)

    other = prepare_test_file(Encoder(config, tokenizer, 1), str(test), tmp_path / "other")
    assert pq.read_table(other.file("test")).to_pylist() == [row]


def test_absent_files_are_an_error_or_the_embedded_set(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    absent = str(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"data\.train: no .* at .*none\.jsonl.*data\.fallback=embedded"):
        prepare(Encoder(section(train=absent), tokenizer, 1), tmp_path / "out")
    config = section(train=absent, test=absent, fallback="embedded", embedded_rows=40)
    prepared = prepare(Encoder(config, tokenizer, 1), tmp_path / "out")
    assert sum(prepared.rows.values()) == 40
    assert "chain_sum" in prepared.describe()[0] and "is absent" in prepared.describe()[1]


def test_unreadable_file_is_one_plain_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "x.parquet", 0, 10)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"^.*x\.parquet: not a readable Parquet file"):
        prepare(Encoder(section(train=str(path)), tokenizer, 1), tmp_path / "out")


def test_fallback_leaves_out_a_pattern_made_for_the_absent_files(tmp_path: Path) -> None:
    config = DataSection(
        train=str(tmp_path / "absent.jsonl"),
        fallback="embedded",
        embedded_rows=40,
        template="plain",
        completion_pattern="x = .*",
    )
    prepared = prepare(Encoder(config, make_tokenizer(), 1), tmp_path / "data")
    assert sum(prepared.rows.values()) == 40 and not prepared.quarantined
    assert any("completion_pattern" in note for note in prepared.notes)


def test_completion_pattern_chooses_what_is_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + 1", "completion": f"x = {n} + 1\nThe answer is {n + 1}"} for n in range(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "p", "completion": "no equation"}]))
    config = DataSection(train=str(file), template="plain", completion_pattern=r"x = [^\n]*", max_bad_fraction=0.1)
    prepared = prepare(Encoder(config, make_tokenizer(), 1), tmp_path / "data")
    completions = pq.read_table(prepared.file("train"))["completion"].to_pylist()
    assert all(re.fullmatch(r"x = \d+ \+ 1", text) for text in completions)
    bad = [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["place"], row["field"]) for row in bad] == [(61, "completion")]


def sequence_section(**values: Any) -> DataSection:
    return section(format="sequences", **values)


def write_users(path: Path, users: int = 30) -> Path:
    """User u takes the items u, u + 1, ..., u + 3 + u % 4."""
    lines = [" ".join([f"u{user}", *(f"i{user + n}" for n in range(4 + user % 4))]) for user in range(users)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_sequences_are_cut_by_leave_one_out_and_labelled(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_users(tmp_path / "s.txt")
    with path.open("a") as file:
        file.write("u99 i1 i2\n")
    out = tmp_path / "out"
    config = sequence_section(train=str(path), max_bad_fraction=0.05, sequences={"history": 2})
    prepared = prepare(Encoder(config, tokenizer, 1, encoder_decoder=True), out)
    assert prepared.rows == {"train": sum(1 + user % 4 for user in range(30)), "validation": 30, "test": 30}
    assert (prepared.quarantined, prepared.too_long) == (1, 0)
    (bad,) = [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]
    assert (bad["file"], bad["unit"], bad["place"], bad["field"]) == (str(path), "line", 31, "items")
    labels = read_items(out / "items.parquet")
    assert set(labels) == {f"i{n}" for n in range(34)} and {len(label) for label in labels.values()} == {2}
    assert any("30 users, 34 items" in note for note in prepared.notes)
    for part, rows in read(prepared).items():
        assert [row["sample_id"] for row in rows] == list(range(prepared.rows[part]))
        for row in rows:
            source = tokenizer.decode(row["input_ids"][: row["target_start"]])
            assert source == row["prompt"] + "><eos>" and row["answer"] == row["completion"]
            assert tokenizer.decode(row["input_ids"][row["target_start"] :]) == row["answer"] + "<eos>"
    for user, row in enumerate(read(prepared)["test"]):
        last = user + 3 + user % 4
        assert row["prompt"] == f"{labels[f'i{last - 2}']} {labels[f'i{last - 1}']}"
        assert row["answer"] == labels[f"i{last}"]

    with pytest.raises(DataError, match=r"s\.txt, line 31, field items: user u99 has 2 items"):
        prepare(Encoder(sequence_section(train=str(path), max_bad_fraction=0), tokenizer, 1), out)


def test_other_sequences_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = sequence_section(train=str(write_users(tmp_path / "s.txt")))
    with pytest.raises(DataError, match="measured on its own users only"):
        prepare_test_file(Encoder(config, tokenizer, 1), config.train, tmp_path / "eval")


def test_absent_sequences_fall_back_to_a_generated_set(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    small = {"users": 25, "items": 20, "clusters": 4}
    config = sequence_section(train=str(tmp_path / "none.txt"), fallback="embedded", sequences=small)
    prepared = prepare(Encoder(config, tokenizer, 1), tmp_path / "out")
    assert prepared.rows["test"] == prepared.rows["validation"] == 25 and prepared.rows["train"] > 50
    assert "25 users over 20 items" in prepared.source
    assert any("none.txt is absent: using the embedded data set" in line for line in prepared.describe())
    with pytest.raises(DataError, match=r"no \.txt \(or \.txt\.gz, \.txt\.zst\) file at .*none\.txt"):
        prepare(Encoder(sequence_section(train=str(tmp_path / "none.txt")), tokenizer, 1), tmp_path / "out")


ODD = ("surrogate", "latin1", "long_integer")


def test_odd_records_are_bad_rows_in_rays_tasks_too(tmp_path: Path) -> None:
    """Fault 18: nothing that a record does leaves Ray's tasks as an exception."""
    for case in [case for case in CASES if case.name in ODD]:
        file = case.make(tmp_path)
        file.rename(tmp_path / f"{case.name}{file.suffix}")
    config = section(train=str(tmp_path), max_bad_fraction=0.1)
    prepared = prepare(Encoder(config, make_tokenizer(), 1), tmp_path / "out")
    bad = [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(Path(row["file"]).stem for row in bad) == sorted(ODD)
    assert sum(prepared.rows.values()) == 64 * 3


def test_a_template_that_raises_costs_its_row_in_rays_tasks_too(tmp_path: Path) -> None:
    (case,) = [case for case in CASES if case.name == "template_raises"]
    prepared = prepare(Encoder(DataSection(train=str(case.make(tmp_path))), strict_tokenizer(), 1), tmp_path / "out")
    assert prepared.quarantined == 1 and "Roles must alternate" in (prepared.folder / "quarantine.jsonl").read_text()


def test_the_job_refuses_a_token_without_an_embedding_before_any_worker(tmp_path: Path) -> None:
    """Fault 20: an IndexError in the worker, tried again and again."""
    config = tiny_config(tmp_path, data__train=str(tmp_path / "t.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(config.model.pilot)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(config.model.pilot)
    rows = [{"prompt": f"<tool>{n}", "completion": "x"} for n in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="token '<tool>' has the id 258, but the model embeds 258 tokens"):
        run_job(config)
    assert not (config.run.path / "pilot").exists() and not (config.run.path / "config.yaml").exists()
    status = read_status(config.run.path)
    assert status["state"] == "failed" and status["failure"].startswith("the tokenizer's token '<tool>' has the id"), (
        status
    )


def test_the_job_refuses_too_few_rows_and_no_test_rows(tmp_path: Path) -> None:
    """Fault 13: the arithmetic of the splits where a part ends empty."""
    rows = [{"prompt": f"{n}", "completion": "x"} for n in range(9)] + [{"prompt": "w" * 300, "completion": "x"}] * 51
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"data__train": str(tmp_path / "t.jsonl"), "data__validation_size": 2}
    with pytest.raises(
        DataError, match=r"5 training rows .*batch_size 8: of 60 records .* 51 have .* 2 are validation"
    ):
        run_job(tiny_config(tmp_path, **settings, data__test_size=2))
    with pytest.raises(JobError, match=r"no test rows .*data\.test_size"):
        run_job(tiny_config(tmp_path, **settings, data__test_size=0, pilot__batch_size=4, pilot__micro_batch_size=4))


def test_one_large_file_is_tokenised_by_as_many_tasks_as_there_are_cpus(tmp_path: Path) -> None:
    """Issue 18: one file was one task. Templates and the raw columns travel to the tasks too."""
    rows = [{"question": f"question {n} " + "x" * 200, "reply": {"text": [f"answer {n}"]}} for n in range(1500)]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:900], {"question": 3}, *rows[900:]]))
    config = section(train=str(file), prompt="{{question}}", completion="{{reply.text[0]}}", validation_size=10)
    assert [share.rows for share in shares([DataFile(str(file))], cpus())] == [(0, 750), (750, 1501)]
    prepared = prepare(Encoder(config, make_tokenizer(), 1), tmp_path / "out")
    assert sum(prepared.rows.values()) == 1500 and prepared.quarantined == 1
    numbers = [int(row["prompt"].split()[1]) for row in read(prepared)["train"]]
    assert numbers == sorted(numbers)
    assert any(f"bad: {file}, line 901, field data.completion: 'reply' is undefined" in note for note in prepared.notes)
