"""A Copilot learner worker: a Ray actor that tails the log and steps in time with its peers.

Invariant: rank 0 alone asks the Ledger how far the log is and broadcasts the answer, so every rank reads the same
table version and takes the same steps. The actor asks, never tells: nothing here can make the Pilot wait.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tc_ray.config.schema import RunConfig
from tc_ray.copilot import checkpoint
from tc_ray.copilot.batching import batch_from_records, pooled_records
from tc_ray.copilot.buffer import RoundBuffer, draw
from tc_ray.copilot.checkpoint import Position
from tc_ray.copilot.learner import Learner, StepResult
from tc_ray.data.prepared.train_table import TrainTable
from tc_ray.mistakelog.read.reader import LogTail
from tc_ray.mistakelog.table.data_file import BadFileError
from tc_ray.mistakelog.table.retry import patiently
from tc_ray.models.copilot import Copilot, CopilotBatch
from tc_ray.models.copilot.model import choose_layers
from tc_ray.models.pilot.taps import tapped_layers

IDLE_SECONDS = 0.1


@dataclass(frozen=True)
class CopilotJob:
    """All a learner worker needs; handles are Ray actors."""

    config: RunConfig
    pilot_path: Path | str
    base_path: Path | str
    rounds: int
    ledger: Any
    tracker: Any
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the rows and base weights, which stand in each checkpoint."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.rounds * self.config.copilot.steps_per_round


class CopilotWorker:
    """One rank of the learner group. Methods are called in order: address (rank 0), join, run."""

    def __init__(self, job: CopilotJob, rank: int, world_size: int) -> None:
        torch.set_num_threads(job.config.resources.copilot_threads)
        self.job, self.config, self.rank, self.world_size = job, job.config, rank, world_size
        self.folder = job.config.run.path / "copilot"
        self.left_out = {"left_out_steps": 0.0, "left_out_records": 0.0}

    def address(self) -> str:
        """host:port that the process group meets at."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def join(self, address: str) -> int:
        """Form the learners' own process group; returns this worker's pid."""
        if self.world_size > 1:
            backend = "nccl" if self.config.resources.gpus else "gloo"
            dist.init_process_group(backend, init_method=f"tcp://{address}", rank=self.rank, world_size=self.world_size)
        return os.getpid()

    def run(self) -> Position:
        """Train until every step of the run is done, then export to `copilot/final` (rank 0)."""
        self.job.tracker.process.remote(f"copilot-{self.rank}", os.getpid())
        if self.rank == 0:
            self.job.tracker.waiting.remote("copilot", "loading weights")
        learner = Learner(
            build_copilot(self.config, self.job.pilot_path, self.job.base_path, output_ids_of(self.config)),
            self.config.copilot,
            total_steps=self.job.total_steps,
            device="cuda" if self.config.resources.gpus else "cpu",
            world_size=self.world_size,
        )
        at = checkpoint.restore(learner, self.folder / "checkpoints", self._passed_over) or Position(0, 0, -1)
        self._report(at, None)
        if at.step and not self.rank:
            self.job.tracker.event.remote("resume", f"Copilot goes on after step {at.step}")
        place, who = self.config.log_location, f"Copilot {self.rank}"
        tail = patiently(lambda: LogTail(place, storage_options=self.config.log.storage_options), who)
        buffer = RoundBuffer(self.config.copilot.buffer_rounds, self.config.copilot.max_seen)
        seen_version = -1
        if self.rank == 0:
            self.job.tracker.waiting.remote("copilot", "")
        while at.step < self.job.total_steps:
            version, committed, _ = self._log_position()
            if version > seen_version:
                poll = partial(tail.poll, version, min_round=self._first_round(committed))
                update = patiently(poll, who)
                for name in update.removed:
                    buffer.remove(name)
                for name, records in update.new:
                    buffer.add(name, pooled_records(records, self.config.log.pooling))
                self._report_bad(update.bad)
                seen_version = version
            due = min(committed * self.config.copilot.steps_per_round, self.job.total_steps)
            if at.step < due and not len(buffer):
                # every record so far was left out by log.sampling or copilot.max_seen: nothing to learn from
                at = Position(due, due // self.config.copilot.steps_per_round, version)
            if at.step >= due:
                self._report(at, None)  # again and again: a restarted Ledger has forgotten it
                time.sleep(IDLE_SECONDS)
                continue
            result = learner.step(self._batch(buffer, at.step))
            at = Position(at.step + 1, (at.step + 1) // self.config.copilot.steps_per_round, version)
            self._report_left_out(at, learner.left_out.count, buffer.left_out)
            self._report(at, result)
            if at.step % self.config.copilot.checkpoint_every_steps == 0 or at.step == self.job.total_steps:
                self._save(learner, at)
        if self.rank == 0:
            learner.export(self.folder / "final")
        return at

    def _log_position(self) -> tuple[int, int, int]:
        """(table version, round committed, rows), the same on every rank."""
        import ray

        position = torch.zeros(3, dtype=torch.int64)
        if self.rank == 0:
            state = ray.get(self.job.ledger.state.remote())
            position = torch.tensor([state.version, state.round, state.rows], dtype=torch.int64)
        if self.world_size > 1:
            position = position.cuda() if self.config.resources.gpus else position
            dist.broadcast(position, 0)
        version, committed, rows = position.tolist()
        return version, committed, rows

    def _first_round(self, committed: int) -> int:
        """Files that end before this round are not read: however far the Copilot is behind, the buffer takes the newest.

        A Pilot that goes back to its checkpoint makes earlier rounds the newest: room is left for that.
        """
        if self.config.copilot.max_seen is not None:  # then how far back the buffer reaches depends on the records
            return 0
        return committed - self.config.copilot.buffer_rounds - self.config.pilot.checkpoint_every_rounds

    def _report_bad(self, bad: list[BadFileError]) -> None:
        """Rank 0 names damaged files to the Ledger, which takes them out of the log, and to the user."""
        for error in bad if not self.rank else []:
            self.job.ledger.quarantine.remote(error.name, error.reason)
            self.job.tracker.event.remote("damaged", f"log file {error}; training goes on without its rows")

    def _report_left_out(self, at: Position, steps: int, records: int) -> None:
        """Counts of what was not finite in this start; an event for the first of each."""
        now = {"left_out_steps": float(steps), "left_out_records": float(records)}
        for name, what in (
            ("left_out_steps", "its loss or gradient is not finite, the update is left out"),
            ("left_out_records", f"{records} records of the log hold numbers that are not finite, they are left out"),
        ):
            if now[name] and not self.left_out[name] and not self.rank:
                self.job.tracker.event.remote("not finite", f"Copilot step {at.step}: {what}; further ones are counted")
        self.left_out = now

    def _batch(self, buffer: RoundBuffer, step: int) -> CopilotBatch:
        size = self.config.copilot.batch_size
        drawn = draw(buffer, self.config, step)
        part = size // self.world_size
        return batch_from_records(drawn, range(self.rank * part, (self.rank + 1) * part))

    def _passed_over(self, text: str) -> None:
        if not self.rank:
            self.job.tracker.event.remote("checkpoint", text)

    def _report(self, at: Position, result: StepResult | None) -> None:
        if self.rank:
            return
        self.job.ledger.report_copilot.remote(at.round, at.step)
        if result is not None:
            metrics = {
                "loss": result.loss,
                "error_size": result.error_size,
                "learning_rate": result.learning_rate,
                "tokens": float(result.tokens),
                **self.left_out,
            }
            self.job.tracker.copilot.remote(at.round, at.step, metrics)

    def _save(self, learner: Learner, at: Position) -> None:
        if self.rank == 0:
            checkpoint.save(learner, self.folder / "checkpoints", at, inputs=self.job.inputs)
        if self.world_size > 1:
            dist.barrier()


def build_copilot(
    config: RunConfig, pilot_path: Path | str, base_path: Path | str, output_ids: torch.Tensor | None
) -> Copilot:
    """The Copilot a run starts from; the same weights on every rank. output_ids: tokens it can correct; None: all."""
    from transformers import AutoConfig, AutoTokenizer

    from tc_ray.models.families import family_of
    from tc_ray.models.identity import vocabulary_hash
    from tc_ray.models.pilot.load import load_pilot

    torch.manual_seed(config.run.seed)
    pilot = load_pilot(pilot_path, dtype=torch.float32, random_weights=config.model.random_weights)
    base_config = AutoConfig.from_pretrained(base_path, trust_remote_code=False)
    return Copilot.from_decoder(
        base_path,
        choose_layers(config.copilot.layers, config.copilot.every, family_of(base_config).layer_count(base_config)),
        pilot=pilot,
        output_ids=output_ids,
        pattern=config.copilot.pattern,
        producing_state=config.copilot.producing_state,
        pooling=config.log.pooling,
        tap_layers=tapped_layers(config.log.rationale, len(family_of(pilot).layers(pilot))),
        positions=config.log.positions,
        tokenizer=vocabulary_hash(AutoTokenizer.from_pretrained(pilot_path, trust_remote_code=False)),
        random_weights=config.model.random_weights,
    )


def output_ids_of(config: RunConfig) -> torch.Tensor | None:
    if config.copilot.output_tokens == "all":
        return None
    return torch.from_numpy(TrainTable(config.run.path / "data" / "train.parquet").target_ids())
