"""`tc-ray export`: the Pilot of a run in a form that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tc_ray.cli.command import say


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run that has ended.", metavar="RUN")],
    to: Annotated[
        Literal["gguf", "merged", "adapter"],
        typer.Option(
            help="gguf: for llama.cpp (families llama and qwen2); merged: for transformers; adapter: LoRA, for peft."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; must not exist. Default: export-FORM in the run's folder.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload it to this repository of the hub; needs HF_TOKEN.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a repository that all may read.")] = False,
) -> None:
    """Write the Pilot of a run, without its Copilot, as GGUF, merged weights or LoRA adapters, with a model card."""
    if public and push is None:
        raise typer.BadParameter("--public says who may read what --push uploads: add --push USER/NAME")
    from tc_ray.export.pilot import export_pilot
    from tc_ray.export.push import Repository

    repository = None if push is None else Repository.checked(push, public=public)
    folder = export_pilot(run, to, out)
    say(f"written and read back: {folder}")
    if repository is not None:
        say(f"uploaded: {repository.push(folder)}")
