"""`tc-ray eval`: compare Pilot and fused model of a run on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tc_ray.cli.command import say


def evaluate(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a run that has ended.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="JSON, JSONL or Parquet file; default: the run's test split.")
    ] = None,
) -> None:
    """Choose lambda on the run's validation split, apply it once to the data, and print Pilot against fused."""
    from tc_ray.run.evaluate import evaluate_run

    report, where = evaluate_run(run_folder, data)
    say("\n".join([*report.lines(), "", f"report: {where}"]))
