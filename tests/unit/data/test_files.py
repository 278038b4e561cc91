"""Places of data: patterns, compressed files, tables of text; large files in shares; mixtures with weights."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tc_ray.config.data import DataSection
from tc_ray.config.load import load_config
from tc_ray.config.yaml_file import ConfigError
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared import prepare as prepare_module
from tc_ray.data.prepared.folder import PreparedData
from tc_ray.data.prepared.prepare import prepare
from tc_ray.data.source import readers
from tc_ray.data.source.files import DataFile, _matches, list_place
from tc_ray.data.source.find import find_sources
from tc_ray.data.source.readers import iter_records, shares
from tc_ray.data.source.records import BadRow, DataError
from tests.support.data_writers import SUMS, lines
from tests.support.tiny_model import make_tokenizer


def prepared(folder: Path, train: Any, **values: Any) -> PreparedData:
    config = DataSection(train=train, template="plain", plain_template="{prompt}>", **values)
    return prepare(Encoder(config, make_tokenizer(), 1), folder / "out")


def names(files: list[DataFile]) -> list[str]:
    return [file.name for file in files]


# -- compressed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "ndjson"])
def test_compressed_files_are_read_as_the_plain_ones(tmp_path: Path, suffix: str) -> None:
    plain = tmp_path / f"t.{suffix}"
    if suffix in ("csv", "tsv"):
        separator = {"csv": ",", "tsv": "\t"}[suffix]
        plain.write_text(
            "\n".join(
                f"{a}{separator}{b}"
                for a, b in [("prompt", "completion"), *((r["prompt"], r["completion"]) for r in SUMS)]
            )
        )
    elif suffix == "json":
        plain.write_text(json.dumps(SUMS))
    else:
        lines(plain, SUMS)
    gz, zst = tmp_path / f"t.{suffix}.gz", tmp_path / f"t.{suffix.upper()}.ZST"
    gz.write_bytes(gzip.compress(plain.read_bytes()))
    with pa.CompressedOutputStream(str(zst), "zstd") as output:
        output.write(plain.read_bytes())
    for file in (plain, gz, zst):
        assert [record.value for record in iter_records(file)] == SUMS
    zst.write_bytes(zst.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"ZST: cannot be read: Truncated"):
        list(iter_records(zst))


# -- tables of text -----------------------------------------------------------------------------------------------------


def test_a_table_keeps_texts_as_they_are_written(tmp_path: Path) -> None:
    """Numbers stay as written, an empty cell is null, line ends within quotes belong to the text; places are lines."""
    rows = [["007", 'a, b\n"c"', ""], ["", "x", "1.50"], ["é", " y ", "z"]]
    file = tmp_path / "t.csv"
    with file.open("w", encoding="utf-8-sig", newline="") as opened:
        csv.writer(opened).writerows([["id", "prompt", "completion"], *rows])
    records = list(iter_records(file))
    assert [list(record.value.values()) for record in records] == [[cell or None for cell in row] for row in rows]
    assert [(record.place, record.unit) for record in records] == [(2, "line"), (4, "line"), (5, "line")]


def test_a_bad_row_of_a_table_costs_itself(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(b'prompt,completion\np,c\np,c,d\n\np\n"p"x,c\ncaf\xe9,c\np,c\n')
    found = {record.place: record.value for record in iter_records(file)}
    bad = {place: value.problem for place, value in found.items() if isinstance(value, BadRow)}
    assert sorted(found) == [2, 3, 5, 6, 7, 8] and sorted(bad) == [3, 5, 6, 7]
    assert bad[3] == "has 3 cells, the header names 2 columns" and bad[5].startswith("has 1 cells")
    assert "expected after" in bad[6] and bad[7] == "not UTF-8 at character 4"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('prompt,completion\np,c\n"p,c\np,c\n', "line 3: a quote that opens in this record is not closed"),
        ("prompt;completion\np;c\n", "'prompt;completion' is one column; separate columns by commas"),
        ("prompt,,b\np,c,d\n", "a name is empty or stands twice"),
        ("prompt,prompt\np,c\n", "a name is empty or stands twice: prompt, prompt"),
    ],
)
def test_a_table_that_would_be_misread_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=problem):
        list(iter_records(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    ("end", "problem"),
    [
        ('he said "x"\n', r"lines 3 to 203: a quote is not closed, so they are read as one record \(.* expected after"),
        (
            'c"\n',
            r"lines 3 to 203: a quote is not closed, or one text has more than 100 lines; .* save the rows as JSON lines",
        ),
        ('","d"\n', r"lines 3 to 203: a quote is not closed, .* \(has 3 cells, the header names 2 columns\)"),
    ],
)
def test_a_stray_quote_does_not_cost_rows_without_a_word(tmp_path: Path, end: str, problem: str) -> None:
    """All records up to the next quote were one bad row, or one good one."""
    (tmp_path / "t.csv").write_text('prompt,completion\np,c\np,"c\n' + "p,c\n" * 199 + f"p,{end}" + "p,c\n")
    with pytest.raises(DataError, match=rf"t\.csv, {problem}"):
        list(iter_records(tmp_path / "t.csv"))


def test_texts_of_a_hundred_lines_stand_in_a_table(tmp_path: Path) -> None:
    text = "\n".join("x" * 100)
    (tmp_path / "t.csv").write_text(f'prompt,completion\np,"{text}"\n')
    assert [record.value["completion"] for record in iter_records(tmp_path / "t.csv")] == [text]


# -- patterns -------------------------------------------------------------------------------------------------------------


def test_a_pattern_names_files_and_tells_their_parts_apart(tmp_path: Path) -> None:
    for name in ("a/train-0.jsonl", "a/train-1.jsonl", "a/test-0.jsonl", "b/more.jsonl", "b/notes.md", "c.jsonl"):
        lines(tmp_path / name, SUMS[:2])

    def found(pattern: str) -> tuple[list[str], list[str]]:
        files = find_sources(DataSection(train=f"{tmp_path}/{pattern}")).files
        return names(files["train"]), names(files["test"])

    assert found("*/*.jsonl") == (["train-0.jsonl", "train-1.jsonl", "more.jsonl"], ["test-0.jsonl"])
    assert found("**/*.jsonl") == (["train-0.jsonl", "train-1.jsonl", "more.jsonl", "c.jsonl"], ["test-0.jsonl"])
    assert found("a/train-[1-9].jsonl") == (["train-1.jsonl"], [])
    assert found("?") == found("[ab]") == (["train-0.jsonl", "train-1.jsonl", "more.jsonl"], ["test-0.jsonl"])
    with pytest.raises(DataError, match=r"no .* file matches .*x\*\.jsonl"):
        found("x*.jsonl")
    odd = lines(tmp_path / "run[1].jsonl", SUMS)
    assert find_sources(DataSection(train=str(odd))).files["train"] == [DataFile(str(odd))], "a name, not a pattern"


def test_a_pattern_in_a_store_means_what_it_means_on_a_disk(tmp_path: Path) -> None:
    some = ["a/b/c.jsonl", "a/b/c/0.jsonl", "a/train-0.jsonl", "a/train-1.jsonl", "b/^0.jsonl", "c.jsonl"]
    for name in some:
        lines(tmp_path / name, SUMS[:2])
    for pattern, count in {
        "*/*.jsonl": 3,
        "**/*.jsonl": 6,
        "*.jsonl": 1,
        "a/b/[a-c].*": 1,
        "a/train-[!0].jsonl": 1,
        "b/[^x]0.jsonl": 1,
        "**": 6,
        "a/**": 4,
        "a/b/**": 2,
        "*/**": 5,
        "**/c": 1,
        "[!a]*": 2,
        "a/**/[!t]*.jsonl": 2,
        "x/**": 0,
    }.items():
        found = [name for name in some if _matches(name.split("/"), pattern.split("/"))]
        here = [
            Path(str(file)).relative_to(tmp_path).as_posix()
            for file in list_place(f"{tmp_path}/{pattern}").files.values()
        ]
        assert found == sorted(here) and len(found) == count, pattern


def test_what_datasets_keeps_of_its_work_in_a_saved_folder_is_left_out(tmp_path: Path) -> None:
    """Rows of `map` and `filter` were trained on beside those that they were made from."""
    for name in ("data-00000-of-00001.arrow", "cache-1f2e.arrow", "train/cache-1f2e_00000_of_00002.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_sources(DataSection(train=str(tmp_path)))
    assert names(found.files["train"]) == ["data-00000-of-00001.arrow"]
    assert any(note.startswith("left out of") and "cache-1f2e.arrow, train/cache" in note for note in found.notes)
    one = tmp_path / "cache-1f2e.arrow"
    assert find_sources(DataSection(train=str(one))).files["train"] == [DataFile(str(one))], "named itself"


def test_patterns_stand_beside_their_recipe(tmp_path: Path) -> None:
    lines(tmp_path / "rows" / "a.jsonl", SUMS)
    (tmp_path / "r.yaml").write_text(
        "data:\n  train:\n    - {file: 'rows/*.jsonl', weight: 2}\n    - rows/a.jsonl\n  validation: rows/*.jsonl\n"
    )
    data = load_config(tmp_path / "r.yaml").data
    assert [one.file for one in data.train_sources()] == [f"{tmp_path}/rows/*.jsonl", f"{tmp_path}/rows/a.jsonl"]
    assert data.validation == f"{tmp_path}/rows/*.jsonl"


# -- shares -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json", "t.csv", "t.parquet", "t.arrow"])
def test_shares_of_a_file_hold_each_record_once_and_in_order(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_SHARED_BYTES", 1)
    monkeypatch.setattr(readers, "_SHARE_ROWS", 100)
    monkeypatch.setattr(readers, "_BATCH_ROWS", 64)
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(1000)]
    file = tmp_path / name
    if name.endswith(".csv"):
        file.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    elif name.endswith(".json"):
        file.write_text(json.dumps(rows))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=300)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(file, table.schema) as output:
            output.write_table(table, max_chunksize=150)
    else:
        lines(file, [row for pair in zip(rows, [""] * 1000, strict=True) for row in pair])
    whole = list(iter_records(file))
    small = lines(tmp_path / "small.jsonl", SUMS[:3])
    cut = shares([DataFile(str(small)), DataFile(str(file))], 4)
    assert [share.rows for share in cut] == [None, (0, 250), (250, 500), (500, 750), (750, 1000)]
    found = [record for share in cut[1:] for record in iter_records(share)]
    assert found == whole and [record.value for record in found] == rows
    assert shares([DataFile(str(file))], 1) == [DataFile(str(file))]


def test_a_file_in_shares_gives_the_rows_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(300)]
    file = lines(tmp_path / "t.jsonl", [*rows[:200], "{broken", *rows[200:]])
    whole = pq.read_table(prepared(tmp_path, str(file)).file("train")).to_pylist()
    monkeypatch.setattr(readers, "_SHARED_BYTES", 1)
    monkeypatch.setattr(readers, "_SHARE_ROWS", 10)
    cut = prepared(tmp_path, str(file))
    assert pq.read_table(cut.file("train")).to_pylist() == whole
    assert any("t.jsonl, line 201: not JSON" in note for note in cut.notes)


# -- mixtures -------------------------------------------------------------------------------------------------------------


def test_weights_say_how_often_a_row_is_trained_on(tmp_path: Path) -> None:
    for name in "abc":
        lines(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}", "completion": "x"} for i in range(40)])
    train = [
        {"file": f"{tmp_path}/a.jsonl", "weight": 2.5},
        f"{tmp_path}/b.jsonl",
        {"file": f"{tmp_path}/c.jsonl", "weight": 0.25},
    ]
    sizes = {"validation_size": 10, "test_size": 10}
    data = prepared(tmp_path, train, **sizes)
    prompts = pq.read_table(data.file("train"))["prompt"].to_pylist()
    once = pq.read_table(
        prepared(tmp_path / "once", [one["file"] if isinstance(one, dict) else one for one in train], **sizes).file(
            "train"
        )
    )
    own = Counter(prompt[0] for prompt in once["prompt"].to_pylist())
    assert sum(own.values()) == 100
    times = Counter(prompts)
    found = Counter(prompt[0] for prompt in prompts)
    assert found == {"a": 2 * own["a"] + round(0.5 * own["a"]), "b": own["b"], "c": round(0.25 * own["c"])}
    assert {times[p] for p in times if p[0] == "a"} == {2, 3} and {times[p] for p in times if p[0] != "a"} == {1}
    assert data.rows == {"train": len(prompts), "validation": 10, "test": 10}
    assert pq.read_table(data.file("train"))["sample_id"].to_pylist() == list(range(len(prompts)))
    assert any("after the weights" in note for note in data.notes)
    assert prompts == pq.read_table(prepared(tmp_path, train, **sizes).file("train"))["prompt"].to_pylist()


def test_the_choice_of_a_fraction_is_of_an_entry_not_of_files_or_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on a cluster of other size chose other rows, so its resume was refused; 100 files of one row had none of 50."""
    monkeypatch.setattr(readers, "_SHARED_BYTES", 1)
    monkeypatch.setattr(readers, "_SHARE_ROWS", 10)
    file = lines(tmp_path / "t.jsonl", [{"prompt": f"p{i}", "completion": "x"} for i in range(300)])
    chosen = []
    for tasks in (1, 4):
        monkeypatch.setattr(prepare_module, "cpus", lambda tasks=tasks: tasks)
        data = prepared(tmp_path, [{"file": str(file), "weight": 0.37}], max_train_rows=60)
        chosen.append(pq.read_table(data.file("train"))["prompt"].to_pylist())
        assert any("max_train_rows: the first 60 of 89 training rows" in note for note in data.notes)
    assert chosen[0] == chosen[1] and len(chosen[0]) == 60
    rows = pa.table({"file": pa.array(range(100), pa.int32())})
    assert prepare_module.weighted(rows, [(0, 0.5)] * 100, 1).num_rows == 50


def test_a_mixture_that_is_wrong_is_refused(tmp_path: Path) -> None:
    lines(tmp_path / "d" / "a.jsonl", SUMS)
    with pytest.raises(DataError, match="stands in two of its entries"):
        find_sources(DataSection(train=[str(tmp_path / "d"), str(tmp_path / "d" / "a.jsonl")]))
    for given, problem in (
        ([], "is empty"),
        ([{"file": "a", "weight": 0}], r"0\.weight: .* greater than 0"),
        ([{"weight": 1}], r"0\.file: Field required"),
        (["embedded", "a"], "cannot be mixed"),
    ):
        (tmp_path / "r.yaml").write_text(f"data:\n  train: {json.dumps(given)}\n")
        with pytest.raises(ConfigError, match=problem):
            load_config(tmp_path / "r.yaml")
