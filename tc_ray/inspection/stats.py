"""Statistics of a log in one pass over its files.

Invariant: every number comes with the number of rows or tokens it was taken over. Used by `tc-ray log stats`, by
`log show --worst` and by the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tc_ray.inspection.rows import Rows, stream
from tc_ray.inspection.tallies import Confidence, Examples, PositionMap, SampleTable, TokenTable, Totals
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.ragged import Array
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.mistakelog.table.commits import dropped_records
from tc_ray.mistakelog.table.store import LogStore

MAX_BINS = 120
_LATEST = np.iinfo(np.int64).max
_SAMPLE_FIELDS = ("visits", "tokens", "wrong", "first_round", "first_loss", "last_round", "last_loss")


@dataclass(frozen=True)
class RoundBins:
    """The rounds first..last cut into bins of `width` rounds (the last one may be shorter)."""

    first: int
    last: int
    width: int

    @classmethod
    def over(cls, first: int, last: int, most: int = MAX_BINS) -> RoundBins:
        """At most `most` bins of a span of rounds."""
        return cls(first, last, -(-(last - first + 1) // most))

    def index(self, rounds: Array) -> Array:
        """int64, the bin of each round."""
        return (rounds - self.first) // self.width

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and last round of each bin."""
        starts = range(self.first, self.last + 1, self.width)
        return [(start, min(start + self.width - 1, self.last)) for start in starts]


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
    by_bin: Totals
    """Entry i: span i of `bins`."""
    by_seen: Totals
    """Entry i: samples that the Pilot had trained on i times before."""
    seen_from: Array
    """int64, the first round with such a sample, -1: none."""
    samples: SampleTable
    tokens: TokenTable
    bins: RoundBins
    positions: PositionMap
    confidence: Confidence

    @property
    def rows(self) -> int:
        """Examples in the log."""
        return int(self.by_round.rows.sum())

    @property
    def rounds_with_rows(self) -> int:
        """Rounds that have at least one row."""
        return int((self.by_round.rows > 0).sum())

    @property
    def most_seen(self) -> int:
        """Most times that a sample had been trained on before; 0: each was visited once."""
        return len(self.seen_from) - 1

    def parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The first and the last tenth of the rounds (at least one round each), as `Totals.line` with their rounds."""
        rounds = self.last_round - self.first_round + 1
        tenth = max(1, rounds // 10)
        first, last = slice(0, tenth), slice(rounds - tenth, rounds)
        return (
            {"rounds": [self.first_round, self.first_round + tenth - 1], **self.by_round.line(first)},
            {"rounds": [self.last_round - tenth + 1, self.last_round], **self.by_round.line(last)},
        )

    def hardest(self, count: int) -> Array:
        """Places in `samples` of the largest mean loss per target token, over all visits; ties by sample id."""
        return np.argsort(-self.samples.mean_loss, kind="stable")[:count]

    def missed(self, count: int) -> Array:
        """Tokens most often not ranked first, most often first."""
        order = np.argsort(-self.tokens.missed, kind="stable")[:count]
        return order[self.tokens.missed[order] > 0]

    def to_dict(self, texts: TokenTexts, top: int) -> dict[str, Any]:
        """All of it for programs; `top`: tokens and samples listed."""
        first, last = self.parts() if self.rows else (None, None)
        return {
            "run": self.metadata.run,
            "pilot": self.metadata.pilot,
            "version": self.version,
            "files": self.files,
            "bytes": self.bytes,
            "bad_files": self.bad_files,
            "not_finite_rows": self.not_finite,
            "dropped_rows": self.dropped,
            "rounds": {"first": self.first_round, "last": self.last_round, "with_rows": self.rounds_with_rows},
            "samples": len(self.samples),
            "tokenizer": texts.note,
            **self.by_round.line(slice(None)),
            "first_rounds": first,
            "last_rounds": last,
            "by_seen": [{"seen": int(seen), **self.by_seen.line([seen])} for seen in np.flatnonzero(self.by_seen.rows)],
            "by_round": [
                {"round": self.first_round + int(i), **self.by_round.line([i])}
                for i in np.flatnonzero(self.by_round.rows)
            ],
            "tokens_missed": [self._missed_token(int(token), texts) for token in self.missed(top)],
            "pairs_short_by_at_most": self.tokens.uncounted,
            "hardest_samples": [
                {
                    "sample_id": int(self.samples.ids[i]),
                    "loss": float(self.samples.mean_loss[i]),
                    **{name: getattr(self.samples, name)[i].item() for name in _SAMPLE_FIELDS},
                }
                for i in self.hardest(top)
            ],
            "calibration": {
                name: {
                    "tokens": int(self.confidence.tokens[group].sum()),
                    "expected_calibration_error": self.confidence.gap(group),
                    "probability_minus_accuracy": self.confidence.bias(group),
                }
                for group, name in enumerate(("first_visit", "seen_before"))
            },
        }

    def _missed_token(self, token: int, texts: TokenTexts) -> dict[str, Any]:
        return {
            "token": token,
            "text": texts.raw(token),
            "true": int(self.tokens.true[token]),
            "missed": int(self.tokens.missed[token]),
            "instead": [
                {"token": predicted, "text": texts.raw(predicted), "times": times}
                for predicted, times in self.tokens.instead_of(token, 5)
            ],
        }


def collect(log: MistakeLog, rounds: tuple[int, int] | None = None) -> LogStats:
    """Read the log once and sum up; `rounds`: first and last one, both included; None: all."""
    low, high = rounds if rounds is not None else (0, _LATEST)
    chosen = [file for file in log.files if file.round_min <= high and file.round_max >= low]
    first = max(low, min((file.round_min for file in chosen), default=low))
    last = max(first, min(high, max((file.round_max for file in chosen), default=first)))
    bins = RoundBins.over(first, last)
    tokens, confidence, positions = TokenTable(log.metadata.vocab_size), Confidence(), PositionMap(len(bins.spans))

    def pieces() -> Iterator[Rows]:
        for rows in stream(log, rounds):
            tokens.add(rows)
            positions.add(bins.index(rows.round), rows)
            confidence.add(rows)
            yield rows

    examples = Examples.of(pieces())
    seen_from = np.full(int(examples.seen.max(initial=0)) + 1, _LATEST)
    np.minimum.at(seen_from, examples.seen, examples.round)
    seen_from[seen_from == _LATEST] = -1
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
        by_round=Totals.of(examples, examples.round - first, last - first + 1),
        by_bin=Totals.of(examples, bins.index(examples.round), len(bins.spans)),
        by_seen=Totals.of(examples, examples.seen, len(seen_from)),
        seen_from=seen_from,
        samples=SampleTable.of(examples),
        tokens=tokens,
        bins=bins,
        positions=positions,
        confidence=confidence,
    )


def _dropped(log: MistakeLog, first: int, last: int) -> int:
    """Records of rounds first..last that the commits say were dropped."""
    store = LogStore(log.location, log.version)
    # the Ledger marks logs that dropped records: reading every commit is slow
    if not store.number(f"tc_ray/{log.metadata.run}/drops"):
        return 0
    counts = dropped_records(store.commits())
    return sum(count for rounds in counts.values() for number, count in rounds.items() if first <= number <= last)
