"""The interface of a metric: what it measures of one model on held-out rows.

`exact_match` and `ranking` are the two metrics; `procedure` knows only this interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tc_ray.evaluation.heldout import HeldOut
from tc_ray.evaluation.statistics import Interval


@dataclass(frozen=True)
class Outcome:
    """One model on held-out rows, row by row.

    right: decides wins and losses. score: decides lambda, higher is better. said: the answer as text. columns: further
    measures by name.
    """

    right: list[bool]
    score: list[float]
    said: list[str]
    columns: dict[str, list[float]]


@dataclass(frozen=True)
class Measure:
    """Mean of one column for Pilot and fused model on the same rows, each with its 95% interval, and the paired difference."""

    name: str
    pilot: float
    pilot_interval: Interval
    fused: float
    fused_interval: Interval
    difference: float
    difference_interval: Interval


class Metric(Protocol):
    """How answers are generated and scored. right_name, score_name: names of `right` and `score` of an Outcome."""

    right_name: str
    score_name: str

    def outcome(self, model: Any, examples: Sequence[HeldOut], lam: float | None) -> Outcome:
        """Generate answers and score them. model: a fused model with this lambda, or a Pilot and None."""

    def measures(self, pilot: Outcome, fused: Outcome) -> list[Measure]:
        """Table beside the paired comparison of `right`; a row named `score_name` decides the verdict."""
