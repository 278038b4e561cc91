"""A Copilot learner worker: a Ray actor that follows the log and steps together with its peers.

Invariant: rank 0 alone asks the Ledger how far the log is and broadcasts the answer, so every rank reads the same
table version and takes the same steps. Nothing here can make the Pilot wait. Started by `group`; read `CopilotWorker.run` first.
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
from tc_ray.copilot.batch import batch_from_records
from tc_ray.copilot.buffer import RoundBuffer, draw
from tc_ray.copilot.checkpoint import Position
from tc_ray.copilot.learner import Learner, StepResult, make_learner
from tc_ray.data.prepared.batches import TrainTable
from tc_ray.mistakelog.read.reader import LogTail
from tc_ray.mistakelog.table.data_file import BadFileError
from tc_ray.mistakelog.table.errors import retry
from tc_ray.models.copilot import CopilotBatch

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
        self.buffer = RoundBuffer.of(job.config)
        self.version = -1
        """Of the table, as the buffer holds it."""
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
        self._wait_for("loading weights")
        learner = make_learner(
            self.config,
            self.job.pilot_path,
            self.job.base_path,
            output_ids_of(self.config),
            total_steps=self.job.total_steps,
            world_size=self.world_size,
        )
        at = self._restore(learner)
        location, options = self.config.log_location, self.config.log.storage_options
        tail = retry(lambda: LogTail(location, storage_options=options), f"Copilot {self.rank}")
        self._wait_for("")
        per_round = self.config.copilot.steps_per_round
        while at.step < self.job.total_steps:
            committed = self._follow(tail)
            due = min(committed * per_round, self.job.total_steps)
            if at.step < due and not len(self.buffer):
                # every record so far was left out by log.sampling or copilot.max_seen: nothing to learn from
                at = self._position(due)
            if at.step >= due:
                self._report(at, None)  # again and again: a restarted Ledger has forgotten it
                time.sleep(IDLE_SECONDS)
                continue
            result = learner.step(self._batch(at.step))
            at = self._position(at.step + 1)
            self._report_left_out(at, learner.left_out.count)
            self._report(at, result)
            if at.step % self.config.copilot.checkpoint_every_steps == 0 or at.step == self.job.total_steps:
                self._save(learner, at)
        if self.rank == 0:
            learner.export(self.folder / "final")
        return at

    def _position(self, step: int) -> Position:
        round = step // self.config.copilot.steps_per_round
        return Position(step, round, self.version, dict(self.job.inputs))

    def _restore(self, learner: Learner) -> Position:
        """Load the newest whole checkpoint, if there is one."""
        found = checkpoint.restore(learner, self.folder / "checkpoints", lambda text: self._event("checkpoint", text))
        at = found or Position(0, 0, -1)
        self._report(at, None)
        if at.step:
            self._event("resume", f"Copilot resumes after step {at.step}")
        return at

    def _follow(self, tail: LogTail) -> int:
        """Bring the buffer to the newest table version, the same on every rank; returns the round committed in it."""
        version, committed = self._log_position()
        if version > self.version:
            poll = partial(tail.poll, version, min_round=self._first_round(committed))
            update = retry(poll, f"Copilot {self.rank}")
            for name in update.removed:
                self.buffer.remove(name)
            for name, records in update.new:
                self.buffer.add(name, records)
            self._report_bad(update.bad)
            self.version = version
        return committed

    def _log_position(self) -> tuple[int, int]:
        """(table version, round committed), the same on every rank."""
        import ray

        position = torch.zeros(2, dtype=torch.int64)
        if self.rank == 0:
            state = ray.get(self.job.ledger.state.remote())
            position = torch.tensor([state.version, state.round], dtype=torch.int64)
        if self.world_size > 1:
            position = position.cuda() if self.config.resources.gpus else position
            dist.broadcast(position, 0)
        version, committed = position.tolist()
        return version, committed

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
            self._event("damaged", f"log file {error}; training continues without its rows")

    def _report_left_out(self, at: Position, steps: int) -> None:
        """Counts of what was not finite in this start; an event for the first of each."""
        records = self.buffer.left_out
        now = {"left_out_steps": float(steps), "left_out_records": float(records)}
        for name, what in (
            ("left_out_steps", "its loss or gradient is not finite, the update is left out"),
            ("left_out_records", f"{records} records of the log hold numbers that are not finite, they are left out"),
        ):
            if now[name] and not self.left_out[name]:
                self._event("not finite", f"Copilot step {at.step}: {what}; further ones are counted")
        self.left_out = now

    def _batch(self, step: int) -> CopilotBatch:
        """This rank's slice of the step's draw."""
        part = self.config.copilot.batch_size // self.world_size
        return batch_from_records(draw(self.buffer, self.config, step), range(self.rank * part, (self.rank + 1) * part))

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
            checkpoint.save(learner, self.folder / "checkpoints", at)
        if self.world_size > 1:
            dist.barrier()

    def _event(self, kind: str, text: str) -> None:
        if self.rank == 0:
            self.job.tracker.event.remote(kind, text)

    def _wait_for(self, text: str) -> None:
        """What the status shows before the first step; an empty text: nothing is waited for."""
        if self.rank == 0:
            self.job.tracker.waiting.remote("copilot", text)


def output_ids_of(config: RunConfig) -> torch.Tensor | None:
    """int64 ids that a run's Copilot can correct: those that occur in its completions; None: all."""
    if config.copilot.output_tokens == "all":
        return None
    return torch.from_numpy(TrainTable(config.run.path / "data" / "train.parquet").target_ids())
