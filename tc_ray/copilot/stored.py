"""Batches from a stored log: the trajectory replayed round by round, or epochs over all of it.

Invariant: the batch of a step follows from the log's version, the settings and the step's number, so a training that was
cut resumes exactly where it stopped. `Replay` draws what the live Copilot of a lock-step run draws. Memory: the rounds of the
buffer, or a shuffle block, and one data file. Used by `from_log`. Both sources have:

total_steps     steps of the training
left_out        records passed over so far because they hold a NaN or an infinity
batch(step)     records of a step, from 0; None: there is nothing to learn from. Steps are asked for in order
round(step)     round of the log that a step answers
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tc_ray.config.schema import RunConfig
from tc_ray.copilot.batch import pooled_records
from tc_ray.copilot.buffer import RoundBuffer, draw
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.finite import all_finite
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.store import StoredFile

SHUFFLE_BYTES = 512 * 2**20
"""Data files of this size together are shuffled row by row; the order of all files is drawn for each epoch."""
_EPOCH = 0xE0  # keeps the orders' seeds apart from other uses of run.seed


class Replay:
    """`copilot.steps_per_round` steps for each round, drawn from the newest `buffer_rounds` rounds up to it."""

    def __init__(self, mistakes: MistakeLog, config: RunConfig) -> None:
        self._config, self._per_round = config, config.copilot.steps_per_round
        self._rounds = _Rounds(mistakes)
        self._buffer = RoundBuffer.of(config)
        self._at: int | None = None
        """Last round in the buffer."""
        self.total_steps = max(file.round_max for file in mistakes.files) * self._per_round

    def batch(self, step: int) -> Records | None:
        wanted = self.round(step)
        if self._at is None:
            # with max_seen the window has no fixed start
            window = self._config.copilot.buffer_rounds if self._config.copilot.max_seen is None else wanted
            self._at = max(0, wanted - window)
        while self._at < wanted:
            self._at += 1
            records = self._rounds.take(self._at)
            if records is not None:
                self._buffer.add(f"round-{self._at}", records)
        return draw(self._buffer, self._config, step) if len(self._buffer) else None

    @property
    def left_out(self) -> int:
        return self._buffer.left_out

    def round(self, step: int) -> int:
        return step // self._per_round + 1


class Epochs:
    """Every record of the log once per epoch, in an order drawn for it; the last batch of an epoch may be smaller."""

    def __init__(self, mistakes: MistakeLog, config: RunConfig, epochs: int) -> None:
        self._mistakes, self._config = mistakes, config
        self._files = mistakes.files
        self._size = config.copilot.batch_size
        self._epoch_steps = math.ceil(sum(file.rows for file in self._files) / self._size)
        self.total_steps = epochs * self._epoch_steps
        self._order: np.ndarray = np.zeros((0, 3), np.int64)
        self._epoch = -1
        self._open: dict[int, Records | None] = {}
        """Records of the block's files that were read, by file."""
        self.left_out = 0

    def batch(self, step: int) -> Records | None:
        epoch, at = divmod(step, self._epoch_steps)
        if epoch != self._epoch:
            self._order, self._epoch = self._draw_order(epoch), epoch
        rows = self._order[at * self._size : (at + 1) * self._size]
        of_block = self._order[np.isin(self._order[:, 0], rows[:, 0]), 1]
        self._open = {file: records for file, records in self._open.items() if file in of_block}
        parts = [part for file, row in rows[:, 1:].tolist() if (part := self._row(file, row)) is not None]
        return Records.concat(parts) if parts else None

    def round(self, step: int) -> int:
        """See the module: the last round of the log, because the newest of a batch is not known before it is read."""
        return max(file.round_max for file in self._files)

    def _draw_order(self, epoch: int) -> np.ndarray:
        """[N, 3] (block, file, row)."""
        dice = np.random.default_rng((self._config.run.seed, _EPOCH, epoch))
        block, filled = 0, 0
        parts: list[np.ndarray] = []
        order: list[np.ndarray] = []
        for file in dice.permutation(len(self._files)):
            rows = self._files[file].rows
            if parts and filled + self._files[file].bytes > SHUFFLE_BYTES:
                order.append(dice.permutation(np.concatenate(parts)))
                block, filled, parts = block + 1, 0, []
            parts.append(np.stack([np.full(rows, block), np.full(rows, file), np.arange(rows)], axis=1))
            filled += self._files[file].bytes
        return np.concatenate([*order, dice.permutation(np.concatenate(parts))])

    def _row(self, file: int, row: int) -> Records | None:
        if file not in self._open:
            self._open[file] = self._mistakes.file_records(self._files[file])
        records, most = self._open[file], self._config.copilot.max_seen
        if records is None or (most is not None and records.seen[row] > most):
            return None
        record = pooled_records(records.select([row]), self._config.log.pooling)
        if all_finite(record):
            return record
        self.left_out += 1
        return None


class _Rounds:
    """Records by round; each data file is read once, ahead of the rounds that are asked for."""

    def __init__(self, mistakes: MistakeLog) -> None:
        self._mistakes = mistakes
        self._last = max(file.round_max for file in mistakes.files)
        self._pieces: Iterator[tuple[StoredFile, Records]] | None = None
        self._next: tuple[StoredFile, Records] | None = None
        self._ahead: dict[int, list[Records]] = {}

    def take(self, number: int) -> Records | None:
        """Records of a round, once. Rounds are asked for in order; those of earlier ones are dropped."""
        if self._pieces is None:
            self._pieces = self._mistakes.pieces((number, self._last))
            self._next = next(self._pieces, None)
        while self._next is not None and self._next[0].round_min <= number:
            records = self._next[1]
            for found in np.unique(records.round[records.round >= number]).tolist():
                self._ahead.setdefault(found, []).append(records.select(np.flatnonzero(records.round == found)))
            self._next = next(self._pieces, None)
        self._ahead = {found: parts for found, parts in self._ahead.items() if found >= number}
        parts = self._ahead.pop(number, [])
        return Records.concat(parts) if parts else None
