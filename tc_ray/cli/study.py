"""`tc-ray study`: run the cells of a study, or print its plan, or write its report from the results that are there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tc_ray.cli.command import say

if TYPE_CHECKING:
    from tc_ray.study.cells import Cells
    from tc_ray.study.file import Study

REPORT = "report.md"


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="File of the study (docs/study.md).")],
    plan: Annotated[bool, typer.Option("--plan", help="Print the cells and what they share; start nothing.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="Write the report of the results that are there; start nothing."),
    ] = None,
) -> None:
    """Run variants x tasks x seeds of a recipe with controls, and report on them. The same command goes on after a stop."""
    from tc_ray.config.yaml_file import ConfigError
    from tc_ray.study.cells import cells_of
    from tc_ray.study.file import load_study
    from tc_ray.study.schedule import results_of, run_study

    loaded = load_study(file)
    cells = cells_of(loaded)
    if plan:
        say("\n".join(plan_lines(loaded, cells)))
        return
    if report is not None:
        if report.suffix != ".md":
            raise typer.BadParameter(
                f"--report {report}: the name must end in .md; .html and .csv are written beside it"
            )
        if not results_of(loaded, cells):
            raise ConfigError(f"{file}: none of its {len(cells.by_key)} cells has a result; the report is not written")
        _report(loaded, cells, report)
        return
    try:
        run_study(loaded, cells)
    finally:
        if results_of(loaded, cells):
            _report(loaded, cells, loaded.folder / REPORT)


def _report(loaded: Study, cells: Cells, file: Path) -> None:
    from tc_ray.study.report import Report
    from tc_ray.study.schedule import results_of

    made = Report(loaded, cells, results_of(loaded, cells))
    say("\n".join(f"report    {path}" for path in made.save(file)[:3]))


def plan_lines(loaded: Study, cells: Cells) -> list[str]:
    """The plan of a study, for a terminal."""
    from tc_ray.cluster.session import cpus_needed
    from tc_ray.study.schedule import left_to_run, results_of

    results = results_of(loaded, cells)
    left = left_to_run(loaded, cells, results)
    waiting = {cell.key for cell in left}
    asked = Counter(cell.key for cell, _ in cells.shown.values())
    lines = [
        f"study      {loaded.file.name} in {loaded.folder}",
        f"cells      {len(cells.by_key)} for {len(cells.shown)} places of the report; {len(results)} have a result",
        f"to run     {_kinds(Counter(cell.kind for cell in left))}",
    ]
    if left:
        known: dict[str, list[float]] = {}
        for result in results.values():
            known.setdefault(result.kind, []).append(result.wall_seconds)
        guessed = [sum(known[cell.kind]) / len(known[cell.kind]) for cell in left if cell.kind in known]
        hours = f"{sum(guessed) / 3600:.1f} hours, one after the other" if guessed else "unknown until a cell has ended"
        unknown = len(left) - len(guessed)
        lines.append(f"time       {hours}{f', and {unknown} cells of unknown length' if guessed and unknown else ''}")
        lines.append(f"CPUs       {max(cpus_needed(cell.config) for cell in left):g} for the largest cell")
    for key, cell in cells.by_key.items():
        state = "to run" if key in waiting else "done"
        needs = ", ".join(cells.by_key[need.key].name for need in cell.needs)
        lines.append(
            f"{state:<10} {cell.name} [{cell.kind}] {key[:8]}, {asked[key]} place(s)"
            + (f", after {needs}" if needs else "")
        )
    return lines


def _kinds(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing"
