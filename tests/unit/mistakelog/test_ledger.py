"""Ledger on a real Delta table, no Ray: commits, replays, fencing, restarts, a second Ledger."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tc_ray.mistakelog.commit.ledger import Ledger, LedgerError
from tc_ray.mistakelog.read.reader import LogTail, MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import LogSchemaError
from tc_ray.mistakelog.table.data_file import DataFile, ParquetPart, file_name
from tc_ray.mistakelog.table.errors import FencedError
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tests.support.mistakelog_samples import assert_same, metadata, random_records


def written(folder: Path, first: int, last: int, *, rank: int = 0, attempt: int = 1, sequence: int = 0) -> DataFile:
    """A finished file of two rows a round, not committed."""
    part = ParquetPart(Location(folder), file_name(first, rank, attempt, sequence), "none", {})
    for number in range(first, last + 1):
        rows = random_records(2, round=number, rank=rank, attempt=attempt, first_sample=1000 * rank + 10 * number)
        part.write(rows.to_arrow("test"))
    done = part.finish()
    return DataFile(part.name, part.rows, done.size, first, last, rank, attempt, sequence, done.crc32)


def open_ledger(folder: Path, writers: int = 1) -> Ledger:
    LogStore.create(folder, metadata())
    return Ledger(folder, writers=writers, run="test")


def rounds_in(folder: Path) -> list[int]:
    return sorted(MistakeLog(folder).records().round.tolist())


def test_a_file_is_visible_from_its_commit_on(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    assert ledger.begin_attempt(0, 1) == 1
    file = written(tmp_path, 1, 3)
    assert rounds_in(tmp_path) == []
    version = ledger.commit(file)
    assert rounds_in(tmp_path) == [1, 1, 2, 2, 3, 3]
    expected = Records.concat([random_records(2, round=r, first_sample=10 * r) for r in (1, 2, 3)])
    assert_same(MistakeLog(tmp_path).records(), expected)
    state = ledger.state()
    assert (state.version, state.round, state.rows, state.files, state.bytes) == (version, 3, 6, 1, file.bytes)


def test_a_replayed_commit_adds_nothing_also_after_a_restart(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.begin_attempt(0, 1)
    files = [written(tmp_path, 1, 2), written(tmp_path, 3, 4, sequence=1)]
    versions = [ledger.commit(file) for file in files]
    assert ledger.commit(files[0]) >= versions[0]
    restarted = Ledger(tmp_path, writers=1, run="test")
    assert restarted.commit(files[1]) == versions[1]
    assert restarted.state() == ledger.state()
    assert restarted.state().files == 2
    assert len(rounds_in(tmp_path)) == 8


def test_round_is_what_all_writers_have(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.begin_attempt(0, 2)
    ledger.commit(written(tmp_path, 1, 4, rank=0))
    assert ledger.state().round == 0
    ledger.commit(written(tmp_path, 1, 2, rank=1))
    assert ledger.state().round == 2
    # rank 1 had nothing in rounds 3 to 5
    ledger.commit(DataFile(None, 0, 0, 3, 5, 1, 1, 1))
    assert ledger.state().round == 4
    assert Ledger(tmp_path, writers=2, run="test").state() == ledger.state()
    assert ledger.state().files == 2


def test_skipped_rounds_and_sequences_unknown_ranks_and_missing_files_are_refused(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    with pytest.raises(LedgerError, match="begin_attempt first"):
        ledger.commit(written(tmp_path, 1, 2))
    ledger.begin_attempt(0, 1)
    with pytest.raises(LedgerError, match="expected sequence 0 from round 1"):
        ledger.commit(written(tmp_path, 2, 3))
    with pytest.raises(LedgerError, match="expected sequence 0"):
        ledger.commit(written(tmp_path, 1, 2, sequence=1))
    with pytest.raises(LedgerError, match=r"ranks 0\.\.0"):
        ledger.commit(written(tmp_path, 1, 2, rank=1))
    good = written(tmp_path, 1, 2)
    with pytest.raises(ValueError, match="expected 1 bytes"):
        ledger.commit(dataclasses.replace(good, bytes=1))
    with pytest.raises(ValueError, match="missing"):
        ledger.commit(dataclasses.replace(good, name="elsewhere.parquet"))
    assert ledger.commit(good) == ledger.state().version
    assert rounds_in(tmp_path) == [1, 1, 2, 2]


@pytest.mark.parametrize("watermark", [4, 3])
def test_a_new_attempt_drops_what_follows_the_watermark(tmp_path: Path, watermark: int) -> None:
    """At 4 whole files go; at 3 the file of rounds 3 and 4 is cut."""
    ledger = open_ledger(tmp_path, writers=2)
    ledger.begin_attempt(0, 2)
    for rank in (0, 1):
        for sequence, first in enumerate((1, 3, 5)):
            ledger.commit(written(tmp_path, first, first + 1, rank=rank, sequence=sequence))
    before = ledger.state()
    kept = MistakeLog(tmp_path).records((1, watermark))
    tail = LogTail(tmp_path)
    tail.poll()

    assert ledger.begin_attempt(watermark, 1) == 2
    state = ledger.state()
    # one version does it all: no crash can separate the fence from the new attempt's number
    assert (state.version, state.attempt, state.round) == (before.version + 1, 2, watermark)
    assert_same(MistakeLog(tmp_path).records(), kept)
    assert state.rows == len(kept)
    assert MistakeLog(tmp_path, before.version).records().round.max() == 6
    update = tail.poll()
    assert len(update.removed) == (2 if watermark == 4 else 4)
    assert len(update.new) == (0 if watermark == 4 else 2)

    with pytest.raises(FencedError, match="attempt 1 was replaced by attempt 2"):
        ledger.commit(written(tmp_path, 7, 8, sequence=3))
    restarted = Ledger(tmp_path, writers=2, run="test")
    with pytest.raises(FencedError):
        restarted.commit(written(tmp_path, 7, 8, sequence=3))
    restarted.commit(written(tmp_path, watermark + 1, 6, attempt=2))
    assert restarted.state().round == 6


def test_a_checkpoint_ahead_of_the_log_is_an_error(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.begin_attempt(0, 1)
    ledger.commit(written(tmp_path, 1, 2))
    with pytest.raises(LedgerError, match=r"checkpoint is at round 3.*only up to round 2"):
        ledger.begin_attempt(3, 1)
    assert ledger.state().attempt == 1


def test_end_of_the_pilot_survives(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.begin_attempt(0, 1)
    ledger.commit(written(tmp_path, 1, 2))
    with pytest.raises(LedgerError, match="round 2 is in the log"):
        ledger.finish_pilot(1)
    ledger.finish_pilot(2)
    state = Ledger(tmp_path, writers=1, run="test").state()
    assert (state.pilot_done, state.last_round) == (True, 2)
    ledger.begin_attempt(2, 1)
    state = Ledger(tmp_path, writers=1, run="test").state()
    assert (state.pilot_done, state.last_round) == (False, 0)


def test_position_of_the_copilot_is_known_without_a_commit(tmp_path: Path) -> None:
    """It stands in the Copilot's checkpoint; a table version for each step would only grow the log."""
    ledger = open_ledger(tmp_path)
    version = ledger.state().version
    ledger.report_copilot(2, 8)
    state = ledger.state()
    assert (state.copilot_round, state.copilot_steps, state.version) == (2, 8, version)
    assert ledger.copilot_round() == 2


def test_a_second_ledger_is_noticed(tmp_path: Path) -> None:
    """A stale Ledger (a partitioned actor) cannot commit on old knowledge: it re-reads and finds itself fenced."""
    stale = open_ledger(tmp_path)
    stale.begin_attempt(0, 1)
    fresh = Ledger(tmp_path, writers=1, run="test")
    stale.commit(written(tmp_path, 1, 2))
    fresh.commit(written(tmp_path, 3, 4, sequence=1))
    assert fresh.state().rows == 8
    fresh.begin_attempt(2, 1)
    with pytest.raises(FencedError):
        stale.commit(written(tmp_path, 5, 6, sequence=2))
    assert rounds_in(tmp_path) == [1, 1, 2, 2]
    assert stale.begin_attempt(2, 1) == 3


def test_numbers_survive_the_log_checkpoints_of_delta(tmp_path: Path) -> None:
    """deltalake folds every 100 versions into a checkpoint file; statistics and numbers must come through it."""
    ledger = open_ledger(tmp_path)
    ledger.begin_attempt(0, 1)
    ledger.commit(written(tmp_path, 1, 2))
    for _ in range(120):
        ledger.begin_attempt(2, 1)
    assert list((tmp_path / "_delta_log").glob("*.checkpoint.parquet"))
    assert Ledger(tmp_path, writers=1, run="test").state() == ledger.state()
    assert MistakeLog(tmp_path).files[0].round_max == 2
    for old in (tmp_path / "_delta_log").glob("0000000000000000000*.json"):
        old.unlink()
    assert LogStore(tmp_path).number("tc_ray/test/attempt") == 121


def test_create_refuses_other_settings_and_other_tables(tmp_path: Path) -> None:
    LogStore.create(tmp_path / "log", metadata())
    LogStore.create(tmp_path / "log", metadata())
    with pytest.raises(LogSchemaError, match="top_k: 3 in the table, 7 here"):
        LogStore.create(tmp_path / "log", metadata(top_k=7))
    with pytest.raises(LedgerError, match="'test', not 'other'"):
        Ledger(tmp_path / "log", writers=1, run="other")
    with pytest.raises(LogSchemaError, match="no Delta table"):
        MistakeLog(tmp_path / "nothing")
