"""The training loop of a Copilot: of each learner worker of a run, and of the one learner that reads a stored log.

Invariant: the batch of a step follows from the seed, the step's number and the rows held, so every rank draws the same batch and
takes its own part, and a learner that starts again draws what the one before would have. New records are measured before a batch
is drawn from them (`held_out`). Called by `worker` and `from_log`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from tc_ray.config.schema import RunConfig
from tc_ray.copilot import checkpoint
from tc_ray.copilot.batch import batch_from_records
from tc_ray.copilot.buffer import RoundBuffer
from tc_ray.copilot.checkpoint import Position
from tc_ray.copilot.held_out import ErrorRatio, HeldOut
from tc_ray.copilot.learner import Learner, StepResult
from tc_ray.data.prepared.split import part_of

IDLE_SECONDS = 0.1
_DRAW = 0xC0  # keeps the draws' seeds apart from other uses of run.seed


class Feed(Protocol):
    """Where records come from: a growing log (`worker`) or a stored one (`from_log`)."""

    buffer: RoundBuffer
    version: int
    """Of the table, as the buffer holds it."""
    rounds: int
    """Of the run: those planned, or fewer once the Pilot is known to have ended early."""

    def rounds_for(self, step: int) -> int:
        """Bring the buffer up to date for this step; the newest round whose steps are due, the same on every rank."""
        ...


def train(
    learner: Learner,
    feed: Feed,
    config: RunConfig,
    folder: Path,
    *,
    report: Callable[[Position, StepResult | None], None],
    restored: Callable[[Position, list[str]], None] = lambda at, damaged: None,
    measured: Callable[[ErrorRatio], None] = lambda found: None,
    inputs: Mapping[str, str] | None = None,
    rank: int = 0,
) -> Position:
    """Train from the newest whole checkpoint in `folder` to the last step, then export to `folder/final` (rank 0).

    A round of the feed has `copilot.steps_per_round` steps. inputs: kept in every checkpoint.
    report: called on every rank after each step, and with None while there is nothing to do.
    restored: called once, before the first step, with the faults of damaged checkpoints that were passed over.
    measured: called on every rank with each new error ratio, before the step that first draws from its records.
    """
    per_round, size = config.copilot.steps_per_round, config.copilot.batch_size
    own = part_of(size, rank, learner.world_size)
    held_out = HeldOut(config, rank)

    clock = time.monotonic if config.resources.copilot_gpus else time.process_time

    def position(step: int) -> Position:
        return Position(step, step // per_round, feed.version, dict(inputs or {}), held_out.state())

    def save(at: Position) -> None:
        if rank == 0:
            checkpoint.save(learner, folder / "checkpoints", at)
        if learner.world_size > 1:
            dist.barrier()

    found, damaged = checkpoint.restore(learner, folder / "checkpoints")
    if found is not None:
        held_out.restore(found.held_out)
    at = found or position(0)
    saved = at.step
    restored(at, damaged)
    while at.step < feed.rounds * per_round:
        turn = time.monotonic()
        due = feed.rounds_for(at.step) * per_round
        due = min(due, feed.rounds * per_round)  # the feed knows only now whether the Pilot has ended
        if at.step < due and len(feed.buffer):
            began = clock()
            ratio = held_out.measure(learner, feed.buffer, at.step)
            if ratio is not None:
                measured(ratio)
            records = feed.buffer.draw(size, (config.run.seed, _DRAW, at.step))
            result = learner.step(batch_from_records(records, own))
            result = replace(result, seconds=clock() - began, wall_seconds=time.monotonic() - turn)
            held_out.trained_on(feed.buffer)
            at = position(at.step + 1)
            report(at, result)
            if at.step % config.copilot.checkpoint_every_steps == 0 or at.step == feed.rounds * per_round:
                save(at)
                saved = at.step
            continue
        if at.step < due:
            at = position(due)  # every record so far was left out by log.sampling: there is nothing to learn from
        else:
            time.sleep(IDLE_SECONDS)
        report(at, None)  # again and again: a restarted Ledger has forgotten it
    if at.step != saved:  # the Pilot ended early, after its last step
        save(at)
    if rank == 0:
        learner.export(folder / "final")
    return at
