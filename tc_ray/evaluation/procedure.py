"""Evaluate a fused model: choose lambda on validation data, apply it once to the test data, report.

`evaluate` is the whole procedure on a loaded model, for any metric. `evaluate_finished` is the body of the Ray task of
`run.evaluate`: it loads the models of a run's folder; if the Copilot failed for good, the Pilot is measured alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tc_ray.config.fusion import FusionSection
from tc_ray.config.schema import RunConfig
from tc_ray.data.prepared.folder import LeftOut
from tc_ray.data.source.sequences import ITEMS_FILE, read_items
from tc_ray.evaluation.decode import HeldOut, read_counted
from tc_ray.evaluation.metric import ExactMatch, Metric, Outcome
from tc_ray.evaluation.ranking import Ranking
from tc_ray.evaluation.report import Report
from tc_ray.evaluation.statistics import Choice, Comparison, choose
from tc_ray.evaluation.teacher_forced import TeacherForced, teacher_forced
from tc_ray.models.folder import SPACES

MAX_EXAMPLES_SHOWN = 12


def evaluate(
    model: Any,
    metric: Metric,
    config: FusionSection,
    *,
    test: Sequence[HeldOut],
    data: str,
    validation: Sequence[HeldOut] = (),
    no_copilot: str | None = None,
    left_out: Mapping[str, LeftOut] | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Choose (space, lam) on `validation`, then compare Pilot and fused model on `test` once.

    Args:
        model: a FusedModel; or a Pilot, which is measured as lambda 0 would be. no_copilot: why it is one, for the report.
        data: what the test rows are, for the report.
        left_out: rows missing from "validation" and "test", for the report.
    """
    spaces = SPACES if config.space == "choose" else (config.space,)
    pilot_choice: Choice = (spaces[0], 0.0)

    def ask(examples: Sequence[HeldOut], choice: Choice, what: str) -> Outcome:
        if no_copilot is not None:
            on_progress(f"evaluate: {what}, the Pilot alone, {len(examples)} rows")
            return metric.outcome(model, examples, None)
        model.space = choice[0]
        on_progress(f"evaluate: {what}, lambda {choice[1]:g} in {choice[0]} space, {len(examples)} rows")
        return metric.outcome(model, examples, choice[1])

    tried: dict[Choice, Outcome] = {}
    forced: dict[Choice, TeacherForced] = {}
    chosen = pilot_choice
    if no_copilot is None:
        if not validation:
            raise ValueError("no validation rows: lambda cannot be chosen (data.validation or data.validation_size)")
        choices = [pilot_choice] + [(space, lam) for space in spaces for lam in config.lam_grid if lam > 0]
        forced = teacher_forced(model, validation, choices, batch_size=config.eval_batch_size)
        tried = {choice: ask(validation, choice, "validation") for choice in choices}
        chosen = choose(
            {choice: outcome.score for choice, outcome in tried.items()},
            {choice: measured.nll for choice, measured in forced.items()},
        )
    of_pilot = ask(test, pilot_choice, "test")
    of_fused = ask(test, chosen, "test") if chosen != pilot_choice else of_pilot
    measured: dict[Choice, TeacherForced] = {}
    if no_copilot is None:
        both = list(dict.fromkeys([pilot_choice, chosen]))
        # test files often hold answers only; then the gold tokens of the validation rows are measured instead
        measured = teacher_forced(model, test, both, batch_size=config.eval_batch_size) or forced
    changed = [i for i in range(len(test)) if of_pilot.right[i] != of_fused.right[i]][:MAX_EXAMPLES_SHOWN]
    return Report(
        data=data,
        space=chosen[0],
        lam=chosen[1],
        feedback=config.feedback,
        comparison=Comparison.of(of_pilot.right, of_fused.right),
        pilot_forced=measured.get(pilot_choice),
        fused_forced=measured.get(chosen),
        right_name=metric.right_name,
        score_name=metric.score_name,
        measures=metric.measures(of_pilot, of_fused),
        validation=[
            _tried(choice, outcome, tried[pilot_choice], forced.get(choice)) for choice, outcome in tried.items()
        ],
        left_out=dict(left_out or {}),
        validation_rows=len(validation),
        examples=[
            {"prompt": test[i].prompt, "answer": test[i].answer, "pilot": of_pilot.said[i], "fused": of_fused.said[i]}
            for i in changed
        ],
        no_copilot=no_copilot,
    )


def _tried(choice: Choice, outcome: Outcome, pilot: Outcome, forced: TeacherForced | None) -> dict[str, Any]:
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


def evaluate_finished(
    config: RunConfig,
    source: str,
    tracker: Any,
    *,
    test_file: Path | None = None,
    no_copilot: str | None = None,
) -> Report:
    """Load `pilot/final` and `copilot/final`, choose lambda on the validation rows and measure the test rows.

    Args:
        source: what the test rows are, for the report.
        tracker: Tracker actor that is given progress, or None.
        test_file: prepared test.parquet, measured whole; default the run's own, up to `fusion.max_test_rows`.
        no_copilot: why there is no Copilot; the Pilot is then measured alone.
    """
    import torch
    from transformers import AutoTokenizer

    from tc_ray.models.copilot import Copilot
    from tc_ray.models.fusion import FusedModel
    from tc_ray.models.pilot.load import DTYPES, load_pilot

    folder, resources, fusion = config.run.path, config.resources, config.fusion
    threads = resources.pilot_threads * resources.pilot_workers + resources.copilot_threads * resources.copilot_workers
    torch.set_num_threads(max(1, threads))
    device = "cuda" if resources.gpus else "cpu"
    dtype = DTYPES[config.pilot.dtype]  # the Copilot learned from states of this precision
    if tracker is not None:
        tracker.waiting.remote("evaluation", "loading weights")
    pilot = load_pilot(folder / "pilot" / "final", dtype=dtype)
    rows = None if test_file else fusion.max_test_rows
    test, without_test = read_counted(test_file or folder / "data" / "test.parquet", rows)
    tokenizer = AutoTokenizer.from_pretrained(folder / "pilot" / "final", trust_remote_code=False)
    metric = _metric(config, tokenizer)

    def report_progress(line: str) -> None:
        if tracker is not None:
            tracker.waiting.remote("evaluation", "")
            tracker.event.remote("evaluate", line)

    left_out = {"test": without_test}
    common: dict[str, Any] = {"test": test, "data": source, "on_progress": report_progress, "left_out": left_out}
    if no_copilot is not None:
        return evaluate(pilot.to(device), metric, fusion, no_copilot=no_copilot, **common)
    validation, left_out["validation"] = read_counted(
        folder / "data" / "validation.parquet", fusion.max_validation_rows
    )
    copilot = Copilot.from_pretrained(folder / "copilot" / "final", dtype=dtype)
    fused = FusedModel.join(pilot, copilot, feedback=fusion.feedback).to(device)
    return evaluate(fused, metric, fusion, validation=validation, **common)


def _metric(config: RunConfig, tokenizer: Any) -> Metric:
    """The metric of the config, with what it needs of the run's data."""
    if config.fusion.metric == "exact_match":
        return ExactMatch(tokenizer, config.fusion)
    labels = read_items(config.run.path / "data" / ITEMS_FILE)
    return Ranking(tokenizer, config.fusion, labels)
