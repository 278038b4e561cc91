"""`tc-ray report`: what runs took, read from their folders. Needs no Ray; works while a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tc_ray.cli.command import say
from tc_ray.files import write_file
from tc_ray.text import byte_size


def report(
    run_folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, side by side.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write an HTML page with pictures too.")] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", metavar="RUN", help="A run of the same settings with log.enabled=false: the log's cost."
        ),
    ] = None,
) -> None:
    """Time by part, peak memory, tokens/s and capacity of both sides, waits, lag, and bytes of the log."""
    from tc_ray.inspection.terminal import print_view, table_view
    from tc_ray.run.costs.measured import read_costs
    from tc_ray.run.costs.tables import bottleneck, tables

    runs = [read_costs(folder) for folder in run_folders]
    other = None if against is None else read_costs(against)
    for table in tables(runs, other):
        print_view(table_view(table))
    say("")
    for run in runs:
        if run.copilot.count:
            say(f"{run.run}: {bottleneck(run)}" if len(runs) > 1 else bottleneck(run))
    if out is not None:
        from tc_ray.run.costs.page import costs_page

        write_file(out, costs_page(runs, other))
        say(f"{out}: {byte_size(out.stat().st_size)}")
