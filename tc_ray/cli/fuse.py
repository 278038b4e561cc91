"""`tc-ray fuse`: join a Copilot with a Pilot it was not trained beside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tc_ray.cli.command import say


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
