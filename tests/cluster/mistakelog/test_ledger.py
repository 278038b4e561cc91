"""The Ledger as a real Ray actor: killed in mid-run, and the table read with plain `ray.data.read_delta`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger_actor import start_ledger, submit_to
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.read.reader_lease import held_versions
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import LogSchemaError
from tc_ray.mistakelog.table.errors import FencedError
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.local_ray import local_ray
from tests.support.mistakelog_samples import assert_same, metadata, random_records

ROUNDS = 60
ROWS = 3

cluster = local_ray(cpus=2)


def make_writer(folder: Path, ledger: object, rank: int, attempt: int) -> RecordWriter:
    return RecordWriter(
        folder,
        submit_to(ledger),
        LogSection(flush_rounds=1, file_bytes=2**30, queue_rounds=2),
        run="test",
        rank=rank,
        attempt=attempt,
    )


def batch(round: int, rank: int) -> Records:
    return random_records(ROWS, round=round, rank=rank, first_sample=100 * round + 10 * rank)


@pytest.mark.slow
def test_killing_the_ledger_loses_and_doubles_nothing(tmp_path: Path) -> None:
    ledger = start_ledger(tmp_path, metadata(), writers=2, run="test")
    attempt = ray.get(ledger.begin_attempt.remote(0, 2))

    def work(rank: int) -> None:
        writer = make_writer(tmp_path, ledger, rank, attempt)
        for number in range(1, ROUNDS + 1):
            writer.put(batch(number, rank), number)
            writer.end_round(number)
        writer.flush(ROUNDS)
        writer.close()

    pool = ThreadPoolExecutor(2)
    workers = [pool.submit(work, rank) for rank in (0, 1)]
    reached = []
    for kill_at in (5, 20, 40):
        while (reached_now := ray.get(ledger.state.remote()).round) < kill_at:
            for worker in workers:
                assert not worker.done() or worker.exception() is None, worker.exception()
        reached.append(reached_now)
        ray.kill(ledger, no_restart=False)
    for worker in workers:
        worker.result(timeout=120)
    assert reached[-1] < ROUNDS, "the kills came after the run"

    state = ray.get(ledger.state.remote())
    assert (state.round, state.rows, state.files) == (ROUNDS, 2 * ROUNDS * ROWS, 2 * ROUNDS)
    got = MistakeLog(tmp_path).records()
    order = np.lexsort((got.sample_id, got.rank, got.round))
    expected = Records.concat([batch(number, rank) for number in range(1, ROUNDS + 1) for rank in (0, 1)])
    assert_same(got.select(order), expected)

    ray.get(ledger.finish_pilot.remote(ROUNDS))
    ray.kill(ledger, no_restart=False)
    state = ray.get(ledger.state.remote())
    assert (state.pilot_done, state.last_round) == (True, ROUNDS)

    plain = ray.data.read_delta(str(tmp_path))
    assert plain.count() == len(expected)
    rows = sorted(plain.take_all(), key=lambda row: (row["round"], row["rank"], row["sample_id"]))
    assert [row["sample_id"] for row in rows] == expected.sample_id.tolist()
    first = expected.select([0])
    assert np.array_equal(np.frombuffer(rows[0]["rationale"], np.uint16), first.rationale.reshape(-1))
    assert np.array_equal(rows[0]["error_values"], first.error_values.reshape(-1))

    log = MistakeLog(tmp_path)
    ray.get(ledger.begin_attempt.remote(10, 2))
    assert log.dataset(columns=["round"]).max("round") == ROUNDS
    with MistakeLog(tmp_path) as newest:
        later = newest.dataset()
    assert [held.version for held in held_versions(Location(tmp_path), Location(tmp_path).now())].count(
        newest.version
    ) == 1
    assert later.max("round") == 10, "the rows are read when the log that they come from is closed"


def test_a_new_attempt_stops_the_writer_of_the_old(tmp_path: Path) -> None:
    ledger = start_ledger(tmp_path, metadata(), writers=1, run="test")
    writer = make_writer(tmp_path, ledger, 0, ray.get(ledger.begin_attempt.remote(0, 1)))
    writer.put(batch(1, 0), 1)
    writer.end_round(1)
    writer.flush(1)
    assert ray.get(ledger.begin_attempt.remote(1, 1)) == 2
    writer.end_round(2)
    with pytest.raises(FencedError, match="attempt 1 was replaced by attempt 2"):
        writer.flush(2)


def test_starting_on_another_log_fails_at_once(tmp_path: Path) -> None:
    start_ledger(tmp_path, metadata(), writers=1, run="test")
    with pytest.raises(LogSchemaError, match="vocab_size"):
        start_ledger(tmp_path, metadata(vocab_size=7), writers=1, run="test")
