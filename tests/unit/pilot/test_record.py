"""Restarts, sampling and the costs of the log, through the recorder, a real writer, Ledger and table."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.data.prepared.batches import collate
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.sampling import has_mistake
from tc_ray.mistakelog.table.data_file import DataFile
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tc_ray.pilot.engine import pilot_step
from tc_ray.pilot.record import Recorder, log_metadata
from tests.support.family_samples import new_pilot, quiet, reference_model
from tests.support.mistakelog_samples import assert_same, in_order
from tests.support.tiny_families import VOCAB
from tests.support.tiny_model import make_tokenizer

quiet()

ROUNDS, MICRO = 5, 3
CPU = torch.device("cpu")


def config_of(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(sections)


def micro_batches(number: int) -> list[dict[str, np.ndarray]]:
    """Two of a round; some completions the Pilot gets right are among them by chance."""
    rng = np.random.default_rng(number)
    made = []
    for part in range(2):
        rows = [
            {
                "input_ids": rng.integers(2, VOCAB, 6 + row + number).tolist(),
                "target_start": int(rng.integers(3, 6 + number)),
                "sample_id": 100 * number + 10 * part + row,
            }
            for row in range(MICRO)
        ]
        made.append(collate(rows, 0))
    return made


class Run:
    """Rounds of an untrained Pilot into a real log in `folder`; the weights stay, so that attempts can be compared."""

    def __init__(self, folder: Path, **sections: dict[str, Any]) -> None:
        self.config = config_of(**{"run": {"folder": folder}, **sections})
        shape = reference_model("llama").config
        store = LogStore.create(self.config.log_location, log_metadata(self.config, shape, make_tokenizer()))
        self.ledger = Ledger(store.location, writers=1, run=self.config.run.name)
        self.lock = threading.Lock()
        self.metrics: list[dict[str, float]] = []
        self.left_out: set[int] = set()

    def attempt(self, start: int, last: int, *, close: bool = True, device: torch.device = CPU) -> Recorder:
        with self.lock:
            attempt = self.ledger.begin_attempt(start, 1)
        writer = RecordWriter(
            self.config.log_location,
            self.commit,
            self.config.log.model_copy(update={"flush_rounds": 1}),
            run=self.config.run.name,
            rank=0,
            attempt=attempt,
            start_round=start,
        )
        step = pilot_step(new_pilot("llama").eval(), self.config).eval().to(device)
        recorder = Recorder(writer, self.config.log, seed=self.config.run.seed, device=device)
        for number in range(start + 1, last + 1):
            for batch in micro_batches(number):
                ids, lengths, starts = (
                    torch.from_numpy(batch[n]).to(device) for n in ("input_ids", "lengths", "target_start")
                )
                record = step(ids, lengths, starts, 1.0)[1]
                recorder.record(record, batch, np.zeros(MICRO, np.int16), number)
            recorder.end_round(number, left_out=number in self.left_out)
            self.metrics.append(recorder.metrics())
        if close:
            recorder.writer.close()
        return recorder

    def commit(self, file: DataFile) -> int:
        """One call at a time, as in an actor: an attempt left behind may still commit."""
        with self.lock:
            return self.ledger.commit(file)

    def records(self) -> Records:
        made = MistakeLog(self.config.log_location).records()
        return in_order(made)


@pytest.mark.gpu
def test_the_log_of_a_gpu_is_that_of_the_cpu(tmp_path: Path) -> None:
    """Through the side stream and the writer."""
    found = {}
    for device in ("cpu", "cuda"):
        run = Run(tmp_path / device)
        run.attempt(0, ROUNDS, device=torch.device(device))
        found[device] = run.records()
    cpu, cuda = found["cpu"], found["cuda"]
    assert cuda.top_k == cpu.top_k and len(cuda) == len(cpu) == ROUNDS * 2 * MICRO
    for name in ("round", "sample_id", "input_ids", "target_offsets", "token_correct"):
        np.testing.assert_array_equal(getattr(cuda, name), getattr(cpu, name))
    # fp32 sums in another order; states are kept in bf16
    for name in ("error_values", "error_rest", "token_loss"):
        np.testing.assert_allclose(getattr(cuda, name), getattr(cpu, name), atol=1e-4)


@pytest.mark.parametrize("watermark", [0, 2])
def test_a_replay_writes_the_same_rows(tmp_path: Path, watermark: int) -> None:
    """Killed after round 3 and begun again from the start or a checkpoint: bit for bit the log of one attempt."""
    whole, torn = Run(tmp_path / "whole", log={"top_k": 4}), Run(tmp_path / "torn", log={"top_k": 4})
    whole.attempt(0, ROUNDS)
    if watermark:
        torn.attempt(0, watermark)
    torn.attempt(watermark, 3, close=False)
    torn.attempt(watermark, ROUNDS)
    found, expected = torn.records(), whole.records()
    assert found.top_k == 4 and set(found.attempt[found.round > watermark].tolist()) == {3 if watermark else 2}
    found.attempt = expected.attempt
    assert_same(found, expected)


def test_sampling_leaves_the_rest_as_it_is(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", log={"top_k": 4})
    whole.attempt(0, ROUNDS)
    everything = whole.records()
    for sampling in ({"sampling": "fraction", "sampling_fraction": 0.4}, {"sampling": "mistakes", "mistake_loss": 9.0}):
        run = Run(tmp_path / sampling["sampling"], log={"top_k": 4, **sampling})
        recorder = run.attempt(0, ROUNDS)
        found = run.records()
        kept = np.isin(everything.sample_id, found.sample_id)
        assert 0 < kept.sum() < len(everything) or sampling["sampling"] == "mistakes"
        assert recorder.skipped == len(everything) - kept.sum()
        assert_same(found, everything.select(np.flatnonzero(kept)))
        assert run.ledger.state().round == ROUNDS, "rounds without a record are covered too"
        if sampling["sampling"] == "mistakes":
            loss = (everything.token_correct, everything.token_loss, everything.target_offsets)
            np.testing.assert_array_equal(kept, has_mistake(*loss, 9.0))


def test_bytes_a_token(tmp_path: Path) -> None:
    run = Run(tmp_path, log={"top_k": 4})
    recorder = run.attempt(0, ROUNDS)
    tokens = sum(int(b["lengths"].sum()) for number in range(1, ROUNDS + 1) for b in micro_batches(number))
    assert recorder.metrics()["bytes_per_token"] == pytest.approx(run.ledger.state().bytes / tokens)
