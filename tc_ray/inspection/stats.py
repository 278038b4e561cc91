"""Statistics of a log in one pass over its files: by round, by sample, by token, by position, by confidence.

Invariant: a sum does not depend on how the rows were cut into pieces, and every number comes with the number of rows or tokens
it was taken over. `examples_of` keeps one short entry per row, from which rounds and samples are summed at the end; all else is
summed as rows arrive. Used by `tc-ray log stats`, by `log show --worst` and by the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tc_ray.inspection.rows import UNKNOWN, Rows, stream
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.ragged import Array, lengths_of
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.mistakelog.table.commits import dropped_records
from tc_ray.mistakelog.table.store import LogStore

MAX_BINS = 100
VISITED = ("first visit", "seen before")
"""The groups of `Confidence`."""
MAX_POSITIONS = 32
CONFIDENCE_BINS = 20
_EXAMPLE = np.dtype(
    [
        *((name, np.int64) for name in ("round", "sample_id", "seen", "tokens", "wrong")),
        ("loss", float),
        ("error", float),
    ]
)
_LATEST = np.iinfo(np.int64).max


def examples_of(pieces: Iterable[Rows]) -> Array:
    """One entry of 56 bytes per row, in the order of the pieces: `seen`, its target `tokens`, and sums over these: `wrong`
    (not ranked first), `loss` (nats), `error` (1 - p(truth)).
    """
    parts = [np.zeros(0, _EXAMPLE)]
    for rows in pieces:
        part = np.zeros(len(rows), _EXAMPLE)
        part["round"], part["sample_id"], part["seen"] = rows.round, rows.sample_id, np.maximum(rows.seen, 0)
        part["tokens"], part["wrong"] = lengths_of(rows.target_offsets), rows.sums(~rows.correct)
        part["loss"], part["error"] = rows.sums(rows.loss), rows.sums(rows.error)
        parts.append(part)
    return np.concatenate(parts)


class Totals:
    """Sums of the examples that share a key (a round, a number of earlier visits); arrays [count].

    rows: examples. mistaken: those with a token not ranked first. tokens, wrong, loss, error: see `examples_of`.
    """

    def __init__(self, examples: Array, keys: Array, count: int) -> None:
        """keys: [N], each in 0..count-1."""
        self.rows = np.bincount(keys, minlength=count)
        self.mistaken = np.bincount(keys, examples["wrong"] > 0, count)
        self.tokens, self.wrong, self.loss, self.error = (
            np.bincount(keys, examples[name], count) for name in ("tokens", "wrong", "loss", "error")
        )

    def line(self, keys: Any) -> dict[str, Any]:
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


def samples_of(examples: Array) -> Any:
    """What became of each sample with target tokens: a record array in order of `sample_id`, losses in nats per target token.

    Fields: sample_id, mean_loss (over all visits), visits, wrong, tokens, first_loss, last_loss, first_round, last_round.
    """
    used = examples[examples["tokens"] > 0]
    used = used[np.lexsort((used["round"], used["sample_id"]))]
    ids, first, sample, visits = np.unique(
        used["sample_id"], return_index=True, return_inverse=True, return_counts=True
    )
    loss, wrong, tokens = (np.bincount(sample, used[name], len(ids)) for name in ("loss", "wrong", "tokens"))
    fields = {"sample_id": ids, "mean_loss": loss / tokens, "visits": visits}
    fields |= {"wrong": wrong.astype(np.int64), "tokens": tokens.astype(np.int64)}
    for name, part in (("first", used[first]), ("last", used[first + visits - 1])):
        fields |= {f"{name}_loss": part["loss"] / part["tokens"], f"{name}_round": part["round"]}
    return np.rec.fromarrays(list(fields.values()), names=list(fields))  # type: ignore[call-overload]


class TokenTable:
    """How often each token was true, was missed, and which other token was predicted in its place."""

    def __init__(self, vocab_size: int) -> None:
        self.true = np.zeros(vocab_size, np.int64)
        self.missed = np.zeros(vocab_size, np.int64)
        self._pairs = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)

    def add(self, rows: Rows) -> None:
        """Add the target tokens of rows."""
        wrong, predicted = ~rows.correct, rows.predicted
        self.true += np.bincount(rows.truth, minlength=len(self.true))
        self.missed += np.bincount(rows.truth[wrong], minlength=len(self.true))
        known = wrong & (predicted != UNKNOWN)
        pairs, counts = np.unique((rows.truth[known].astype(np.int64) << 32) | predicted[known], return_counts=True)
        self._pairs, where = np.unique(np.concatenate([self._pairs, pairs]), return_inverse=True)
        self._counts = np.bincount(where, np.concatenate([self._counts, counts])).astype(np.int64)

    def instead_of(self, truth: int, count: int | None = None) -> list[tuple[int, int]]:
        """(predicted, times) in place of `truth`, most often first."""
        first, last = np.searchsorted(self._pairs, [truth << 32, (truth + 1) << 32])
        order = first + np.argsort(-self._counts[first:last], kind="stable")[:count]
        return [(int(self._pairs[i] & 0xFFFFFFFF), int(self._counts[i])) for i in order]


class PositionMap:
    """Errors by bin of rounds and place in the answer: [bins, at most MAX_POSITIONS]; longer answers join positions."""

    def __init__(self, bins: int) -> None:
        self.width = 1
        """Answer positions per column."""
        self._sums = np.zeros((2, bins, MAX_POSITIONS))
        self.tokens, self.error = self._sums

    def add(self, bins: Array, rows: Rows) -> None:
        """Add rows; `bins` [N]."""
        position = rows.position
        while position.max(initial=0) >= MAX_POSITIONS * self.width:
            half = MAX_POSITIONS // 2
            self._sums[:, :, :half] = self._sums.reshape(2, -1, half, 2).sum(3)
            self._sums[:, :, half:] = 0
            self.width *= 2
        cell = (bins[rows.row], position // self.width)
        np.add.at(self.tokens, cell, 1)
        np.add.at(self.error, cell, rows.error.astype(np.float64))

    def means(self) -> Array:
        """Mean error, NaN without a token; columns up to the longest answer."""
        used = int(np.flatnonzero(self.tokens.any(0)).max(initial=-1)) + 1
        with np.errstate(invalid="ignore"):
            return self.error[:, :used] / self.tokens[:, :used]


class Confidence:
    """Probability of the first choice against how often it was right: [2, bins of equal width].

    Row 0: samples that the Pilot had never trained on; row 1: others.
    """

    def __init__(self) -> None:
        self.tokens, self.probability, self.correct = np.zeros((3, 2, CONFIDENCE_BINS))

    def add(self, rows: Rows) -> None:
        """Add the target tokens of rows."""
        known = rows.predicted != UNKNOWN
        probability = np.clip(rows.p_predicted[known].astype(np.float64), 0.0, 1.0)
        group = (rows.seen > 0).astype(np.int64)[rows.row][known]
        cell = (group, np.minimum((probability * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1))
        np.add.at(self.tokens, cell, 1)
        np.add.at(self.probability, cell, probability)
        np.add.at(self.correct, cell, rows.correct[known])

    def summary(self, group: int) -> dict[str, float]:
        """Of one group: tokens, accuracy, `gap` (expected calibration error: mean |accuracy - probability| over bins, weighted by
        tokens) and `bias` (mean probability minus accuracy: above 0 is over-confident); empty without tokens.
        """
        tokens, excess = self.tokens[group].sum(), self.probability[group] - self.correct[group]
        sums = {"accuracy": self.correct[group].sum(), "gap": np.abs(excess).sum(), "bias": excess.sum()}
        return {"tokens": int(tokens), **{n: float(v / tokens) for n, v in sums.items()}} if tokens else {}


def round_spans(first: int, last: int, most: int) -> list[tuple[int, int]]:
    """The rounds first..last cut into at most `most` spans of one width (the last one may be shorter): first and last round."""
    width = -(-(last - first + 1) // most)
    return [(start, min(start + width - 1, last)) for start in range(first, last + 1, width)]


@dataclass(frozen=True)
class LogStats:
    """What `collect` found."""

    metadata: LogMetadata
    version: int
    files: int
    bytes: int
    bad_files: list[str]
    """Files of this version that could not be read; their rows are counted nowhere here."""
    not_finite: int
    """Rows with a NaN or an infinity among their errors and losses; counted nowhere else here."""
    dropped: int
    """Records of these rounds that were never written: the log was full (`log.full_policy`), or they were not finite."""
    first_round: int
    last_round: int
    by_round: Totals
    """Entry i: round first_round + i."""
    by_seen: Totals
    """Entry i: samples that the Pilot had trained on i times before."""
    samples: Any
    """See `samples_of`."""
    tokens: TokenTable
    spans: list[tuple[int, int]]
    """First and last round of the bins of `positions`."""
    positions: PositionMap
    confidence: Confidence

    @property
    def rows(self) -> int:
        """Examples in the log."""
        return int(self.by_round.rows.sum())

    def over(self, spans: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """`Totals.line` of spans of rounds."""
        first = self.first_round
        return [self.by_round.line(slice(low - first, high - first + 1)) for low, high in spans]

    def hardest(self, count: int) -> Any:
        """The samples of the largest mean loss per target token, over all visits; ties by sample id."""
        return self.samples[np.argsort(-self.samples.mean_loss, kind="stable")[:count]]

    def missed(self, count: int) -> Array:
        """Tokens most often not ranked first, most often first."""
        order = np.argsort(-self.tokens.missed, kind="stable")[:count]
        return order[self.tokens.missed[order] > 0]

    def to_dict(self, texts: TokenTexts, top: int) -> dict[str, Any]:
        """All of it for programs; `top`: tokens and samples listed."""
        tokens, hardest = self.tokens, self.hardest(top)
        return {
            "run": self.metadata.run,
            "pilot": self.metadata.pilot,
            **{
                name: getattr(self, name)
                for name in ("version", "files", "bytes", "bad_files", "not_finite", "dropped")
            },
            "rounds": {"first": self.first_round, "last": self.last_round},
            "samples": len(self.samples),
            "tokenizer": texts.note,
            **self.by_round.line(slice(None)),
            "by_seen": [{"seen": int(seen), **self.by_seen.line([seen])} for seen in np.flatnonzero(self.by_seen.rows)],
            "by_round": [
                {"round": self.first_round + int(i), **self.by_round.line([i])}
                for i in np.flatnonzero(self.by_round.rows)
            ],
            "tokens_missed": [
                {
                    "token": token,
                    "text": texts.raw(token),
                    "true": int(tokens.true[token]),
                    "missed": int(tokens.missed[token]),
                    "instead": [
                        {"token": other, "text": texts.raw(other), "times": times}
                        for other, times in tokens.instead_of(token, 5)
                    ],
                }
                for token in self.missed(top).tolist()
            ],
            "hardest_samples": [dict(zip(hardest.dtype.names, line, strict=True)) for line in hardest.tolist()],
            "calibration": {name: self.confidence.summary(group) for group, name in enumerate(VISITED)},
        }


def collect(log: MistakeLog, rounds: tuple[int, int] | None = None) -> LogStats:
    """Read the log once and sum up; `rounds`: first and last one, both included; None: all."""
    low, high = rounds if rounds is not None else (0, _LATEST)
    chosen = [file for file in log.files if file.round_min <= high and file.round_max >= low]
    first = max(low, min((file.round_min for file in chosen), default=low))
    last = max(first, min(high, max((file.round_max for file in chosen), default=first)))
    spans = round_spans(first, last, MAX_BINS)
    width = spans[0][1] - first + 1
    tokens, confidence, positions = TokenTable(log.metadata.vocab_size), Confidence(), PositionMap(len(spans))

    def pieces() -> Iterator[Rows]:
        for rows in stream(log, rounds):
            tokens.add(rows)
            positions.add((rows.round - first) // width, rows)
            confidence.add(rows)
            yield rows

    examples = examples_of(pieces())
    return LogStats(
        metadata=log.metadata,
        version=log.version,
        files=len(chosen),
        bytes=sum(file.bytes for file in chosen),
        bad_files=[str(bad) for bad in log.bad_files],
        not_finite=sum(log.not_finite.values()),
        dropped=_dropped(log, first, last),
        first_round=first,
        last_round=last,
        by_round=Totals(examples, examples["round"] - first, last - first + 1),
        by_seen=Totals(examples, examples["seen"], int(examples["seen"].max(initial=0)) + 1),
        samples=samples_of(examples),
        tokens=tokens,
        spans=spans,
        positions=positions,
        confidence=confidence,
    )


def _dropped(log: MistakeLog, first: int, last: int) -> int:
    store = LogStore(log.location, log.version)
    # the Ledger marks logs that dropped records: reading every commit is slow
    if not store.number(f"tc_ray/{log.metadata.run}/drops"):
        return 0
    counts = dropped_records(store.commits())
    return sum(count for rounds in counts.values() for number, count in rounds.items() if first <= number <= last)
