"""Statistics of a log in one pass over its files.

Invariant: every number comes with the number of rows or tokens it was taken over. Used by `tc-ray log stats`, by
`log show --worst` and by the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tc_ray.inspection.rows import Rows, stream
from tc_ray.inspection.tallies import Confidence, PositionMap, TokenTable, Totals, examples_of, samples_of
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.ragged import Array
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.mistakelog.table.commits import dropped_records
from tc_ray.mistakelog.table.store import LogStore

MAX_BINS = 100
VISITED = ("first visit", "seen before")
"""The groups of `Confidence`."""
_LATEST = np.iinfo(np.int64).max


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
    """See `tallies.samples_of`."""
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
            "version": self.version,
            "files": self.files,
            "bytes": self.bytes,
            "bad_files": self.bad_files,
            "not_finite_rows": self.not_finite,
            "dropped_rows": self.dropped,
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
            "calibration": {
                name.replace(" ", "_"): {
                    "tokens": int(self.confidence.tokens[group].sum()),
                    "expected_calibration_error": self.confidence.gap(group),
                    "probability_minus_accuracy": self.confidence.bias(group),
                }
                for group, name in enumerate(VISITED)
            },
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
    """Records of rounds first..last that the commits say were dropped."""
    store = LogStore(log.location, log.version)
    # the Ledger marks logs that dropped records: reading every commit is slow
    if not store.number(f"tc_ray/{log.metadata.run}/drops"):
        return 0
    counts = dropped_records(store.commits())
    return sum(count for rounds in counts.values() for number, count in rounds.items() if first <= number <= last)
