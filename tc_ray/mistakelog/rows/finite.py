"""Which records hold only finite numbers, and which hold a NaN or an infinity.

Invariant: checking clean records takes two passes over their arrays and no copy. The writer keeps records with a NaN or an
infinity out of the log, verification counts those that another writer left in one.
"""

from __future__ import annotations

import numpy as np

from tc_ray.mistakelog.rows.ragged import Array
from tc_ray.mistakelog.rows.records import Records

_INFINITY, _MINUS_INFINITY = 0x7F80, 0xFF80  # bf16 bits; larger absolute values are NaN


def all_finite(records: Records) -> bool:
    """No number of any record is NaN or infinite."""
    numbers = (records.error_values, records.error_rest, records.token_loss)
    states = (records.rationale,) if records.question is None else (records.rationale, records.question)
    return all(map(_is_finite, numbers)) and all(map(_are_finite_bits, states))


def finite_rows(records: Records) -> Array:
    """int64 indices of the records whose numbers are all finite."""
    owned = [
        (records.rationale_offsets, _finite_bits(records.rationale)),
        (records.target_offsets, np.isfinite(records.error_values)),
        (records.target_offsets, np.isfinite(records.error_rest)),
        (records.target_offsets, np.isfinite(records.token_loss)),
    ]
    if records.question is not None:
        owned.append((records.question_offsets, _finite_bits(records.question)))
    good = np.ones(len(records), bool)
    for offsets, finite in owned:
        bad = np.concatenate([[0], np.cumsum(~finite.all(tuple(range(1, finite.ndim))))])
        good &= bad[offsets[1:]] == bad[offsets[:-1]]
    return np.flatnonzero(good)


def only_finite(records: Records) -> tuple[Records, int]:
    """The records without a NaN or an infinity (the same object if that is all of them), and how many were left out."""
    if all_finite(records):
        return records, 0
    rows = finite_rows(records)
    return records.select(rows), len(records) - len(rows)


def _is_finite(values: Array) -> bool:
    flat = values.reshape(-1)  # numpy reduces one axis three times as fast as three
    # a NaN is both the minimum and the maximum
    return not flat.size or bool(np.isfinite(flat.min()) and np.isfinite(flat.max()))


def _are_finite_bits(bits: Array) -> bool:
    flat = bits.reshape(-1)
    # of signed numbers the positive ones that are not finite are the largest, of unsigned numbers the negative ones
    return not flat.size or bool(flat.view(np.int16).max() < _INFINITY and flat.max() < _MINUS_INFINITY)


def _finite_bits(bits: Array) -> Array:
    return (bits & 0x7FFF) < _INFINITY
