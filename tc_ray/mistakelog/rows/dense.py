"""Dense errors (`log.error: dense`): all V values of a target token, in vocabulary order in the table.

In memory they look like sparse errors: the true token first, then all others by id, so that later code knows one kind. Invariant:
`listed_errors` returns bit for bit what `vocabulary_order` was given. Used by `records`.
"""

from __future__ import annotations

import numpy as np

from tc_ray.mistakelog.rows.ragged import Array


def vocabulary_order(ids: Array, values: Array) -> Array:
    """Values [n, V] with ids [n, V], each row a permutation of the vocabulary -> [n, V], column v for token v."""
    dense = np.empty_like(values)
    np.put_along_axis(dense, ids.astype(np.int64), values, 1)
    return dense


def listed_errors(values: Array, true_ids: Array) -> tuple[Array, Array]:
    """Values [n, V] in vocabulary order -> (ids int32 [n, V], values [n, V]): the true token, then the others by id."""
    count, vocab = values.shape
    ids = np.empty((count, vocab), np.int32)
    ids[:, 0] = true_ids
    others = np.arange(vocab - 1, dtype=np.int32)
    ids[:, 1:] = others + (others >= true_ids[:, None])
    return ids, np.take_along_axis(values, ids.astype(np.int64), 1)
