"""Charts of the report as inline SVG, drawn by matplotlib.

Invariant: colours are the page's CSS variables, so one drawing serves light pages, dark pages and paper; and no chart uses
colour alone: lines differ in dashes, points in shape, and the heat maps' scale runs from light to dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from tc_ray.inspection.colours import LEVELS, level
from tc_ray.inspection.tallies import Confidence
from tc_ray.mistakelog.rows.ragged import Array

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_FROM = 10.0
"""Values that span more than this factor get a logarithmic axis."""
_VARIABLES = ("ink", "soft", "grid", "one", "two", "panel", *(f"e{shade}" for shade in range(LEVELS)))
# colours that stand for the page's variables until the SVG is written
_COLOUR = {name: f"#fe00{place:02x}" for place, name in enumerate(_VARIABLES)}
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": _COLOUR["one"], "linestyle": "-", "marker": "o"},
    {"color": _COLOUR["two"], "linestyle": (0, (5, 2)), "marker": "s", "markerfacecolor": "none"},
)
_SETTINGS = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "font.size": 9.0,
    "text.color": _COLOUR["ink"],
    "axes.labelcolor": _COLOUR["soft"],
    "axes.edgecolor": _COLOUR["soft"],
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid.axis": "y",
    "grid.color": _COLOUR["grid"],
    "xtick.color": _COLOUR["soft"],
    "ytick.color": _COLOUR["soft"],
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
}


def line_chart(
    title: str,
    lines: Sequence[tuple[str, Array]],
    spans: Sequence[tuple[int, int]],
    *,
    percent: bool = False,
    epochs: Sequence[tuple[int, int]] = (),
) -> Markup:
    """At most two lines over bins of rounds.

    Args:
        lines: names and values; NaN: no value there.
        spans: first and last round of each bin.
        percent: values are shares, shown from 0% to 100%. Other values that span more than a factor LOG_FROM get a
            logarithmic axis, which the title then says.
        epochs: (epoch, its first round): dotted lines.
    """
    values = np.concatenate([line for _, line in lines])
    finite = values[np.isfinite(values)]
    logarithmic = not percent and len(finite) > 0 and finite.min() > 0 and finite.max() / finite.min() > LOG_FROM
    with _figure(5.4, 2.9) as figure:
        axes = figure.subplots()
        axes.set_title(f"{title}, logarithmic axis" if logarithmic else title)
        middle = [(low + high) / 2 for low, high in spans]
        for style, (name, line) in zip(_STYLES, lines, strict=False):
            dots = {} if len(spans) == 1 else {"marker": ""}
            axes.plot(middle, line, label=name, **{**style, **dots})
        if logarithmic:
            axes.set_yscale("log", subs=(2, 5))
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(0, 1.02 if percent else None)
            if percent:
                axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        axes.grid(visible=True)
        _round_axis(axes, spans)
        if epochs:
            top = axes.secondary_xaxis("top")
            top.set_xticks([first for _, first in epochs], [str(epoch) for epoch, _ in epochs])
            top.set_xlabel("epoch", loc="left", fontsize=8)
            top.tick_params(length=0)
            top.spines["top"].set_visible(False)
            for _, first in epochs:
                axes.axvline(first, color=_COLOUR["soft"], linestyle=":", linewidth=1)
        if len(lines) > 1:
            axes.legend()
        return _svg(figure, title)


def heat_map(title: str, values: Array, spans: Sequence[tuple[int, int]], *, width: int, high: float) -> Markup:
    """Shares by bin of rounds (across) and place in the answer (down, the first on top).

    Args:
        values: [bins, rows], each 0..high; NaN: no data.
        width: answer tokens per row. high: share that has the strongest colour.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    bins, rows = values.shape
    edges = [spans[0][0] - 0.5, *(last + 0.5 for _, last in spans)]
    cells: list[list[tuple[float, float]]] = [[] for _ in range(LEVELS)]
    for row in range(rows):
        shades = [level(float(value) / high) if np.isfinite(value) else -1 for value in values[:, row]]
        first = 0
        for column in range(1, bins + 1):
            if column == bins or shades[column] != shades[first]:  # neighbours of one colour are one piece
                if shades[first] >= 0:
                    left, right = edges[first], edges[column]
                    up, down = row * width + 0.5, (row + 1) * width + 0.5
                    cells[shades[first]] += [(left, up), (right, up), (right, down), (left, down), (left, up)]
                first = column
    with _figure(10.6, 1.1 + min(4.6, max(0.9, 0.22 * rows))) as figure:
        axes = figure.subplots()
        axes.set_title(title)
        axes.set_facecolor(_COLOUR["panel"])
        for shade, corners in enumerate(cells):
            if corners:
                codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * (len(corners) // 5)
                patch = PathPatch(Path(corners, codes), facecolor=_COLOUR[f"e{shade}"], linewidth=0, antialiased=False)
                axes.add_patch(patch)
        axes.set_ylim(rows * width + 0.5, 0.5)
        axes.locator_params(axis="y", integer=True, min_n_ticks=1)
        axes.set_ylabel("place in the answer")
        _round_axis(axes, spans)
        return _svg(figure, title)


def reliability_chart(confidence: Confidence, names: Sequence[str]) -> Markup:
    """Probability of the first choice against how often it was right, and how many tokens had that probability.

    names: of the two groups of `confidence`; one without tokens is left out.
    """
    with _figure(5.4, 5.2) as figure:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        axes.set_title("Accuracy of the first choice")
        axes.plot([0, 1], [0, 1], color=_COLOUR["soft"], linestyle=":", linewidth=1)
        axes.text(0.02, 0.94, "above the diagonal: under-confident", color=_COLOUR["soft"], fontsize=8)
        axes.text(0.98, 0.03, "below: over-confident", color=_COLOUR["soft"], fontsize=8, ha="right")
        for group, (style, name) in enumerate(zip(_STYLES, names, strict=True)):
            used = np.flatnonzero(confidence.tokens[group])
            if not len(used):
                continue
            tokens = confidence.tokens[group, used]
            p, accuracy = confidence.probability[group, used] / tokens, confidence.correct[group, used] / tokens
            axes.plot(p, accuracy, label=name, **style)
            slot = 1 / confidence.tokens.shape[1]
            left = slot * (used + 0.08 + 0.44 * group)
            below.bar(left, tokens, 0.4 * slot, align="edge", color=style["color"], alpha=0.7)
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        axes.grid(visible=True)
        axes.legend(loc="center left")
        below.set_yscale("log")
        below.set_ylabel("tokens\n(log scale)")
        below.set_xlabel("probability of the first choice")
        below.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        return _svg(figure, "Reliability of the Pilot's probabilities")


def _round_axis(axes: Axes, spans: Sequence[tuple[int, int]]) -> None:
    axes.set_xlim(spans[0][0] - 0.5, spans[-1][1] + 0.5)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_xlabel("round")


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of a size in inches, under the settings of this module."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        yield Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, name: str) -> Markup:
    """The drawing as an element for a page: named for screen readers, of the width it is given, in the page's colours."""
    from matplotlib import rc_context

    written = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # ids that follow from the chart: no two charts of a page share one
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"#fe00([0-9a-f]{2})", lambda found: f"var(--{_VARIABLES[int(found[1], 16)]})", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1))
