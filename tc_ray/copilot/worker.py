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

from tc_ray.cluster.measure import peak_memory
from tc_ray.config.schema import RunConfig
from tc_ray.copilot.buffer import RoundBuffer
from tc_ray.copilot.checkpoint import Position
from tc_ray.copilot.held_out import ErrorRatio
from tc_ray.copilot.learner import StepResult, make_learner
from tc_ray.copilot.training import train
from tc_ray.data.prepared.batches import TrainTable
from tc_ray.mistakelog.read.reader import LogTail
from tc_ray.mistakelog.table.errors import retry
from tc_ray.models.hub import on_this_node


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
        """Steps of the whole run as it is planned."""
        return self.rounds * self.config.copilot.steps_per_round


class CopilotWorker:
    """One rank of the learner group. Methods are called in order: address (rank 0), join, run."""

    def __init__(self, job: CopilotJob, rank: int, world_size: int) -> None:
        torch.set_num_threads(job.config.resources.copilot_threads)
        self.job, self.config, self.rank, self.world_size = job, job.config, rank, world_size
        self.buffer = RoundBuffer(job.config.copilot.buffer_rounds, job.config.log.pooling)
        self.version, self.rounds = -1, job.rounds

    def address(self) -> str:
        """host:port that the process group meets at."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def join(self, address: str) -> int:
        """Form the learners' own process group; returns this worker's pid."""
        if self.world_size > 1:
            backend = "nccl" if self.config.resources.copilot_gpus else "gloo"
            dist.init_process_group(backend, init_method=f"tcp://{address}", rank=self.rank, world_size=self.world_size)
        return os.getpid()

    def run(self) -> Position:
        """Train until every step of the run is done, then export to `copilot/final` (rank 0)."""
        self.began = time.monotonic()
        self.job.tracker.process.remote(f"copilot-{self.rank}", os.getpid())
        self._wait_for("loading weights")
        self.learner = make_learner(
            self.config,
            on_this_node(self.job.pilot_path),
            on_this_node(self.job.base_path),
            output_ids_of(self.config),
            total_steps=self.job.total_steps,
            world_size=self.world_size,
        )
        location, options = self.config.log_location, self.config.log.storage_options
        self.tail = retry(lambda: LogTail(location, storage_options=options), f"Copilot {self.rank}")
        position = train(
            self.learner,
            self,
            self.config,
            self.config.run.path / "copilot",
            report=self._report,
            restored=self._restored,
            measured=self._measured,
            inputs=self.job.inputs,
            rank=self.rank,
        )
        self._report_memory()
        return position

    def rounds_for(self, step: int) -> int:
        """Bring the buffer to the newest table version, the same on every rank; the round committed in it."""
        version, committed, last = self._log_position()
        self.rounds = last or self.job.rounds
        if version > self.version:
            poll = partial(self.tail.poll, version, min_round=self._first_round(committed))
            update = retry(poll, f"Copilot {self.rank}")
            for name in update.removed:
                self.buffer.remove(name)
            for name, records in update.new:
                self.buffer.add(name, records)
            for error in update.bad if not self.rank else []:
                # the Ledger takes damaged files out of the log
                self.job.ledger.quarantine.remote(error.name, error.reason)
                self._event("damaged", f"log file {error}; training continues without its rows")
            self.version = version
        return committed

    def _log_position(self) -> tuple[int, int, int]:
        """Version, committed round, and the Pilot's last round (0 until it has ended)."""
        import ray

        position = torch.zeros(3, dtype=torch.int64)
        if self.rank == 0:
            state = ray.get(self.job.ledger.state.remote())
            position = torch.tensor([state.version, state.round, state.last_round], dtype=torch.int64)
        if self.world_size > 1:
            position = position.cuda() if self.config.resources.copilot_gpus else position
            dist.broadcast(position, 0)
        version, committed, last = position.tolist()
        return version, committed, last

    def _first_round(self, committed: int) -> int:
        """Files that end before this round are not read: the buffer takes the newest, and the Pilot may go back a checkpoint."""
        return committed - self.config.copilot.buffer_rounds - self.config.pilot.checkpoint_every_rounds

    def _restored(self, at: Position, damaged: list[str]) -> None:
        if damaged:
            self._event("checkpoint", f"{'; '.join(damaged)}. The checkpoint before is used, if there is one")
        if at.step:
            self._event("resume", f"Copilot resumes after step {at.step}")
        self._wait_for("")
        if self.rank == 0:
            self.job.tracker.spent.remote({"copilot load": time.monotonic() - self.began})
        self._report(at, None)

    def _report_memory(self) -> None:
        self.job.tracker.memory.remote(peak_memory(f"copilot-{self.rank}"))

    def _report(self, at: Position, result: StepResult | None) -> None:
        if result is not None and at.step % self.config.copilot.checkpoint_every_steps == 0:
            self._report_memory()
        if self.rank:
            return
        self.job.ledger.report_copilot.remote(at.round, at.step)
        if result is None:
            return
        left_out = self.learner.left_out.count
        if not result.taken and left_out == 1:
            what = "its loss or gradient is not finite, the update is left out; further ones are counted"
            self._event("not finite", f"Copilot step {at.step}: {what}")
        metrics = {
            "loss": result.loss,
            "error_size": result.error_size,
            "learning_rate": result.learning_rate,
            "tokens": float(result.tokens),
            "left_out_steps": float(left_out),
            "compute_seconds": result.seconds,
            "step_seconds": result.wall_seconds,
        }
        self.job.tracker.copilot.remote(at.round, at.step, metrics)

    def _measured(self, found: ErrorRatio) -> None:
        if self.rank == 0:
            self.job.tracker.error_ratio.remote(found.round, found.metrics())
        if found.memorised:
            self._event("memorised", found.event())

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
