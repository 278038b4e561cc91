"""losses.png: the losses of both models and the Copilot's lag on one axis of wall time.

Called by `tracker.Tracker.finish`. It needs only a metrics.jsonl, so it can draw a run that is still going on.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from tc_ray.files import write_file
from tc_ray.tracking.points import Point, read_points

LOSSES_FILE = "losses.png"
PILOT_COLOUR = "#1f5fa8"
COPILOT_COLOUR = "#c8541b"
LAG_COLOUR = "#8a8f98"
SMOOTH_SHARE = 0.04
"""Width of the smoothing window as a share of all points."""


def draw_losses(metrics: Path, picture: Path) -> None:
    """Draw pilot `loss` (left), copilot `loss` (right) and log `lag_rounds` (below) over wall minutes.

    The idle time between two starts of a resumed run is left out and marked by a dotted line. Raises ValueError if the file
    `metrics` has no loss yet.
    """
    points, resumes = _active_minutes(list(read_points(metrics)))
    pilot = _series(points, "pilot", "loss")
    copilot = _series(points, "copilot", "loss")
    lag = _series(points, "log", "lag_rounds")
    if not pilot[0] and not copilot[0]:
        raise ValueError(f"{metrics}: no loss in it yet")

    # Objects instead of pyplot: no global state, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=130, layout="constrained")
    upper, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    for axes, (minutes, values), colour, label in (
        (upper, pilot, PILOT_COLOUR, "Pilot cross-entropy"),
        (upper.twinx(), copilot, COPILOT_COLOUR, "Copilot loss"),
    ):
        axes.plot(minutes, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(minutes, _smooth(values), color=colour, linewidth=1.8)
        axes.set_ylabel(label, color=colour)
        axes.tick_params(axis="y", colors=colour)
        if values:
            axes.set_ylim(bottom=0)
    upper.grid(axis="y", alpha=0.2)
    upper.set_title("Losses of both models", loc="left", fontsize=11)

    below.fill_between(*lag, step="post", color=LAG_COLOUR, alpha=0.45, linewidth=0)
    below.set_ylabel("lag (rounds)", color=LAG_COLOUR)
    below.set_ylim(bottom=0)
    below.yaxis.get_major_locator().set_params(integer=True)
    below.set_xlabel("minutes of running (dotted: resumed)")
    ended = max(minutes[-1] for minutes, _ in (pilot, copilot) if minutes)
    below.set_xlim(0, ended * 1.02 or 1)  # there is no loss after training
    for minute in resumes:
        for axes in (upper, below):
            axes.axvline(minute, color="black", linestyle=":", linewidth=1)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_file(picture, drawn.getvalue())


def _active_minutes(points: list[Point]) -> tuple[list[tuple[float, Point]], list[float]]:
    """Pair each point with the minutes that the run had been running; also the minutes at which it was resumed."""
    timed: list[tuple[float, Point]] = []
    resumes: list[float] = []
    began = before = points[0]["time"] if points else 0.0
    for point in points:
        if point["kind"] == "start" and timed:
            began += point["time"] - before  # nothing ran in between
            resumes.append((point["time"] - began) / 60)
        before = point["time"]
        timed.append(((point["time"] - began) / 60, point))
    return timed, resumes


def _series(points: list[tuple[float, Point]], kind: str, name: str) -> tuple[list[float], list[float]]:
    """Minutes and values of one metric; NaN (null) is left out."""
    found = [
        (minute, point["metrics"][name])
        for minute, point in points
        if point["kind"] == kind and point["metrics"].get(name) is not None
    ]
    return [minute for minute, _ in found], [value for _, value in found]


def _smooth(values: list[float]) -> np.ndarray:
    """Centred running mean; the window shrinks at both ends."""
    window = np.ones(2 * int(len(values) * SMOOTH_SHARE / 2) + 1)
    return (
        np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
        if values
        else np.zeros(0)
    )
