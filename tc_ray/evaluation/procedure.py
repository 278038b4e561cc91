"""Evaluate a fused model: choose lambda on validation data, apply it once to the test data, report.

`evaluate` is the whole procedure on loaded models, for any metric; `evaluate_pilot` is that of a run without a Copilot. Both
are called by `task`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tc_ray.config.fusion import FusionSection
from tc_ray.data.prepared.left_out import LeftOut
from tc_ray.evaluation.heldout import HeldOut
from tc_ray.evaluation.metric import Metric, Outcome
from tc_ray.evaluation.report import Report
from tc_ray.evaluation.selection import Choice, Comparison, choose
from tc_ray.evaluation.teacher_forced import TeacherForced, teacher_forced
from tc_ray.models.folder import SPACES
from tc_ray.models.fusion import FusedModel

MAX_EXAMPLES_SHOWN = 12


def evaluate(
    fused: FusedModel,
    metric: Metric,
    config: FusionSection,
    *,
    validation: Sequence[HeldOut],
    test: Sequence[HeldOut],
    data: str,
    seen_error_size: float | None = None,
    left_out: Mapping[str, LeftOut] | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Choose (space, lam) on `validation`, then compare Pilot and fused on `test` once.

    Args:
        data: what the test rows are, for the report.
        seen_error_size: mean squared logged error of the last rounds, for the report.
        left_out: rows missing from "validation" and "test", for the report.
    """
    if not validation:
        raise ValueError("no validation rows: lambda cannot be chosen (data.validation or data.validation_size)")
    spaces = SPACES if config.space == "choose" else (config.space,)
    pilot_choice: Choice = (spaces[0], 0.0)
    choices = [pilot_choice] + [(space, lam) for space in spaces for lam in config.lam_grid if lam > 0]
    forced = teacher_forced(fused, validation, choices, batch_size=config.eval_batch_size)

    def ask(examples: Sequence[HeldOut], choice: Choice, what: str) -> Outcome:
        fused.space = choice[0]
        on_progress(f"evaluate: {what}, lambda {choice[1]:g} in {choice[0]} space, {len(examples)} rows")
        return metric.outcome(fused, examples, choice[1])

    tried = {choice: ask(validation, choice, "validation") for choice in choices}
    chosen = choose(
        {choice: outcome.score for choice, outcome in tried.items()},
        {choice: measured.nll for choice, measured in forced.items()},
    )
    of_pilot = ask(test, pilot_choice, "test")
    of_fused = ask(test, chosen, "test") if chosen != pilot_choice else of_pilot
    # test files often hold answers only; then the gold tokens of the validation rows are measured instead
    both = list(dict.fromkeys([pilot_choice, chosen]))
    measured = teacher_forced(fused, test, both, batch_size=config.eval_batch_size)
    measured = measured or {choice: forced[choice] for choice in both if choice in forced}
    fused.space = chosen[0]
    changed = [i for i in range(len(test)) if of_pilot.right[i] != of_fused.right[i]][:MAX_EXAMPLES_SHOWN]
    return Report(
        data=data,
        space=chosen[0],
        lam=chosen[1],
        feedback=fused.feedback,
        comparison=Comparison.of(of_pilot.right, of_fused.right),
        pilot_forced=measured.get(pilot_choice),
        fused_forced=measured.get(chosen),
        right_name=metric.right_name,
        score_name=metric.score_name,
        measures=metric.measures(of_pilot, of_fused),
        validation=[
            _tried(choice, outcome, tried[pilot_choice], forced.get(choice)) for choice, outcome in tried.items()
        ],
        seen_error_size=seen_error_size,
        heldout_error_size=forced[pilot_choice].squared_error if forced else None,
        left_out=dict(left_out or {}),
        validation_rows=len(validation),
        examples=[
            {"prompt": test[i].prompt, "answer": test[i].answer, "pilot": of_pilot.said[i], "fused": of_fused.said[i]}
            for i in changed
        ],
    )


def _tried(choice: Choice, outcome: Outcome, pilot: Outcome, forced: TeacherForced | None) -> dict[str, Any]:
    """One row of the report's validation sweep."""
    compared = Comparison.of(pilot.right, outcome.right)
    return {
        "space": choice[0],
        "lam": choice[1],
        "score": sum(outcome.score) / compared.rows,
        "right": compared.fused_correct / compared.rows,
        "wins": compared.wins,
        "losses": compared.losses,
        "nll": forced.nll if forced else math.nan,
        "error_ratio": forced.error_ratio if forced else math.nan,
    }


def evaluate_pilot(
    pilot: Any,
    metric: Metric,
    config: FusionSection,
    *,
    test: Sequence[HeldOut],
    data: str,
    no_copilot: str,
    left_out: Mapping[str, LeftOut] | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure the Pilot alone on `test`, as lambda 0 would be.

    Args:
        pilot: language model. no_copilot: why there is no Copilot, for the report. The others as for `evaluate`.
    """
    on_progress(f"evaluate: test, the Pilot alone, {len(test)} rows")
    outcome = metric.outcome(pilot, test, None)
    return Report(
        data=data,
        space=SPACES[0] if config.space == "choose" else config.space,
        lam=0.0,
        feedback=config.feedback,
        comparison=Comparison.of(outcome.right, outcome.right),
        pilot_forced=None,
        fused_forced=None,
        right_name=metric.right_name,
        score_name=metric.score_name,
        measures=metric.measures(outcome, outcome),
        left_out=dict(left_out or {}),
        no_copilot=no_copilot,
    )
