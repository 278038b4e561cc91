"""RecordWriter while the log cannot be written: both policies, exact counts, and recovery by itself.

Failures are put in where they come from: at the file's `write`, or in the answer of the Ledger. A real full disk is in
tests/faults/mistakelog/test_disk_full.py.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.maintain.maintenance import Maintenance, Position
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.commits import dropped_records
from tc_ray.mistakelog.table.data_file import DataFile, _Output
from tc_ray.mistakelog.table.errors import LogFullError
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.queue import Batch, Cut, WriteQueue
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import assert_same, metadata, random_records
from tests.support.waiting import until

ROWS = 3


class Disk:
    """The disk of a location, full or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self.refused = 0
        disk = self

        arrow_write = _Output.write

        def output_write(output: _Output, data: bytes) -> int:
            disk.check()
            return arrow_write(output, data)

        def write(location: Location, name: str, data: bytes) -> None:
            disk.check()
            assert location.local is not None
            (location.local / name).parent.mkdir(parents=True, exist_ok=True)
            (location.local / name).write_bytes(data)

        monkeypatch.setattr(_Output, "write", output_write)
        monkeypatch.setattr(Location, "write", write)

    def check(self) -> None:
        if self.full:
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr("tc_ray.mistakelog.table.errors._FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("tc_ray.mistakelog.table.errors._LAST_PAUSE_SECONDS", 0.05)
    return Disk(monkeypatch)


class Pilot:
    """Puts rounds and remembers them."""

    def __init__(self, folder: Path, submit: Any = None, **changes: Any) -> None:
        LogStore.create(folder, metadata())
        self.folder = folder
        self.ledger = Ledger(folder, writers=1, run="test")
        attempt = self.ledger.begin_attempt(0, 1)
        options = {"flush_rounds": 1, "file_bytes": 2**30, "queue_rounds": 2, **changes}
        self.writer = RecordWriter(
            folder, submit or self.ledger.commit, LogSection(**options), run="test", rank=0, attempt=attempt
        )
        self.round = 0
        self.put: list[Records] = []
        self.dropped: dict[int, int] = {}

    def train(self, batches: int = 1) -> list[bool]:
        self.round += 1
        taken = []
        for at in range(batches):
            records = random_records(ROWS, round=self.round, first_sample=100 * self.round + 10 * at)
            taken.append(self.writer.put(records, self.round))
            self.put.append(records)
        self.writer.end_round(self.round)
        return taken

    def logged_drops(self) -> dict[int, int]:
        """By round, as the table's commits say."""
        return dropped_records(LogStore(self.folder).commits()).get(0, {})


def data_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_block_waits_and_loses_nothing(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tc_ray.mistakelog.table.errors")
    pilot = Pilot(tmp_path)
    pilot.train()
    assert pilot.writer.flush(1)
    disk.full = True
    pilot.train()
    until(lambda: disk.refused >= 4)
    committed = {file.name for file in MistakeLog(tmp_path).files}
    # between two tries: an unfinished file holds no space
    until(lambda: data_files(tmp_path) == committed)
    pilot.train(2)  # fills the queue
    threading.Timer(0.3, lambda: setattr(disk, "full", False)).start()
    pilot.train()  # waits for it
    assert pilot.writer.stats()["blocked_seconds"] > 0.1
    assert pilot.writer.flush(4)
    pilot.writer.close()
    assert_same(MistakeLog(tmp_path).records(), Records.concat(pilot.put))
    stats = pilot.writer.stats()
    assert (stats["dropped_records"], pilot.logged_drops()) == (0, {})
    assert 0.2 < stats["full_seconds"] < 10
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2, texts
    assert "out of reach ([Errno 28] No space left on device)" in texts[0]
    assert "is there again, after" in texts[1]


def test_block_keeps_what_was_written_before_the_disk_was_full(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups of the file are on the disk already when it fails: they are written again from memory."""
    monkeypatch.setattr("tc_ray.mistakelog.table.data_file.ROW_GROUP_BYTES", 1)
    pilot = Pilot(tmp_path, flush_rounds=100, queue_rounds=8)
    for _ in range(3):
        pilot.train()
    until(lambda: list(tmp_path.glob("*.tmp")))
    disk.full = True
    pilot.train()
    until(lambda: disk.refused >= 3)
    until(lambda: not list(tmp_path.glob("*.tmp")))  # each try begins a file and takes it away again
    disk.full = False
    assert pilot.writer.flush(4)
    pilot.writer.close()
    assert_same(MistakeLog(tmp_path).records(), Records.concat(pilot.put))
    assert len(MistakeLog(tmp_path).files) == 1


def test_drop_drops_what_finds_the_queue_full(tmp_path: Path, disk: Disk) -> None:
    pilot = Pilot(tmp_path, full_policy="drop")
    disk.full = True
    started = time.monotonic()
    pilot.train()  # the thread takes it and fails
    until(lambda: pilot.writer._full_since is not None)  # a moment after the disk has refused
    taken = [pilot.train(2) for _ in range(200)]
    assert not pilot.writer.flush(200, timeout=30)
    assert not pilot.writer.flush(201)
    assert time.monotonic() - started < 5, "the Pilot waited"
    assert taken[0] == [True, True] and not any(any(pair) for pair in taken[1:])
    assert len(pilot.writer._queue._entries) <= 6, "the queue grows while the log cannot be written"
    dropped = {round: 2 * ROWS for round in range(3, 202)}
    assert pilot.writer.stats()["dropped_records"] == sum(dropped.values())
    disk.full = False
    until(lambda: pilot.writer.flush(201))
    assert pilot.train() == [True]
    pilot.writer.close()
    kept = [records for records in pilot.put if int(records.round[0]) not in dropped]
    assert_same(MistakeLog(tmp_path).records(), Records.concat(kept))
    assert pilot.logged_drops() == dropped
    assert pilot.ledger.state().round == 202


class FullLedger:
    """A Ledger whose commits fail for want of space, before or after they are made."""

    def __init__(self) -> None:
        self.ledger: Ledger | None = None
        self.full: str | None = None
        self.refused = 0

    def commit(self, file: DataFile) -> int:
        assert self.ledger is not None
        if self.full == "before":
            self.refused += 1
            raise LogFullError("no space left at here")
        version = self.ledger.commit(file)
        if self.full == "after":
            self.refused += 1
            raise LogFullError("no space left at here")
        return version


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("policy", ["block", "drop"])
def test_a_commit_without_space_is_repeated(tmp_path: Path, disk: Disk, policy: Any, when: str) -> None:
    """The answer does not say whether the commit was made: the file must stay, whatever the policy."""
    full = FullLedger()
    pilot = Pilot(tmp_path, full.commit, full_policy=policy, queue_rounds=1)
    full.ledger = pilot.ledger
    pilot.train()
    assert pilot.writer.flush(1)
    full.full = when
    pilot.train()
    until(lambda: full.refused >= 2)
    assert pilot.train() == [True]
    if policy != "block":
        assert not pilot.writer.flush(3)
    full.full = None
    until(lambda: pilot.writer.flush(3, timeout=0.1))
    pilot.train()
    pilot.writer.close()
    assert_same(MistakeLog(tmp_path).records(), Records.concat(pilot.put))
    assert pilot.logged_drops() == {}


def test_drops_are_counted_where_a_commit_has_no_rows(tmp_path: Path, disk: Disk) -> None:
    pilot = Pilot(tmp_path, full_policy="drop", queue_rounds=1)
    disk.full = True
    pilot.train()  # the thread takes it and fails
    until(lambda: pilot.writer._full_since is not None)
    assert pilot.train() == [True]  # waits in the queue
    assert [pilot.train() for _ in range(3)] == [[False]] * 3
    disk.full = False
    until(lambda: pilot.writer.flush(5))
    assert pilot.logged_drops() == {3: ROWS, 4: ROWS, 5: ROWS}
    state = pilot.ledger.state()
    assert (state.round, state.rows, state.dropped) == (5, 2 * ROWS, 3 * ROWS)
    pilot.writer.close()


def test_close_waits_until_the_log_can_be_written(tmp_path: Path, disk: Disk) -> None:
    pilot = Pilot(tmp_path)
    disk.full = True
    pilot.train()
    until(lambda: disk.refused)
    threading.Timer(0.2, lambda: setattr(disk, "full", False)).start()
    pilot.writer.close()
    assert_same(MistakeLog(tmp_path).records(), Records.concat(pilot.put))
    assert not list(tmp_path.glob("*.tmp"))


def test_flush_has_a_time_limit(tmp_path: Path, disk: Disk) -> None:
    pilot = Pilot(tmp_path)
    disk.full = True
    pilot.train()
    started = time.monotonic()
    assert not pilot.writer.flush(1, timeout=0.2)
    assert 0.15 < time.monotonic() - started < 2
    disk.full = False
    assert pilot.writer.flush(1)
    pilot.writer.close()


def test_records_that_are_still_on_a_device(tmp_path: Path) -> None:
    """The step goes on: the thread waits, and reads no number before."""
    pilot = Pilot(tmp_path)
    records = random_records(ROWS, round=1, first_sample=100)
    ready, losses = threading.Event(), records.token_loss.copy()
    records.token_loss[:] = float("nan")
    assert pilot.writer.put(records, 1, lambda: ready.wait(10))
    pilot.writer.end_round(1)
    assert not pilot.writer.flush(1, timeout=0.1)
    records.token_loss[:] = losses
    ready.set()
    assert pilot.writer.flush(1)
    assert_same(MistakeLog(tmp_path).records(), records)
    pilot.writer.close()


def test_the_queue_counts_every_record() -> None:
    queue = WriteQueue()
    records = random_records(ROWS)
    for round in (1, 2):
        queue.push(Batch(round, records))
        queue.end_round(Cut(round, force=round == 1))
    queue.end_round(Cut(3, force=False))
    assert (queue.depth, queue.dropped) == (2, 0)
    assert queue.pop() == Batch(1, records)
    assert [queue.pop() for _ in range(3)] == [Cut(1, force=True), Batch(2, records), Cut(3, force=False)]
    assert queue.pop() is None and not queue and queue.depth == 0
    queue.drop(2, ROWS)
    queue.drop(5, 2)
    assert queue.dropped == ROWS + 2
    assert queue.take_drops(4) == {2: ROWS}
    assert queue.take_drops(4) == {}
    assert queue.take_drops(5) == {5: 2}


def test_a_merge_that_finds_the_disk_full_is_put_off(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """From the first byte: not even the file's header can be written."""
    pilot = Pilot(tmp_path)
    for _ in range(12):
        pilot.train()
    assert pilot.writer.flush(12)
    pilot.writer.close()
    store = LogStore(tmp_path)
    limits = LogSection(file_bytes=1 << 20, vacuum_grace_seconds=600, orphan_seconds=3600)
    keeper = Maintenance(store, limits, 1, lambda: nullcontext(Position({"x": 1}, 12, 12, 1)))
    disk.full = True
    done = keeper.maintain()
    assert done.merge is None and not list(tmp_path.glob("*.tmp"))
    assert "maintenance is put off: [Errno 28]" in caplog.text
    disk.full = False
    assert keeper.maintain().merge is not None
    assert_same(MistakeLog(tmp_path).records(), Records.concat(pilot.put))
