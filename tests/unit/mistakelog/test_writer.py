"""RecordWriter with a real Ledger (no Ray): cuts, flush, queue policies, failures; and the readers beside it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import LogTail, MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.data_file import DataFile
from tc_ray.mistakelog.table.errors import FencedError, WriterError
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import assert_same, metadata, random_records


def begin(folder: Path, watermark: int = 0) -> tuple[Ledger, int]:
    LogStore.create(folder, metadata())
    ledger = Ledger(folder, writers=1, run="test")
    return ledger, ledger.begin_attempt(watermark, 1)


def make_writer(folder: Path, submit: Any, attempt: int = 1, start_round: int = 0, **changes: Any) -> RecordWriter:
    settings = LogSection.model_validate({"flush_rounds": 4, "file_bytes": 2**30, "queue_rounds": 4, **changes})
    return RecordWriter(folder, submit, settings, run="test", rank=0, attempt=attempt, start_round=start_round)


def batch(round: int, rows: int = 3, attempt: int = 1) -> Records:
    return random_records(rows, round=round, attempt=attempt, first_sample=100 * round)


def test_rounds_are_cut_by_count_and_flush_and_close(tmp_path: Path) -> None:
    ledger, _ = begin(tmp_path)
    writer = make_writer(tmp_path, ledger.commit)
    put = []
    for number in range(1, 12):
        for _ in range(2):
            put.append(batch(number))
            assert writer.put(put[-1], number)
        writer.end_round(number)
        if number == 6:
            assert writer.flush(6)
            assert ledger.state().round == 6
            assert writer.flush(6)
    writer.put(batch(12), 12)  # never ended: not part of the log
    writer.close()
    files = MistakeLog(tmp_path).files
    assert [(file.round_min, file.round_max) for file in files] == [(1, 4), (5, 6), (7, 10), (11, 11)]
    assert_same(MistakeLog(tmp_path).records(), Records.concat(put))
    assert not list(tmp_path.glob("*.tmp"))
    stats = writer.stats()
    assert stats.pop("bytes") == sum(file.bytes for file in files)
    assert stats.pop("blocked_seconds") < 30
    assert stats == {
        "records": 69,
        "dropped_records": 0,
        "not_finite_records": 0,
        "full_seconds": 0.0,
        "queue_depth": 0,
        "acknowledged_round": 11,
    }
    with pytest.raises(WriterError, match="closed"):
        writer.put(batch(12), 12)


def test_a_file_is_cut_by_size_at_round_ends_only(tmp_path: Path) -> None:
    ledger, _ = begin(tmp_path)
    writer = make_writer(tmp_path, ledger.commit, file_bytes=1, flush_rounds=100)
    for number in (1, 2):
        for _ in range(3):
            writer.put(batch(number), number)
        writer.end_round(number)
    writer.close()
    assert [(file.round_min, file.round_max, file.rows) for file in MistakeLog(tmp_path).files] == [
        (1, 1, 9),
        (2, 2, 9),
    ]


def test_rounds_without_rows_advance_the_log_without_a_file(tmp_path: Path) -> None:
    ledger, _ = begin(tmp_path)
    writer = make_writer(tmp_path, ledger.commit)
    for number in (1, 2):
        writer.put(batch(number, rows=0), number)
        writer.end_round(number)
    writer.flush(2)
    assert (ledger.state().round, ledger.state().files) == (2, 0)
    writer.put(batch(3), 3)
    writer.end_round(3)
    writer.close()
    assert ledger.state().round == 3
    assert not list(tmp_path.glob("*.tmp"))


class SlowLedger:
    """A Ledger whose `commit` waits for `release`."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.release, self.waiting = ledger, threading.Event(), threading.Event()

    def commit(self, file: DataFile) -> int:
        self.waiting.set()
        assert self.release.wait(30)
        return self.ledger.commit(file)


def test_a_full_queue_blocks_and_is_counted(tmp_path: Path) -> None:
    ledger, _ = begin(tmp_path)
    slow = SlowLedger(ledger)
    writer = make_writer(tmp_path, slow.commit, flush_rounds=1, queue_rounds=2)
    writer.put(batch(1), 1)
    writer.end_round(1)
    assert slow.waiting.wait(10)
    writer.put(batch(2), 2)
    writer.put(batch(2), 2)
    assert writer.stats()["queue_depth"] == 2
    threading.Timer(0.3, slow.release.set).start()
    started = time.monotonic()
    writer.put(batch(2), 2)
    assert time.monotonic() - started >= 0.2
    assert writer.stats()["blocked_seconds"] >= 0.2
    writer.end_round(2)
    writer.close()
    assert ledger.state().rows == 12


def test_a_full_queue_drops_by_policy_and_counts_exactly(tmp_path: Path) -> None:
    ledger, _ = begin(tmp_path)
    slow = SlowLedger(ledger)
    writer = make_writer(tmp_path, slow.commit, flush_rounds=1, queue_rounds=2, full_policy="drop")
    writer.put(batch(1), 1)
    writer.end_round(1)
    assert slow.waiting.wait(10)
    started = time.monotonic()
    assert [writer.put(batch(2, rows=5), 2) for _ in range(4)] == [True, True, False, False]
    writer.end_round(2)
    assert [writer.put(batch(3, rows=5), 3)] == [False]
    writer.end_round(3)
    assert time.monotonic() - started < 0.2
    slow.release.set()
    writer.flush(3)
    writer.close()
    stats = writer.stats()
    assert (stats["records"], stats["dropped_records"], stats["blocked_seconds"]) == (13, 15, 0.0)
    assert (ledger.state().rows, ledger.state().round) == (13, 3)


def test_an_error_of_the_thread_is_raised_at_the_next_call(tmp_path: Path) -> None:
    def refuse(file: DataFile) -> int:
        raise PermissionError(13, "Permission denied")

    begin(tmp_path)
    writer = make_writer(tmp_path, refuse, flush_rounds=1)
    writer.put(batch(1), 1)
    writer.end_round(1)
    with pytest.raises(WriterError, match=r"after round 0: .*Permission denied") as caught:
        writer.flush(1)
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(WriterError):
        writer.put(batch(2), 2)
    with pytest.raises(WriterError):
        writer.close()
    assert len(MistakeLog(tmp_path).records()) == 0


def test_a_blocked_put_ends_when_the_thread_fails(tmp_path: Path) -> None:
    begin(tmp_path)
    asked, go = threading.Event(), threading.Event()

    def refuse(file: DataFile) -> int:
        asked.set()
        go.wait(30)
        raise OSError("gone")

    writer = make_writer(tmp_path, refuse, flush_rounds=1, queue_rounds=1)
    writer.put(batch(1), 1)
    writer.end_round(1)
    assert asked.wait(10)
    writer.put(batch(2), 2)
    threading.Timer(0.1, go.set).start()
    with pytest.raises(WriterError, match="gone"):
        writer.put(batch(2), 2)


def test_a_fenced_writer_stops_and_its_leftovers_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tc_ray.mistakelog.table.data_file.ROW_GROUP_BYTES", 1)  # to the disk at once
    ledger, _ = begin(tmp_path)
    old = make_writer(tmp_path, ledger.commit)
    for number in (1, 2):
        old.put(batch(number), number)
        old.end_round(number)
    old.flush(2)
    old.put(batch(3), 3)
    old.end_round(3)
    while not list(tmp_path.glob("*.tmp")):
        time.sleep(0.01)
    attempt = ledger.begin_attempt(1, 1)
    new = make_writer(tmp_path, ledger.commit, attempt, start_round=1)
    assert not list(tmp_path.glob("*.tmp"))
    new.put(batch(2, attempt=attempt), 2)
    new.end_round(2)
    new.close()
    # its unfinished file was taken away
    with pytest.raises(WriterError, match="No such file"):
        old.flush(3)
    assert MistakeLog(tmp_path).records().attempt.tolist() == [1, 1, 1, 2, 2, 2]

    late = make_writer(tmp_path, ledger.commit, attempt=1, start_round=2)
    late.end_round(3)
    with pytest.raises(FencedError, match="attempt 1 was replaced by attempt 2"):
        late.flush(3)


def test_wrong_rounds_are_refused(tmp_path: Path) -> None:
    ledger, _ = begin(tmp_path)
    writer = make_writer(tmp_path, ledger.commit)
    with pytest.raises(ValueError, match="attempt 1"):
        writer.put(batch(1, attempt=2), 1)
    with pytest.raises(ValueError, match="round 2"):
        writer.put(batch(1), 2)
    writer.put(batch(1), 1)
    with pytest.raises(ValueError, match="last ended"):
        writer.flush(1)
    writer.end_round(1)
    with pytest.raises(ValueError, match="round 1 was the last to end"):
        writer.put(batch(1), 1)
    with pytest.raises(ValueError, match="round 1 was the last to end"):
        writer.end_round(3)
    writer.close()


def test_zstd_and_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tc_ray.mistakelog.table.data_file.ROW_GROUP_BYTES", 1)
    ledger, _ = begin(tmp_path)
    writer = make_writer(tmp_path, ledger.commit, compression="zstd")
    put = [batch(1), batch(1)]
    for records in put:
        writer.put(records, 1)
    writer.end_round(1)
    writer.close()
    assert_same(MistakeLog(tmp_path).records(), Records.concat(put))


def test_tail_reads_each_file_once(tmp_path: Path) -> None:
    ledger, _ = begin(tmp_path)
    tail = LogTail(tmp_path)
    assert tail.poll().new == []
    writer = make_writer(tmp_path, ledger.commit, flush_rounds=2)
    versions, seen = [], []
    for number in range(1, 9):
        writer.put(batch(number), number)
        writer.end_round(number)
        if number % 4 == 0:
            writer.flush(number)
            versions.append(ledger.state().version)
            update = tail.poll()
            assert (update.version, update.removed, len(update.new)) == (versions[-1], [], 2)
            seen += [records for _, records in update.new]
    writer.close()
    assert_same(Records.concat(seen), MistakeLog(tmp_path).records())
    assert tail.poll().new == []

    resumed = LogTail(tmp_path)
    first = resumed.poll(versions[0], min_round=3)
    assert (first.version, [records.round.max() for _, records in first.new]) == (versions[0], [4])
    assert len(resumed.poll().new) == 2


def test_log_selects_rounds_and_columns_of_its_version(tmp_path: Path) -> None:
    ledger, _ = begin(tmp_path)
    writer = make_writer(tmp_path, ledger.commit)
    put = [batch(number) for number in range(1, 7)]
    for number, records in enumerate(put, 1):
        writer.put(records, number)
        writer.end_round(number)
    writer.flush(6)
    log = MistakeLog(tmp_path)
    ledger.begin_attempt(0, 1)
    assert len(MistakeLog(tmp_path).records()) == 0
    assert_same(log.records((2, 4)), Records.concat(put[1:4]))
    table = log.arrow((3, 5), ["sample_id", "seen"])
    assert table.column_names == ["sample_id", "seen"]
    np.testing.assert_array_equal(table["sample_id"], Records.concat(put[2:5]).sample_id)
    assert log.metadata == metadata()


def test_a_flush_leaves_out_rows_of_the_next_round(tmp_path: Path) -> None:
    """Also more micro-batches a round than the queue holds: nothing may wait for the round's end."""
    ledger, _ = begin(tmp_path)
    writer = make_writer(tmp_path, ledger.commit, queue_rounds=1)
    writer.put(batch(1), 1)
    writer.end_round(1)
    for _ in range(5):
        writer.put(batch(2), 2)
    writer.flush(1)
    assert MistakeLog(tmp_path).records().round.tolist() == [1, 1, 1]
    writer.end_round(2)
    writer.close()
    assert [file.rows for file in MistakeLog(tmp_path).files] == [3, 15]
