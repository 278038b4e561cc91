"""`tc-ray status`: what a run is doing, read from its folder. Needs no Ray; works on a finished or dead run too."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from tc_ray.cli.command import say


def status(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a run, for instance outputs/demo.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep showing it until the run has ended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print status.json as it is.")] = False,
) -> None:
    """Show both losses, error ratio, rounds, log size and lag, tokens/s, restarts and ETA of a run."""
    from tc_ray.tracking.statusfile import (
        ProgressView,
        Status,
        facts,
        failure,
        read_status,
        silence,
        silent_seconds,
        waiting_text,
    )

    def read() -> Status:
        return {**read_status(run_folder), "silent_seconds": silent_seconds(run_folder)}

    if follow:
        read_status(run_folder)
        ProgressView().follow(read, threading.Event())
        _print(failure(read()).items())
        return
    if as_json:
        say(json.dumps(read_status(run_folder), indent=1))
        return
    now = read()
    lines: list[tuple[str, object]] = [(name, now[name]) for name in ("run", "phase", "state")]
    lines += failure(now).items()
    lines += [("waiting", waiting_text(now.get("waiting", {}))), *facts(now).items(), ("", silence(now))]
    lines += [("folder", str(run_folder)), ("mlflow", (now.get("mlflow") or {}).get("command"))]
    _print(lines)


def _print(lines: Iterable[tuple[str, object]]) -> None:
    """Names in a column of their own, the lines of a value below each other."""
    for name, value in lines:
        if value:
            text = f"\n{' ' * 14}".join(str(value).splitlines())
            say(f"{name:<13} {text}" if name else text)
