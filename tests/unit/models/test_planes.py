"""The two planes: what crosses to the Ledger are names and numbers, however large the records are; and what a late learner reads."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tc_ray.config.log import LogSection
from tc_ray.config.schema import RunConfig
from tc_ray.copilot.worker import CopilotJob, CopilotWorker
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import LogTail
from tc_ray.mistakelog.table.data_file import DataFile
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import metadata, random_records

MESSAGE_BYTES = 2000


def write(folder: Path, rows: int, rounds: int = 1) -> tuple[list[DataFile], Ledger]:
    """A log with a file a round; what its writer handed to the Ledger."""
    LogStore.create(folder, metadata())
    ledger = Ledger(folder, writers=1, run="test")
    attempt, handed = ledger.begin_attempt(0, 1), []

    def commit(file: DataFile) -> int:
        handed.append(file)
        return ledger.commit(file)

    options: dict[str, Any] = {"flush_rounds": 1, "file_bytes": 2**30, "queue_rounds": 4}
    writer = RecordWriter(folder, commit, LogSection(**options), run="test", rank=0, attempt=attempt)
    for number in range(1, rounds + 1):
        writer.put(random_records(rows, round=number, first_sample=10_000 * number), number)
        writer.end_round(number)
        writer.flush(number)
    writer.close()
    return handed, ledger


def plain(value: object) -> bool:
    """A number, a text, or small things made of them: nothing that could hold a tensor."""
    if isinstance(value, dict):
        return all(plain(key) and plain(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def test_no_tensor_crosses_to_the_ledger(tmp_path: Path) -> None:
    sizes = []
    for rows in (2, 2000):
        (file,), ledger = write(tmp_path / str(rows), rows)
        assert file.rows == rows and file.bytes > 100 * rows
        state = ledger.state()
        assert plain(asdict(file)) and plain(asdict(state))
        sizes.append(len(pickle.dumps(file)) + len(pickle.dumps(state)))
    assert max(sizes) < MESSAGE_BYTES and sizes[1] - sizes[0] < 50, "the message grows with the records"


def test_a_learner_that_is_far_behind_reads_the_newest_rounds_only(tmp_path: Path) -> None:
    rounds, buffer, interval = 30, 6, 4
    write(tmp_path, rows=2, rounds=rounds)
    config = RunConfig.model_validate(
        {
            "run": {"folder": tmp_path / "run"},
            "copilot": {"buffer_rounds": buffer},
            "pilot": {"checkpoint_every_rounds": interval},
        }
    )
    worker = CopilotWorker(CopilotJob(config, "", "", rounds, None, None), 0, 1)
    read = [int(records.round[0]) for _, records in LogTail(tmp_path).poll(min_round=worker._first_round(rounds)).new]
    assert read == list(range(rounds - buffer - interval, rounds + 1))
