"""Ages are measured by one clock, that of the disk: hosts whose clocks differ by minutes or a day share logs and run folders."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tc_ray.files import disk_time
from tc_ray.mistakelog.maintain.vacuum import vacuum_log
from tc_ray.mistakelog.read.reader_lease import FRESH_SECONDS, ReaderLease
from tc_ray.mistakelog.table.lease import STALE_SECONDS, LeaseHeldError, RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.tracking.statusfile import silence, silent_seconds
from tests.support.mistakelog_samples import merge_all, metadata
from tests.unit.mistakelog.test_compaction import written

DAY = 86400.0
SKEWS = [-DAY, -90.0, 90.0, DAY]


def skew(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Set the clock of this host, not that of the disk."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + seconds)


def age(path: Path, seconds: float) -> None:
    then = disk_time(path.parent) - seconds
    os.utime(path, (then, then))


def elsewhere(path: Path) -> None:
    """Make a lease one of a process on another machine."""
    reports = json.loads(path.read_bytes())
    path.write_text(
        json.dumps({**reports, "process": {**reports["process"], "host": "other", "boot": "another machine"}})
    )


@pytest.mark.parametrize("seconds", SKEWS)
def test_a_living_holder_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Fault 9: a host 90 s ahead took a live lease over, and one that is behind never took over a dead one."""
    place = LogStore.create(tmp_path, metadata()).location
    held = RunLease.take(place, "run there")
    (file,) = (tmp_path / "_tc_ray").glob("lease-*.json")
    elsewhere(file)
    skew(monkeypatch, seconds)
    age(file, STALE_SECONDS - 20)
    with pytest.raises(LeaseHeldError, match=r"on host other.*last sign of life 4\d s ago"):
        RunLease.take(place, "run here")
    age(file, STALE_SECONDS + 5)
    with RunLease.take(place, "run here") as mine:
        assert mine.number != held.number


@pytest.mark.parametrize("seconds", SKEWS)
def test_files_that_left_the_table_stay_for_the_grace_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Fault 9, kind: the host that merged wrote the time of its own clock, which vacuum compared with that of another."""
    written(tmp_path)
    before = {path.name for path in tmp_path.glob("*.parquet")}
    with monkeypatch.context() as other_host:
        skew(other_host, seconds)
        merge_all(tmp_path)
    assert vacuum_log(tmp_path, orphan_seconds=3600, grace_seconds=600).removed == []
    with monkeypatch.context() as other_host:
        skew(other_host, seconds)
        assert vacuum_log(tmp_path, orphan_seconds=3600, grace_seconds=600).removed == []
    for commit in (tmp_path / "_delta_log").glob("*.json"):
        age(commit, 700)
    assert {entry.name for entry in vacuum_log(tmp_path, orphan_seconds=3600, grace_seconds=600).removed} == before


def test_taking_a_log_up_does_not_make_its_commits_younger(tmp_path: Path) -> None:
    """Fault 9, kind: the newest commits are written anew then, and their times say when files left the table."""
    written(tmp_path)
    times = {}
    for commit in (tmp_path / "_delta_log").glob("*.json"):
        age(commit, 700)
        times[commit] = commit.stat().st_mtime
    RunLease.take(Location(tmp_path), "run").release()
    assert {commit: commit.stat().st_mtime for commit in times} == times


@pytest.mark.parametrize("seconds", SKEWS)
def test_readers_of_other_hosts_keep_their_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Fault 9, kind: leases of readers."""
    written(tmp_path)
    reader = ReaderLease(Location(tmp_path), LogStore(tmp_path).version)
    (file,) = (tmp_path / "_tc_ray/readers").iterdir()
    elsewhere(file)
    merge_all(tmp_path)
    skew(monkeypatch, seconds)
    age(file, FRESH_SECONDS - 20)
    kept = vacuum_log(tmp_path, orphan_seconds=0, grace_seconds=0)
    assert (kept.removed, kept.held) == ([], [reader.version])
    age(file, FRESH_SECONDS + 5)
    assert len(vacuum_log(tmp_path, orphan_seconds=0, grace_seconds=0).removed) == 8


@pytest.mark.parametrize("seconds", SKEWS)
def test_a_living_run_is_not_called_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Fault 9, kind: `tc-ray status` on another host than the run's, and the driver's view of a Tracker on another node."""
    (tmp_path / "status.json").write_text("{}")
    status = {"state": "running", "updated": time.time()}
    skew(monkeypatch, seconds)
    assert silence(status) == ""
    assert silence({**status, "silent_seconds": silent_seconds(tmp_path)}) == ""
    age(tmp_path / "status.json", 600)
    assert "no sign of life for 10:0" in silence({**status, "silent_seconds": silent_seconds(tmp_path)})
