"""Single samples as the Pilot saw them: every visit to a sample, and which samples show what training does.

Invariant: a visit is one row of the log. Used by `tc-ray log show` and by the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from tc_ray.inspection.charts import level
from tc_ray.inspection.rows import UNKNOWN, Rows, stream
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.ragged import Array

_T = TypeVar("_T")
OTHERS = 3
"""Tokens besides the true one that are shown for each target token."""


class SampleNotFoundError(LookupError):
    """The log has no row of the sample; the message says what it has."""


@dataclass(frozen=True)
class Visit:
    """One sample in one round. prompt: int32, the ids before the first target token. Arrays over its n target tokens: see `Rows`."""

    sample_id: int
    round: int
    seen: int
    prompt: Array
    truth: Array
    error: Array
    others: Array
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
        return f"loss {self.mean_loss:.3f}, {self.wrong} of {len(self.truth)} tokens missed"

    @property
    def mean_loss(self) -> float:
        """Nats per target token; 0 without any."""
        return float(self.loss.mean(dtype=np.float64)) if len(self.loss) else 0.0

    @property
    def wrong(self) -> int:
        """Target tokens not ranked first."""
        return int((~self.correct).sum())

    def p_true(self, place: int) -> float:
        """Probability of the true token; from the loss, which keeps the digits of small ones."""
        return math.exp(-float(self.loss[place]))

    def likely(self, place: int) -> list[tuple[int, float]]:
        """Id and probability of the likeliest tokens besides the true one."""
        listed = zip(self.others[place].tolist(), self.p_others[place].tolist(), strict=True)
        return [(token, p) for token, p in listed if token != UNKNOWN]

    def tokens(self, texts: TokenTexts, most: int | None = None) -> Iterator[tuple[str, int, str | None, str]]:
        """The answer token by token, at most `most` of them: its text (bare ids are set apart by blanks), the level of its
        error, what was ranked first instead (None: it was), and its numbers in words.
        """
        for place, token in enumerate(self.truth[:most].tolist()):
            others = " | ".join(f"{texts.quoted(other)} {percent(p)}" for other, p in self.likely(place))
            title = (
                f"token {place + 1}: true {texts.quoted(token)} {percent(self.p_true(place))}, "
                f"loss {float(self.loss[place]):.2f} nats; others: {others or 'none in the log'}"
            )
            instead = None if self.correct[place] else texts.quoted(int(self.others[place, 0]))
            text = texts.flowing(token) + ("" if texts.known else " ")
            yield text, level(float(self.error[place])), instead, title


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
    if found:
        for rows in stream(log, rounds, others=OTHERS, samples=list(found)):
            for visit in visits_in(rows):
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


def visits_in(rows: Rows) -> Iterator[Visit]:
    """Each row as a visit. Its arrays are copies: views would keep the whole file in memory."""
    for i in range(len(rows)):
        part = slice(int(rows.target_offsets[i]), int(rows.target_offsets[i + 1]))
        start = int(rows.seq_offsets[i])
        prompt = rows.input_ids[start : start + int(rows.target_start[i])].copy()
        arrays = {n: getattr(rows, n)[part].copy() for n in ("truth", "error", "others", "p_others", "loss", "correct")}
        yield Visit(int(rows.sample_id[i]), int(rows.round[i]), int(rows.seen[i]), prompt, **arrays)


def thinned(many: Sequence[_T], most: int) -> list[_T]:
    """At most `most` of them, evenly spread, the first and the last among them."""
    if len(many) <= most:
        return list(many)
    return [many[round(i * (len(many) - 1) / (most - 1))] for i in range(most)]


def across_epochs(samples: Any, each: int) -> list[tuple[str, int]]:
    """(what it shows, sample id) of `each` samples whose loss fell most over repeated visits, and of those where it rose most."""
    repeated = samples[samples.visits > 1]
    fell = repeated.first_loss - repeated.last_loss
    order = np.argsort(-fell, kind="stable")
    learned, worse = order[:each], order[::-1][:each]
    shown = [("learned", i) for i in learned if fell[i] > 0] + [("got worse", i) for i in worse if fell[i] < 0]
    return [(label, int(repeated.sample_id[i])) for label, i in shown]
