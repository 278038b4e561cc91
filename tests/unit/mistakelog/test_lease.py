"""The run's lease: one committer, refusals that name the holder, take-over of the dead, and a holder that lost it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.table import lease as lease_module
from tc_ray.mistakelog.table.errors import LeaseLostError
from tc_ray.mistakelog.table.lease import LeaseHeldError, RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LEASE_NUMBER, LogStore
from tests.support.mistakelog_samples import metadata

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def place(tmp_path: Path) -> Location:
    return LogStore.create(tmp_path / "log", metadata()).location


def lease_files(place: Location) -> list[str]:
    return sorted(entry.name for entry in place.list("_tc_ray"))


def test_the_second_is_refused_with_the_holders_name(place: Location) -> None:
    held = RunLease.take(place, "run first")
    with pytest.raises(LeaseHeldError) as refused:
        RunLease.take(place, "run second")
    text = str(refused.value)
    assert f"run first, process {os.getpid()} on host" in text
    assert re.search(r"started \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", text)
    held.release()
    assert lease_files(place) == []
    with RunLease.take(place, "run second") as second:
        assert LogStore(place).number(LEASE_NUMBER) == second.number
    assert lease_files(place) == []


def test_a_killed_holders_lease_is_taken_over_at_once(place: Location) -> None:
    code = (
        "import sys, time\nfrom tc_ray.mistakelog.table.lease import RunLease\nfrom tc_ray.mistakelog.table.location import Location\n"
        "lease = RunLease.take(Location(sys.argv[1]), 'run killed')\nprint('held', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, place.uri], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(LeaseHeldError, match=f"run killed, process {process.pid} on host"):
        RunLease.take(place, "run next")
    process.send_signal(signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    with RunLease.take(place, "run next"):
        assert time.monotonic() - began < 2.0
        assert len(lease_files(place)) == 1  # the dead one's file is gone


def elsewhere(place: Location, *, silent_seconds: float) -> None:
    """Make the present holder one of another machine, last seen some time ago."""
    assert place.local is not None
    (name,) = lease_files(place)
    reports = json.loads(place.read(name))
    place.write(
        name,
        json.dumps({**reports, "process": {**reports["process"], "host": "other", "boot": "another machine"}}).encode(),
    )
    then = time.time() - silent_seconds
    os.utime(place.local / name, (then, then))


def test_a_holder_elsewhere_counts_as_dead_when_it_has_been_silent(place: Location) -> None:
    held = RunLease.take(place, "run there")
    elsewhere(place, silent_seconds=5)
    with pytest.raises(LeaseHeldError, match=r"on host other.*last sign of life \d s ago"):
        RunLease.take(place, "run here")
    elsewhere(place, silent_seconds=lease_module.STALE_SECONDS + 1)
    with RunLease.take(place, "run here") as mine:
        assert mine.number != held.number


def test_the_holder_shows_that_it_lives(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_TOUCH_SECONDS", 0.05)
    with RunLease.take(place, "run"):
        elsewhere(place, silent_seconds=1000)
        end = time.monotonic() + 5
        while time.time() - place.list("_tc_ray")[0].modified > 5:
            assert time.monotonic() < end, "the lease is not touched"
            time.sleep(0.02)


def test_a_ledger_whose_lease_was_taken_stops(place: Location) -> None:
    """As when a machine was suspended: it wakes up, and another run is at work."""
    first = RunLease.take(place, "run first")
    ledger = Ledger(place, writers=1, run="test", lease=first.number)
    ledger.begin_attempt(0, 1)
    elsewhere(place, silent_seconds=lease_module.STALE_SECONDS + 1)
    with RunLease.take(place, "run second") as second:
        other = Ledger(place, writers=1, run="test", lease=second.number)
        with pytest.raises(LeaseLostError, match="another process has taken this log over"):
            ledger.finish_pilot(1)
        assert other.begin_attempt(0, 1) == 2
        with pytest.raises(LeaseLostError):
            Ledger(place, writers=1, run="test", lease=first.number)


def test_of_many_one_wins(place: Location) -> None:
    code = (
        "import sys\nfrom tc_ray.mistakelog.table.lease import LeaseHeldError, RunLease\n"
        "from tc_ray.mistakelog.table.location import Location\n"
        "sys.stdin.readline()\n"
        "try:\n    lease = RunLease.take(Location(sys.argv[1]), 'run')\n    print('won', flush=True)\n"
        "except LeaseHeldError:\n    print('refused', flush=True)\nsys.stdin.readline()"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, place.uri],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(5)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    answers = sorted(racer.stdout.readline().strip() for racer in racers if racer.stdout is not None)
    for racer in racers:
        racer.communicate("\n")
    assert answers == ["refused"] * 4 + ["won"]
