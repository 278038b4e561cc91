"""The Pilot's training loop, run by every Ray Train worker.

Invariant: a round is a pure function of (weights, seed, round number): data order, dropout and learning rate follow
from the number alone, so an attempt that starts at the watermark repeats exactly what a lost attempt did. The step
never waits for disk or for the Copilot: records go to a bounded queue, metrics to an actor without an answer. Only a
checkpoint waits, for the log to be committed up to its round; with `log.full_policy: drop` it is postponed while the log cannot be
written. Called by `pilot.trainer`; read `Worker.run` first.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tc_ray.cluster.measure import peak_memory, timed
from tc_ray.config.schema import RunConfig
from tc_ray.data.prepared.batches import TrainTable
from tc_ray.data.prepared.split import micro_batches
from tc_ray.mistakelog.commit.ledger_actor import submit_to
from tc_ray.mistakelog.table.errors import may_pass
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.write.writer import RecordWriter
from tc_ray.models.hub import on_this_node
from tc_ray.models.weights import LeftOut, NotFiniteError, first_not_finite
from tc_ray.pilot.callbacks import call_back
from tc_ray.pilot.checkpoint import (
    PilotCheckpoint,
    find_checkpoints,
    folder_of,
    load_checkpoint,
    mark_complete,
    save_files,
)
from tc_ray.pilot.engine import build_engine, step_inputs, take_step
from tc_ray.pilot.export import PROBE_ROWS, save_merged
from tc_ray.pilot.record import Recorder
from tc_ray.pilot.validated import Validated
from tc_ray.pilot.validation import ValidationRows

LOCKSTEP_POLL_SECONDS = 0.05
SPACE_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class PilotJob:
    """All a worker needs; paths are absolute, handles are Ray actors (`ledger` is None when the log is off)."""

    config: RunConfig
    model_path: Path | str
    train_file: Path
    rounds: int
    ledger: Any
    tracker: Any
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the rows and base weights, which stand in each checkpoint."""


def train_worker(settings: dict[str, Any]) -> None:
    """Entry of a Ray Train worker; `settings["job"]` is a PilotJob."""
    import ray.train

    context, job = ray.train.get_context(), settings["job"]
    if not job.config.resources.pilot_gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a GPU that it sees, one of the Copilot perhaps
    Worker(job, context.get_world_rank(), context.get_world_size()).run()


class Worker:
    """One rank of the Pilot."""

    validated = Validated()
    """What validations have found so far."""

    def __init__(self, job: PilotJob, rank: int, world_size: int) -> None:
        self.made = time.monotonic()
        self.job, self.config, self.rank, self.world_size = job, job.config, rank, world_size
        torch.set_num_threads(self.config.resources.pilot_threads)
        self.checkpoints = self.config.run.path / "pilot" / "checkpoints"
        self.table = TrainTable(job.train_file)
        pilot = self.config.pilot
        self.order = self.table.order(self.config)
        self.validation: ValidationRows | None = None
        if pilot.validate_every is not None:
            self.validation = ValidationRows(
                job.train_file.with_name("validation.parquet"),
                most=pilot.validation_rows,
                batch_size=pilot.micro_batch_size,
                rank=rank,
                world_size=world_size,
            )
        self._wait_for("loading weights")
        self.model_path = on_this_node(job.model_path)
        self.engine = build_engine(self.config, self.model_path, job.rounds)
        self.device = self.engine.device
        self.recorder: Recorder | None = None
        self.postponed = False
        self.left_out = LeftOut(
            "the Pilot",
            "its weights are spoilt, or learning cannot go on with these settings: set a lower pilot.learning_rate or "
            "pilot.max_grad_norm, or pilot.dtype=fp32, in a new run.folder",
        )

    def run(self) -> None:
        """Train from the last checkpoint to the last round, or to the early end, then export the merged Pilot."""
        number = start = self._restore()
        self.job.tracker.process.remote(f"pilot-{self.rank}", os.getpid())
        if self.config.log.enabled:
            self.recorder = self._begin_attempt(start)
        self._wait_for("")
        if self.rank == 0:
            self.job.tracker.spent.remote({"pilot load": time.monotonic() - self.made})
        # what a round costs: on a device that is not the processor, the processor's time says nothing
        clock = time.monotonic if self.config.resources.pilot_gpus else time.process_time
        started, tokens, checkpoint_due = time.monotonic(), 0.0, False
        while number < self.job.rounds and not self.validated.ended(self.config.pilot):
            number += 1
            began, busy = time.monotonic(), clock()
            metrics = self._round(number)
            tokens += metrics["tokens"]
            seconds = time.monotonic() - began
            metrics |= {
                "compute_seconds": clock() - busy,
                "round_seconds": seconds,
                "tokens_per_second": metrics["tokens"] / seconds,
            }
            metrics["mean_tokens_per_second"] = tokens / (time.monotonic() - started)
            if self.rank == 0:
                self.job.tracker.pilot.remote(number, metrics)
                call_back(self.config.callbacks, "on_round", number, metrics, report=self._event)
            self._validate(number)
            if self.config.copilot.schedule == "lockstep" and self.recorder is not None:
                with timed(self.job.tracker, "pilot lockstep", enabled=self.rank == 0):
                    self._wait_for_copilot(number)
            last = number == self.job.rounds or self.validated.ended(self.config.pilot)
            needed = last or (self.config.pilot.final == "best" and self.validated.best == number)
            checkpoint_due |= needed or number % self.config.pilot.checkpoint_every_rounds == 0
            if checkpoint_due:
                with timed(self.job.tracker, "pilot checkpoints", enabled=self.rank == 0):
                    checkpoint_due = not self._checkpoint(number, wait=needed)
                self.job.tracker.memory.remote(peak_memory(f"pilot-{self.rank}"))
        with timed(self.job.tracker, "pilot export", enabled=self.rank == 0):
            self._export(number)
        self.job.tracker.memory.remote(peak_memory(f"pilot-{self.rank}"))
        if self.recorder is not None:
            self.recorder.writer.close()
            if self.rank == 0:
                self._committed("finish_pilot", number)

    def _validate(self, number: int) -> None:
        """Where one is due: measure, report, and note what it means; the same on every rank."""
        pilot = self.config.pilot
        if self.validation is None or (number % (pilot.validate_every or 1) and number != self.job.rounds):
            return
        with timed(self.job.tracker, "pilot validation", enabled=self.rank == 0):
            self.validated = found = self.validated.then(number, self.validation.nll(self.engine))
        if self.rank == 0:
            self.job.tracker.validation.remote(number, found.metrics(pilot))
        if found.ended(pilot) and number < self.job.rounds:
            lowest = (
                "none was finite" if found.lowest is None else f"the lowest is {found.lowest:.4f} of round {found.best}"
            )
            self._event(
                "early end",
                f"round {number} is the Pilot's last: {found.waited} validations in a row found no lower NLL ({lowest})",
            )

    def _export(self, last: int) -> None:
        """Publish `pilot/final`: of the last round, or of the best one, whose checkpoint is then loaded."""
        kept = last
        if self.config.pilot.final == "best" and self.validated.best not in (0, last):
            kept = self.validated.best
            wanted = folder_of(self.checkpoints, kept)
            found = next((one for one in find_checkpoints(self.checkpoints)[0] if one.round == kept), None)
            if found is None:
                raise ValueError(
                    f"{wanted}: the checkpoint of the round with the lowest NLL is absent or damaged: restore it. Without "
                    "it this run cannot end; train anew in another run.folder"
                )
            self._load(found)
        final = self.checkpoints.with_name("final")
        probe = [self.table.batch(np.array([row])) for row in range(min(PROBE_ROWS, len(self.table)))]
        save_merged(self.engine, self.config, self.model_path, final, probe=probe, rank=self.rank, round_number=kept)

    def _restore(self) -> int:
        """Load the newest whole checkpoint; returns its round, 0 without one."""
        found, damaged = find_checkpoints(self.checkpoints)
        checkpoint = found[-1] if found else None
        if damaged:
            resumes = f"resumes after round {checkpoint.round}" if checkpoint else "starts anew: no checkpoint is whole"
            self._event("checkpoint", f"{'; '.join(damaged)}. The Pilot {resumes}")
        if checkpoint is None:
            return 0
        self._load(checkpoint)
        self.validated = checkpoint.validated
        return checkpoint.round

    def _load(self, checkpoint: PilotCheckpoint) -> None:
        stage = self.config.pilot.zero_stage
        if load_checkpoint(self.engine, checkpoint, world_size=self.world_size, zero_stage=stage):
            made = f"{checkpoint.world_size} worker(s) at ZeRO stage {checkpoint.zero_stage}"
            self._event("resume", f"{checkpoint.folder.name} of {made} is divided anew: {self.world_size} at {stage}")
        self._check_weights(f"{checkpoint.folder}: the checkpoint", "remove the folder to resume from the one before")

    def _begin_attempt(self, watermark: int) -> Recorder:
        """Rank 0 fences the log past the watermark and shares the attempt's number; then every rank writes."""
        begun = self._committed("begin_attempt", watermark, self.world_size) if self.rank == 0 else 0
        attempt, log = int(self._largest(begun)), self.config.log
        if attempt > 1:
            self._event("resume", f"Pilot attempt {attempt} resumes after round {watermark}")
        if self.config.copilot.schedule == "lockstep":  # the Copilot waits for the file of every round
            log = log.model_copy(update={"flush_rounds": 1})
        writer = RecordWriter(
            Location(self.config.log_location, log.storage_options),
            submit_to(self.job.ledger),
            log,
            run=self.config.run.name,
            rank=self.rank,
            attempt=attempt,
            start_round=watermark,
        )
        return Recorder(writer, log, seed=self.config.run.seed, device=self.device)

    def _round(self, number: int) -> dict[str, float]:
        """One optimizer step, left out on every rank if that of one is not finite. Returns metrics; the writer's are this rank's."""
        rate = float(self.engine.get_lr()[0])  # before the step, which sets that of the next round
        rows = self.order.sample_rows(number)
        seed = np.random.SeedSequence([self.config.run.seed, number, self.rank])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        loss_sum = self._forward_backward(number, rows)
        skipped = 0 if self.recorder is None else self.recorder.skipped
        totals = torch.stack([loss_sum.double(), torch.tensor(float(skipped), device=self.device).double()])
        if self.world_size > 1:
            dist.all_reduce(totals)
        loss, all_skipped = totals.tolist()
        loss /= self.config.accumulation_steps * self.world_size
        taken = take_step(self.engine, math.isfinite(loss))
        if self.left_out.add(taken, loss):
            text = f"round {number}: loss or gradient is not finite (loss {loss}); its update is left out"
            self._event("not finite", text)
        metrics = {
            "loss": loss,
            "tokens": float(self.table.tokens(rows)),
            "learning_rate": rate,
            "left_out_rounds": float(self.left_out.count),
        }
        if self.recorder is not None:
            self.recorder.end_round(number, left_out=not taken)
            metrics |= {f"log_{name}": value for name, value in self.recorder.metrics().items()}
            metrics["log_skipped_records"] = all_skipped
        return metrics

    def _forward_backward(self, number: int, rows: np.ndarray) -> torch.Tensor:
        """Gradients and records of this rank's micro-batches; returns the sum of their losses, each scaled for DeepSpeed."""
        steps = self.config.accumulation_steps
        # DeepSpeed divides by accumulation steps and by ranks; a token of the round must count once in the mean
        scale = self.world_size * steps / self.table.target_tokens(rows)
        seen = self.order.seen(number)
        loss_sum = torch.zeros((), device=self.device)
        for step, places in enumerate(micro_batches(len(rows), self.rank, self.world_size, steps), 1):
            # collectives need every rank in every pass: one without rows left repeats a row, which counts nothing
            part = slice(places.start, places.stop) if places else slice(places.start - 1, places.start)
            batch = self.table.batch(rows[part])
            inputs = step_inputs(batch, self.device, row_tokens=self.config.row_tokens)
            loss, record = self.engine(loss_scale=scale if places else 0.0, **inputs)
            if self.recorder is not None and record is not None and places:
                # before the backward pass, so that a copy from a device runs beside it
                self.recorder.record(record, batch, seen[part], number)
            del record
            self.engine.backward(loss)
            if step < steps:  # the last one takes the optimizer step, see `_round`
                self.engine.step()
            loss_sum += loss.detach()
        return loss_sum

    def _wait_for_copilot(self, number: int) -> None:
        while not self._log_is_complete(number):
            time.sleep(SPACE_POLL_SECONDS)
        self._barrier()
        while self._answer("copilot_round") < number:
            time.sleep(LOCKSTEP_POLL_SECONDS)

    def _checkpoint(self, number: int, *, wait: bool) -> bool:
        """Log first, then weights, then the marker: a marker promises both. wait: until the log can be written.

        Returns False on every rank if the log cannot be written on one of them; then nothing was done.
        """
        while not self._log_is_complete(number):
            self._report_postponed(f"the checkpoint of round {number} is postponed")
            if not wait:
                return False
            time.sleep(SPACE_POLL_SECONDS)
        self.postponed = False
        self._check_weights(
            f"the Pilot after round {number}", "no checkpoint was made of it; set a lower pilot.learning_rate"
        )
        folder = save_files(self.engine, self.checkpoints, number)
        self._barrier()
        if self.rank == 0:
            mark_complete(
                folder,
                round_number=number,
                world_size=self.world_size,
                zero_stage=self.config.pilot.zero_stage,
                keep=self.config.pilot.keep_checkpoints,
                inputs=self.job.inputs,
                validated=self.validated,
                keep_best=self.config.pilot.final == "best",
            )
            if self.recorder is not None:
                self.job.ledger.report_checkpoint.remote(number)
            call_back(self.config.callbacks, "on_checkpoint", number, folder, report=self._event)
        self._barrier()
        return True

    def _log_is_complete(self, number: int) -> bool:
        """Up to this round, on all ranks; all get the same answer."""
        if self.recorder is None:
            return True
        return not self._largest(float(not self.recorder.writer.flush(number)))

    def _check_weights(self, what: str, advice: str) -> None:
        """Raise NotFiniteError on every rank where a trained weight of one is not finite (collective)."""
        trained = ((n, _own_part(p)) for n, p in self.engine.module.named_parameters() if p.requires_grad)
        name = first_not_finite(trained)
        if self._largest(float(name is not None)):
            raise NotFiniteError(f"{what} holds weights that are not finite ({name or 'on another rank'}); {advice}")

    def _committed(self, method: str, *arguments: int) -> Any:
        """Answer of a Ledger call that writes to the log: without it the run cannot go on, so it waits for a full disk."""
        import ray

        while True:
            try:
                answer = self._answer(method, *arguments)
            except ray.exceptions.RayTaskError as error:
                if not may_pass(error.cause):
                    raise error.cause from error
                self._report_postponed(f"the Pilot waits with {method}")
                time.sleep(SPACE_POLL_SECONDS)
            else:
                self.postponed = False
                return answer

    def _answer(self, method: str, *arguments: int) -> Any:
        import ray

        return ray.get(getattr(self.job.ledger, method).remote(*arguments))

    def _report_postponed(self, what: str) -> None:
        if not self.postponed:
            self._event("postponed", f"{what}: the log at {self.config.log_location} cannot be written now")
        self.postponed = True

    def _event(self, kind: str, text: str) -> None:
        if self.rank == 0:
            self.job.tracker.event.remote(kind, text)

    def _wait_for(self, text: str) -> None:
        """What the status shows until the first round; an empty text: nothing is waited for."""
        if self.rank == 0:
            self.job.tracker.waiting.remote("pilot", text)

    def _largest(self, number: float) -> float:
        largest = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def _barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def _own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter: under ZeRO-3 its part without the padding, in which NaN may stand."""
    part: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter
    zero: Any = parameter
    left = zero.ds_numel - zero.ds_zero_partition_rank * part.numel()
    return part[: max(0, left)]
