"""The colours of errors, and the charts of the report as inline SVG, drawn by matplotlib.

Invariant: lightness runs one way along the scale of errors, so it reads in grey and with every kind of colour blindness, and
text on it has a contrast of at least 4.5 to 1. The charts' colours are the page's CSS variables, so one drawing serves light
pages, dark pages and paper; lines differ in dashes, points in shape. The scale is used in the terminal and in pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from tc_ray.mistakelog.rows.ragged import Array

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tc_ray.inspection.stats import Confidence

LEVELS = 20
"""Level 0 (error below 1/20) is no colour."""
# from small to large errors: darker on light pages, lighter on dark ones
_LIGHT = ((255, 247, 230), (254, 217, 142), (246, 140, 50), (196, 58, 20), (110, 14, 22))
_DARK = ((44, 30, 24), (96, 44, 22), (176, 72, 24), (240, 142, 52), (255, 224, 150))

_VARIABLES = ("ink", "soft", "grid", "one", "two", "panel", *(f"e{shade}" for shade in range(LEVELS)))
COLOUR = {name: f"#fe00{place:02x}" for place, name in enumerate(_VARIABLES)}
"""Colours that stand for the page's variables until the SVG is written."""
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": COLOUR["one"], "linestyle": "-", "marker": "o"},
    {"color": COLOUR["two"], "linestyle": (0, (5, 2)), "marker": "s", "markerfacecolor": "none"},
)
_SETTINGS = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "font.size": 9.0,
    "text.color": COLOUR["ink"],
    "axes.labelcolor": COLOUR["soft"],
    "axes.edgecolor": COLOUR["soft"],
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid.axis": "y",
    "grid.color": COLOUR["grid"],
    "xtick.color": COLOUR["soft"],
    "ytick.color": COLOUR["soft"],
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
}


def level(error: float) -> int:
    """0..LEVELS-1 of an error between 0 and 1."""
    return min(max(int(error * LEVELS), 0), LEVELS - 1)


def scale(dark: bool = False) -> list[tuple[str, str]]:
    """Background and text colour of each level, as #rrggbb."""
    anchors = np.array(_DARK if dark else _LIGHT)
    at = np.linspace(0, len(anchors) - 1, LEVELS)
    rgb = np.stack([np.interp(at, range(len(anchors)), channel) for channel in anchors.T], 1)
    luminance = (rgb / 255) ** 2.2 @ (0.2126, 0.7152, 0.0722)
    return [
        (f"#{bytes(colour).hex()}", "#000000" if bright else "#ffffff")
        for colour, bright in zip(rgb.round().astype(np.uint8), luminance > 0.18, strict=True)
    ]


def line_chart(
    title: str, lines: Sequence[tuple[str, Array]], spans: Sequence[tuple[int, int]], *, percent: bool = False
) -> Markup:
    """At most two lines over bins of rounds.

    Args:
        lines: names and values; NaN: no value there.
        spans: first and last round of each bin.
        percent: values are shares, shown from 0% to 100%.
    """
    with new_figure(5.4, 2.9) as figure:
        axes = figure.subplots()
        axes.set_title(title)
        middle = [(low + high) / 2 for low, high in spans]
        for style, (name, line) in zip(_STYLES, lines, strict=False):
            axes.plot(middle, line, label=name, **{**style, **({} if len(spans) == 1 else {"marker": ""})})
        axes.set_ylim(0, 1.02 if percent else None)
        if percent:
            axes.yaxis.set_major_formatter(_percent)
        axes.grid(visible=True)
        _round_axis(axes, spans)
        if len(lines) > 1:
            axes.legend()
        return inline_svg(figure, title)


def heat_map(title: str, values: Array, spans: Sequence[tuple[int, int]], *, width: int, high: float) -> Markup:
    """Shares by bin of rounds (across) and place in the answer (down, the first on top).

    Args:
        values: [bins, rows], each 0..high; NaN: no data.
        width: answer tokens per row. high: share that has the strongest colour.
    """
    from matplotlib.colors import ListedColormap

    rows = values.shape[1]
    across = [spans[0][0] - 0.5, *(last + 0.5 for _, last in spans)]
    down = width * np.arange(rows + 1) + 0.5
    colours = ListedColormap([COLOUR[f"e{shade}"] for shade in range(LEVELS)])
    with new_figure(10.6, 1.1 + min(4.6, max(0.9, 0.22 * rows))) as figure:
        axes = figure.subplots()
        axes.set_title(title)
        axes.set_facecolor(COLOUR["panel"])
        axes.pcolormesh(across, down, np.ma.masked_invalid(values.T), cmap=colours, vmin=0, vmax=high)
        axes.set_ylim(down[-1], down[0])
        axes.locator_params(axis="y", integer=True, min_n_ticks=1)
        axes.set_ylabel("place in the answer")
        _round_axis(axes, spans)
        return inline_svg(figure, title)


def reliability_chart(confidence: Confidence, names: Sequence[str]) -> Markup:
    """Probability of the first choice against how often it was right.

    names: of the two groups of `confidence`; one without tokens is left out.
    """
    with new_figure(5.4, 4.4) as figure:
        axes = figure.subplots()
        axes.set_title("Accuracy of the first choice")
        axes.plot([0, 1], [0, 1], color=COLOUR["soft"], linestyle=":", linewidth=1)
        for group, (style, name) in enumerate(zip(_STYLES, names, strict=True)):
            used = np.flatnonzero(confidence.tokens[group])
            if len(used):
                tokens = confidence.tokens[group, used]
                p, right = confidence.probability[group, used] / tokens, confidence.correct[group, used] / tokens
                axes.plot(p, right, label=name, **style)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(visible=True)
        axes.legend(loc="center left")
        axes.set_xlabel("probability of the first choice")
        axes.xaxis.set_major_formatter(_percent)
        axes.yaxis.set_major_formatter(_percent)
        return inline_svg(figure, "Reliability of the Pilot's probabilities")


def _percent(share: float, _: Any) -> str:
    return f"{100 * share:g}%"


def _round_axis(axes: Axes, spans: Sequence[tuple[int, int]]) -> None:
    axes.set_xlim(spans[0][0] - 0.5, spans[-1][1] + 0.5)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_xlabel("round")


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of a size in inches, under the settings of this module."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        yield Figure(figsize=(width, height), layout="constrained")


def inline_svg(figure: Figure, name: str) -> Markup:
    """The drawing as an element for a page: named for screen readers, of the width it is given, in the page's colours."""
    head, text = _written(figure, name)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", f"{head}>{text}")
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return Markup(re.sub(r"#fe00([0-9a-f]{2})", lambda found: f"var(--{_VARIABLES[int(found[1], 16)]})", text))


def file_svg(figure: Figure, name: str) -> str:
    """The drawing as a file of its own, in the colours of a light page."""
    head, text = _written(figure, name)
    style = (Path(__file__).parent / "static" / "page.css").read_text(encoding="utf-8").partition("@media")[0]
    light = dict(re.findall(r"--(\w+): (#\w+)", style)) | {f"e{at}": back for at, (back, _) in enumerate(scale())}
    text = f'{head} style="background:{light["back"]}">{text}'
    return re.sub(r"#fe00([0-9a-f]{2})", lambda found: light[_VARIABLES[int(found[1], 16)]], text)


def _written(figure: Figure, name: str) -> tuple[str, str]:
    """The opening tag without its end, and the rest."""
    from matplotlib import rc_context

    written = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # ids that follow from the chart: no two charts of a page share one
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = written.getvalue()
    head, text = text[text.index("<svg") :].split(">", 1)
    return head.replace("<svg", f'<svg role="img" aria-label="{name}"'), text
