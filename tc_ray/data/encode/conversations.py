"""Rows of one conversation: which belong together, and those that share their tokens joined to one training row.

`encode` makes one row for each answer to learn, with all messages before it as its prompt. Where a row's tokens are the beginning
of the next one's prompt, one forward pass has both: the joined row holds the last one's tokens, and where the earlier targets
stand. Invariant: a joined row has the targets, and before each of them the tokens, that its rows had. Called by `prepare` and by
plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

EARLIER = "earlier_targets"
"""Column of a joined row: start and end of each earlier target in input_ids, one after the other; null in other rows."""


def first_rows(table: pa.Table) -> NDArray[np.bool_]:
    """Of rows of `encode_files`, whether each is the first one of its record, [N]."""
    turns = table["turn"].to_numpy()
    first = np.ones(len(turns), np.bool_)
    if turns.any():
        places = np.stack([table[name].to_numpy() for name in ("file", "place")])
        first[1:] = (places[:, 1:] != places[:, :-1]).any(0) | (turns[1:] == 0)
    return first


def last_rows(table: pa.Table) -> NDArray[np.bool_]:
    """Whether each row is the last one of its record, [N]."""
    return np.append(first_rows(table)[1:], True)[: table.num_rows]


def joined_turns(table: pa.Table, *, share: bool = True) -> pa.Table:
    """The rows with the column EARLIER; rows of a conversation are joined where they share their tokens.

    share: False for an encoder-decoder, whose source is another one for each answer.
    """
    first = first_rows(table)
    if not share or first.all():
        return table.append_column(EARLIER, pa.nulls(table.num_rows, pa.list_(pa.int32())))
    ids = table["input_ids"].combine_chunks()
    values, offsets = ids.values.to_numpy(), ids.offsets.to_numpy()
    starts = table["target_start"].to_numpy()
    kept: list[int] = []
    earlier: list[list[int] | None] = []
    for begin, end in _ranges(first):
        rows = [(values[offsets[row] : offsets[row + 1]], int(starts[row])) for row in range(begin, end)]
        for last, spans in chains(rows):
            kept.append(begin + last)
            earlier.append(spans or None)
    return table.take(pa.array(kept, pa.int64())).append_column(EARLIER, pa.array(earlier, pa.list_(pa.int32())))


def chains(rows: Sequence[tuple[Any, int]]) -> Iterator[tuple[int, list[int]]]:
    """Rows (token ids, target_start) of one conversation in order -> for each joined row its last row's place and EARLIER."""
    spans: list[int] = []
    for place, (ids, start) in enumerate(rows):
        if place + 1 < len(rows):
            following, next_start = rows[place + 1]
            if len(ids) <= next_start and np.array_equal(ids, following[: len(ids)]):
                spans += [start, len(ids)]
                continue
        yield place, spans
        spans = []


def _ranges(first: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    begins = np.flatnonzero(first).tolist()
    yield from zip(begins, [*begins[1:], len(first)], strict=True)
