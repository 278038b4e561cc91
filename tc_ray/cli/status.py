"""`tc-ray status`: what a run is doing, read from its folder. Needs no Ray; works on a finished or dead run too."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Annotated

import typer

from tc_ray.cli.command import say

BARS = "▁▂▃▄▅▆▇█"
TREND_WIDTH = 40


def status(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a run, for instance outputs/demo.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep showing it until the run has ended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print status.json as it is.")] = False,
) -> None:
    """Show both losses, rounds, log size and lag, tokens/s, restarts and ETA of a run."""
    from tc_ray.tracking.progress import ProgressView, facts, silence, waiting_text
    from tc_ray.tracking.statusfile import Status, read_status, silent_seconds

    def read() -> Status:
        return {**read_status(run_folder), "silent_seconds": silent_seconds(run_folder)}

    if follow:
        read_status(run_folder)
        ProgressView().follow(read, threading.Event())
        return
    if as_json:
        say(json.dumps(read_status(run_folder), indent=1))
        return
    now = read()
    lines = [(name, now[name]) for name in ("run", "phase", "state")]
    lines += [
        ("waiting", waiting_text(now.get("waiting", {}))),
        *facts(now).items(),
        ("", silence(now)),
        *trends(run_folder),
    ]
    lines += [("folder", str(run_folder)), ("mlflow", (now["mlflow"] or {}).get("command"))]
    for name, value in lines:
        if value:
            say(f"{name:<13} {value}" if name else value)


def trends(folder: Path) -> list[tuple[str, str]]:
    """Each loss from first to last round as a row of bars, with its first and last mean."""
    from tc_ray.tracking.points import METRICS_FILE, read_points

    series: dict[str, list[float]] = {"pilot loss": [], "copilot loss": []}
    for point in read_points(folder / METRICS_FILE):
        for name, values in series.items():
            kind, metric = name.split()
            if point["kind"] == kind and point["metrics"].get(metric) is not None:
                values.append(point["metrics"][metric])
    return [(name, sparkline(values)) for name, values in series.items() if values]


def sparkline(values: list[float]) -> str:
    """The means of at most TREND_WIDTH equal parts as bars, with the first and the last mean as numbers."""
    parts = min(TREND_WIDTH, len(values))
    cuts = [len(values) * i // parts for i in range(parts + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    bars = "".join(BARS[round((mean - low) * scale)] for mean in means)
    return f"{means[0]:.4f} {bars} {means[-1]:.4f}"
