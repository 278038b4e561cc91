"""kill -9 of a process that writes the log, at random moments, with a reader open all the time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from tc_ray.mistakelog.ledger import Ledger
from tc_ray.mistakelog.reader import LogTail, MistakeLog
from tc_ray.mistakelog.records import Records
from tc_ray.mistakelog.store import LogStore
from tc_ray.mistakelog.writer import RecordWriter
from tests.mistakelog_samples import assert_same, metadata, random_records

KILLS = 8
ROUNDS = 400
ROWS = 4
CHECKPOINT_EVERY = 5
REPOSITORY = Path(__file__).parents[2]


def batch(round: int, attempt: int) -> Records:
    """What the Pilot would log in `round`: the same in every attempt."""
    return random_records(ROWS, round=round, attempt=attempt, first_sample=10 * round)


def pilot(folder: Path) -> None:
    """Runs in the killed process: Ledger, writer and a checkpoint file that holds the watermark, like a Pilot."""
    checkpoint = folder.parent / "checkpoint"
    watermark = int(checkpoint.read_text()) if checkpoint.exists() else 0
    ledger = Ledger(folder, writers=1, run="test")
    attempt = ledger.begin_attempt(watermark, 1)
    print(f"attempt {attempt} from {watermark}", flush=True)
    writer = RecordWriter(
        folder,
        ledger.commit,
        run="test",
        rank=0,
        attempt=attempt,
        flush_rounds=2,
        file_bytes=2**30,
        queue_rounds=4,
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


def test_no_committed_row_is_lost_doubled_or_torn(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    LogStore.create(folder, metadata())
    tail = LogTail(folder, "test")
    held: dict[str, Records] = {}
    dice = random.Random(4)
    killed = 0

    def read() -> None:
        update = tail.poll()
        for name in update.removed:
            del held[name]
        held.update(update.new)
        for _, records in update.new:
            # torn or mixed files would differ from what was put
            for number, attempt in {(int(r), int(a)) for r, a in zip(records.round, records.attempt, strict=True)}:
                part = records.select(np.flatnonzero(records.round == number))
                assert_same(part, batch(number, attempt))
        counts = Counter(int(s) for records in held.values() for s in records.sample_id)
        assert set(counts.values()) <= {1}, "a sample twice at one version"

    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.test_mistakelog_writer_killed", str(folder)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"attempt {killed + 1} from")
        if killed < KILLS:
            end = time.monotonic() + dice.uniform(0.0, 0.25)
            while time.monotonic() < end:
                read()
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "the process ended before it was killed: raise ROUNDS"
            killed += 1
            before = {name: len(records) for name, records in held.items()}
            read()
            assert before.items() <= {name: len(records) for name, records in held.items()}.items()
            state = Ledger(folder, writers=1, run="test").state()
            checkpoint = tmp_path / "checkpoint"
            assert state.round >= (int(checkpoint.read_text()) if checkpoint.exists() else 0)
            assert state.rows == state.round * ROWS == sum(len(records) for records in held.values())
        else:
            assert process.wait(timeout=120) == 0
            read()
            break

    got = MistakeLog(folder).records()
    assert got.round.tolist() == [number for number in range(1, ROUNDS + 1) for _ in range(ROWS)]
    assert got.sample_id.tolist() == [10 * number + i for number in range(1, ROUNDS + 1) for i in range(ROWS)]
    assert len(set(got.attempt.tolist())) > 2, "the kills left no trace"
    assert not list(folder.glob("*.tmp"))
    assert Ledger(folder, writers=1, run="test").state().pilot_done


if __name__ == "__main__":
    pilot(Path(sys.argv[1]))
