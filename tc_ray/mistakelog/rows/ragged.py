"""Ragged columns: flat values with offsets, the Arrow arrays that hold the same memory, and dense errors. Used by `records`.

Dense errors (`log.error: dense`) are all V values of a target token, in vocabulary order in the table. In memory they look like
sparse errors, so that later code knows one kind: `listed_errors` returns bit for bit what `vocabulary_order` was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tc_ray.mistakelog.rows.schema import LogSchemaError

Array = npt.NDArray[Any]


def offsets_of(lengths: Array) -> Array:
    """int64 [N+1] offsets of parts with these lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def lengths_of(offsets: Array) -> Array:
    """[N] lengths of the parts between offsets [N+1] (`np.diff` takes several times as long for short ones)."""
    return offsets[1:] - offsets[:-1]


def flat_index(starts: Array, lengths: Array) -> Array:
    """Index of every element of ragged parts: the start of its part plus its position in the part."""
    return np.repeat(starts - offsets_of(lengths)[:-1], lengths) + np.arange(lengths.sum())


def binary_array(offsets: Array, values: Array) -> pa.Array:
    """Binary cells over the memory of `values`; offsets int32 [N+1] in bytes."""
    return pa.Array.from_buffers(
        pa.binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(values))]
    )


def list_arrays(values: Sequence[Array], offsets: Array) -> list[pa.ListArray]:
    """List cells over the memory of several flat `values` (bools are packed) with the same offsets [N+1]."""
    first, last = int(offsets[0]), int(offsets[-1])
    counted = pa.array((offsets - first).astype(np.int32))
    return [pa.ListArray.from_arrays(counted, pa.array(flat[first:last])) for flat in values]


def plain_column(table: pa.Table, name: str, dtype: type[np.generic]) -> Array:
    """Values [N] of a column of single values; LogSchemaError: there are nulls."""
    column = table.column(name)
    if column.null_count:
        raise LogSchemaError(f"column {name}: {column.null_count} null values")
    return np.asarray(column.to_numpy()).astype(dtype, copy=False)


def flat_column(column: pa.ChunkedArray) -> tuple[Array, Array]:
    """Flat values and int64 offsets [N+1] of a list or binary column; with one chunk the values are a view."""
    if column.null_count:
        raise LogSchemaError(f"{column.null_count} null cells in a list or binary column")
    if not column.num_chunks:
        empty = np.uint8 if pa.types.is_binary(column.type) else column.type.value_type.to_pandas_dtype()
        return np.zeros(0, empty), np.zeros(1, np.int64)
    parts = [_flat_chunk(chunk) for chunk in column.chunks]
    if len(parts) == 1:
        values, offsets = parts[0]
        return values, offsets.astype(np.int64) - offsets[0]
    lengths = np.concatenate([lengths_of(offsets) for _, offsets in parts])
    return np.concatenate([values for values, _ in parts]), offsets_of(lengths)


def _flat_chunk(chunk: pa.Array) -> tuple[Array, Array]:
    """Values of a chunk's cells, and its int32 offsets, which need not start at 0."""
    if pa.types.is_binary(chunk.type):
        _, offset_buffer, data = chunk.buffers()
        offsets = np.frombuffer(offset_buffer, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        return np.frombuffer(data if data is not None else b"", np.uint8)[offsets[0] : offsets[-1]], offsets
    offsets = chunk.offsets.to_numpy()
    return chunk.values[int(offsets[0]) : int(offsets[-1])].to_numpy(zero_copy_only=False), offsets


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
