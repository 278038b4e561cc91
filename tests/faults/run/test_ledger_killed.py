"""kill -9 of the Ledger's actor at random moments: Ray starts it again, and it knows everything from the table."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger_actor import start_ledger, submit_to
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import LogTail, MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.local_ray import local_ray
from tests.support.mistakelog_samples import assert_same, metadata, random_records

ROWS = 3
RANKS = 2
SETTINGS = LogSection(
    file_bytes=1 << 18,
    vacuum_grace_seconds=0.5,
    orphan_seconds=3600,
)

cluster = local_ray(cpus=2)


def batch(round: int, rank: int) -> Records:
    return random_records(ROWS, round=round, rank=rank, first_sample=100 * round + 10 * rank)


def pid_of(ledger: Any) -> int:
    return int(ray.get(ledger.__ray_call__.remote(lambda actor: os.getpid())))


@pytest.mark.parametrize(
    "kills", [4, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)], id="50-slow")]
)
def test_the_ledger_killed_at_random(tmp_path: Path, kills: int) -> None:
    ledger = start_ledger(tmp_path, metadata(), writers=RANKS, run="test", settings=SETTINGS)
    attempt = ray.get(ledger.begin_attempt.remote(0, RANKS))
    last = [0]  # the round to end with: given when all kills are done

    def work(rank: int) -> int:
        writer = RecordWriter(
            tmp_path,
            submit_to(ledger),
            LogSection(flush_rounds=1, file_bytes=2**30, queue_rounds=2),
            run="test",
            rank=rank,
            attempt=attempt,
        )
        number = 0
        while not last[0] or number < last[0]:
            number += 1
            writer.put(batch(number, rank), number)
            writer.end_round(number)
            if number % 5 == 0:
                assert writer.flush(number)
                if rank == 0:
                    ledger.report_checkpoint.remote(number - 5)
        writer.close()
        return number

    pool = ThreadPoolExecutor(RANKS)
    workers = [pool.submit(work, rank) for rank in range(RANKS)]
    tail = LogTail(tmp_path)
    rows: dict[str, int] = {}
    dice = random.Random(7)
    for _ in range(kills):
        pid = pid_of(ledger)
        end = time.monotonic() + dice.uniform(0.0, 0.3)
        while time.monotonic() < end:
            update = tail.poll()
            assert not update.bad
            for name in update.removed:
                del rows[name]
            rows.update({name: len(records) for name, records in update.new})
        before = sum(rows.values())
        os.kill(pid, signal.SIGKILL)
        for worker in workers:
            assert not worker.done(), worker.exception()
        state = ray.get(ledger.state.remote())
        assert state.rows >= before, "a committed row is gone"
    last[0] = ray.get(ledger.state.remote()).round + 50
    reached = max(worker.result(timeout=120) for worker in workers)
    assert reached == last[0], "a rank was ahead of the end: raise it"

    state = ray.get(ledger.state.remote())
    assert (state.round, state.rows) == (reached, RANKS * reached * ROWS)
    got = MistakeLog(tmp_path).records()
    order = np.lexsort((got.sample_id, got.rank, got.round))
    expected = [batch(number, rank) for number in range(1, reached + 1) for rank in range(RANKS)]
    assert_same(got.select(order), Records.concat(expected))
    assert state.files < RANKS * reached / 2, "nothing was merged"
    assert verify_log(tmp_path).good
