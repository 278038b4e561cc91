"""`tc-ray train`: run the main job of a recipe, or print what it would do. `jobs/train.py` calls `start` too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tc_ray.cli.command import say

if TYPE_CHECKING:
    from tc_ray.config.schema import RunConfig
    from tc_ray.run.job import JobResult

UPLOADED = "working_dir_files"
"""Folder of Ray's runtime resources that holds uploaded working directories."""


def train(
    recipe: Annotated[
        Path, typer.Argument(help="YAML file of the run, or the name of a recipe of tc-ray, such as demo.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Change fields, e.g. pilot.epochs=2.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the resolved plan and start nothing.")] = False,
    on: Annotated[
        str | None,
        typer.Option(
            "--on", metavar="NODES", help="Plan for nodes: 8x80 (8 GPUs of 80 GB), 2x8x80+1000 (two, RAM each)."
        ),
    ] = None,
) -> None:
    """Train Pilot and Copilot, evaluate, export. Starts a local Ray or joins RAY_ADDRESS; an existing run is resumed."""
    if on is not None and not plan:
        raise typer.BadParameter("it describes the nodes of a plan: give --plan too", param_hint="--on")
    start(recipe, overrides or [], only_plan=plan, on=on)


def start(recipe: Path, overrides: Sequence[str], only_plan: bool = False, on: str | None = None) -> None:
    """Load the config, then print its plan (`on`: for these nodes, see `nodes.described`) or run it.

    Raises JobError if the run would refuse its plan, ValueError for another form of `on`, and what the job raises.
    """
    from tc_ray.config.load import load_config

    config = load_config(recipe, overrides)
    keep_outside_upload(config)
    if only_plan:
        from tc_ray.run.plan.nodes import described
        from tc_ray.run.plan.plan import make_plan
        from tc_ray.run.state import JobError

        made = make_plan(config, None if on is None else described(on))
        say(str(made))
        if made.refusals:
            raise JobError(f"the run would refuse: {'; '.join(made.refusals)}")
        return
    from tc_ray.run.job import NoCopilotError, run_job

    try:
        result = run_job(config)
    except NoCopilotError as error:
        say("\n".join(summary(error.result)))
        raise
    say("\n".join(summary(result)))


def keep_outside_upload(config: RunConfig) -> None:
    """Move a relative run folder out of the directory that `ray job submit` uploaded, since Ray deletes that directory."""
    if UPLOADED not in Path.cwd().parts or (config.run.folder and config.run.folder.is_absolute()):
        return
    relative = config.run.folder or Path("outputs") / config.run.name
    config.run.folder = Path.home() / "tc-ray" / relative
    say(f"run folder {config.run.folder} (the uploaded working directory is deleted; run.folder=/path chooses)")


def summary(result: JobResult) -> list[str]:
    """The results of a run and what to do with them, as lines."""
    from tc_ray.run.costs.measured import read_costs
    from tc_ray.run.costs.tables import lines as cost_lines

    costs = cost_lines(read_costs(result.folder))
    if result.report is None or result.export is None:
        return [*costs, f"done: {result.folder} (log.enabled is false: plain fine-tuning, no Copilot)"]
    lines = ["", *result.report.lines(), "", *costs]
    lines += [f"report    {result.folder / 'evaluation' / 'report.md'}", f"losses    {result.folder / 'losses.png'}"]
    if result.report.first.no_copilot is not None:
        return [*lines, f"exported  {result.export} (pilot/ alone)"]
    seq2seq = json.loads((result.export / "pilot" / "config.json").read_text()).get("is_encoder_decoder")
    lines.append(
        f"exported  {result.export} (pilot/ loads with plain AutoModelFor{'Seq2SeqLM' if seq2seq else 'CausalLM'})"
    )
    if not seq2seq:
        lines.append(f"serve     tc-ray serve {result.folder}")
    return lines + ([f"mlflow    {result.mlflow_command}"] if result.mlflow_command else [])
