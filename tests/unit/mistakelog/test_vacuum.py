"""What vacuum removes and what it leaves: removed files, orphans, held versions, foreign files; and maintenance."""

from __future__ import annotations

import errno
import os
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.maintain.maintenance import Maintenance, Position
from tc_ray.mistakelog.maintain.vacuum import Vacuum, look, vacuum_log
from tc_ray.mistakelog.read.reader import LogTail, MistakeLog
from tc_ray.mistakelog.read.reader_lease import ReaderLease
from tc_ray.mistakelog.table.data_file import DataFile
from tc_ray.mistakelog.table.errors import LogFullError
from tc_ray.mistakelog.table.lease import LeaseHeldError, RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LEASE_NUMBER, LogStore
from tests.support.mistakelog_samples import merge_all
from tests.unit.mistakelog.test_compaction import ROWS, written

HOUR = 3600.0


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def data_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def removed(done: Vacuum) -> set[str]:
    return {entry.name for entry in done.removed}


def test_removed_files_go_after_the_grace_time(tmp_path: Path) -> None:
    written(tmp_path)
    before = data_files(tmp_path)
    merge_all(tmp_path)
    kept = vacuum_log(tmp_path, orphan_seconds=HOUR, grace_seconds=HOUR)
    assert removed(kept) == set()
    assert kept.disk_bytes == sum((tmp_path / name).stat().st_size for name in data_files(tmp_path))
    done = vacuum_log(tmp_path, orphan_seconds=HOUR, grace_seconds=0)
    assert removed(done) == before
    assert data_files(tmp_path) == {file.name for file in LogStore(tmp_path).files()}
    assert len(MistakeLog(tmp_path).records()) == 8 * ROWS
    assert vacuum_log(tmp_path, orphan_seconds=HOUR, grace_seconds=0).removed == []


def test_a_held_version_keeps_its_files(tmp_path: Path) -> None:
    written(tmp_path)
    reader = MistakeLog(tmp_path)
    held = data_files(tmp_path)
    merge_all(tmp_path)
    done = vacuum_log(tmp_path, orphan_seconds=0, grace_seconds=0)
    assert done.removed == [] and done.held == [reader.version]
    assert len(reader.records()) == 8 * ROWS and not reader.bad_files
    reader.close()
    assert removed(vacuum_log(tmp_path, orphan_seconds=0, grace_seconds=0)) == held


@pytest.mark.parametrize("follow", [True, False], ids=["tail", "log"])
def test_a_reader_that_is_held_up_before_its_lease_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follow: bool
) -> None:
    written(tmp_path)
    tail = LogTail(tmp_path) if follow else None
    move, seen = ReaderLease.move, []

    def held_up(lease: ReaderLease, version: int, onwards: bool = False) -> None:
        # the reader has looked and stands here for long: meanwhile the log is merged and vacuumed without any grace
        if not onwards and not seen:
            monkeypatch.setattr(ReaderLease, "move", move)
            merge_all(tmp_path)
            seen.append(vacuum_log(tmp_path, orphan_seconds=0, grace_seconds=0))
        move(lease, version, onwards)

    monkeypatch.setattr(ReaderLease, "move", held_up)
    if tail is not None:
        # a commit, so that there is something to look for
        with RunLease.take(Location(tmp_path), "test") as lease:
            LogStore(tmp_path).commit(numbers={LEASE_NUMBER: lease.number})
        update = tail.poll()
        assert not update.bad and sum(len(records) for _, records in update.new) == 8 * ROWS
        assert tail.poll().removed == sorted(name for name, _ in update.new)
        tail.close()
    else:
        with MistakeLog(tmp_path) as log:
            assert len(log.records()) == 8 * ROWS and not log.bad_files
    (vacuum,) = seen
    assert vacuum.removed == []
    assert removed(vacuum_log(tmp_path, orphan_seconds=0, grace_seconds=0))


def test_readers_that_look_all_the_time_keep_only_what_they_may_find(tmp_path: Path) -> None:
    written(tmp_path)
    before = data_files(tmp_path)
    known = LogStore(tmp_path).version
    merge_all(tmp_path)
    merged = LogStore(tmp_path)
    (version,) = {fate.left for name, fate in merged.fates().items() if name in before}
    assert version is not None and known < version <= merged.version
    looking = ReaderLease(Location(tmp_path), version - 1, onwards=True)
    done = vacuum_log(tmp_path, orphan_seconds=0, grace_seconds=0)
    assert (done.removed, done.held) == ([], []), "the version before the merge may be found"
    looking.move(version, onwards=True)
    done = vacuum_log(tmp_path, orphan_seconds=0, grace_seconds=0)
    assert removed(done) == before, "from the merge on, no version has them"
    looking.release()


def test_a_full_disk_is_vacuumed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease needs a few bytes, which are there only when the first files are gone."""
    written(tmp_path)
    merge_all(tmp_path)
    before, write = data_files(tmp_path), Location.write

    def full(location: Location, name: str, data: bytes) -> None:
        if data_files(tmp_path) == before:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(location, name, data)

    monkeypatch.setattr(Location, "write", full)
    with pytest.raises(LogFullError, match=f"no space left at {tmp_path}"):
        vacuum_log(tmp_path, orphan_seconds=0, grace_seconds=HOUR)
    assert len(vacuum_log(tmp_path, orphan_seconds=0, grace_seconds=0).removed) == 8
    assert data_files(tmp_path) == {file.name for file in LogStore(tmp_path).files()}


def test_a_ledger_frees_space_without_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    merge_all(tmp_path)
    ledger = Ledger(tmp_path, writers=1, run="test", settings=limits())
    version = ledger.state().version
    ledger.maintain()
    assert data_files(tmp_path) == {file.name for file in LogStore(tmp_path).files()}
    assert ledger.state().version == version, "nothing is merged: that needs space first"


def test_orphans_go_by_age_and_name(tmp_path: Path) -> None:
    written(tmp_path)
    table = data_files(tmp_path)
    old = {
        "rounds-00000009-rank0-a1-000008.parquet",
        "rounds-00000009-rank0-a1-000009.parquet.tmp",
        "rounds-00000001-00000008-merged-abc.parquet",
    }
    for name in (*old, "rounds-00000010-rank0-a1-000010.parquet", "mine.parquet", "notes.txt"):
        (tmp_path / name).write_bytes(b"x" * 10)
    for name in (*old, "mine.parquet", "notes.txt"):
        age(tmp_path / name, 2 * HOUR)
    done = vacuum_log(tmp_path, orphan_seconds=HOUR, grace_seconds=0)
    assert removed(done) == old
    assert data_files(tmp_path) == table | {
        "rounds-00000010-rank0-a1-000010.parquet",
        "mine.parquet",
        "notes.txt",
    }


def test_what_the_running_attempt_has_not_committed_yet_stays(tmp_path: Path) -> None:
    """Its writer may have been waiting for space for hours."""
    written(tmp_path)
    names = {attempt: f"rounds-00000009-rank0-a{attempt}-000008.parquet" for attempt in (1, 2)}
    for name in names.values():
        (tmp_path / name).write_bytes(b"x")
        age(tmp_path / name, 10 * HOUR)
    done = look(LogStore(tmp_path), orphan_seconds=HOUR, grace_seconds=0, live_attempt=2)
    assert removed(done) == {names[1]}


def test_no_vacuum_beside_a_run(tmp_path: Path) -> None:
    written(tmp_path)
    with RunLease.take(Location(tmp_path), "run 'test'"), pytest.raises(LeaseHeldError, match="run 'test'"):
        vacuum_log(tmp_path, orphan_seconds=0, grace_seconds=0)


def keeper_of(
    store: LogStore, limits: LogSection, safe_round: int, copilot_round: int, now: list[float] | None = None
) -> Maintenance:
    """Maintenance of a log that nobody else commits to."""
    position = Position({LEASE_NUMBER: 1}, safe_round, copilot_round, 1)
    return Maintenance(store, limits, 1, lambda: nullcontext(position), lambda: now[0] if now else time.monotonic())


def limits(**changes: object) -> LogSection:
    base = {"file_bytes": 1 << 20, "vacuum_grace_seconds": 1e-6, "orphan_seconds": HOUR}
    return LogSection(**{**base, **changes})


def test_maintenance_merges_retires_and_removes(tmp_path: Path) -> None:
    written(tmp_path, rounds=20)
    store = LogStore(tmp_path)
    now = [0.0]
    keeper = keeper_of(store, limits(keep_rounds=16), 18, 20, now)
    done = keeper.maintain()
    assert [file.round_max for file in done.retired] == [1, 2, 3, 4]
    assert [file.round_max for file in done.merged] == [5, 6], "an eighth of what is kept"
    assert done.vacuum is not None and not done.vacuum.removed
    assert [(file.round_min, file.round_max) for file in store.files()][:3] == [(5, 6), (7, 7), (8, 8)]
    again = keeper.maintain()
    assert again.vacuum is None, "vacuum runs no more often than needed"
    now[0] += 61
    later = keeper.maintain()
    assert later.vacuum is not None and len(later.vacuum.removed) == 8
    assert data_files(tmp_path) == {file.name for file in store.files()} | {file.name for file in later.merged}
    assert len(MistakeLog(tmp_path).records()) == 16 * ROWS


def test_maintenance_says_once_that_a_limit_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path)
    now = [0.0]
    keeper = keeper_of(LogStore(tmp_path), limits(max_bytes=1, compact=False), 8, 0, now)
    for _ in range(3):
        keeper.maintain()
    assert caplog.text.count("the Copilot is at round 0, the last checkpoint at round 8") == 1
    now[0] += 601
    keeper.maintain()
    assert caplog.text.count("log.max_bytes 1, but") == 2
    assert len(MistakeLog(tmp_path).records()) == 8 * ROWS


def test_maintenance_passes_over_a_damaged_file(tmp_path: Path) -> None:
    written(tmp_path, rounds=20)
    store = LogStore(tmp_path)
    victim = store.files()[0]
    (tmp_path / victim.name).write_bytes(b"PAR1")
    keeper = keeper_of(store, limits(), 20, 20)
    done = keeper.maintain()
    assert [error.name for error in done.bad] == [victim.name] and done.merge is None
    done = keeper.maintain()
    assert done.merge is not None and len(done.merged) == 19


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_maintenance_that_fails_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    written(tmp_path, rounds=20)
    store = LogStore(tmp_path)
    keeper = keeper_of(store, limits(), 20, 20)

    def refuse(location: Location, name: str, new: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tc_ray.mistakelog.table.location.Location.rename", refuse)
    before = store.version
    done = keeper.maintain()
    assert (done.merge, store.version, not list(tmp_path.glob("*.tmp"))) == (None, before, True)
    assert f"maintenance is put off: [Errno {number}]" in caplog.text
    monkeypatch.undo()
    assert keeper.maintain().merge is not None


def test_maintenance_in_the_ledger(tmp_path: Path) -> None:
    """Its counts follow, and only rounds before the checkpoint are merged."""
    written(tmp_path, rounds=20)
    ledger = Ledger(tmp_path, writers=1, run="test", settings=limits(keep_rounds=16))
    ledger.begin_attempt(20, 1)
    ledger.report_copilot(20, 20)
    ledger.commit(DataFile(None, 0, 0, 21, 21, 0, 2, 0))
    ledger.maintain()
    state = ledger.state()
    assert (state.files, state.rows, state.round) == (9, 16 * ROWS, 21)
    assert [(f.round_min, f.round_max) for f in LogStore(tmp_path).files()][:3] == [(5, 6), (7, 8), (9, 10)]
