"""Evaluate a run whose Pilot and Copilot are trained: the job's task, and `tc-ray eval` on other data.

A run whose Copilot failed for good has a Pilot all the same: it is measured alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tc_ray.config.schema import RunConfig
from tc_ray.data.source.sequences import ITEMS_FILE, read_items
from tc_ray.evaluation.exact_match import ExactMatch
from tc_ray.evaluation.heldout import read_counted
from tc_ray.evaluation.metric import Metric
from tc_ray.evaluation.procedure import evaluate, evaluate_pilot
from tc_ray.evaluation.ranking import Ranking
from tc_ray.evaluation.report import Report


def evaluate_finished(
    config: RunConfig,
    source: str,
    tracker: Any,
    *,
    test_file: Path | None = None,
    seen_error_size: float | None = None,
    no_copilot: str | None = None,
) -> Report:
    """Load `pilot/final` and `copilot/final`, choose lambda on the validation rows and measure the test rows.

    Args:
        source: what the test rows are, for the report.
        tracker: Tracker actor that hears of progress, or None.
        test_file: prepared test.parquet; default the run's own.
        seen_error_size: mean squared logged error of the log's last rounds, for the report.
        no_copilot: why there is no Copilot; the Pilot is then measured alone.
    """
    import torch
    from transformers import AutoTokenizer

    from tc_ray.models.copilot import Copilot
    from tc_ray.models.fusion import FusedModel
    from tc_ray.models.pilot.load import DTYPES, load_pilot

    folder, resources = config.run.path, config.resources
    torch.set_num_threads(
        max(
            1, resources.pilot_threads * resources.pilot_workers + resources.copilot_threads * resources.copilot_workers
        )
    )
    device = "cuda" if resources.gpus else "cpu"
    dtype = DTYPES[config.pilot.dtype]  # the Copilot learned from states of this precision
    if tracker is not None:
        tracker.waiting.remote("evaluation", "loading weights")
    pilot = load_pilot(folder / "pilot" / "final", dtype=dtype)
    # a file that the user names is measured whole
    test, without_test = read_counted(
        test_file or folder / "data" / "test.parquet", None if test_file else config.fusion.max_test_rows
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "pilot" / "final", trust_remote_code=False)

    def heard(line: str) -> None:
        if tracker is not None:
            tracker.waiting.remote("evaluation", "")
            tracker.event.remote("evaluate", line)

    fusion = config.fusion
    if no_copilot is not None:
        metric = _metric(config, tokenizer, pilot.config.vocab_size)
        return evaluate_pilot(
            pilot.to(device),
            metric,
            fusion,
            test=test,
            data=source,
            no_copilot=no_copilot,
            left_out={"test": without_test},
            on_progress=heard,
        )
    validation, without_validation = read_counted(folder / "data" / "validation.parquet", fusion.max_validation_rows)
    copilot = Copilot.from_pretrained(folder / "copilot" / "final", dtype=dtype)
    fused = FusedModel.join(pilot, copilot, feedback=config.fusion.feedback).to(device)
    return evaluate(
        fused,
        _metric(config, tokenizer, fused.vocab_size),
        fusion,
        validation=validation,
        test=test,
        data=source,
        seen_error_size=seen_error_size,
        left_out={"validation": without_validation, "test": without_test},
        on_progress=heard,
    )


def _metric(config: RunConfig, tokenizer: Any, vocab_size: int) -> Metric:
    """The metric of the config, with what it needs of the run's data."""
    if config.fusion.metric == "exact_match":
        return ExactMatch(tokenizer, config.fusion)
    labels = read_items(config.run.path / "data" / ITEMS_FILE)
    return Ranking(tokenizer, config.fusion, labels, vocab_size)
