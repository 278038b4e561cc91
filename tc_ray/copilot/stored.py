"""A stored log, round by round as its run wrote it.

Invariant: what a step draws from follows from the log's version, the settings and the step's number, so a training that was cut
goes on exactly where it stopped, and draws what the live Copilot of a lock-step run draws. Memory: the rounds of the buffer and
one data file. Used by `from_log`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tc_ray.config.schema import RunConfig
from tc_ray.copilot.buffer import RoundBuffer
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.store import StoredFile


class Replay:
    """The feed (`training.Feed`) of a stored log: at each step the newest `buffer_rounds` rounds up to that of the step."""

    def __init__(self, mistakes: MistakeLog, config: RunConfig) -> None:
        self._mistakes, self._settings = mistakes, config.copilot
        self.buffer = RoundBuffer(config.copilot.buffer_rounds, config.log.pooling)
        self.version = mistakes.version
        self.rounds = max(file.round_max for file in mistakes.files)
        self._pieces: Iterator[tuple[StoredFile, Records]] | None = None
        self._next: tuple[StoredFile, Records] | None = None
        self._ahead: dict[int, list[Records]] = {}
        """Records that were read before their round came, by round: each data file is read once."""
        self._at = 0
        """Last round in the buffer."""

    def rounds_for(self, step: int) -> int:
        """Fill the buffer up to the round of a step, and return it. Steps are asked for in order."""
        wanted = step // self._settings.steps_per_round + 1
        if self._pieces is None:
            self._at = max(0, wanted - self._settings.buffer_rounds)
            self._pieces = self._mistakes.pieces((self._at + 1, self.rounds))
            self._next = next(self._pieces, None)
        while self._at < wanted:
            self._at += 1
            while self._next is not None and self._next[0].round_min <= self._at:
                self._sort_in(self._next[1])
                self._next = next(self._pieces, None)
            for number, records in enumerate(self._ahead.pop(self._at, [])):
                self.buffer.add(f"{self._at}-{number}", records)
        return wanted

    def _sort_in(self, records: Records) -> None:
        for found in np.unique(records.round[records.round >= self._at]).tolist():
            self._ahead.setdefault(found, []).append(records.select(np.flatnonzero(records.round == found)))
