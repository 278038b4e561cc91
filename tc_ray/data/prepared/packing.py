"""Several short sequences of a micro-batch in one row: which share a row, and where each token stands. No torch, no Ray.

Invariant: a pure function of the batch, so that a replayed round is computed in the same rows. Called by `pilot.engine`; the
step that computes the rows undoes it, so that the log has a record for each sequence as without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heapreplace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class PackedRows(NamedTuple):
    """A batch [B, S] in R common rows of W tokens, int64.

    ids, positions: [R, W]; positions begin at 0 with each sequence, and are 0 in padding. places: [B, S], index into the R * W
    tokens of each token of the batch; 0 in padding.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    places: NDArray[np.int64]


def packed(batch: Mapping[str, NDArray[Any]], most: int) -> PackedRows:
    """A batch as of `collate` in as few tokens as its sequences allow; a row has `most` tokens, or those of the longest."""
    lengths, ids = batch["lengths"], batch["input_ids"]
    row, width = shared_rows(lengths.tolist(), most)
    order = np.argsort(row, kind="stable")
    ends = np.cumsum(lengths[order])
    first = np.empty_like(lengths)
    first[order] = ends - lengths[order]  # of each sequence, as if all rows were one
    begins = np.searchsorted(row[order], row)  # its row's first sequence, in `order`
    start = row * width + first - first[order][begins]
    inside = np.arange(ids.shape[1])
    real = inside < lengths[:, None]
    places = np.where(real, start[:, None] + inside, 0)
    made, positions = (np.zeros((int(row.max()) + 1) * width, np.int64) for _ in range(2))
    made[places[real]] = ids[real]
    positions[places[real]] = np.broadcast_to(inside, ids.shape)[real]
    return PackedRows(made.reshape(-1, width), positions.reshape(-1, width), places)


def shared_rows(lengths: Sequence[int], most: int) -> tuple[NDArray[np.int64], int]:
    """The row of each sequence, and the rows' width: at most `most`, or the longest sequence.

    For each number of rows the longest sequence that is left goes into the emptiest row; the number with the fewest cells
    is taken, of equal ones the larger, whose rows are narrower.
    """
    longest, total = max(lengths), sum(lengths)
    most = max(most, longest)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    best, found = len(lengths) * longest, (np.arange(len(lengths)), longest)
    for count in range(-(-total // most), len(lengths)):
        if count * longest > best:  # and so have all larger numbers
            break
        rows, fills = [0] * len(lengths), [(0, row) for row in range(count)]
        heapify(fills)
        for index in order:
            fill, rows[index] = fills[0]
            heapreplace(fills, (fill + lengths[index], rows[index]))
        width = max(fills)[0]
        if width <= most and count * width <= best:
            best, found = count * width, (np.array(rows), width)
    return found
