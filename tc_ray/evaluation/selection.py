"""Choosing lambda and the fusion space on validation data: pure functions of what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tc_ray.evaluation.statistics import Interval, mcnemar_p, paired_difference_interval, wilson_interval

Choice = tuple[str, float]
"""(fusion space, lam). lam 0 is the Pilot itself, whatever the space."""


@dataclass(frozen=True)
class Comparison:
    """Fused against Pilot on the same rows. wins: only fused is right; losses: only the Pilot is."""

    rows: int
    pilot_correct: int
    fused_correct: int
    wins: int
    losses: int

    @classmethod
    def of(cls, pilot: Sequence[bool], fused: Sequence[bool]) -> Comparison:
        """From correctness, row by row."""
        pairs = list(zip(pilot, fused, strict=True))
        return cls(
            rows=len(pairs),
            pilot_correct=sum(pilot),
            fused_correct=sum(fused),
            wins=sum(f and not p for p, f in pairs),
            losses=sum(p and not f for p, f in pairs),
        )

    @property
    def p_value(self) -> float:
        """Exact McNemar."""
        return mcnemar_p(self.wins, self.losses)

    @property
    def pilot_interval(self) -> Interval:
        """95% Wilson interval of the Pilot's accuracy."""
        return wilson_interval(self.pilot_correct, self.rows)

    @property
    def fused_interval(self) -> Interval:
        """95% Wilson interval of the fused model's accuracy."""
        return wilson_interval(self.fused_correct, self.rows)

    @property
    def difference_interval(self) -> Interval:
        """95% interval of the accuracy difference, paired."""
        return paired_difference_interval(self.wins, self.losses, self.rows)


def choose(scores: Mapping[Choice, Sequence[float]], nll: Mapping[Choice, float]) -> Choice:
    """The choice with the highest mean score on validation rows; a tie goes to the lower teacher-forced NLL.

    lam 0 is among the choices and wins every tie, because a correction must prove itself.
    """
    total = {choice: math.fsum(row_scores) for choice, row_scores in scores.items()}  # exact: ties are ties
    pilot = next(choice for choice in scores if choice[1] == 0)
    best = max(scores, key=lambda choice: (total[choice], -nll.get(choice, 0.0)))
    return best if total[best] > total[pilot] else pilot
