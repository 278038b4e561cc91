"""Sums over rows that arrive a few at a time: by round, by sample, by token, by position, by confidence.

Invariant: a sum does not depend on how the rows were cut into pieces, and its size is bounded by the number of rounds,
samples and tokens, never by that of rows. Used by `stats.collect`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tc_ray.inspection.rows import UNKNOWN, Rows
from tc_ray.mistakelog.rows.ragged import Array, lengths_of

MAX_POSITIONS = 64
MAX_PAIRS = 2_000_000
CONFIDENCE_BINS = 20


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
    def zeros(cls, keys: int) -> Totals:
        """Totals of no rows."""
        kinds = (np.int64, np.int64, np.float64, np.float64, np.int64, np.int64)
        return cls(*(np.zeros(keys, kind) for kind in kinds))

    def add(self, keys: Array, rows: Rows) -> None:
        """Add rows under their keys [N], each in 0..len-1."""
        wrong = rows.sums(~rows.correct)
        np.add.at(self.rows, keys, 1)
        np.add.at(self.tokens, keys, lengths_of(rows.target_offsets))
        np.add.at(self.loss, keys, rows.sums(rows.loss))
        np.add.at(self.error, keys, rows.sums(rows.error))
        np.add.at(self.wrong, keys, wrong.astype(np.int64))
        np.add.at(self.mistaken, keys, (wrong > 0).astype(np.int64))

    def binned(self, bins: Array, count: int) -> Totals:
        """Sums of the keys that share a bin; `bins` [keys], each in 0..count-1."""
        summed = Totals.zeros(count)
        for name, values in vars(self).items():
            np.add.at(getattr(summed, name), bins, values)
        return summed

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


_FIRST_VALUE = {"first_round": np.iinfo(np.int64).max, "last_round": np.iinfo(np.int64).min}


class SampleTable:
    """What became of each sample: one entry per sample id, in order of `ids`."""

    def __init__(self) -> None:
        self.ids = np.zeros(0, np.int64)
        whole, real = np.zeros(0, np.int64), np.zeros(0, np.float64)
        self._columns: dict[str, Array] = {
            **dict.fromkeys(("visits", "tokens", "wrong", "first_round", "last_round"), whole),
            **dict.fromkeys(("loss", "first_loss", "last_loss"), real),
        }

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, name: str) -> Array:
        """A column: visits, tokens, loss (summed over them), wrong, first_round, first_loss, last_round, last_loss."""
        return self._columns[name]

    @property
    def mean_loss(self) -> Array:
        """float64, nats per target token over all visits."""
        return self["loss"] / np.maximum(self["tokens"], 1)

    def add(self, rows: Rows) -> None:
        """Add rows; those without target tokens are left out."""
        tokens, loss, wrong = lengths_of(rows.target_offsets), rows.sums(rows.loss), rows.sums(~rows.correct)
        order = np.lexsort((rows.round, rows.sample_id))
        order = order[tokens[order] > 0]
        if len(order) == 0:
            return
        ids, starts = np.unique(rows.sample_id[order], return_index=True)
        ends = np.append(starts[1:], len(order))
        first, last = order[starts], order[ends - 1]
        self._add_ids(ids)
        at = np.searchsorted(self.ids, ids)
        columns = self._columns
        columns["visits"][at] += ends - starts
        columns["tokens"][at] += np.add.reduceat(tokens[order], starts)
        columns["loss"][at] += np.add.reduceat(loss[order], starts)
        columns["wrong"][at] += np.add.reduceat(wrong[order], starts).astype(np.int64)
        mean = loss / np.maximum(tokens, 1)
        earlier = rows.round[first] < columns["first_round"][at]
        later = rows.round[last] > columns["last_round"][at]
        for name, chosen, row in (("first", earlier, first), ("last", later, last)):
            columns[f"{name}_round"][at[chosen]] = rows.round[row[chosen]]
            columns[f"{name}_loss"][at[chosen]] = mean[row[chosen]]

    def _add_ids(self, ids: Array) -> None:
        new = np.setdiff1d(ids, self.ids, assume_unique=True)
        if not len(new):
            return
        at = np.searchsorted(self.ids, new)
        self.ids = np.insert(self.ids, at, new)
        for name, values in self._columns.items():
            self._columns[name] = np.insert(values, at, _FIRST_VALUE.get(name, 0))


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
        self.tokens = np.zeros((bins, MAX_POSITIONS), np.int64)
        self.error = np.zeros((bins, MAX_POSITIONS), np.float64)
        self.first_wrong = np.zeros((bins, MAX_POSITIONS), np.int64)
        """Answers whose first token not ranked first stands here."""

    def add(self, bins: Array, rows: Rows) -> None:
        """Add rows; `bins` [N]."""
        position, row = rows.position, rows.row
        if len(position) == 0:
            return
        while position.max() >= MAX_POSITIONS * self.width:
            for name in ("tokens", "error", "first_wrong"):
                values = getattr(self, name)
                folded = np.zeros_like(values)
                folded[:, : MAX_POSITIONS // 2] = values.reshape(len(values), -1, 2).sum(2)
                setattr(self, name, folded)
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
