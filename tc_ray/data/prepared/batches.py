"""Which rows each round trains on, and how rows become one padded batch; the training rows in memory.

Invariant: the rows of a round depend on (rows and their lengths, batch size, epochs, seed) and the round's number alone, so a
restart needs only that number. Every row is used once per epoch and never twice in one round. Used by the Pilot's loop; no torch, no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from tc_ray.config.schema import RunConfig
from tc_ray.data.encode.conversations import EARLIER
from tc_ray.data.source.records import DataError, read_prepared

GROUPED_ROUNDS = 50
"""Rounds whose rows are sorted together by `data.group_by_length`: more of them leave less padding and less chance."""


class RoundOrder:
    """Order of the training rows over all epochs, cut into rounds (1-based).

    Each epoch is a fresh seeded permutation. A round can span two epochs; only the rows after the last whole round are
    dropped. lengths: int [rows]; where given, rows of a round are of like length, but those of a round over two epochs.
    """

    def __init__(
        self, rows: int, batch_size: int, epochs: int, seed: int, *, lengths: NDArray[np.int64] | None = None
    ) -> None:
        if rows < batch_size:
            raise DataError(
                f"{rows} training rows cannot fill a round of pilot.batch_size {batch_size}; lower it or give more data"
            )
        self.rows = rows
        self.batch_size = batch_size
        self.rounds = epochs * rows // batch_size
        self._order = np.empty(epochs * rows, dtype=np.int64)
        for epoch in range(epochs):
            draw = np.random.default_rng([seed, epoch])
            order = draw.permutation(rows)
            begun = epoch * rows % batch_size  # rows of the last epoch in the round that this epoch completes
            missing = -begun % batch_size
            if begun:
                order = _keep_apart(order, self._order[epoch * rows - begun : epoch * rows], missing)
            if lengths is not None:
                whole = slice(missing, rows - (rows - missing) % batch_size)
                order[whole] = _grouped(order[whole], lengths, batch_size, draw)
            self._order[epoch * rows : (epoch + 1) * rows] = order

    def sample_rows(self, round: int) -> NDArray[np.int64]:
        """Row indices [batch_size] that round `round` (from 1 to `rounds`) trains on, all different."""
        return self._order[self._positions(round)]

    def seen(self, round: int) -> NDArray[np.int16]:
        """How often each row of the round was trained on before, [batch_size]: 0 in the first epoch."""
        return (np.arange(self._order.size)[self._positions(round)] // self.rows).astype(np.int16)

    def _positions(self, round: int) -> slice:
        if not 1 <= round <= self.rounds:
            raise IndexError(f"round {round} is outside 1 to {self.rounds}")
        return slice((round - 1) * self.batch_size, round * self.batch_size)


def _keep_apart(order: NDArray[np.int64], begun: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`order`, swapped so that none of its first `count` rows is in `begun`."""
    taken = set(begun.tolist())
    order = order.copy()
    spare = (place for place in range(count, order.size) if int(order[place]) not in taken)
    for place in range(count):
        if int(order[place]) in taken:
            other = next(spare)
            order[place], order[other] = order[other], order[place]
    return order


def _grouped(
    order: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int, draw: np.random.Generator
) -> NDArray[np.int64]:
    """The same rows, as whole rounds of like lengths: sorted within each GROUPED_ROUNDS rounds, the rounds then drawn anew."""
    group = np.arange(order.size) // (GROUPED_ROUNDS * batch_size)
    rounds = order[np.lexsort((lengths[order], group))].reshape(-1, batch_size)
    return draw.permutation(rounds).ravel()


def collate(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, NDArray[np.int64]]:
    """Pad rows (as in the prepared Parquet files) on the right into one batch of int64 arrays.

    input_ids [B, S] filled with `pad_id`, attention_mask [B, S] (1 where a token stands), lengths [B],
    target_start [B], sample_id [B]; S is the longest row. If a row has earlier targets: earlier_targets [B, K, 2], start and end of
    each, 0 and 0 where a row has fewer.
    """
    lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)
    input_ids = np.full((len(rows), int(lengths.max())), pad_id, dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : lengths[index]] = row["input_ids"]
    batch = {
        "input_ids": input_ids,
        "attention_mask": (np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int64),
        "lengths": lengths,
        "target_start": np.array([row["target_start"] for row in rows], dtype=np.int64),
        "sample_id": np.array([row["sample_id"] for row in rows], dtype=np.int64),
    }
    earlier = [np.asarray([] if (spans := row.get(EARLIER)) is None else spans, np.int64) for row in rows]
    if any(map(len, earlier)):
        batch[EARLIER] = np.zeros((len(rows), max(map(len, earlier)) // 2, 2), np.int64)
        for index, spans in enumerate(earlier):
            batch[EARLIER][index, : len(spans) // 2] = spans.reshape(-1, 2)
    return batch


class Targets(NamedTuple):
    """Targets of a batch in the order of its tokens, int64 [M] each: input_ids[row, start:end]; all before `start` is the prompt."""

    row: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    sample_id: NDArray[np.int64]


def targets_of(batch: Mapping[str, NDArray[Any]]) -> Targets:
    """The targets of a batch as of `collate`: one of each row, or several."""
    rows, start = np.arange(len(batch["lengths"])), batch["target_start"].astype(np.int64)
    end, sample_id = batch["lengths"].astype(np.int64), batch["sample_id"].astype(np.int64)
    if EARLIER not in batch:
        return Targets(rows, start, end, sample_id)
    spans = np.concatenate([batch[EARLIER], np.stack([start, end], 1)[:, None]], 1)
    row, place = np.nonzero(spans[:, :, 1] > 0)
    found = spans[row, place]
    number = np.arange(len(row)) - np.searchsorted(row, row)  # of the target in its row
    return Targets(row, found[:, 0], found[:, 1], sample_id[row] + number)


class TrainTable:
    """Rows of a prepared Parquet file as flat arrays (4 bytes per token).

    held_out: rows without a target may be among them, see `with_target`; else they raise DataError.
    """

    def __init__(self, file: Path, *, held_out: bool = False) -> None:
        table = read_prepared(file, ["sample_id", "input_ids", "target_start", EARLIER])
        ids = table["input_ids"].combine_chunks()
        self._ids = ids.values.to_numpy()
        self._offsets = ids.offsets.to_numpy().astype(np.int64)
        self._lengths = np.diff(self._offsets)
        self._target_start = table["target_start"].to_numpy().astype(np.int64)
        self._sample_id = table["sample_id"].to_numpy()
        earlier = table[EARLIER].combine_chunks()
        self._earlier = earlier.flatten().to_numpy()
        self._earlier_offsets = np.zeros(len(table) + 1, np.int64)
        np.cumsum(pc.fill_null(pc.list_value_length(earlier), 0).to_numpy(), out=self._earlier_offsets[1:])
        bare = int((self._target_start >= self._lengths).sum())
        if bare and not held_out:  # the loss of a round is divided by its target tokens
            raise DataError(f"{file}: {bare} rows have no target token; remove the folder, and it is prepared again")

    def __len__(self) -> int:
        return len(self._lengths)

    def with_target(self) -> NDArray[np.int64]:
        """Indices of the rows that have a target token."""
        return np.flatnonzero(self._target_start < self._lengths)

    def order(self, config: RunConfig) -> RoundOrder:
        """Which of these rows each round of a run trains on."""
        pilot, lengths = config.pilot, self._lengths if config.data.group_by_length else None
        return RoundOrder(len(self), pilot.batch_size, pilot.epochs, config.run.seed, lengths=lengths)

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of these rows, prompt and completion."""
        return self._lengths[rows]

    def tokens(self, rows: NDArray[np.int64]) -> int:
        """Tokens of these rows, prompt and completion."""
        return int(self._lengths[rows].sum())

    def target_tokens(self, rows: NDArray[np.int64]) -> int:
        """Completion tokens of these rows."""
        last = int((self._lengths[rows] - self._target_start[rows]).sum())
        if not len(self._earlier):
            return last
        return last + sum(int((spans[1::2] - spans[::2]).sum()) for spans in map(self._earlier_of, rows.tolist()))

    def target_ids(self) -> NDArray[np.int64]:
        """Sorted token ids that occur in completions."""
        starts = np.repeat(self._offsets[:-1] + self._target_start, self._lengths)
        targets = np.arange(len(self._ids)) >= starts
        for row in np.flatnonzero(np.diff(self._earlier_offsets)).tolist():
            for start, end in self._earlier_of(row).reshape(-1, 2) + self._offsets[row]:
                targets[start:end] = True
        return np.unique(self._ids[targets]).astype(np.int64)

    def _earlier_of(self, row: int) -> NDArray[np.int32]:
        found: NDArray[np.int32] = self._earlier[self._earlier_offsets[row] : self._earlier_offsets[row + 1]]
        return found

    def batch(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """These rows as one right-padded batch, see `collate`. Padding is token 0; nothing attends to it."""
        return collate(
            [
                {
                    "input_ids": self._ids[self._offsets[row] : self._offsets[row + 1]],
                    "target_start": self._target_start[row],
                    "sample_id": self._sample_id[row],
                    EARLIER: self._earlier_of(row),
                }
                for row in rows
            ],
            0,
        )
