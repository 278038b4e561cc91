"""Batches from a stored log: the trajectory of its run replayed round by round.

Invariant: the batch of a step follows from the log's version, the settings and the step's number, so a training that was
cut resumes exactly where it stopped, and draws what the live Copilot of a lock-step run draws. Memory: the rounds of the
buffer and one data file. Used by `from_log`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tc_ray.config.schema import RunConfig
from tc_ray.copilot.buffer import RoundBuffer, draw
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.store import StoredFile


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
            self._at = max(0, wanted - self._config.copilot.buffer_rounds)
        while self._at < wanted:
            self._at += 1
            records = self._rounds.take(self._at)
            if records is not None:
                self._buffer.add(f"round-{self._at}", records)
        return draw(self._buffer, self._config, step) if len(self._buffer) else None

    def round(self, step: int) -> int:
        return step // self._per_round + 1


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
