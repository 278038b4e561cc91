"""Records: round trips through Arrow and Parquet, ragged selection, and what `validate` refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tc_ray.mistakelog.rows import records as records_module
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import ROW_SCHEMA, SCHEMA_VERSION, LogMetadata, LogSchemaError
from tests.support.mistakelog_samples import DIM, TOP_K, assert_same, metadata, random_records


@pytest.mark.parametrize("question", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_arrow_round_trip(rows: int, layers: int, question: bool) -> None:
    records = random_records(rows, layers=layers, question=question)
    table = records.to_arrow("r")
    assert table.schema.equals(ROW_SCHEMA, check_metadata=False)
    assert table.column("run").to_pylist() == ["r"] * rows
    assert_same(records, Records.from_arrow(table))


def test_cells_are_what_the_arrays_say() -> None:
    records = random_records(9, layers=2)
    rows = records.to_arrow("r").to_pylist()
    for index, row in enumerate(rows):
        one = records.select([index])
        assert row["input_ids"] == one.input_ids.tolist()
        assert np.array_equal(np.frombuffer(row["rationale"], np.uint16).reshape(-1, 2, DIM), one.rationale)
        assert row["error_values"] == one.error_values.reshape(-1).tolist()
        assert len(row["token_correct"]) == len(row["input_ids"]) - row["target_start"]


def test_large_columns_are_views_of_the_arrays() -> None:
    records = random_records(8)
    chunk = records.to_arrow("r").column("rationale").chunk(0)
    assert chunk.buffers()[2].address == records.rationale.ctypes.data
    assert Records.from_arrow(records.to_arrow("r")).rationale.ctypes.data == records.rationale.ctypes.data


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("question", [False, True])
def test_joined_parts_are_the_rows_of_their_concatenation(question: bool, kind: Literal["bf16", "int8"]) -> None:
    parts = [
        dataclasses.replace(random_records(rows, round=rows + 1, layers=2, question=question), rationale_dtype=kind)
        for rows in (4, 0, 7)
    ]
    table, expected = Records.join_to_arrow(parts, "r"), Records.concat(parts).to_arrow("r")
    assert table.schema.equals(expected.schema, check_metadata=True)
    assert table.equals(expected)
    assert_same(Records.from_arrow(table), Records.from_arrow(expected))
    if kind == "bf16":
        chunks = table.column("rationale").chunks
        assert [chunk.buffers()[2].address for chunk in chunks if len(chunk)] == [
            part.rationale.ctypes.data for part in parts if len(part)
        ]
    with pytest.raises(ValueError, match="rationale_layers"):
        Records.join_to_arrow([parts[0], random_records(2)], "r")


def test_sliced_and_chunked_tables() -> None:
    records = random_records(20, question=True)
    table = records.to_arrow("r")
    pieces = pa.concat_tables([table.slice(3, 5), table.slice(8, 0), table.slice(8, 7)])
    assert_same(records.select(range(3, 15)), Records.from_arrow(pieces))


def test_a_column_past_the_32_bit_limit_becomes_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    records = random_records(40, question=True)
    monkeypatch.setattr(records_module, "_CHUNK_LIMIT", 400)
    table = records.to_arrow("r")
    assert table.column("rationale").num_chunks > 3
    assert_same(records, Records.from_arrow(table))
    monkeypatch.setattr(records_module, "_CHUNK_LIMIT", 8)
    with pytest.raises(ValueError, match="alone passes 2 GiB"):
        records.to_arrow("r")


def test_parquet_round_trip(tmp_path) -> None:
    records = random_records(30)
    pq.write_table(records.to_arrow("r"), tmp_path / "x.parquet", store_schema=False)
    assert_same(records, Records.from_arrow(pq.read_table(tmp_path / "x.parquet"), metadata().to_configuration()))


@pytest.mark.parametrize("question", [False, True])
def test_concat_and_select(question: bool) -> None:
    parts = [random_records(n, round=n + 1, first_sample=100 * n, question=question) for n in (3, 0, 5)]
    joined = Records.concat(parts)
    joined.validate()
    assert joined.sample_id.tolist() == [300, 301, 302, 500, 501, 502, 503, 504]
    assert_same(joined.select([0, 1, 2]), parts[0])
    shuffled = joined.select([7, 0, 7])
    shuffled.validate()
    assert_same(Records.concat([joined.select([7]), joined.select([0]), joined.select([7])]), shuffled)
    assert len(joined.select([])) == 0
    with pytest.raises(IndexError):
        joined.select([8])
    with pytest.raises(ValueError, match="rationale_layers"):
        Records.concat([parts[0], random_records(2, layers=2)])
    with pytest.raises(ValueError, match="question"):
        Records.concat([parts[0], random_records(2, question=not question)])


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("target_start", lambda a: np.where(np.arange(len(a)) == 2, 0, a).astype(a.dtype), "record 2, sample_id 2"),
        ("target_start", lambda a: np.where(np.arange(len(a)) == 1, 99, a).astype(a.dtype), "target_start"),
        ("target_offsets", lambda a: np.concatenate([[0], a[:-1]]), "target tokens differ"),
        ("rationale_offsets", lambda a: np.concatenate([[0, a[-1]], a[2:-1], a[-1:]]), "never fall"),
        ("seq_offsets", lambda a: a[:-1], "seq_offsets"),
        ("error_rest", lambda a: a[:-1], "error_rest: length"),
        ("error_values", lambda a: a[:, :-1].copy(), "same shape"),
        ("sample_id", lambda a: a[:-1], "sample_id: shape"),
    ],
)
def test_validate_names_the_field(field, change, message) -> None:
    records = random_records(6, seed=3)
    records.validate()
    broken = dataclasses.replace(records, **{field: change(getattr(records, field))})
    with pytest.raises(ValueError, match=message):
        broken.validate()


def test_states_past_position_s_minus_2_are_refused() -> None:
    records = random_records(1, seed=5)
    length = len(records.input_ids)
    broken = dataclasses.replace(
        records,
        rationale=np.zeros((length, 1, DIM), np.uint16),
        rationale_offsets=np.array([0, length], np.int64),
    )
    with pytest.raises(ValueError, match=r"len\(input_ids\) - 2"):
        broken.validate()


def test_wrong_dtype_or_width() -> None:
    records = random_records(3)
    with pytest.raises(ValueError, match="error_rest: expected a numpy array of float32, got float64"):
        dataclasses.replace(records, error_rest=records.error_rest.astype(np.float64))
    with pytest.raises(ValueError, match="whole number of positions"):
        dataclasses.replace(records, rationale=records.rationale.reshape(-1)[:-1])


def test_question_states_belong_to_source_positions() -> None:
    records = random_records(4, question=True)
    records.validate()
    row = records.to_arrow("r").to_pylist()[2]
    assert np.array_equal(np.frombuffer(row["question"], np.uint16), records.select([2]).question.reshape(-1))
    assert len(row["question"]) == row["target_start"] * DIM * 2
    with pytest.raises(ValueError, match=r"records.question: .* source positions"):
        dataclasses.replace(records, question=records.question[:-1]).validate()
    with pytest.raises(LogSchemaError, match="column question"):
        Records.from_arrow(
            random_records(4, question=True).to_arrow("r"),
            metadata(question="states", rationale_dim=2 * DIM, rationale_layers=1).to_configuration(),
        )
    with pytest.raises(LogSchemaError, match="null"):  # a log that promises states and holds none
        Records.from_arrow(random_records(4).to_arrow("r"), metadata(question="states").to_configuration())


def test_from_arrow_refuses_what_does_not_fit() -> None:
    records = random_records(5)
    table = records.to_arrow("r")
    with pytest.raises(LogSchemaError, match="without tc_ray"):
        Records.from_arrow(table.replace_schema_metadata(None))
    with pytest.raises(LogSchemaError, match="seen"):
        Records.from_arrow(table.drop_columns(["seen"]))
    with pytest.raises(LogSchemaError, match=f"top_k={TOP_K + 1}"):
        Records.from_arrow(table, metadata(top_k=TOP_K + 1).to_configuration())
    with pytest.raises(LogSchemaError, match="whole number of 1 x 5"):
        Records.from_arrow(table, metadata(rationale_dim=5).to_configuration())


def test_metadata_round_trip_and_unknown_version() -> None:
    stored = metadata()
    configuration = stored.to_configuration()
    assert all(key.startswith("tc_ray.") for key in configuration)
    assert LogMetadata.from_configuration({**configuration, "delta.x": "1"}, "here") == stored
    with pytest.raises(LogSchemaError, match=f"here.*version 99.*reads version {SCHEMA_VERSION}"):
        LogMetadata.from_configuration({**configuration, "tc_ray.schema_version": "99"}, "here")
    partial = {key: value for key, value in configuration.items() if key != "tc_ray.question"}
    with pytest.raises(LogSchemaError, match=r"tc_ray\.question is missing"):
        LogMetadata.from_configuration(partial, "here")
    with pytest.raises(LogSchemaError, match="not a Mistake Log"):
        LogMetadata.from_configuration({}, "here")
    assert metadata(top_k=9).differences(stored) == ["top_k: 3 in the table, 9 here"]


def test_the_package_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, tc_ray.mistakelog.commit.ledger, tc_ray.mistakelog.read.reader, tc_ray.mistakelog.write.writer; "
        "sys.exit(str({'torch', 'ray'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.strip() == ""
