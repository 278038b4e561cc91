"""The Pilot's training loop, run by every Ray Train worker.

Invariant: a round is a pure function of (weights, seed, round number): data order, dropout and learning rate follow
from the number alone, so an attempt that starts at the watermark repeats exactly what a lost attempt did. The step
never waits for disk or for the Copilot: records go to a bounded queue, metrics to an actor without an answer. Only a
checkpoint waits, for the log to be committed up to its round.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.data.batches import RoundOrder
from tc_ray.data.train_table import TrainTable
from tc_ray.mistakelog.ledger import submit_to
from tc_ray.mistakelog.writer import RecordWriter
from tc_ray.pilot.checkpoint import latest_checkpoint, load_checkpoint, mark_complete, save_files
from tc_ray.pilot.engine import build_engine
from tc_ray.pilot.export import save_merged
from tc_ray.pilot.recording import to_records

LOCKSTEP_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class PilotJob:
    """All a worker needs; paths are absolute, handles are Ray actors (`ledger` is None when the log is off)."""

    config: RunConfig
    model_path: Path | str
    train_file: Path
    rounds: int
    ledger: Any
    tracker: Any


def train_worker(settings: dict[str, Any]) -> None:
    """Entry of a Ray Train worker; `settings["job"]` is a PilotJob."""
    import ray.train

    context = ray.train.get_context()
    Worker(settings["job"], context.get_world_rank(), context.get_world_size()).run()


class Worker:
    """One rank of the Pilot."""

    def __init__(self, job: PilotJob, rank: int, world_size: int) -> None:
        self.job, self.config, self.rank, self.world_size = job, job.config, rank, world_size
        torch.set_num_threads(self.config.resources.pilot_threads)
        self.folder = self.config.run.path
        self.checkpoints = self.folder / "pilot" / "checkpoints"
        self.table = TrainTable(job.train_file)
        self.order = RoundOrder(
            len(self.table), self.config.pilot.batch_size, self.config.pilot.epochs, self.config.run.seed
        )
        self.engine = build_engine(self.config, job.model_path, job.rounds)
        self.device = self.engine.device
        self.attempt = 0
        self.writer: RecordWriter | None = None

    def run(self) -> None:
        """Train from the last checkpoint to the last round, then export the merged Pilot."""
        start = self._restore()
        self._begin_attempt(start)
        started, tokens = time.monotonic(), 0
        for number in range(start + 1, self.job.rounds + 1):
            began = time.monotonic()
            loss, round_tokens = self._round(number)
            tokens += round_tokens
            if self.writer is not None:
                self.writer.end_round(number)
            last = number == self.job.rounds
            self._report(number, loss, round_tokens, time.monotonic() - began, tokens / (time.monotonic() - started))
            if self.config.copilot.schedule == "lockstep" and self.writer is not None:
                self._wait_for_copilot(number)
            if last or number % self.config.pilot.checkpoint_every_rounds == 0:
                self._checkpoint(number)
        save_merged(self.engine, self.config, self.job.model_path, self.folder / "pilot" / "final", rank=self.rank)
        if self.writer is not None:
            self.writer.close()
            if self.rank == 0:
                _get(self.job.ledger.finish_pilot.remote(self.job.rounds))

    def _restore(self) -> int:
        checkpoint = latest_checkpoint(self.checkpoints)
        if checkpoint is None:
            return 0
        load_checkpoint(self.engine, checkpoint, world_size=self.world_size, zero_stage=self.config.pilot.zero_stage)
        return checkpoint.round

    def _begin_attempt(self, watermark: int) -> None:
        """Rank 0 fences the log past the watermark and shares the attempt's number; then every rank writes."""
        self.job.tracker.process.remote(f"pilot-{self.rank}", os.getpid())
        if not self.config.log.enabled:
            return
        number = torch.zeros(1, dtype=torch.int64, device=self.device)
        if self.rank == 0:
            number[0] = _get(self.job.ledger.begin_attempt.remote(watermark, self.world_size))
        if self.world_size > 1:
            torch.distributed.broadcast(number, 0)
        self.attempt = int(number)
        if self.rank == 0 and self.attempt > 1:
            self.job.tracker.event.remote("restart", f"Pilot attempt {self.attempt} goes on after round {watermark}")
        log = self.config.log
        self.writer = RecordWriter(
            self.folder / "log",
            submit_to(self.job.ledger),
            run=self.config.run.name,
            rank=self.rank,
            attempt=self.attempt,
            flush_rounds=1 if self.config.copilot.schedule == "lockstep" else log.flush_rounds,
            file_bytes=log.file_bytes,
            queue_rounds=log.queue_rounds,
            full_policy=log.full_policy,
            compression=log.compression,
            start_round=watermark,
        )

    def _round(self, number: int) -> tuple[float, int]:
        """One optimizer step; returns the round's mean cross-entropy over all ranks and its tokens, all ranks."""
        rows, seen = self.order.sample_rows(number), self.order.seen(number)
        target_tokens = self.table.target_tokens(rows)
        accumulation, micro = self.config.accumulation_steps, self.config.pilot.micro_batch_size
        # DeepSpeed divides by accumulation steps and by ranks; a token of the round must count once in the mean
        scale = self.world_size * accumulation / target_tokens
        torch.manual_seed(_round_seed(self.config.run.seed, number, self.rank))
        first = self.rank * micro * accumulation
        total = torch.zeros((), device=self.device)
        for at in range(first, first + micro * accumulation, micro):
            part = slice(at, at + micro)
            batch = self.table.batch(rows[part])
            ids = torch.from_numpy(batch["input_ids"]).to(self.device, torch.int64)
            lengths = torch.from_numpy(batch["lengths"]).to(self.device, torch.int64)
            starts = torch.from_numpy(batch["target_start"]).to(self.device, torch.int64)
            loss, record = self.engine(ids, lengths, starts, scale)
            self.engine.backward(loss)
            if self.writer is not None and record is not None:
                records = to_records(
                    record,
                    input_ids=batch["input_ids"],
                    lengths=batch["lengths"],
                    target_start=batch["target_start"],
                    sample_id=batch["sample_id"],
                    seen=seen[part],
                    round_number=number,
                    rank=self.rank,
                    attempt=self.attempt,
                    positions=self.config.log.positions,
                )
                self.writer.put(records, number)
            self.engine.step()
            total += loss.detach()
        total /= accumulation
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
            total /= self.world_size
        return float(total), self.table.tokens(rows)

    def _report(self, number: int, loss: float, tokens: int, seconds: float, mean_tokens_per_second: float) -> None:
        if self.rank:
            return
        metrics = {
            "loss": loss,
            "tokens": float(tokens),
            "learning_rate": float(self.engine.get_lr()[0]),
            "round_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mean_tokens_per_second": mean_tokens_per_second,
        }
        if self.writer is not None:
            metrics |= {f"log_{name}": float(value) for name, value in self.writer.stats().items()}
        self.job.tracker.pilot.remote(number, metrics)

    def _checkpoint(self, number: int) -> None:
        """Log first, then weights, then the marker: a marker promises both."""
        if self.writer is not None:
            self.writer.flush(number)
        folder = save_files(self.engine, self.checkpoints, number)
        _barrier(self.world_size)
        if self.rank == 0:
            mark_complete(
                folder,
                round_number=number,
                world_size=self.world_size,
                zero_stage=self.config.pilot.zero_stage,
                keep=self.config.pilot.keep_checkpoints,
            )
        _barrier(self.world_size)

    def _wait_for_copilot(self, number: int) -> None:
        assert self.writer is not None
        self.writer.flush(number)
        _barrier(self.world_size)
        while _get(self.job.ledger.copilot_round.remote()) < number:
            time.sleep(LOCKSTEP_POLL_SECONDS)


def _round_seed(seed: int, number: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, number, rank]).generate_state(1)[0])


def _barrier(world_size: int) -> None:
    if world_size > 1:
        torch.distributed.barrier()


def _get(reference: Any) -> Any:
    import ray

    return ray.get(reference)
