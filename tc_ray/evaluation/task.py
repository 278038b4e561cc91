"""Evaluate a run whose Pilot and Copilot are trained, from its folder: the body of the Ray task of `run.evaluate`.

If the run's Copilot failed for good, the Pilot is measured alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tc_ray.config.schema import RunConfig
from tc_ray.data.source.sequences import ITEMS_FILE, read_items
from tc_ray.evaluation.heldout import read_counted
from tc_ray.evaluation.metric import ExactMatch, Metric
from tc_ray.evaluation.procedure import evaluate
from tc_ray.evaluation.ranking import Ranking
from tc_ray.evaluation.report import Report


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

    common: dict[str, Any] = {
        "test": test,
        "data": source,
        "on_progress": report_progress,
        "left_out": {"test": without_test},
    }
    if no_copilot is not None:
        return evaluate(pilot.to(device), metric, fusion, no_copilot=no_copilot, **common)
    validation, common["left_out"]["validation"] = read_counted(
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
