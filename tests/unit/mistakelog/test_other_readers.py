"""The log read with what users have, no code of ours: what docs/mistake-log.md shows, run."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import polars
import pytest
from deltalake import DeltaTable

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import metadata, random_records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log with a restart in it: rounds 3 and 4 were written twice, the first time by an attempt that was fenced."""
    LogStore.create(tmp_path / "log", metadata())
    ledger = Ledger(tmp_path / "log", writers=1, run="test")
    for watermark, last in ((0, 4), (2, 5)):
        attempt = ledger.begin_attempt(watermark, 1)
        writer = RecordWriter(
            tmp_path / "log",
            ledger.commit,
            LogSection(flush_rounds=3, file_bytes=2**30, queue_rounds=4),
            run="test",
            rank=0,
            attempt=attempt,
            start_round=watermark,
        )
        for number in range(watermark + 1, last + 1):
            writer.put(random_records(4, round=number, attempt=attempt, first_sample=10 * number), number)
            writer.end_round(number)
        writer.close()
    return tmp_path / "log"


def test_polars(folder: Path) -> None:
    rows = polars.scan_delta(str(folder))
    found = rows.group_by("round").agg(polars.len().alias("rows")).sort("round").collect()
    assert found.rows() == [(number, 4) for number in range(1, 6)]
    loss = rows.group_by("seen").agg(polars.col("token_loss").list.mean().mean()).collect()
    assert set(loss["seen"]) == set(MistakeLog(folder).arrow(columns=["seen"])["seen"].to_pylist())


def test_duckdb(folder: Path) -> None:
    """Through the table's file list: rows of the fenced attempt, whose files are still in the folder, are not read."""
    rows = DeltaTable(str(folder)).to_pyarrow_dataset()
    averages = duckdb.sql("SELECT round, avg(list_avg(token_loss)) FROM rows GROUP BY round ORDER BY round")
    count = duckdb.sql("SELECT count(*) FROM rows")
    assert averages is not None and count is not None  # as it would be of a statement without an answer
    assert count.fetchall() == [(rows.count_rows(),)] == [(4 * 5,)]
    found = averages.fetchall()
    log = MistakeLog(folder).arrow(columns=["round", "token_loss"]).to_pylist()
    for number, mean in found:
        means = [np.mean(row["token_loss"]) for row in log if row["round"] == number and row["token_loss"]]
        assert mean == pytest.approx(np.mean(means))
    assert [number for number, _ in found] == [1, 2, 3, 4, 5]


def test_deltalake_and_numpy(folder: Path) -> None:
    table = DeltaTable(str(folder))
    meta = table.metadata().configuration
    rows = table.to_pyarrow_table().sort_by([("round", "ascending"), ("sample_id", "ascending")])
    row = next(row for row in rows.to_pylist() if row["token_loss"])
    bits = np.frombuffer(row["rationale"], np.uint16).astype(np.uint32) << 16
    states = bits.view(np.float32).reshape(-1, row["rationale_layers"], int(meta["tc_ray.rationale_dim"]))
    ids = np.reshape(row["error_ids"], (-1, int(meta["tc_ray.top_k"]) + 1))
    errors = np.reshape(row["error_values"], ids.shape)

    records = MistakeLog(folder).records()
    at = int(np.flatnonzero((records.round == row["round"]) & (records.sample_id == row["sample_id"]))[0])
    span = slice(records.rationale_offsets[at], records.rationale_offsets[at + 1])
    decoded = (records.rationale[span].astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(states, decoded)
    span = slice(records.target_offsets[at], records.target_offsets[at + 1])
    np.testing.assert_array_equal(ids, records.error_ids[span])
    np.testing.assert_array_equal(errors, records.error_values[span])
