"""Evaluate a fused model: choose lambda on validation data, apply it once to the test data, report.

`evaluate` is the whole procedure on loaded models; the job runs it as a Ray task after training, `tc-ray eval` calls it
for any exported run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tc_ray.config.schema import FusionSection
from tc_ray.evaluation.decode import complete
from tc_ray.evaluation.heldout import HeldOut
from tc_ray.evaluation.report import Report
from tc_ray.evaluation.scoring import matches
from tc_ray.evaluation.selection import Choice, Comparison, choose
from tc_ray.evaluation.teacher_forced import teacher_forced
from tc_ray.models.fusion import SPACES, FusedModel

MAX_EXAMPLES_SHOWN = 12


def evaluate(
    fused: FusedModel,
    tokenizer: Any,
    config: FusionSection,
    *,
    validation: Sequence[HeldOut],
    test: Sequence[HeldOut],
    data: str,
    seen_error_size: float | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Choose (space, lam) on `validation`, then compare Pilot and fused on `test` once.

    Args:
        data: what the test rows are, for the report.
        seen_error_size: mean squared logged error of the last rounds, for the report.
    """
    if not validation:
        raise ValueError("no validation rows: lambda cannot be chosen (data.validation or data.validation_size)")
    spaces = SPACES if config.space == "choose" else (config.space,)
    pilot_choice: Choice = (spaces[0], 0.0)
    choices = [pilot_choice] + [(space, lam) for space in spaces for lam in config.lam_grid if lam > 0]
    forced = teacher_forced(fused, validation, choices, batch_size=config.eval_batch_size)

    def texts(examples: Sequence[HeldOut], choice: Choice, what: str) -> list[str]:
        fused.space = choice[0]
        on_progress(f"evaluate: {what}, lambda {choice[1]:g} in {choice[0]} space, {len(examples)} rows")
        return complete(
            fused,
            tokenizer,
            examples,
            lam=choice[1],
            max_new_tokens=config.max_new_tokens,
            batch_size=config.eval_batch_size,
        )

    correct = {
        choice: [
            matches(text, e.answer) for text, e in zip(texts(validation, choice, "validation"), validation, strict=True)
        ]
        for choice in choices
    }
    chosen = choose(correct, {choice: measured.nll for choice, measured in forced.items()})
    sweep = []
    for choice in choices:
        compared = Comparison.of(correct[pilot_choice], correct[choice])
        sweep.append(
            {
                "space": choice[0],
                "lam": choice[1],
                "accuracy": compared.fused_correct / compared.rows,
                "wins": compared.wins,
                "losses": compared.losses,
                "nll": forced[choice].nll if choice in forced else float("nan"),
                "error_ratio": forced[choice].error_ratio if choice in forced else float("nan"),
            }
        )
    # when validation chose lam 0 the best correction is still shown, so that the reader sees what it would have done
    shown = chosen if chosen[1] > 0 else pilot_choice
    pilot_texts = texts(test, pilot_choice, "test")
    fused_texts = texts(test, shown, "test") if shown[1] > 0 else pilot_texts
    pilot_right = [matches(text, e.answer) for text, e in zip(pilot_texts, test, strict=True)]
    fused_right = [matches(text, e.answer) for text, e in zip(fused_texts, test, strict=True)]
    # test files often hold answers only; then the gold tokens of the validation rows are measured
    both = list(dict.fromkeys([pilot_choice, shown]))
    measured = teacher_forced(fused, test, both, batch_size=config.eval_batch_size)
    measured = measured or {choice: forced[choice] for choice in both if choice in forced}
    fused.space = shown[0]
    changed = [i for i in range(len(test)) if pilot_right[i] != fused_right[i]][:MAX_EXAMPLES_SHOWN]
    return Report(
        data=data,
        space=shown[0],
        lam=shown[1],
        feedback=fused.feedback,
        comparison=Comparison.of(pilot_right, fused_right),
        pilot_forced=measured.get(pilot_choice),
        fused_forced=measured.get(shown),
        validation=sweep,
        seen_error_size=seen_error_size,
        heldout_error_size=forced[pilot_choice].squared_error if forced else None,
        examples=[
            {
                "prompt": tokenizer.decode(test[i].prompt_ids, skip_special_tokens=True),
                "answer": test[i].answer,
                "pilot": pilot_texts[i],
                "fused": fused_texts[i],
            }
            for i in changed
        ],
    )
