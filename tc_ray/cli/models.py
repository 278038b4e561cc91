"""`tc-ray eval`, `tc-ray fuse`, `tc-ray serve`: what is done with the models of a run that has ended."""

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


def fuse(
    pilot: Annotated[str, typer.Option(help="Model folder, or exported run whose Pilot is taken.")],
    copilot: Annotated[Path, typer.Option(help="Exported run whose Copilot is taken, or copilot/final of a run.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    lam: Annotated[
        float | None, typer.Option(help="Weight of the correction; default: the exported run's, else 0.5.")
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="probability or logits; default: the exported run's, else probability.")
    ] = None,
    feedback: Annotated[
        str | None, typer.Option(help="own or realised; default: the exported run's, else own.")
    ] = None,
) -> None:
    """Write a fused model of a Pilot and a Copilot that was trained beside another Pilot with the same tokenizer."""
    from tc_ray.export.join import fuse_models

    fusion = fuse_models(pilot, copilot, out, lam=lam, space=space, feedback=feedback)
    say("\n".join(fusion.lines()))


def serve(
    arguments: Annotated[
        list[str],
        typer.Argument(
            help="Folders of runs that have ended, or exported models; NAME=FOLDER names one. Then settings, such as "
            "serving.max_tokens=256 (docs/config.md).",
            metavar="RUN... [serving.FIELD=VALUE]...",
        ),
    ],
    config: Annotated[
        Path | None, typer.Option(help="YAML file whose `serving` section counts instead of that of the run's recipe.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (serving.host); one that others can reach needs a key.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (serving.port).")] = None,
) -> None:
    """Serve exported runs as an OpenAI-compatible endpoint, until Ctrl-C. SIGUSR1 loads Copilots that have changed."""
    from tc_ray.serving.deploy.launch import serve_until_stopped
    from tc_ray.serving.deploy.settings import command_settings

    address = {"host": host, "port": port}
    overrides = [f"serving.{name}={value}" for name, value in address.items() if value is not None]
    serve_until_stopped(command_settings([*arguments, *overrides], config))
