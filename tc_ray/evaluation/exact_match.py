"""The metric of completions: is the final answer the gold answer?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tc_ray.config.fusion import FusionSection
from tc_ray.evaluation.decode import complete
from tc_ray.evaluation.heldout import HeldOut
from tc_ray.evaluation.metric import Measure, Outcome
from tc_ray.evaluation.scoring import matches


class ExactMatch:
    """Decodes with `config.num_beams` beams and compares final answers."""

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
