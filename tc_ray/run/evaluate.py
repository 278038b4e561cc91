"""Evaluate a trained run in a Ray task of its own: the job's phase, and `tc-ray eval` on the run's test rows or on other data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tc_ray.cluster.capacity import check_capacity
from tc_ray.cluster.session import evaluation_need, ray_session
from tc_ray.config.load import load_saved_config
from tc_ray.config.schema import RunConfig
from tc_ray.evaluation.report import Report
from tc_ray.text import visible

NEEDED = ("config.yaml", "pilot/final/config.json", "copilot/final/config.json", "data/validation.parquet")


class NotFinishedError(RuntimeError):
    """The folder is no run that can be evaluated; the message says what is missing."""


def launch_evaluation(config: RunConfig, source: str, tracker: Any = None, **options: Any) -> Report:
    """Run `evaluate_finished` as a Ray task with the CPUs (and the GPU) of `evaluation_need`; blocks until it is done.

    Args:
        source: what the test rows are, for the report. tracker: Tracker actor that is given progress; None: it is printed.
        options: further arguments of `evaluate_finished`.
    """
    import ray

    from tc_ray.evaluation.task import evaluate_finished

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
        folder: run folder. data: JSON, JSONL or Parquet file; None takes the run's own test rows.

    Raises:
        NotFinishedError: parts of the run are missing. DataError: `data` cannot be read.
    """
    folder = folder.expanduser().absolute()
    missing = [part for part in NEEDED if not (folder / part).is_file()]
    if missing:
        raise NotFinishedError(
            f"{folder} cannot be evaluated: {', '.join(missing)} missing (has `tc-ray train` ended?)"
        )
    config = load_saved_config(folder / "config.yaml")
    config.run.folder = folder
    report, stem = _evaluate(config, data)
    report.save(folder, stem)
    return report, folder / f"{stem}.md"


def _evaluate(config: RunConfig, data: Path | None) -> tuple[Report, str]:
    from transformers import AutoConfig, AutoTokenizer

    from tc_ray.data.encode.encode import Encoder
    from tc_ray.data.prepared.prepare import prepare_test_file
    from tc_ray.data.source.sequences import ITEMS_FILE
    from tc_ray.models.hub import embedding_rows

    folder = config.run.path
    with ray_session(config):
        check_capacity([], [evaluation_need(config)])
        test_file, source, stem = None, "the run's own test split", "evaluation"
        if data is not None:
            stem = "evaluation-" + re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(data.absolute().parts[-2:]))
            tokenizer = AutoTokenizer.from_pretrained(folder / "pilot" / "final", trust_remote_code=False)
            shape = AutoConfig.from_pretrained(folder / "pilot" / "final", trust_remote_code=False)
            rows = embedding_rows(folder / "pilot" / "final", shape)
            encoder = Encoder(config.data, tokenizer, config.run.seed, shape.is_encoder_decoder, rows)
            items = folder / "data" / ITEMS_FILE
            prepared = prepare_test_file(encoder, str(data), folder / "data" / stem, items=items)
            for line in prepared.notes:
                print(visible(line), flush=True)
            test_file, source = prepared.file("test"), str(data)
        return launch_evaluation(config, source, test_file=test_file), stem
