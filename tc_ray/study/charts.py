"""The pictures of a study's report: score against training compute, and the size of the correction.

Each is drawn once and written twice: as an element of the page, and as a file beside the Markdown. Called by `report`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tc_ray.inspection.charts import COLOUR, file_svg, inline_svg, new_figure
from tc_ray.study.numbers import Mean

LABEL_CHARACTERS = 28
_LINE_INCHES = 0.17
"""Height of a label."""


@dataclass(frozen=True)
class Picture:
    """A drawing. name: of its file, without the ending."""

    name: str
    title: str
    inline: Markup
    file: str


@dataclass(frozen=True)
class Point:
    """A line of the report. has_copilot: fused models and Pilots alone differ in shape and colour."""

    name: str
    compute: Mean
    score: Mean
    has_copilot: bool


def compute_chart(task: str, points: Sequence[Point], *, percent: bool) -> Picture:
    """Score (up) against training compute (right; 1 is the Pilot alone), with 95% intervals of the score."""
    title, scale = f"{task}: score against training compute", 100.0 if percent else 1.0
    with new_figure(7.2, 4.2) as figure:
        axes = figure.subplots()
        axes.set_title(title)
        for point in points:
            low, high = (scale * end for end in point.score.interval)
            x, y = point.compute.value, scale * point.score.value
            colour = COLOUR["one" if point.has_copilot else "two"]
            if math.isfinite(high):
                axes.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.6)
            axes.plot([x], [y], color=colour, marker="o" if point.has_copilot else "s", linestyle="")
        axes.margins(0.08)
        axes.set_xlim(axes.get_xlim()[0], axes.get_xlim()[1] + 0.35 * (axes.get_xlim()[1] - axes.get_xlim()[0]))
        bottom, top = axes.get_ylim()
        height = (top - bottom) * _LINE_INCHES / 3.4
        for point, at in zip(
            sorted(points, key=lambda p: p.score.value),
            apart(sorted(scale * p.score.value for p in points), height),
            strict=True,
        ):
            spot = (point.compute.value, scale * point.score.value)
            label = textwrap.shorten(point.name, LABEL_CHARACTERS, placeholder="…")
            axes.annotate(
                label,
                spot,
                (max(p.compute.value for p in points) * 1.02, at),
                va="center",
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": COLOUR["soft"], "alpha": 0.4, "linewidth": 0.6, "shrinkB": 3},
            )
        axes.grid(visible=True)
        axes.set_xlabel("training compute, Pilot alone = 1")
        axes.set_ylabel("score, %" if percent else "score")
        return Picture(f"compute-{task}", title, inline_svg(figure, title), file_svg(figure, title))


def apart(places: Sequence[float], least: float) -> list[float]:
    """Ascending places, moved so that neighbours are at least so far apart, around where they were."""
    groups: list[list[float]] = []  # [sum of wanted first places, members]
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1 and _first(groups[-1], least) < _first(groups[-2], least) + least * groups[-2][1]:
            wanted, count = groups.pop()
            groups[-1][0] += wanted
            groups[-1][1] += count
    return [_first(group, least) + least * at for group in groups for at in range(int(group[1]))]


def _first(group: Sequence[float], least: float) -> float:
    total, count = group
    return total / count - least * (count - 1) / 2


def correction_chart(sizes: Mapping[str, Mapping[str, Mean]]) -> Picture:
    """Probability that the correction moves at a gold token (figure 3). sizes: by line, then by task."""
    title = "Probability moved by the correction at a gold token"
    tasks = list(dict.fromkeys(task for by_task in sizes.values() for task in by_task))
    bars = [(f"{task}, {line}", by_task[task]) for task in tasks for line, by_task in sizes.items() if task in by_task]
    with new_figure(7.2, 0.9 + 0.24 * len(bars)) as figure:
        axes = figure.subplots()
        axes.set_title(title)
        names = [textwrap.shorten(name, 2 * LABEL_CHARACTERS, placeholder="…") for name, _ in bars]
        axes.barh(range(len(bars)), [100 * size.value for _, size in bars], color=COLOUR["one"], height=0.6)
        axes.set_yticks(range(len(bars)), names)
        axes.invert_yaxis()
        axes.grid(visible=True, axis="x")
        axes.set_xlabel("%")
        return Picture("correction", title, inline_svg(figure, title), file_svg(figure, title))
