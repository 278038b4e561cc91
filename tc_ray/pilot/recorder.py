"""The Pilot loop's side of the log: what of each forward pass becomes a record, and when the writer gets it.

Invariant: what is recorded of a round is a pure function of the round, so a replayed round leaves the same records. Where
`log.top_k` is auto, the records of the first rounds wait here until k is chosen over all ranks: in memory are at most
`measured_rounds` rounds of this rank's records with `log.top_k_limit` errors of 8 bytes a target token, beside its hidden states,
and there are never more rounds of them than the writer's queue may hold micro-batches. Called by `loop`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.write.writer import RecordWriter
from tc_ray.models.pilot.step import PilotStep, StepRecord
from tc_ray.pilot.error_width import ErrorCurve, measured_rounds, told
from tc_ray.pilot.host_copy import HostCopy, PendingRecords
from tc_ray.pilot.recording import chosen_rows, to_records


class Recorder:
    """Records of one rank in one attempt.

    Args:
        writer: of this rank and attempt. step: the Pilot's forward, whose top_k is set here.
        rounds: of the whole run. start_round: the last one before this attempt's first.
        stored_top_k: errors a token of the rows that the log holds; 0: not chosen yet.
        choose: makes k the log's for good and returns what stands (the first choice wins); called on rank 0 only.
        tell: (kind, text) of an event; called on rank 0 only.

    Raises:
        ValueError: the log holds rounds, but not how many errors a token they have.
    """

    def __init__(
        self,
        config: RunConfig,
        writer: RecordWriter,
        step: PilotStep,
        device: torch.device,
        *,
        rank: int,
        world_size: int,
        attempt: int,
        rounds: int,
        start_round: int,
        stored_top_k: int,
        choose: Callable[[int], int],
        tell: Callable[[str, str], object],
    ) -> None:
        self._config, self._log, self._writer, self._step = config, config.log, writer, step
        self._rank, self._world_size, self._attempt = rank, world_size, attempt
        self._choose, self._tell = choose, tell
        self._copy = HostCopy(device)
        self._measured = measured_rounds(config, rounds)
        self._held: dict[int, list[Records | PendingRecords]] = {}
        self._spoilt: set[int] = set()
        self._curve: ErrorCurve | None = None
        self._captured: float | None = None
        self._top_k = stored_top_k if start_round >= self._measured else 0
        self.skipped = 0
        """Records of this rank that `log.sampling` left out in this attempt."""
        self._round_tokens = 0
        self._waiting: deque[tuple[int, int]] = deque()
        self._acknowledged_tokens = 0
        if start_round < self._measured:
            step.top_k = config.log.top_k_limit
        elif self._measured:
            if not stored_top_k:
                raise ValueError(
                    f"the log at {config.log_location} does not say how many errors a token it keeps (top_k 0), but the "
                    f"Pilot's checkpoint is at round {start_round}: the log is not the one of this run.folder"
                )
            step.top_k = stored_top_k

    def record(self, step: StepRecord, batch: Mapping[str, np.ndarray], seen: np.ndarray, number: int) -> None:
        """Take what one forward pass of round `number` left; batch as of `TrainTable.batch`, seen: int16 [B]."""
        self._round_tokens += int(batch["lengths"].sum())
        if number <= self._measured:
            if self._curve is None:
                self._curve = ErrorCurve(step.errors.values.shape[1] - 1, step.errors.values.device)
            self._curve.add(step.errors)
        rows = chosen_rows(step, batch, self._log, seed=self._config.run.seed, round_number=number)
        if rows is not None:
            self.skipped += len(seen) - len(rows)
            if not len(rows):
                return
        records = to_records(
            step,
            **{name: batch[name] for name in ("input_ids", "lengths", "target_start", "sample_id")},
            seen=seen,
            round_number=number,
            rank=self._rank,
            attempt=self._attempt,
            positions=self._log.positions,
            rows=rows,
            dense=self._step.dense,
            copy=self._copy,
        )
        if number <= self._measured:
            self._held.setdefault(number, []).append(records)
        else:
            self._writer.put(records, number)

    def end_round(self, number: int, *, spoilt: bool = False) -> None:
        """All forward passes of the round were recorded (collective in the round that k is chosen in).

        Args:
            spoilt: the round took no step, as its loss or gradient was not finite: its records do not enter the log.
        """
        if spoilt:
            self._spoilt.add(number)
        self._waiting.append((number, self._round_tokens))
        self._round_tokens = 0
        if number < self._measured:
            self._held.setdefault(number, [])
        elif number == self._measured:
            self._held.setdefault(number, [])
            self._release(self._chosen())
        else:
            self._writer.end_round(number, spoilt=spoilt)

    def _chosen(self) -> int:
        """k over all ranks, as it stands in the log."""
        assert self._curve is not None
        if self._world_size > 1:
            self._curve.add_over_ranks()
        standing = torch.zeros(1, dtype=torch.int64, device=self._curve.sums.device)
        if self._rank == 0:
            standing[0] = self._choose(self._curve.smallest(self._log.top_k_captured, self._log.top_k_norm))
        if self._world_size > 1:
            torch.distributed.broadcast(standing, 0)
        top_k = self._top_k = self._step.top_k = int(standing)
        self._captured = self._curve.captured(top_k, self._log.top_k_norm)
        if self._rank == 0:
            self._tell("log", told(top_k, self._curve, self._log, self._measured))
        return top_k

    def _release(self, top_k: int) -> None:
        """Hand the rounds held back to the writer, each as one micro-batch: together they fit into its queue."""
        for number in sorted(self._held):
            parts = [part.resolve() if isinstance(part, PendingRecords) else part for part in self._held.pop(number)]
            if parts:
                self._writer.put(Records.concat([part.truncated(top_k) for part in parts]), number)
            self._writer.end_round(number, spoilt=number in self._spoilt)

    def flush(self, number: int) -> bool:
        """Wait until the log holds everything up to round `number`; False: it cannot be written now (see the writer)."""
        return self._writer.flush(number)

    def close(self) -> None:
        """Commit all rounds that have ended and stop the writer."""
        self._writer.close()

    def metrics(self) -> dict[str, float]:
        """The writer's counts, top_k once it is known, and what the log costs: `bytes_per_token` of prompt and completion, in
        this rank's files."""
        stats = {name: float(value) for name, value in self._writer.stats().items()}
        while self._waiting and self._waiting[0][0] <= stats["acknowledged_round"]:
            self._acknowledged_tokens += self._waiting.popleft()[1]
        if self._acknowledged_tokens:
            stats["bytes_per_token"] = stats["bytes"] / self._acknowledged_tokens
        if self._top_k:
            stats["top_k"] = float(self._top_k)
        if self._captured is not None:
            stats["captured_share"] = self._captured
        return stats
