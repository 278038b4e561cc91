"""`tc-ray eval`, `tc-ray fuse`, `tc-ray serve`: what is done with the models of a run that has ended."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from tc_ray.cli.command import say
from tc_ray.config.data import SET_NAME
from tc_ray.config.section import check_metric


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders of runs that have ended, exported or fused folders, model folders or hub ids; NAME=FOLDER names one.",
            metavar="MODEL...",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="A test set: JSON, JSONL or Parquet; default: the sets of the first run."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=METRIC",
            help="What a set is measured by: exact_match, choice, ranking, nll, chrf or module:function.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TASK", help="Form of a set's records: a known task (docs/evaluation.md), or a YAML file."
        ),
    ] = None,
    choose_again: Annotated[
        bool, typer.Option("--choose-again", help="Choose lambda anew, where a run or an export has one.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; default: evaluation in the run's folder, for several models here."),
    ] = None,
) -> None:
    """Measure models on test sets: Pilots, fused models, or both of each run, with paired tests between any two."""
    from tc_ray.run.evaluate import Asked, evaluate_models

    metrics = _named("--metric", metric)
    for name, value in metrics.items():
        try:
            check_metric(value)
        except ValueError as error:
            raise typer.BadParameter(f"--metric {name}={value}: {error}") from None
    asked = Asked(_named("--data", data), metrics, _named("--task", task), choose_again, out)
    report, folder = evaluate_models(models, asked)
    say("\n".join([*report.lines(), "", f"report: {folder / 'report.md'}"]))


def _named(option: str, given: list[str] | None) -> dict[str, str]:
    """NAME=VALUE options by name."""
    found: dict[str, str] = {}
    for one in given or []:
        name, equals, value = one.partition("=")
        if not equals or not value or not re.fullmatch(SET_NAME, name) or name in found:
            raise typer.BadParameter(f"{option} {one}: write NAME=VALUE, each name once (letters, digits, . _ -)")
        found[name] = value
    return found


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
