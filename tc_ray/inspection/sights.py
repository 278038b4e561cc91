"""Single samples as the Pilot met them: every sight of a sample, and which samples are worth a look.

Invariant: a sight is one row of the log. Used by `tc-ray log show` and by the report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tc_ray.inspection.rows import UNKNOWN, Array, Rows, stream
from tc_ray.inspection.tallies import SampleTable
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog

OTHERS = 3
"""Tokens besides the true one that are told of each target token."""


class SampleNotFoundError(LookupError):
    """The log has no row of the sample; the message says what it has."""


@dataclass(frozen=True)
class Sight:
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
    def mean_loss(self) -> float:
        """Nats a target token; 0 without target tokens."""
        return float(self.loss.mean()) if len(self.loss) else 0.0

    @property
    def wrong(self) -> int:
        """Target tokens not ranked first."""
        return int((~self.correct).sum())

    def headline(self) -> str:
        """Round, earlier sights, mean loss and mistakes in one line."""
        before = "first sight" if self.seen == 0 else f"trained on {self.seen} time{'s' * (self.seen > 1)} before"
        return (
            f"round {self.round} ({before}): loss {self.mean_loss:.3f} nats a token, "
            f"{self.wrong} of {len(self.truth)} tokens not ranked first"
        )

    def p_true(self, place: int) -> float:
        """Probability of the true token; from the loss, which keeps the digits of small ones."""
        return math.exp(-float(self.loss[place]))

    def said(self, place: int) -> int:
        """The token ranked first at a place of the answer."""
        return int(self.truth[place] if self.correct[place] else self.others[place, 0])

    def describe(self, place: int, texts: TokenTexts) -> str:
        """What the Pilot thought at a place of the answer, in one line."""
        truth = texts.quoted(int(self.truth[place]))
        others = " | ".join(
            f"{texts.quoted(int(token))} {percent(p)}"
            for token, p in zip(self.others[place], self.p_others[place], strict=True)
            if token != UNKNOWN
        )
        return (
            f"token {place + 1}: true {truth} {percent(self.p_true(place))}, "
            f"loss {float(self.loss[place]):.2f} nats; others: {others or 'none in the log'}"
        )


def percent(share: float) -> str:
    """A share as a percentage with few but honest digits: 0.03%, 4.2%, 99.98%; not 100% unless it is."""
    value = 100.0 * float(share)
    if value in (0.0, 100.0):
        return f"{value:.0f}%"
    if 0 < value < 0.01:
        return "<0.01%"
    if 99.99 < value < 100:
        return ">99.99%"
    digits = 2 if value < 1 or 99 < value < 100 else 1
    return f"{value:.{digits}f}%"


def find_sights(
    log: MistakeLog, samples: Sequence[int], rounds: tuple[int, int] | None = None
) -> dict[int, list[Sight]]:
    """All sights of some samples, by round.

    Args:
        rounds: first and last round, both included; None: all.
    """
    found: dict[int, list[Sight]] = {int(sample): [] for sample in samples}
    if not found:
        return found
    for rows in stream(log, rounds, others=OTHERS, samples=list(found)):
        for i in range(len(rows)):
            sight = _sight(rows, i)
            found[sight.sample_id].append(sight)
    for sights in found.values():
        sights.sort(key=lambda sight: sight.round)
    return found


def sights_of(log: MistakeLog, sample: int, round: int | None = None) -> list[Sight]:
    """The sights of one sample.

    Raises:
        SampleNotFoundError: there is none (in that round).
    """
    sights = find_sights(log, [sample])[sample]
    if not sights:
        spoilt = sum(log.not_finite.values())
        ids = np.asarray(log.arrow(columns=["sample_id"])["sample_id"])
        has = (
            f"its samples are {ids.min()} to {ids.max()}, {len(np.unique(ids))} of them" if len(ids) else "it is empty"
        )
        left_out = f"; rows with numbers that are not finite are not shown: {spoilt}" if spoilt else ""
        raise SampleNotFoundError(f"the log has no row of sample {sample}; {has}{left_out}")
    chosen = [sight for sight in sights if round is None or sight.round == round]
    if not chosen:
        rounds = ", ".join(str(sight.round) for sight in sights)
        raise SampleNotFoundError(f"sample {sample} was not trained on in round {round}, but in {rounds}")
    return chosen


def thinned(sights: Sequence[Sight], most: int) -> list[Sight]:
    """At most `most` sights, evenly spread, the first and the last among them."""
    if len(sights) <= most:
        return list(sights)
    return [sights[round(i * (len(sights) - 1) / (most - 1))] for i in range(most)]


def across_epochs(samples: SampleTable, each: int = 3) -> list[tuple[str, int]]:
    """Samples that show what repeated training does: (what they show, place in the table), each sample once.

    Learned: the loss fell most. Got worse: it rose most. Still hard: it was largest at the last sight.
    """
    repeated = np.flatnonzero(samples["sights"] > 1)
    fell = (samples["first_loss"] - samples["last_loss"])[repeated]
    last = samples["last_loss"][repeated]
    chosen: list[tuple[str, int]] = []
    for label, score, counts in (
        ("learned", fell, fell > 0),
        ("got worse", -fell, fell < 0),
        ("still hard", last, last > 0),
    ):
        taken = {place for _, place in chosen}
        order = [int(repeated[i]) for i in np.argsort(-score, kind="stable") if counts[i]]
        chosen += [(label, place) for place in order if place not in taken][:each]
    return chosen


def _sight(rows: Rows, i: int) -> Sight:
    part = slice(int(rows.target_offsets[i]), int(rows.target_offsets[i + 1]))
    start = int(rows.seq_offsets[i])
    return Sight(
        sample_id=int(rows.sample_id[i]),
        round=int(rows.round[i]),
        seen=int(rows.seen[i]),
        # views would keep the whole file in memory
        prompt=rows.input_ids[start : start + int(rows.target_start[i])].copy(),
        truth=rows.truth[part].copy(),
        error=rows.error[part].copy(),
        others=rows.others[part].copy(),
        p_others=rows.p_others[part].copy(),
        loss=rows.loss[part].copy(),
        correct=rows.correct[part].copy(),
    )
