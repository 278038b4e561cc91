"""Leases of readers: held, moved, given back, and stale ones found."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tc_ray.mistakelog.read import reader_lease
from tc_ray.mistakelog.read.reader_lease import FRESH_SECONDS, ReaderLease, held_versions
from tc_ray.mistakelog.table.location import Location


def versions(folder: Path, now: float | None = None) -> list[int]:
    place = Location(folder)
    return sorted(lease.version for lease in held_versions(place, place.now() if now is None else now))


def test_held_moved_and_given_back(tmp_path: Path) -> None:
    place = Location(tmp_path)
    one, other = ReaderLease(place, 3), ReaderLease(place, 5)
    assert versions(tmp_path) == [3, 5]
    one.move(7)
    assert (one.version, versions(tmp_path)) == (7, [5, 7])
    other.release()
    other.release()
    other.move(9)
    assert versions(tmp_path) == [7]
    del one
    gc.collect()
    assert versions(tmp_path) == []
    assert not list((tmp_path / "_tc_ray/readers").iterdir())


def test_a_living_reader_on_this_machine_needs_no_renewal(tmp_path: Path) -> None:
    lease = ReaderLease(Location(tmp_path), 3)
    assert versions(tmp_path, time.time() + 10 * FRESH_SECONDS) == [3]
    lease.release()


def leave_lease(folder: Path) -> None:
    """By a process that is killed."""
    code = f"""
import os, signal
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.read.reader_lease import ReaderLease
lease = ReaderLease(Location({str(folder)!r}), 4)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9


def test_what_a_killed_write_of_a_lease_left_holds_nothing(tmp_path: Path) -> None:
    """A fault found by attack: an empty temporary file ended every vacuum."""
    lease = ReaderLease(Location(tmp_path), 3)
    left = tmp_path / "_tc_ray/readers/.0123abcd.json.4711.140.writing"
    left.write_bytes(b"")
    assert versions(tmp_path) == [3] and left.exists()
    assert versions(tmp_path, time.time() + FRESH_SECONDS + 1) == [3] and not left.exists()
    lease.release()


def test_a_dead_reader_is_forgotten(tmp_path: Path) -> None:
    leave_lease(tmp_path)
    assert versions(tmp_path) == [4], "it might be a reader on another machine"
    late = time.time() + FRESH_SECONDS + 1
    assert versions(tmp_path, late) == []
    assert not list((tmp_path / "_tc_ray/readers").iterdir())


def test_a_reader_elsewhere_holds_while_it_renews(tmp_path: Path) -> None:
    lease = ReaderLease(Location(tmp_path), 3)
    (path,) = (tmp_path / "_tc_ray/readers").iterdir()
    reports = json.loads(path.read_text())
    reports["process"]["boot"] = "another machine"
    path.write_text(json.dumps(reports))
    now = time.time() + FRESH_SECONDS + 1
    os.utime(path, (now, now))
    assert versions(tmp_path, now + 1) == [3]
    assert versions(tmp_path, now + FRESH_SECONDS + 1) == []
    # it was stopped for long and comes back
    lease.renew()
    assert versions(tmp_path) == [3]
    lease.release()


def test_no_lease_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "_tc_ray").write_text("a file in the way")
    lease = ReaderLease(Location(tmp_path), 3)
    assert lease.version is None
    lease.move(4)
    lease.renew()
    assert lease.version is None
    (tmp_path / "_tc_ray").unlink()  # as when a full disk has space again
    lease.renew()
    assert lease.version == 4 and versions(tmp_path) == [4]
    lease.release()


def test_one_thread_renews_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_lease, "_RENEW_SECONDS", 0.05)
    reader_lease._start_renewing.__wrapped__()
    leases = [ReaderLease(Location(tmp_path), version) for version in (1, 2)]
    paths = list((tmp_path / "_tc_ray/readers").iterdir())
    for path in paths:
        os.utime(path, (0, 0))
    end = time.monotonic() + 5
    while min(path.stat().st_mtime for path in paths) < 1:
        assert time.monotonic() < end
        time.sleep(0.02)
    for lease in leases:
        lease.release()


def test_a_forked_process_does_not_give_back_its_parents_lease(tmp_path: Path) -> None:
    lease = ReaderLease(Location(tmp_path), 3)
    child = os.fork()
    if not child:
        lease.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert versions(tmp_path) == [3]
    lease.release()
