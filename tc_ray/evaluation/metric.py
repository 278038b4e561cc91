"""The interface of a metric, which is all that `procedure` knows, and the metric of completions; `ranking` is the other one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tc_ray.config.fusion import FusionSection
from tc_ray.evaluation.decode import HeldOut, complete
from tc_ray.evaluation.scoring import matches
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


class ExactMatch:
    """Is the final answer the gold answer? Decodes with `config.num_beams` beams."""

    right_name = score_name = "accuracy"

    def __init__(self, tokenizer: Any, config: FusionSection) -> None:
        self._tokenizer, self._config = tokenizer, config

    def outcome(self, model: Any, examples: Sequence[HeldOut], lam: float | None) -> Outcome:
        """Completions; a right one scores 1."""
        texts = complete(
            model,
            self._tokenizer,
            examples,
            max_new_tokens=self._config.max_new_tokens,
            batch_size=self._config.eval_batch_size,
            num_beams=self._config.num_beams,
            lam=lam,
        )
        right = [matches(text, e.answer) for text, e in zip(texts, examples, strict=True)]
        return Outcome(right, [float(is_right) for is_right in right], texts, {})

    def measures(self, pilot: Outcome, fused: Outcome) -> list[Measure]:
        """None: wins, losses and accuracies are all there is."""
        return []
