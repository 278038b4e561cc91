"""The last phases of a run, and `tc-ray eval`: measure Pilot and fused model on held-out rows, export what was measured.

Invariant: every start repeats both, since they are made from the two `final` folders alone. Evaluation is a Ray task of its
own. Called by `run.job` and `tc-ray eval`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tc_ray.cluster.capacity import check_capacity
from tc_ray.cluster.session import evaluation_need, ray_session
from tc_ray.config.load import load_saved_config
from tc_ray.config.schema import RunConfig
from tc_ray.evaluation.report import Report
from tc_ray.run.state import Run
from tc_ray.text import visible

NEEDED = ("config.yaml", "pilot/final/config.json", "copilot/final/config.json", "data/validation.parquet")


class NotFinishedError(RuntimeError):
    """The folder is no run that can be evaluated; the message says what is missing."""


def evaluate(run: Run) -> None:
    """Leaves `run.report`, evaluation.json and evaluation.md."""
    report = launch_evaluation(run.config, run.prepared.data.source, run.tracker, no_copilot=run.no_copilot)
    report.save(run.folder)
    run.tracker.evaluation.remote(report.to_dict(), report.markdown())
    run.report = report


def export(run: Run) -> None:
    """Leaves `export/`: both models (the Pilot alone if the Copilot failed) and how to join them."""
    from tc_ray.export.write import export_fused

    assert run.report is not None
    run.export = export_fused(run.config, run.report, rounds=run.prepared.rounds)
    if run.config.tracking.log_model:
        run.tracker.artifact.remote(run.export, "export")


def launch_evaluation(config: RunConfig, source: str, tracker: Any = None, **options: Any) -> Report:
    """Run `evaluate_finished` as a Ray task with the CPUs (and the GPU) of `evaluation_need`; blocks until it is done.

    Args:
        source: what the test rows are, for the report. tracker: Tracker actor that is given progress; None: it is printed.
        options: further arguments of `evaluate_finished`.
    """
    import ray

    from tc_ray.evaluation.procedure import evaluate_finished

    need = evaluation_need(config)
    if tracker is None:
        print(visible(f"evaluation: {need.starting()}"), flush=True)
    else:
        tracker.waiting.remote("evaluation", need.starting())
    task = ray.remote(evaluate_finished).options(num_cpus=need.bundle["CPU"], num_gpus=need.bundle.get("GPU", 0))
    report: Report = ray.get(task.remote(config, source, tracker, **options))
    return report


def evaluate_run(folder: Path, data: Path | None) -> tuple[Report, Path]:
    """Choose lambda on the run's validation rows, apply it once to the test rows; returns the report and its file.

    Args:
        data: JSON, JSONL or Parquet file; None takes the run's own test rows.

    Raises NotFinishedError: parts of the run are missing. DataError: `data` cannot be read.
    """
    folder = folder.expanduser().absolute()
    missing = [part for part in NEEDED if not (folder / part).is_file()]
    if missing:
        raise NotFinishedError(
            f"{folder} cannot be evaluated: {', '.join(missing)} missing (has `tc-ray train` ended?)"
        )
    config = load_saved_config(folder / "config.yaml")
    config.run.folder = folder
    stem, test_file, source = "evaluation", None, "the run's own test split"
    with ray_session(config):
        check_capacity([], [evaluation_need(config)])
        if data is not None:
            stem = "evaluation-" + re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(data.absolute().parts[-2:]))
            test_file, source = _prepare(config, data, folder / "data" / stem), str(data)
        report = launch_evaluation(config, source, test_file=test_file)
    report.save(folder, stem)
    return report, folder / f"{stem}.md"


def _prepare(config: RunConfig, data: Path, folder: Path) -> Path:
    from transformers import AutoConfig, AutoTokenizer

    from tc_ray.data.encode.encode import Encoder
    from tc_ray.data.prepared.prepare import prepare_test_file

    pilot = config.run.path / "pilot" / "final"
    shape = AutoConfig.from_pretrained(pilot, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(pilot, trust_remote_code=False)
    encoder = Encoder(config.data, tokenizer, config.data_seed, shape.is_encoder_decoder, shape.vocab_size)
    prepared = prepare_test_file(encoder, str(data), folder)
    for line in prepared.notes:
        print(visible(line), flush=True)
    return prepared.file("test")
