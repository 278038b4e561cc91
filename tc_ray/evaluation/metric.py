"""What an evaluation measures: the interface of a metric, and what it tells about one model on held-out rows.

`exact_match` and `ranking` are the two metrics; `run.evaluate` knows only this interface.
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

    right: what wins and losses are counted by. score: what lambda is chosen by, higher is better. said: for people.
    columns: further measures by name.
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
    """How answers are asked for and scored. right_name, score_name: what `right` and `score` of an Outcome are called."""

    right_name: str
    score_name: str

    def outcome(self, fused: Any, examples: Sequence[HeldOut], lam: float) -> Outcome:
        """Ask `fused` with this lambda and score its answers."""

    def measures(self, pilot: Outcome, fused: Outcome) -> list[Measure]:
        """Table beside the paired comparison of `right`; the row named `score_name`, if any, decides the verdict."""
