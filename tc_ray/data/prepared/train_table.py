"""The prepared training rows in memory, addressed by row. Used by the Pilot's loop, its export and the Copilot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tc_ray.data.prepared.batches import collate
from tc_ray.data.source.records import DataError, read_prepared


class TrainTable:
    """Rows of a prepared train.parquet as flat arrays (4 bytes per token). Raises DataError for rows without a target."""

    def __init__(self, file: Path) -> None:
        table = read_prepared(file, ["sample_id", "input_ids", "target_start"])
        ids = table["input_ids"].combine_chunks()
        self._ids = ids.values.to_numpy()
        self._offsets = ids.offsets.to_numpy().astype(np.int64)
        self._lengths = np.diff(self._offsets)
        self._target_start = table["target_start"].to_numpy().astype(np.int64)
        self._sample_id = table["sample_id"].to_numpy()
        bare = int((self._target_start >= self._lengths).sum())
        if bare:  # the loss of a round is divided by its target tokens
            raise DataError(f"{file}: {bare} rows have no target token; remove the folder, and it is prepared again")

    def __len__(self) -> int:
        return len(self._lengths)

    def tokens(self, rows: NDArray[np.int64]) -> int:
        """Tokens of these rows, prompt and completion."""
        return int(self._lengths[rows].sum())

    def target_tokens(self, rows: NDArray[np.int64]) -> int:
        """Completion tokens of these rows."""
        return int((self._lengths[rows] - self._target_start[rows]).sum())

    def target_ids(self) -> NDArray[np.int64]:
        """Sorted token ids that occur in completions."""
        starts = np.repeat(self._offsets[:-1] + self._target_start, self._lengths)
        return np.unique(self._ids[np.arange(len(self._ids)) >= starts]).astype(np.int64)

    def batch(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """These rows as one right-padded batch, see `collate`. Padding is token 0; nothing attends to it."""
        return collate(
            [
                {
                    "input_ids": self._ids[self._offsets[row] : self._offsets[row + 1]],
                    "target_start": self._target_start[row],
                    "sample_id": self._sample_id[row],
                }
                for row in rows
            ],
            0,
        )
