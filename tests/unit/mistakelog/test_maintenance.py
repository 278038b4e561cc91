"""Maintenance beside the run: while a merge is being written, the Ledger answers and commits; what it builds upon may change.

The merge is real; only its reading is held up at a gate. The slow test measures with 128 MB and no gate.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.commit.ledger_actor import LedgerActor
from tc_ray.mistakelog.maintain.quarantine import quarantined
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table import data_file
from tc_ray.mistakelog.table.data_file import DataFile
from tc_ray.mistakelog.table.errors import LeaseLostError
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.store import LogStore, StoredFile
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import metadata, random_records
from tests.support.waiting import until
from tests.unit.mistakelog.test_fenced import taken_for_dead
from tests.unit.mistakelog.test_ledger import rounds_in, written

ROUNDS = 12
SETTINGS = LogSection(
    file_bytes=1 << 20,
    vacuum_grace_seconds=600,
    orphan_seconds=3600,
)


class Gate:
    """Holds the merge up while it reads its second file, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        read, seen = LogStore.read, []

        def held_up(store: LogStore, file: StoredFile, columns: list[str] | None = None) -> pa.Table:
            if threading.current_thread().name == "log-maintenance":
                seen.append(file)
                if len(seen) == 2:
                    self.reached.set()
                    assert self.opened.wait(30)
            return read(store, file, columns)

        monkeypatch.setattr(LogStore, "read", held_up)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.opened.set()


def merging(folder: Path, gate: Gate, lease: int | None = None) -> LedgerActor:
    """A Ledger with rounds 1 to `ROUNDS` in a file each, whose thread stands in the middle of merging them."""
    LogStore.create(folder, metadata())
    ledger = LedgerActor(folder, writers=1, run="test", lease=lease, settings=SETTINGS)
    ledger.begin_attempt(0, 1)
    for sequence in range(ROUNDS):
        ledger.commit(written(folder, sequence + 1, sequence + 1, sequence=sequence))
    assert not gate.reached.wait(0.05), "no round is before a checkpoint yet"
    ledger.report_checkpoint(ROUNDS)
    ledger.maintain_soon()
    assert gate.reached.wait(20)
    return ledger


def leftovers(folder: Path) -> list[str]:
    """Merged files, and parts of them, that are not in the table."""
    table = {file.name for file in LogStore(folder).files()}
    return [path.name for path in folder.iterdir() if "-merged-" in path.name and path.name not in table]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def test_commits_and_state_do_not_wait_for_a_merge(tmp_path: Path, gate: Gate) -> None:
    ledger = merging(tmp_path, gate)
    before = ledger.state()
    for sequence in (ROUNDS, ROUNDS + 1):
        ledger.commit(written(tmp_path, sequence + 1, sequence + 1, sequence=sequence))
        assert ledger.state().round == sequence + 1
    with within(0.05):
        assert ledger.state().files == before.files + 2
    assert not gate.opened.is_set() and rounds_in(tmp_path) == sorted([*range(1, ROUNDS + 3)] * 2)
    gate.opened.set()
    until(lambda: ledger.state().files == 3)
    assert rounds_in(tmp_path) == sorted([*range(1, ROUNDS + 3)] * 2)
    assert ledger.state().rows == 2 * (ROUNDS + 2) and verify_log(tmp_path).good


def test_the_pilots_end_waits_for_the_merge(tmp_path: Path, gate: Gate) -> None:
    """A process that is ended after it leaves no half-written file."""
    ledger = merging(tmp_path, gate)
    threading.Timer(0.2, gate.opened.set).start()
    ledger.finish_pilot(ROUNDS)
    assert gate.opened.is_set() and ledger.state().files == 1 and not leftovers(tmp_path)


def test_a_merge_whose_parts_were_fenced_is_dropped(tmp_path: Path, gate: Gate) -> None:
    ledger = merging(tmp_path, gate)
    assert ledger.begin_attempt(3, 1) == 2
    gate.opened.set()
    until(lambda: not leftovers(tmp_path))
    ledger.maintain()  # waits for the thread
    assert rounds_in(tmp_path) == [1, 1, 2, 2, 3, 3] and not leftovers(tmp_path)
    ledger.commit(written(tmp_path, 4, 4, attempt=2))
    assert ledger.state().round == 4 and verify_log(tmp_path).good


def test_a_merge_whose_part_was_quarantined_is_dropped(tmp_path: Path, gate: Gate) -> None:
    ledger = merging(tmp_path, gate)
    victim = LogStore(tmp_path).files()[0]  # the merge has read it already
    (tmp_path / victim.name).write_bytes(b"PAR1")
    assert ledger.quarantine(victim.name, "a reader says so")
    gate.opened.set()
    ledger.maintain()
    assert rounds_in(tmp_path) == sorted([*range(2, ROUNDS + 1)] * 2) and not leftovers(tmp_path)
    assert [line.name for line in quarantined(LogStore(tmp_path).location)] == [victim.name]


def test_a_damaged_part_is_quarantined_and_the_rest_merged(tmp_path: Path, gate: Gate) -> None:
    ledger = merging(tmp_path, gate)
    (tmp_path / LogStore(tmp_path).files()[4].name).write_bytes(b"PAR1")
    gate.opened.set()
    ledger.maintain()
    ledger.maintain()
    assert (ledger.state().files, ledger.state().quarantined) == (1, 1)
    assert rounds_in(tmp_path) == sorted([n for n in range(1, ROUNDS + 1) if n != 5] * 2)


def test_a_lease_that_is_lost_during_a_merge(tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    """The new owner's log is untouched, the merged file goes, and every later call says why."""
    place = LogStore.create(tmp_path / "log", metadata()).location
    lease = RunLease.take(place, "run A")
    ledger = merging(tmp_path / "log", gate, lease.number)
    taken_for_dead(place)
    with RunLease.take(place, "run B") as other:
        version = LogStore(place).version
        gate.opened.set()
        until(
            lambda: f"{tmp_path / 'log'}: another process has taken this log over" in caplog.text
        )  # not another test's
        with pytest.raises(LeaseLostError):
            ledger.state()
        assert LogStore(place).version == version and not leftovers(tmp_path / "log")
        assert Ledger(place, writers=1, run="test", lease=other.number).state().round == ROUNDS


@pytest.mark.slow
def test_a_merge_of_128_mb_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`state` answers within 50 ms, and a commit takes at most twice its usual time (medians)."""
    monkeypatch.setattr(data_file, "_ROW_GROUP_BYTES", 16 << 20)
    LogStore.create(tmp_path, metadata())
    limits = SETTINGS.model_copy(update={"file_bytes": 160 << 20})
    ledger = LedgerActor(tmp_path, writers=1, run="test", settings=limits)
    writer = RecordWriter(
        tmp_path,
        ledger.commit,
        LogSection(flush_rounds=1, file_bytes=2**30, queue_rounds=2),
        run="test",
        rank=0,
        attempt=ledger.begin_attempt(0, 1),
    )
    base = random_records(120_000)
    for number in range(1, 7):
        writer.put(Records(**{**base.__dict__, "round": np.full(len(base), number, np.int64)}), number)
        writer.end_round(number)
    writer.close()
    assert sum(file.bytes for file in LogStore(tmp_path).files()) > 128e6

    sequence = ledger.state().files

    def commit() -> float:
        nonlocal sequence
        began = time.perf_counter()
        ledger.commit(DataFile(None, 0, 0, sequence + 1, sequence + 1, 0, 1, sequence))
        sequence += 1
        return time.perf_counter() - began

    usual = [commit() for _ in range(15)]
    files = ledger.state().files
    ledger.report_checkpoint(6)
    ledger.maintain_soon()
    answers, commits = [], []
    while ledger.state().files == files:
        began = time.perf_counter()
        ledger.state()
        answers.append(time.perf_counter() - began)
        commits.append(commit())
        assert len(commits) < 1000
    usual += [commit() for _ in range(15)]  # a machine with other work is slow at some times
    print(
        f"{len(commits)} commits during the merge: {statistics.median(commits):.4f} s, usual {statistics.median(usual):.4f} s"
    )
    print(f"state: at most {max(answers):.4f} s; slowest commit {max(commits):.4f} s, usual {max(usual):.4f} s")
    assert len(commits) >= 3, "the merge was over before anything could be measured"
    assert max(answers) < 0.05
    assert statistics.median(commits) < 2 * statistics.median(usual)
    with MistakeLog(tmp_path) as log:
        assert len(log.files) == 1 and sum(len(records) for _, records in log.pieces()) == 6 * len(base)
