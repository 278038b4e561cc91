"""The Copilot's training buffer: records of the most recent rounds (paper A.3: 128), drawn uniformly.

Invariant: records have one state per position. A draw depends only on the rows held and the seed, not on the order of reading nor
on how the rounds were cut into files. Filled by `worker` from the growing log, by `from_log.Replay` from a stored one.
"""

from __future__ import annotations

import numpy as np

from tc_ray.copilot.batch import pooled_records
from tc_ray.mistakelog.rows.records import Records


class RoundBuffer:
    """Records by data file, of the newest `rounds` rounds. pooling: `log.pooling`, for a log that keeps layers."""

    def __init__(self, rounds: int, pooling: str = "mean") -> None:
        self._rounds, self._pooling = rounds, pooling
        self._files: dict[str, Records] = {}
        self._index: np.ndarray | None = None
        self._names: list[str] = []

    def add(self, name: str, records: Records) -> None:
        """Take the records of a data file."""
        records = pooled_records(records, self._pooling)
        if len(records):
            self._files[name] = records
            self._index = None

    def remove(self, name: str) -> None:
        """Forget a file that the log no longer holds (fenced or compacted)."""
        if self._files.pop(name, None) is not None:
            self._index = None

    def __len__(self) -> int:
        """Records that can be drawn."""
        return len(self._rows())

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(records.nbytes for records in self._files.values())

    def draw(self, count: int, seed: tuple[int, ...]) -> Records:
        """`count` records, uniform with replacement."""
        rows = self._rows()
        if not len(rows):
            raise ValueError("the buffer is empty")
        chosen = rows[np.random.default_rng(seed).integers(len(rows), size=count)]
        # records are kept in the order drawn, so that a worker's slice of the draw is well defined
        return Records.concat([self._files[self._names[file]].select(np.array([row])) for file, row in chosen])

    def _rows(self) -> np.ndarray:
        """[N, 2] (file, row) of every record of the newest rounds, in (round, rank, sample) order."""
        if self._index is None:
            self._drop_old_files()
            self._names = sorted(self._files)
            keys = [
                np.stack([r.round, r.rank, r.sample_id, np.full(len(r), file), np.arange(len(r))], axis=1)
                for file, r in enumerate(self._files[name] for name in self._names)
            ]
            table = np.concatenate(keys) if keys else np.zeros((0, 5), np.int64)
            newest = np.unique(table[:, 0])[-self._rounds :]
            table = table[np.isin(table[:, 0], newest)]
            order = np.lexsort((table[:, 2], table[:, 1], table[:, 0]))
            self._index = table[order][:, 3:]
        return self._index

    def _drop_old_files(self) -> None:
        rounds = np.unique(np.concatenate([r.round for r in self._files.values()])) if self._files else np.zeros(0)
        if len(rounds) > self._rounds:
            oldest = rounds[-self._rounds]
            self._files = {name: r for name, r in self._files.items() if r.round.max() >= oldest}
