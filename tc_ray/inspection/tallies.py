"""Sums over rows that arrive a few at a time: by round, by sample, by token, by position, by confidence.

Invariant: a sum does not depend on how the rows were cut into pieces. `Examples` keeps one short entry per row, from which
rounds and samples are summed at the end; tokens, positions and confidence are summed as rows arrive. Used by `stats.collect`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tc_ray.inspection.rows import UNKNOWN, Rows
from tc_ray.mistakelog.rows.ragged import Array, lengths_of

MAX_POSITIONS = 64
MAX_PAIRS = 2_000_000
CONFIDENCE_BINS = 20


@dataclass(frozen=True)
class Examples:
    """One entry per row of the log; arrays [N], 56 bytes in all."""

    round: Array
    sample_id: Array
    seen: Array
    """int64, how often the Pilot had trained on the sample before."""
    tokens: Array
    """int64, target tokens."""
    loss: Array
    """float64, sum of nats over them."""
    error: Array
    """float64, sum of 1 - p(truth) over them."""
    wrong: Array
    """int64, those not ranked first."""

    @classmethod
    def of(cls, pieces: Iterable[Rows]) -> Examples:
        """Entries of all rows, in the order of the pieces."""
        parts = [
            (
                rows.round.copy(),  # a view would keep the column of its whole file
                rows.sample_id.copy(),
                np.maximum(rows.seen, 0).astype(np.int64),
                lengths_of(rows.target_offsets),
                rows.sums(rows.loss),
                rows.sums(rows.error),
                rows.sums(~rows.correct).astype(np.int64),
            )
            for rows in pieces
        ]
        whole, real = np.zeros(0, np.int64), np.zeros(0)
        empty = (whole, whole, whole, whole, real, real, whole)
        return cls(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))


@dataclass(frozen=True)
class Totals:
    """Sums over rows with the same key (a round, a number of earlier visits); arrays [keys]."""

    rows: Array
    """int64, examples."""
    tokens: Array
    """int64, target tokens."""
    loss: Array
    """Sum of nats."""
    error: Array
    """Sum of 1 - p(truth)."""
    wrong: Array
    """int64, target tokens not ranked first."""
    mistaken: Array
    """int64, examples with at least one of those."""

    @classmethod
    def of(cls, examples: Examples, keys: Array, count: int) -> Totals:
        """Sums of the examples that share a key; `keys` [N], each in 0..count-1."""

        def total(values: Array) -> Array:
            return np.bincount(keys, values, count).astype(values.dtype)

        found = examples
        mistaken = (found.wrong > 0).astype(np.int64)
        rows = np.bincount(keys, minlength=count)
        return cls(
            rows, total(found.tokens), total(found.loss), total(found.error), total(found.wrong), total(mistaken)
        )

    def line(self, keys: Any) -> dict[str, float | int | None]:
        """Counts and means over some keys; means are None without rows."""
        rows, tokens = int(self.rows[keys].sum()), int(self.tokens[keys].sum())

        def mean(values: Array, count: int) -> float | None:
            return float(values[keys].sum()) / count if count else None

        return {
            "rows": rows,
            "target_tokens": tokens,
            "loss": mean(self.loss, tokens),
            "error": mean(self.error, tokens),
            "wrong_tokens": int(self.wrong[keys].sum()),
            "wrong_share": mean(self.wrong, tokens),
            "rows_with_mistake": int(self.mistaken[keys].sum()),
            "rows_with_mistake_share": mean(self.mistaken, rows),
        }


@dataclass(frozen=True)
class SampleTable:
    """What became of each sample: one entry per sample id, in order of `ids`; losses in nats."""

    ids: Array
    visits: Array
    tokens: Array
    wrong: Array
    first_round: Array
    first_loss: Array
    """Mean per target token at the first visit."""
    last_round: Array
    last_loss: Array
    mean_loss: Array
    """Per target token over all visits."""

    @classmethod
    def of(cls, examples: Examples) -> SampleTable:
        """Rows without target tokens are left out."""
        order = np.lexsort((examples.round, examples.sample_id))
        order = order[examples.tokens[order] > 0]
        ids, first, sample, visits = np.unique(
            examples.sample_id[order], return_index=True, return_inverse=True, return_counts=True
        )

        def total(values: Array) -> Array:
            return np.bincount(sample, values[order], len(ids)).astype(values.dtype)

        first, last = order[first], order[first + visits - 1]
        tokens, rounds, loss = total(examples.tokens), examples.round, examples.loss / np.maximum(examples.tokens, 1)
        wrong, mean = total(examples.wrong), total(examples.loss) / tokens
        return cls(ids, visits, tokens, wrong, rounds[first], loss[first], rounds[last], loss[last], mean)

    def __len__(self) -> int:
        return len(self.ids)


class TokenTable:
    """How often each token was true, was missed, and which other token was predicted in its place.

    Args:
        vocab_size: V.
        max_pairs: (truth, predicted) pairs kept; beyond it the rarer half is dropped, and a count of the others can then be
            too low by up to `uncounted`.
    """

    def __init__(self, vocab_size: int, max_pairs: int = MAX_PAIRS) -> None:
        self.true = np.zeros(vocab_size, np.int64)
        self.missed = np.zeros(vocab_size, np.int64)
        self.uncounted = 0
        self._max_pairs = max_pairs
        self._keys = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)

    def add(self, rows: Rows) -> None:
        """Add the target tokens of rows."""
        wrong, predicted = ~rows.correct, rows.predicted
        self.true += np.bincount(rows.truth, minlength=len(self.true))
        self.missed += np.bincount(rows.truth[wrong], minlength=len(self.true))
        known = wrong & (predicted != UNKNOWN)
        pairs = (rows.truth[known].astype(np.int64) << 32) | predicted[known]
        keys, counts = np.unique(pairs, return_counts=True)
        joined, where = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        self._counts = np.bincount(where, np.concatenate([self._counts, counts]), len(joined)).astype(np.int64)
        self._keys = joined
        if len(joined) > self._max_pairs:
            kept = np.sort(np.argsort(-self._counts, kind="stable")[: self._max_pairs // 2])
            self.uncounted += int(np.delete(self._counts, kept).max())
            self._keys, self._counts = self._keys[kept], self._counts[kept]

    def instead_of(self, truth: int, count: int | None = None) -> list[tuple[int, int]]:
        """(predicted, times) in place of `truth`, most often first."""
        first, last = np.searchsorted(self._keys, [truth << 32, (truth + 1) << 32])
        order = first + np.argsort(-self._counts[first:last], kind="stable")[:count]
        return [(int(self._keys[i] & 0xFFFFFFFF), int(self._counts[i])) for i in order]


class PositionMap:
    """Errors by bin of rounds and place in the answer: [bins, at most MAX_POSITIONS]; longer answers join positions."""

    def __init__(self, bins: int) -> None:
        self.width = 1
        """Answer positions per column."""
        self._sums = np.zeros((3, bins, MAX_POSITIONS))
        # first_wrong: answers whose first token not ranked first stands here
        self.tokens, self.error, self.first_wrong = self._sums

    def add(self, bins: Array, rows: Rows) -> None:
        """Add rows; `bins` [N]."""
        position, row = rows.position, rows.row
        if len(position) == 0:
            return
        while position.max() >= MAX_POSITIONS * self.width:
            half = MAX_POSITIONS // 2
            self._sums[:, :, :half] = self._sums.reshape(3, -1, half, 2).sum(3)
            self._sums[:, :, half:] = 0
            self.width *= 2
        cell = (bins[row], position // self.width)
        np.add.at(self.tokens, cell, 1)
        np.add.at(self.error, cell, rows.error.astype(np.float64))
        wrong = np.flatnonzero(~rows.correct)
        _, at = np.unique(row[wrong], return_index=True)
        first = wrong[at]
        np.add.at(self.first_wrong, (bins[row[first]], position[first] // self.width), 1)

    @property
    def used(self) -> int:
        """Columns up to the longest answer."""
        filled = np.flatnonzero(self.tokens.any(0))
        return int(filled[-1]) + 1 if len(filled) else 0


class Confidence:
    """Probability of the first choice against how often it was right: [2, bins of equal width].

    Row 0: samples that the Pilot had never trained on; row 1: others.
    """

    def __init__(self) -> None:
        self.tokens = np.zeros((2, CONFIDENCE_BINS), np.int64)
        self.probability = np.zeros((2, CONFIDENCE_BINS), np.float64)
        self.correct = np.zeros((2, CONFIDENCE_BINS), np.int64)

    def add(self, rows: Rows) -> None:
        """Add the target tokens of rows."""
        known = rows.predicted != UNKNOWN
        probability = np.clip(rows.p_predicted[known].astype(np.float64), 0.0, 1.0)
        group = (rows.seen > 0).astype(np.int64)[rows.row][known]
        cell = (group, np.minimum((probability * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1))
        np.add.at(self.tokens, cell, 1)
        np.add.at(self.probability, cell, probability)
        np.add.at(self.correct, cell, rows.correct[known].astype(np.int64))

    def gap(self, group: int) -> float | None:
        """Expected calibration error: mean |accuracy - probability| over bins, weighted by tokens; None without tokens."""
        total = int(self.tokens[group].sum())
        return float(np.abs(self.correct[group] - self.probability[group]).sum()) / total if total else None

    def bias(self, group: int) -> float | None:
        """Mean probability minus accuracy: above 0 is over-confident."""
        total = int(self.tokens[group].sum())
        return float((self.probability[group] - self.correct[group]).sum()) / total if total else None
