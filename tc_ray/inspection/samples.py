"""Single samples as the Pilot saw them: every visit to a sample, and which samples show what training does.

Invariant: a visit is one row of the log. Used by `tc-ray log show` and by the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tc_ray.inspection.colours import level
from tc_ray.inspection.rows import UNKNOWN, Rows, stream
from tc_ray.inspection.tallies import SampleTable
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.ragged import Array

_T = TypeVar("_T")
OTHERS = 3
"""Tokens besides the true one that are shown for each target token."""


class SampleNotFoundError(LookupError):
    """The log has no row of the sample; the message says what it has."""


@dataclass(frozen=True)
class Token:
    """A target token as it is shown: its text, the level of its error, what was ranked first instead, and its numbers."""

    text: str
    shade: int
    instead: str | None
    """None: the true token was ranked first."""
    title: str


@dataclass(frozen=True)
class Visit:
    """One sample in one round. Arrays over its n target tokens: see `Rows`."""

    sample_id: int
    round: int
    seen: int
    prompt: Array
    """int32, the ids before the first target token."""
    truth: Array
    error: Array
    others: Array
    """int32 [n, m]."""
    p_others: Array
    loss: Array
    correct: Array

    @property
    def when(self) -> str:
        """How often the Pilot had trained on the sample before."""
        return "first visit" if self.seen == 0 else f"trained on {self.seen} time{'s' * (self.seen > 1)} before"

    @property
    def result(self) -> str:
        """Mean loss and mistakes."""
        loss = float(self.loss.mean()) if len(self.loss) else 0.0
        return f"loss {loss:.3f}, {self.wrong} of {len(self.truth)} tokens missed"

    @property
    def wrong(self) -> int:
        """Target tokens not ranked first."""
        return int((~self.correct).sum())

    def p_true(self, place: int) -> float:
        """Probability of the true token; from the loss, which keeps the digits of small ones."""
        return math.exp(-float(self.loss[place]))

    def predicted(self, place: int) -> int:
        """The token ranked first at a place of the answer."""
        return int(self.truth[place] if self.correct[place] else self.others[place, 0])

    def likely(self, place: int, texts: TokenTexts) -> list[tuple[str, str]]:
        """Text and probability of the likeliest tokens besides the true one."""
        listed = zip(self.others[place], self.p_others[place], strict=True)
        return [(texts.quoted(int(token)), percent(p)) for token, p in listed if token != UNKNOWN]

    def tokens(self, texts: TokenTexts, most: int | None = None) -> Iterator[Token]:
        """The answer token by token, at most `most` of them; bare ids are set apart by blanks."""
        for place, token in enumerate(self.truth[:most].tolist()):
            others = " | ".join(f"{text} {p}" for text, p in self.likely(place, texts))
            yield Token(
                text=texts.flowing(token) + ("" if texts.known else " "),
                shade=level(float(self.error[place])),
                instead=None if self.correct[place] else texts.quoted(self.predicted(place)),
                title=f"token {place + 1}: true {texts.quoted(token)} {percent(self.p_true(place))}, "
                f"loss {float(self.loss[place]):.2f} nats; others: {others or 'none in the log'}",
            )


def percent(share: float) -> str:
    """A share as a percentage with few digits: 0.03%, 4.2%, 99.98%; 0% and 100% only where it is exactly that."""
    value = 100.0 * float(share)
    if value in (0.0, 100.0):
        return f"{value:.0f}%"
    if 0 < value < 0.01:
        return "<0.01%"
    if 99.99 < value < 100:
        return ">99.99%"
    digits = 2 if value < 1 or 99 < value < 100 else 1
    return f"{value:.{digits}f}%"


def find_visits(
    log: MistakeLog, samples: Sequence[int], rounds: tuple[int, int] | None = None
) -> dict[int, list[Visit]]:
    """All visits to some samples, by round.

    Args:
        rounds: first and last round, both included; None: all.
    """
    found: dict[int, list[Visit]] = {int(sample): [] for sample in samples}
    if not found:
        return found
    for rows in stream(log, rounds, others=OTHERS, samples=list(found)):
        for i in range(len(rows)):
            visit = _visit(rows, i)
            found[visit.sample_id].append(visit)
    for visits in found.values():
        visits.sort(key=lambda visit: visit.round)
    return found


def visits_of(log: MistakeLog, sample: int, round: int | None = None) -> list[Visit]:
    """The visits to one sample.

    Raises:
        SampleNotFoundError: there is none (in that round).
    """
    visits = find_visits(log, [sample])[sample]
    if not visits:
        ids = np.asarray(log.arrow(columns=["sample_id"])["sample_id"])
        has = f"its samples are {ids.min()} to {ids.max()}, {len(np.unique(ids))} in all" if len(ids) else "it is empty"
        spoilt = sum(log.not_finite.values())
        left_out = f"; rows with numbers that are not finite are not shown: {spoilt}" if spoilt else ""
        raise SampleNotFoundError(f"the log has no row of sample {sample}; {has}{left_out}")
    chosen = [visit for visit in visits if round is None or visit.round == round]
    if not chosen:
        rounds = ", ".join(str(visit.round) for visit in visits)
        raise SampleNotFoundError(f"sample {sample} was not trained on in round {round}, but in {rounds}")
    return chosen


def thinned(many: Sequence[_T], most: int) -> list[_T]:
    """At most `most` of them, evenly spread, the first and the last among them."""
    if len(many) <= most:
        return list(many)
    return [many[round(i * (len(many) - 1) / (most - 1))] for i in range(most)]


def across_epochs(samples: SampleTable, each: int = 3) -> list[tuple[str, int]]:
    """Samples that show what repeated training does: (what they show, place in the table), each sample once.

    Learned: the loss fell most. Got worse: it rose most. Still hard: it was largest at the last visit.
    """
    repeated = np.flatnonzero(samples.visits > 1)
    fell = (samples.first_loss - samples.last_loss)[repeated]
    last = samples.last_loss[repeated]
    chosen: list[tuple[str, int]] = []
    for label, score in (("learned", fell), ("got worse", -fell), ("still hard", last)):
        taken = {place for _, place in chosen}
        order = [int(repeated[i]) for i in np.argsort(-score, kind="stable") if score[i] > 0]
        chosen += [(label, place) for place in order if place not in taken][:each]
    return chosen


def _visit(rows: Rows, i: int) -> Visit:
    part = slice(int(rows.target_offsets[i]), int(rows.target_offsets[i + 1]))
    start = int(rows.seq_offsets[i])
    # copies: views would keep the whole file in memory
    prompt = rows.input_ids[start : start + int(rows.target_start[i])].copy()
    arrays = {n: getattr(rows, n)[part].copy() for n in ("truth", "error", "others", "p_others", "loss", "correct")}
    return Visit(int(rows.sample_id[i]), int(rows.round[i]), int(rows.seen[i]), prompt, **arrays)
