"""Dense errors (`log.error: dense`): all V values of a target token, in vocabulary order in the table.

In memory they look like sparse ones: the true token first, then all others by id, so that nothing downstream knows two
kinds. Invariant: `listed_errors` gives back bit for bit what `vocabulary_order` was given. Used by `records`.
"""

from __future__ import annotations

import numpy as np

from tc_ray.mistakelog.rows.ragged import Array


def vocabulary_order(ids: Array, values: Array) -> Array:
    """Values [n, V] with ids [n, V], a permutation of the vocabulary in each row -> [n, V] where column v is token v's."""
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
