"""The page of `tc-ray report --out`: the tables, and of each run its time by part, its lag and both losses as pictures.

Invariant: a page is bounded, however long the run: a curve has at most MOST_POINTS. It loads nothing from anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from tc_ray.inspection.charts import COLOUR, inline_svg, new_figure
from tc_ray.inspection.report import render
from tc_ray.run.costs.measured import Costs, Curve
from tc_ray.run.costs.tables import bottleneck, tables

MOST_POINTS = 400


def costs_page(runs: Sequence[Costs], against: Costs | None = None) -> str:
    """The page as HTML; errors as of `tables`."""
    title = f"Costs of {runs[0].run}" if len(runs) == 1 else f"Costs of {len(runs)} runs"
    return render(
        "costs.html",
        package="tc_ray.run.costs",
        title=title,
        tables=tables(runs, against),
        runs=[(run, bottleneck(run), pictures(run)) for run in runs],
    )


def pictures(run: Costs) -> list[Markup]:
    """Time by part, lag over time, and the losses, as far as the run has them."""
    found = [_time(run)]
    if len(run.lag.x):
        found.append(_lag(run))
    for name, axis, curve in (("Pilot", "round", run.pilot_loss), ("Copilot", "step", run.copilot_loss)):
        if len(curve.x):
            found.append(_loss(f"{run.folder}: {name} loss", f"{name} loss", axis, curve))
    return found


def _time(run: Costs) -> Markup:
    parts = [(name, seconds) for name, seconds in run.parts.items() if seconds >= 0.005 * run.seconds]
    with new_figure(5.4, 0.9 + 0.26 * len(parts)) as figure:
        axes = figure.subplots()
        axes.set_title("Time by part")
        unit, name = (60.0, "minutes") if run.seconds > 300 else (1.0, "seconds")
        bars = axes.barh(range(len(parts)), [value / unit for _, value in parts], color=COLOUR["one"], height=0.6)
        axes.bar_label(bars, [f"{value / run.seconds:.0%}" for _, value in parts], padding=3, fontsize=8)
        axes.set_yticks(range(len(parts)), [part for part, _ in parts])
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_axisbelow(True)
        axes.grid(visible=True, axis="x")
        axes.set_xlabel(name)
        return inline_svg(figure, f"{run.folder}: time by part")


def _lag(run: Costs) -> Markup:
    unit, name = (60.0, "minutes of the run") if run.lag.x[-1] > 300 else (1.0, "seconds of the run")
    lag = binned(run.lag, largest=True)
    with new_figure(5.4, 2.9) as figure:
        axes = figure.subplots()
        axes.set_title("Rounds that the Pilot is ahead of the Copilot")
        axes.step(lag.x / unit, lag.y, where="post", color=COLOUR["one"])
        axes.set_ylim(0, max(1.0, 1.05 * float(lag.y.max())))
        axes.locator_params(axis="y", integer=True)
        axes.grid(visible=True)
        axes.set_xlabel(name)
        return inline_svg(figure, f"{run.folder}: lag")


def _loss(label: str, title: str, axis: str, curve: Curve) -> Markup:
    """Each value lightly, the running mean over it."""
    few = binned(curve)
    window = np.ones(2 * (len(few.y) // 20) + 1)
    mean = np.convolve(few.y, window, "same") / np.convolve(np.ones(len(few.y)), window, "same")
    with new_figure(5.4, 2.9) as figure:
        axes = figure.subplots()
        axes.set_title(title)
        axes.plot(few.x, few.y, color=COLOUR["soft"], alpha=0.5, linewidth=0.8)
        axes.plot(few.x, mean, color=COLOUR["two"])
        axes.set_ylim(bottom=0)
        axes.grid(visible=True)
        axes.set_xlabel(axis)
        return inline_svg(figure, label)


def binned(curve: Curve, *, largest: bool = False) -> Curve:
    """A curve of at most MOST_POINTS: the mean of neighbours, or the largest value among them; x is that of the last."""
    if len(curve.x) <= MOST_POINTS:
        return curve
    bounds = np.linspace(0, len(curve.x), MOST_POINTS + 1).astype(int)
    join = np.max if largest else np.mean
    y = np.array([join(curve.y[first:last]) for first, last in pairwise(bounds)])
    return Curve(curve.x[bounds[1:] - 1], y)
