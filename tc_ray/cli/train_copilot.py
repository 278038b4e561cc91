"""`tc-ray train-copilot`: train a Copilot from a stored Mistake Log."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tc_ray.cli.command import say
from tc_ray.cluster.signals import resumable

if TYPE_CHECKING:
    from tc_ray.copilot.checkpoint import Position
    from tc_ray.copilot.held_out import ErrorRatio
    from tc_ray.copilot.learner import StepResult

LINE_SECONDS = 10.0


def train_copilot(
    log: Annotated[str, typer.Argument(help="Run folder, or folder or URI of its log.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Change fields, e.g. copilot.every=5.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Recipe with sections copilot and model; default: that of the run.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write, or to resume; default: copilot-from-log in the run folder."),
    ] = None,
    storage_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Option of the log's object store; may be given again."),
    ] = None,
) -> None:
    """Train a Copilot from a log alone; no Pilot runs. The result is what `tc-ray fuse --copilot` takes."""
    from tc_ray.config.load import load_config, load_saved_config
    from tc_ray.copilot.from_log import train_from_log
    from tc_ray.inspection.source import find_log
    from tc_ray.mistakelog.read.reader import MistakeLog
    from tc_ray.run.folder import FolderLock

    place = find_log(log, storage_option or [])
    if place.note:
        say(place.note, error=True)
    target = out or (place.run_folder / "copilot-from-log" if place.run_folder is not None else None)
    if target is None:
        raise typer.BadParameter("a log without its run folder needs --out FOLDER")
    if config is not None:
        settings = load_config(config, overrides or [])
    elif place.run_folder is not None:
        settings = load_saved_config(place.run_folder / "config.yaml", overrides or [])
    else:
        raise typer.BadParameter("a log without its run folder needs --config RECIPE (sections copilot and model)")
    target = target.expanduser().absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside the folder, so that a folder which is refused is left as it was
    lock = FolderLock(target.parent, f"train-copilot into {target.name}", name=f".{target.name}.lock")
    with lock, resumable(target), MistakeLog(place.uri, storage_options=place.options) as mistakes:
        trained = train_from_log(mistakes, settings, target, show=_Show())
    say("\n".join(trained.lines()))


class _Show:
    """A line on standard error, every LINE_SECONDS and at the end."""

    def __init__(self) -> None:
        self._due = 0.0

    def __call__(self, at: Position, total: int, result: StepResult | None, ratio: ErrorRatio | None) -> None:
        if time.monotonic() > self._due or at.step == total:
            self._due = time.monotonic() + LINE_SECONDS
            loss = (
                "nothing to learn from" if result is None else f"loss {result.loss:.4f}" if result.taken else "left out"
            )
            held_out = "" if ratio is None else f" | error ratio {ratio.text()}"
            say(f"copilot step {at.step}/{total} | round {at.round} | {loss}{held_out}", error=True)
