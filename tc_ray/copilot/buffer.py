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
        """[N, 4]: file, row, round and seen of every record of the newest rounds, in (round, rank, sample) order."""
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
        return self._records(rows[np.random.default_rng(seed).integers(len(rows), size=count)])

    def sample(
        self, most: int, seed: tuple[int, ...], *, after: int = 0, up_to: int | None = None, unseen: bool = False
    ) -> Records | None:
        """Up to `most` different records, uniform; None if there is none.

        after, up_to: rounds above the one and not above the other. unseen: of samples that the Pilot had not trained on before.
        """
        rows = self._rows()
        rows = rows[(rows[:, 2] > after) & ((rows[:, 3] == 0) | (not unseen))]
        rows = rows if up_to is None else rows[rows[:, 2] <= up_to]
        if not len(rows):
            return None
        dice = np.random.default_rng(seed)
        return self._records(rows[dice.choice(len(rows), size=min(most, len(rows)), replace=False)])

    @property
    def newest(self) -> int:
        """The newest round held; 0 without one."""
        rows = self._rows()
        return int(rows[-1, 2]) if len(rows) else 0

    def _records(self, rows: np.ndarray) -> Records:
        # in the order drawn, so that a worker's slice of the draw is well defined
        return Records.concat([self._files[self._names[file]].select(np.array([row])) for file, row in rows[:, :2]])

    def _rows(self) -> np.ndarray:
        if self._index is None:
            self._drop_old_files()
            self._names = sorted(self._files)
            keys = [
                np.stack(
                    [r.round, r.rank, r.sample_id, np.full(len(r), file), np.arange(len(r)), r.round, r.seen], axis=1
                )
                for file, r in enumerate(self._files[name] for name in self._names)
            ]
            table = np.concatenate(keys) if keys else np.zeros((0, 7), np.int64)
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
