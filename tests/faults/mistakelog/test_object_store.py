"""The Mistake Log in an object store: a real S3-protocol server, a real writer, and kill -9 in the middle of uploads."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import LogTail, MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.commits import commit_name
from tc_ray.mistakelog.table.data_file import ParquetPart
from tc_ray.mistakelog.table.errors import CommitConflictError
from tc_ray.mistakelog.table.lease import LeaseHeldError, RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import assert_same, metadata, random_records
from tests.support.object_store import new_log_uri, store_options

ROUNDS, ROWS, CHECKPOINT_EVERY = 60, 4, 5
REPOSITORY = Path(__file__).resolve().parents[3]


options = store_options()


@pytest.fixture
def place(options: dict[str, str]) -> Location:
    return LogStore.create(Location(new_log_uri(options), options), metadata()).location


def batch(number: int, attempt: int) -> Records:
    """What the Pilot would log in a round: the same in every attempt."""
    return random_records(ROWS, round=number, attempt=attempt, first_sample=10 * number)


def test_files_by_name(place: Location) -> None:
    place.write("_tc_ray/a.json", b"one")
    place.write("_tc_ray/a.json", b"two")
    assert place.read("_tc_ray/a.json") == b"two"
    assert (place.size("_tc_ray/a.json"), place.size("_tc_ray/b.json")) == (3, None)
    (entry,) = place.list("_tc_ray")
    assert (entry.name, entry.size) == ("_tc_ray/a.json", 3)
    assert abs(entry.modified - time.time()) < 60
    place.touch("_tc_ray/a.json")
    place.delete("_tc_ray/a.json")
    place.delete("_tc_ray/a.json")
    assert place.list("_tc_ray") == []
    with pytest.raises(FileNotFoundError):
        place.read("_tc_ray/a.json")
    with pytest.raises(FileNotFoundError):
        place.touch("_tc_ray/a.json")


def test_an_upload_is_visible_whole_or_not_at_all(place: Location) -> None:
    rows = batch(1, 1).to_arrow("test")
    left = ParquetPart(place, "left.parquet", "none", {})
    left.write(rows)
    left.abort()
    part = ParquetPart(place, "whole.parquet", "none", {})
    part.write(rows)
    assert place.list("", recursive=False) == []
    done = part.finish()
    assert [(entry.name, entry.size) for entry in place.list("", recursive=False)] == [("whole.parquet", done.size)]


def test_two_committers_are_noticed(place: Location) -> None:
    one, other = LogStore(place), LogStore(place)
    one.commit(numbers={"x": 1})
    with pytest.raises(CommitConflictError):
        other.commit(numbers={"x": 2})
    with RunLease.take(place, "run first"), pytest.raises(LeaseHeldError, match=f"process {os.getpid()} on host"):
        RunLease.take(place, "run second")


def pilot(uri: str, checkpoint: Path, options: dict[str, str]) -> None:
    """Runs in the killed process: Ledger, writer and a checkpoint file that holds the watermark, like a Pilot."""
    place = Location(uri, options)
    watermark = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with RunLease.take(place, "run test") as lease:
        ledger = Ledger(place, writers=1, run="test", lease=lease.number)
        attempt = ledger.begin_attempt(watermark, 1)
        print(f"attempt {attempt} from {watermark}", flush=True)
        writer = RecordWriter(
            place,
            ledger.commit,
            LogSection(flush_rounds=2, file_bytes=2**30, queue_rounds=4),
            run="test",
            rank=0,
            attempt=attempt,
            start_round=watermark,
        )
        for number in range(watermark + 1, ROUNDS + 1):
            writer.put(batch(number, attempt), number)
            writer.end_round(number)
            if number % CHECKPOINT_EVERY == 0:
                writer.flush(number)
                checkpoint.with_suffix(".tmp").write_text(str(number))
                os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
        writer.close()
        ledger.finish_pilot(ROUNDS)


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_in_the_middle_nothing_is_lost_doubled_or_torn(
    place: Location, options: dict[str, str], tmp_path: Path, kills: int
) -> None:
    checkpoint = tmp_path / "checkpoint"
    dice = random.Random(4)
    tail = LogTail(place)
    held: dict[str, Records] = {}

    def read() -> None:
        update = tail.poll()
        assert not update.bad
        for name in update.removed:
            held.pop(name, None)
        held.update(update.new)
        for _, records in update.new:
            for number, attempt in {(int(r), int(a)) for r, a in zip(records.round, records.attempt, strict=True)}:
                assert_same(records.select(np.flatnonzero(records.round == number)), batch(number, attempt))
        counts = Counter(int(s) for records in held.values() for s in records.sample_id)
        assert set(counts.values()) <= {1}, "a sample twice at one version"

    for kill in range(kills + 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.mistakelog.test_object_store", place.uri, str(checkpoint)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "STORAGE_OPTIONS": json.dumps(options)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"attempt {kill + 1} from")
        if kill == kills:
            assert process.wait(timeout=120) == 0
            break
        end = time.monotonic() + dice.uniform(0.0, 0.3)
        while time.monotonic() < end:
            read()
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0 and kill:
            break  # it was through before the kill
        read()
        with MistakeLog(place) as log:
            done = int(checkpoint.read_text()) if checkpoint.exists() else 0
            assert set(log.arrow(columns=["round"])["round"].to_pylist()) >= set(range(1, done + 1))
    read()
    with MistakeLog(place) as log:
        records = log.records()
        assert log.bad_files == []
    assert sorted(records.sample_id.tolist()) == [10 * n + i for n in range(1, ROUNDS + 1) for i in range(ROWS)]
    assert Ledger(place, writers=1, run="test").state().pilot_done


def test_checksums_are_found_and_an_altered_object_is_refused(place: Location) -> None:
    ledger = Ledger(place, writers=1, run="test")
    writer = RecordWriter(
        place,
        ledger.commit,
        LogSection(flush_rounds=1, file_bytes=2**30, queue_rounds=4),
        run="test",
        rank=0,
        attempt=ledger.begin_attempt(0, 1),
    )
    for number in range(1, 4):
        writer.put(batch(number, 1), number)
        writer.end_round(number)
    writer.close()
    log = MistakeLog(place)
    assert all(file.crc32 for file in log.files)
    name = log.files[1].name
    content = bytearray(place.read(name))
    content[len(content) // 2] ^= 1
    place.write(name, bytes(content))
    table = log.arrow(columns=["round"])
    assert sorted(set(table["round"].to_pylist())) == [1, 3]
    assert [(bad.name, bad.reason) for bad in log.bad_files] == [
        (name, "its bytes differ from those committed (CRC-32)")
    ]
    assert isinstance(table, pa.Table) and place.size(commit_name(0)) is not None


if __name__ == "__main__":
    pilot(sys.argv[1], Path(sys.argv[2]), json.loads(os.environ["STORAGE_OPTIONS"]))
