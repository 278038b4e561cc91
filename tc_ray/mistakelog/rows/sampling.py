"""Which records the log keeps if not all (`log.sampling`): a fraction, or those with a mistake.

Invariant: the choice is a pure function of the record (and, for a fraction, of the run's seed). It does not depend on ranks,
attempts, micro-batches or other records, so a replayed round keeps the same records. Called by the Pilot before anything is
copied to the host.
"""

from __future__ import annotations

import numpy as np

from tc_ray.mistakelog.rows.ragged import Array

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def in_fraction(fraction: float, seed: int, round: Array, sample_id: Array) -> Array:
    """Bool [N]: a hash of (seed, round, sample_id), uniform on [0, 1), is below `fraction`."""
    mixed = _mixed(np.full(len(sample_id), seed % 2**64, np.uint64))
    for number in (round, sample_id):
        mixed = _mixed(mixed ^ np.asarray(number).astype(np.uint64))
    uniform = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.asarray(uniform < fraction)


def has_mistake(token_correct: Array, token_loss: Array, target_offsets: Array, bound: float | None) -> Array:
    """Bool [N]: the record has a target token that was not ranked first, or whose loss in nats is above `bound`.

    Args:
        token_correct, token_loss: [sum n]; record i owns `target_offsets[i]:target_offsets[i + 1]`.
    """
    wrong = ~token_correct if bound is None else ~token_correct | (token_loss > bound)
    before = np.concatenate([[0], np.cumsum(wrong)])
    return np.asarray(before[target_offsets[1:]] > before[target_offsets[:-1]])


def _mixed(values: Array) -> Array:
    """SplitMix64 of uint64 values: close numbers give unrelated ones."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        values = values + _GOLDEN
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
