"""`log.top_k: auto`, sampling and the costs of the log, through the recorder, a real writer, Ledger and table."""

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
from tc_ray.pilot.log_metadata import log_metadata
from tc_ray.pilot.recorder import Recorder
from tests.support.family_samples import new_pilot, quiet, reference_model
from tests.support.mistakelog_samples import assert_same
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
        self.told: list[tuple[str, str]] = []
        self.metrics: list[dict[str, float]] = []
        self.spoilt: set[int] = set()

    def attempt(self, start: int, last: int, *, close: bool = True, device: torch.device = CPU) -> Recorder:
        log = self.config.log
        with self.lock:
            attempt = self.ledger.begin_attempt(start, 1)
        writer = RecordWriter(
            self.config.log_location,
            self.commit,
            run=self.config.run.name,
            rank=0,
            attempt=attempt,
            flush_rounds=1,
            file_bytes=log.file_bytes,
            queue_rounds=log.queue_rounds,
            full_policy=log.full_policy,
            start_round=start,
        )
        step = pilot_step(new_pilot("llama").eval(), self.config).eval().to(device)
        recorder = Recorder(
            self.config,
            writer,
            step,
            device,
            rank=0,
            world_size=1,
            attempt=attempt,
            rounds=ROUNDS,
            start_round=start,
            stored_top_k=LogStore(self.config.log_location).metadata.top_k,
            choose=self.choose,
            tell=lambda kind, text: self.told.append((kind, text)),
        )
        for number in range(start + 1, last + 1):
            for batch in micro_batches(number):
                ids, lengths, starts = (
                    torch.from_numpy(batch[n]).to(device) for n in ("input_ids", "lengths", "target_start")
                )
                record = step(ids, lengths, starts, 1.0)[1]
                recorder.record(record, batch, np.zeros(MICRO, np.int16), number)
            recorder.end_round(number, spoilt=number in self.spoilt)
            self.metrics.append(recorder.metrics())
        if close:
            recorder.close()
        return recorder

    def choose(self, top_k: int) -> int:
        with self.lock:
            return self.ledger.choose_top_k(top_k)

    def commit(self, file: DataFile) -> int:
        """One call at a time, as in an actor: an attempt left behind may still commit."""
        with self.lock:
            return self.ledger.commit(file)

    def records(self) -> Records:
        made = MistakeLog(self.config.log_location).records()
        return made.select(np.lexsort((made.sample_id, made.round)))


@pytest.mark.parametrize("asked", [{"top_k_captured": 0.999}, {"top_k_captured": 0.9, "top_k_norm": 1}])
def test_the_log_is_that_of_the_chosen_k(tmp_path: Path, asked: dict[str, float]) -> None:
    run = Run(tmp_path / "auto", log={"top_k_rounds": 3, **asked})
    assert LogStore(run.config.log_location).metadata.top_k == 0
    run.attempt(0, ROUNDS)
    k = LogStore(run.config.log_location).metadata.top_k
    assert 1 < k < VOCAB - 1
    ((kind, text),) = run.told
    assert kind == "log" and f"the {k} largest errors a token: 9" in text and "in rounds 1 to 3" in text
    found = run.records()
    assert found.top_k == k and len(found) == ROUNDS * 2 * MICRO
    # the share by hand, of the rounds measured
    measured = found.select(np.flatnonzero(found.round <= 3))
    size, rest = np.abs(measured.error_values).astype(np.float64), measured.error_rest.astype(np.float64)
    share = run.metrics[-1]["captured_share"]
    assert asked["top_k_captured"] <= share < 1
    if "top_k_norm" in asked:
        assert size.sum() / (2 * size[:, 0].sum()) == pytest.approx(share, rel=1e-6)
    else:
        held = np.sqrt(np.square(size).sum(1))
        most = np.sqrt(
            np.square(size).sum(1) + rest * size[:, -1]
        )  # each error that is not listed is below the last one
        assert held.sum() / most.sum() <= share
        assert np.sqrt(np.square(size[:, :-1]).sum(1)).sum() < 0.999 * held.sum() / share
    fixed = Run(tmp_path / "fixed", log={"top_k": k})
    fixed.attempt(0, ROUNDS)
    expected = fixed.records()
    assert not fixed.told
    np.testing.assert_allclose(found.error_rest, expected.error_rest, atol=1e-6)
    found.error_rest = expected.error_rest
    assert_same(found, expected)


@pytest.mark.gpu
def test_the_log_of_a_gpu_is_that_of_the_cpu(tmp_path: Path) -> None:
    """Through the side stream and the writer; first rounds held back until k is known."""
    log = {"top_k_rounds": 2, "top_k_captured": 0.9, "top_k_norm": 1}
    found = {}
    for device in ("cpu", "cuda"):
        run = Run(tmp_path / device, log=log)
        run.attempt(0, ROUNDS, device=torch.device(device))
        found[device] = run.records()
    cpu, cuda = found["cpu"], found["cuda"]
    assert cuda.top_k == cpu.top_k and len(cuda) == len(cpu) == ROUNDS * 2 * MICRO
    for name in ("round", "sample_id", "input_ids", "target_offsets", "token_correct"):
        np.testing.assert_array_equal(getattr(cuda, name), getattr(cpu, name))
    # fp32 sums in another order; states are kept in bf16
    for name in ("error_values", "error_rest", "token_loss"):
        np.testing.assert_allclose(getattr(cuda, name), getattr(cpu, name), atol=1e-4)


def test_no_more_than_the_limit_is_chosen(tmp_path: Path) -> None:
    """A share that the limit does not reach is told; with the default one the log holds it, and no error more than it takes."""
    found = {}
    for name, limit in (("low", {"top_k_limit": 5}), ("default", {})):
        run = Run(tmp_path / name, log={"top_k_rounds": 2, "top_k_captured": 0.99, "top_k_norm": 1, **limit})
        run.attempt(0, ROUNDS)
        found[name] = run.records()
        assert ("log.top_k_limit is 5" in run.told[0][1]) == bool(limit)
    low, default = found["low"], found["default"]
    assert low.top_k == 5 < default.top_k < VOCAB - 1
    measured = np.repeat(default.round <= 2, np.diff(default.target_offsets))
    size = np.abs(default.error_values[measured]).astype(np.float64)
    whole = 2 * size[:, 0].sum()
    assert size[:, :-1].sum() < 0.99 * whole <= size.sum()


def test_nothing_is_in_the_log_until_k_is_chosen(tmp_path: Path) -> None:
    run = Run(tmp_path, log={"top_k_rounds": 3})
    recorder = run.attempt(0, 2, close=False)
    assert run.ledger.state().rows == 0 and "top_k" not in run.metrics[-1]
    del recorder


@pytest.mark.parametrize("died_after", [1, 2, 3, 4])
def test_a_replay_writes_the_same_rows(tmp_path: Path, died_after: int) -> None:
    """Killed before, at and after the choice, and begun again from the start: bit for bit the log of one attempt."""
    log = {"top_k_rounds": 2, "top_k_captured": 0.9, "top_k_norm": 1}
    whole, torn = Run(tmp_path / "whole", log=log), Run(tmp_path / "torn", log=log)
    whole.attempt(0, ROUNDS)
    torn.attempt(0, died_after, close=False)
    torn.attempt(0, ROUNDS)
    found, expected = torn.records(), whole.records()
    assert set(found.attempt.tolist()) == {2}
    found.attempt = expected.attempt
    assert_same(found, expected)


def test_a_resumed_attempt_takes_k_from_the_log(tmp_path: Path) -> None:
    log = {"top_k_rounds": 2, "top_k_captured": 0.9, "top_k_norm": 1}
    whole, resumed = Run(tmp_path / "whole", log=log), Run(tmp_path / "resumed", log=log)
    whole.attempt(0, ROUNDS)
    resumed.attempt(0, 3)
    resumed.attempt(3, ROUNDS)
    assert len(resumed.told) == 1, "it is chosen once"
    found, expected = resumed.records(), whole.records()
    found.attempt = expected.attempt
    assert_same(found, expected)
    # a checkpoint beside a log that has no rows of its rounds
    other = Run(tmp_path / "other", log=log)
    other.ledger.begin_attempt(0, 1)
    with pytest.raises(ValueError, match=r"top_k 0.*round 3.*not the one of this run.folder"):
        Recorder(
            other.config, None, pilot_step(new_pilot("llama"), other.config), CPU, rank=0, world_size=1, attempt=1,
            rounds=9, start_round=3, stored_top_k=0, choose=lambda k: k, tell=lambda *_: None,
        )  # type: ignore[arg-type]  # fmt: skip


def test_the_first_choice_stands(tmp_path: Path) -> None:
    run = Run(tmp_path, log={"top_k_rounds": 2, "top_k_captured": 0.9, "top_k_norm": 1})
    assert run.ledger.choose_top_k(3) == 3
    run.attempt(0, ROUNDS)
    assert run.records().top_k == 3
    assert "the 3 largest" in run.told[0][1] and "less than the 90% of log.top_k_captured" in run.told[0][1]


def test_a_burst_of_held_rounds_fits_into_the_queue(tmp_path: Path) -> None:
    """Policy subsample drops what finds the queue full: the rounds held back must not."""
    run = Run(tmp_path, log={"top_k_rounds": 4, "queue_rounds": 3, "full_policy": "subsample"})
    run.attempt(0, 3)
    assert run.metrics[-1]["dropped_records"] == 0 and len(run.records()) == 3 * 2 * MICRO


@pytest.mark.parametrize("top_k", [4, "auto"])
def test_sampling_leaves_the_rest_as_it_is(tmp_path: Path, top_k: Any) -> None:
    whole = Run(tmp_path / "whole", log={"top_k": top_k})
    whole.attempt(0, ROUNDS)
    everything = whole.records()
    for sampling in ({"sampling": "fraction", "sampling_fraction": 0.4}, {"sampling": "mistakes", "mistake_loss": 9.0}):
        run = Run(tmp_path / sampling["sampling"], log={"top_k": top_k, **sampling})
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
    assert recorder.metrics()["top_k"] == 4.0
