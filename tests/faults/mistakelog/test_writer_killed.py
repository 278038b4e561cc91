"""kill -9 of a process that writes and merges the log, at random moments, with a reader open all the time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.commit.ledger_actor import LedgerActor
from tc_ray.mistakelog.maintain.vacuum import vacuum_log
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import LogTail, MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import assert_same, in_order, metadata, random_records

ROWS = 4
CHECKPOINT_EVERY = 5
ENDLESS = 1_000_000
RESTART_SECONDS = 2.0
REPOSITORY = Path(__file__).resolve().parents[3]
SETTINGS = LogSection(
    file_bytes=1 << 20,
    vacuum_grace_seconds=1.0,
    orphan_seconds=3600,
)


def batch(round: int, attempt: int) -> Records:
    """What the Pilot would log in `round`: the same in every attempt."""
    return random_records(ROWS, round=round, attempt=attempt, first_sample=10 * round)


def pilot(folder: Path, rounds: int) -> None:
    """Runs in the killed process: Ledger, writer and a checkpoint file that holds the watermark, like a Pilot."""
    started = time.monotonic()
    checkpoint = folder.parent / "checkpoint"
    watermark = int(checkpoint.read_text()) if checkpoint.exists() else 0
    lease = RunLease.take(Location(folder), "pilot")
    ledger = LedgerActor(folder, writers=1, run="test", lease=lease.number, settings=SETTINGS)
    attempt = ledger.begin_attempt(watermark, 1)
    print(f"attempt {attempt} from {watermark} in {time.monotonic() - started:.3f}", flush=True)
    writer = RecordWriter(
        folder,
        ledger.commit,
        LogSection(flush_rounds=2, file_bytes=2**30, queue_rounds=4),
        run="test",
        rank=0,
        attempt=attempt,
        start_round=watermark,
    )
    for number in range(watermark + 1, rounds + 1):
        writer.put(batch(number, attempt), number)
        writer.end_round(number)
        if number % CHECKPOINT_EVERY == 0:
            writer.flush(number)
            checkpoint.with_suffix(".tmp").write_text(str(number))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            ledger.report_checkpoint(number)
    writer.close()
    ledger.finish_pilot(rounds)
    lease.release()


class Watcher:
    """A reader that is open all the time, and checks every row it is given."""

    def __init__(self, folder: Path) -> None:
        self._tail = LogTail(folder)
        self.held: dict[str, Records] = {}
        self.polls = 0

    def read(self) -> None:
        update = self._tail.poll()
        self.polls += 1
        assert not update.bad, f"torn files: {update.bad}"
        for name in update.removed:
            del self.held[name]
        self.held.update(update.new)
        for _, records in update.new:
            # torn or mixed files would differ from what was put
            for number, attempt in {(int(r), int(a)) for r, a in zip(records.round, records.attempt, strict=True)}:
                part = records.select(np.flatnonzero(records.round == number))
                assert_same(part, batch(number, attempt))
        samples = self.samples()
        assert len(np.unique(samples)) == len(samples), "a sample twice at one version"

    def samples(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(records.sample_id for records in self.held.values())])


@pytest.mark.parametrize(
    "kills", [8, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)], id="200-slow")]
)
def test_no_committed_row_is_lost_doubled_or_torn(tmp_path: Path, kills: int) -> None:
    folder = tmp_path / "log"
    LogStore.create(folder, metadata())
    watcher = Watcher(folder)
    dice = random.Random(4)
    rounds = ENDLESS
    restarts = []
    for killed in range(kills + 1):
        if killed == kills:
            rounds = Ledger(folder, writers=1, run="test").state().round + 40
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.mistakelog.test_writer_killed", str(folder), str(rounds)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[:2] == ["attempt", str(killed + 1)]
        restarts.append(float(words[5]))
        if killed == kills:
            while process.poll() is None:
                watcher.read()
            assert process.returncode == 0
            break
        end, before = time.monotonic() + dice.uniform(0.0, 0.25), len(watcher.samples())
        # every second one dies only after a commit, however slow the machine is
        while time.monotonic() < end or (killed % 2 and len(watcher.samples()) == before):
            assert time.monotonic() < end + 30
            watcher.read()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the process ended before it was killed"
        committed = watcher.samples()
        watcher.read()
        assert np.isin(committed, watcher.samples()).all(), "a committed row is gone"
        state = Ledger(folder, writers=1, run="test").state()
        checkpoint = tmp_path / "checkpoint"
        assert state.round >= (int(checkpoint.read_text()) if checkpoint.exists() else 0)
        assert state.rows == state.round * ROWS == len(watcher.samples())

    watcher.read()
    del restarts[0]  # the first start
    print(
        f"{kills} kills, {watcher.polls} polls, restart median {median(restarts):.3f} s, {max(restarts):.3f} s at most"
    )
    got = MistakeLog(folder).records()
    got = in_order(got)
    assert got.round.tolist() == [number for number in range(1, rounds + 1) for _ in range(ROWS)]
    assert got.sample_id.tolist() == [10 * number + i for number in range(1, rounds + 1) for i in range(ROWS)]
    assert len(set(got.attempt.tolist())) > 2, "the kills left no trace"
    assert any("merged" in file.name for file in LogStore(folder).files())
    assert verify_log(folder).good
    # merges that were killed leave unfinished files: of an hour's age in a run, of any here
    vacuum_log(folder, orphan_seconds=0, grace_seconds=0)
    assert {path.name for path in folder.iterdir() if path.is_file()} == {f.name for f in LogStore(folder).files()}
    assert Ledger(folder, writers=1, run="test").state().pilot_done
    # one in a hundred may be slow: on a busy machine it says more about the other processes
    slow = [seconds for seconds in restarts if seconds > RESTART_SECONDS]
    assert len(slow) <= len(restarts) // 100, f"restarts of more than {RESTART_SECONDS} s: {slow}"


if __name__ == "__main__":
    pilot(Path(sys.argv[1]), int(sys.argv[2]))
