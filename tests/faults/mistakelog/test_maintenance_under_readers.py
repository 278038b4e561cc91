"""Merging, retention and vacuum while four processes read: no read fails, no row is wrong, the disk stays under its cap."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger_actor import LedgerActor
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import LogTail, MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import assert_same, in_order, metadata, random_records

REPOSITORY = Path(__file__).resolve().parents[3]
ROWS = 400
CAP = 6 << 20
GRACE = 1.0
BUFFER = 10
SETTINGS = LogSection(
    file_bytes=1 << 19,
    max_bytes=CAP,
    vacuum_grace_seconds=GRACE,
    orphan_seconds=3600,
)


def batch(round: int) -> Records:
    return random_records(ROWS, round=round, first_sample=1000 * round)


def check(records: Records) -> None:
    for number in set(records.round.tolist()):
        assert_same(records.select(np.flatnonzero(records.round == number)), batch(number))


def follow(folder: Path) -> dict[str, int]:
    """A tail, like the Copilot's."""
    tail = LogTail(folder)
    reports = {"reads": 0, "rows": 0}
    while not (folder.parent / "stop").exists():
        update = tail.poll()
        assert not update.bad, update.bad
        for _, records in update.new:
            check(records)
            reports["rows"] += len(records)
        reports["reads"] += 1
        time.sleep(0.05)
    return reports


def study(folder: Path, seed: int) -> dict[str, int]:
    """Opens the newest version again and again, and reads it slowly, while it is merged and retired underneath."""
    dice = random.Random(seed)
    reports = {"reads": 0, "rows": 0, "gone": 0}
    while not (folder.parent / "stop").exists():
        log = MistakeLog(folder)
        names = [file.name for file in log.files]
        time.sleep(dice.uniform(0, 0.4 * GRACE))
        rounds = sorted({file.round_min for file in log.files})
        for first in dice.sample(rounds, min(3, len(rounds))):
            records = log.records((first, first))
            assert len(records) == ROWS
            check(records)
            reports["rows"] += len(records)
            time.sleep(dice.uniform(0, 0.1 * GRACE))
        assert not log.bad_files, log.bad_files
        newest = {file.name for file in LogStore(folder).files()}
        reports["gone"] += len(set(names) - newest)
        log.close()
        reports["reads"] += 1
    return reports


def disk_bytes(folder: Path) -> int:
    total = 0
    for entry in os.scandir(folder):
        if entry.name.endswith((".parquet", ".tmp")):
            try:
                total += entry.stat().st_size
            except FileNotFoundError:
                continue
    return total


@pytest.mark.parametrize("seconds", [12, pytest.param(90, marks=pytest.mark.slow, id="90-slow")])
def test_four_readers_and_a_cap(tmp_path: Path, seconds: float) -> None:
    folder = tmp_path / "log"
    LogStore.create(folder, metadata())
    lease = RunLease.take(Location(folder), "test")
    ledger = LedgerActor(folder, writers=1, run="test", lease=lease.number, settings=SETTINGS, buffer_rounds=BUFFER)
    attempt = ledger.begin_attempt(0, 1)
    writer = RecordWriter(
        folder,
        ledger.commit,
        LogSection(flush_rounds=1, file_bytes=2**30, queue_rounds=2),
        run="test",
        rank=0,
        attempt=attempt,
    )
    readers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.faults.mistakelog.test_maintenance_under_readers", str(folder), str(number)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    number, highest = 0, 0
    started = time.monotonic()
    written = 0
    while time.monotonic() < started + seconds or written < 2 * CAP:
        number += 1
        records = batch(number)
        written += records.nbytes
        writer.put(records, number)
        writer.end_round(number)
        if number % 5 == 0:
            assert writer.flush(number)
            ledger.report_checkpoint(number)
            ledger.report_copilot(number, number)
        highest = max(highest, disk_bytes(folder))
        for reader in readers:
            assert reader.poll() is None, reader.communicate()[1][-3000:]
        time.sleep(0.06)  # a Pilot that fills the cap in about ten grace times
    (tmp_path / "stop").touch()
    reports = []
    for reader in readers:
        out, err = reader.communicate(timeout=60)
        assert reader.returncode == 0, err[-3000:]
        reports.append(json.loads(out))
    writer.close()
    lease.release()
    print(f"{number} rounds, {written:,} bytes written, {highest:,} on the disk at most; readers: {reports}")
    assert all(one["reads"] > 5 and one["rows"] for one in reports)
    assert sum(one.get("gone", 0) for one in reports) > 20, "nothing was merged or retired under the readers"
    assert highest <= CAP
    log = MistakeLog(folder)
    kept = log.records()
    assert_same(
        in_order(kept),
        Records.concat([batch(n) for n in range(int(kept.round.min()), number + 1)]),
    )
    assert 1 < kept.round.min() <= number - BUFFER
    assert sum(file.bytes for file in log.files) > CAP / 4, "more was retired than the cap asks for"
    assert verify_log(folder).good


if __name__ == "__main__":
    place, which = Path(sys.argv[1]), int(sys.argv[2])
    print(json.dumps(follow(place) if which < 2 else study(place, which)))
