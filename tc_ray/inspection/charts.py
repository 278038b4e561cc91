"""Charts as inline SVG, complete without a script, and the figures that the page's script tells of them.

Invariant: colours come from the page's style (light and dark), and no chart tells things apart by colour alone: lines differ
in dashes and are named at their ends, points in shape. Used by the report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tc_ray.inspection.colours import LEVELS, level
from tc_ray.inspection.page import esc
from tc_ray.inspection.rows import Array

STYLES = ("one", "two")
LOG_FROM = 10.0


@dataclass(frozen=True)
class Chart:
    """SVG, and what the script needs to tell the figures under the pointer."""

    svg: str
    hover: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A line over the columns of a chart; NaN: no value there."""

    name: str
    values: Array
    kind: str
    """percent, number or count: how a value is written."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within low..high."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within low..high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= tick <= high]


def line_chart(
    chart_id: str,
    title: str,
    lines: Sequence[Line],
    spans: Sequence[tuple[int, int]],
    *,
    extra: Sequence[Line] = (),
    top: float | None = None,
    marks: Sequence[tuple[int, str]] = (),
) -> Chart:
    """At most two lines over bins of rounds.

    Args:
        spans: first and last round of each bin.
        extra: told under the pointer only.
        top: upper end of the axis; default: from the values, and values that span more than a factor LOG_FROM get a
            logarithmic axis, which the title then says.
        marks: (bin, label) of upright lines.
    """
    left, right, upper, width, height = 52.0, 96.0, 40.0, 520.0, 190.0
    plot = width - left - right
    values = np.concatenate([line.values for line in lines])
    finite = values[np.isfinite(values)]
    high = top if top is not None else float(finite.max()) * 1.05 if len(finite) and finite.max() > 0 else 1.0
    percent = lines[0].kind == "percent"
    low = float(finite.min()) / 1.05 if len(finite) else 0.0
    logarithmic = top is None and low > 0 and high / low > LOG_FROM

    def x(column: float) -> float:
        return left + plot * (column + 0.5) / len(spans)

    def y(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low) if logarithmic else value / high
        return upper + height * (1 - share)

    named = f"{title}, logarithmic axis" if logarithmic else title
    parts = [f'<text class="title" x="0" y="14">{esc(named)}</text>']
    for tick in log_ticks(low, high) if logarithmic else ticks(0.0, high):
        label = f"{100 * tick:g}%" if percent else f"{tick:g}"
        parts.append(f'<line class="grid" x1="{left}" x2="{left + plot}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    last_label = -1e9
    for column, name in marks:
        edge = left + plot * column / len(spans)
        parts.append(f'<line class="mark" x1="{edge:.1f}" x2="{edge:.1f}" y1="{upper}" y2="{upper + height}"/>')
        if edge - last_label > 7.0 * len(name) + 6:
            parts.append(f'<text x="{edge + 3:.1f}" y="{upper - 5}" font-size="11">{esc(name)}</text>')
            last_label = edge
    parts.append(_round_axis(spans, left, plot, upper + height))
    ends = _apart([y(_last(line.values)) for line in lines], 15.0)
    for style, line, end in zip(STYLES, lines, ends, strict=False):
        parts.append(f'<path class="line {style}" d="{_path(line.values, x, y)}"/>')
        if len(spans) == 1 and np.isfinite(line.values[0]):
            parts.append(f'<circle class="dot {style}" cx="{x(0):.1f}" cy="{y(line.values[0]):.1f}" r="4"/>')
        for row, words in enumerate(line.name.split("\n")):
            parts.append(
                f'<text class="{style}" x="{left + plot + 8}" y="{end + 4 + 14 * row:.1f}">{esc(words)}</text>'
            )
    parts.append('<rect class="cursor"/>')
    hover = {
        "left": left,
        "top": upper,
        "width": plot,
        "height": height,
        "xs": [_rounds(span) for span in spans],
        "ys": None,
        "layers": [_layer(line.name.replace("\n", " "), line.values, line.kind) for line in (*lines, *extra)],
    }
    return Chart(_svg(chart_id, title, width, upper + height + 40, parts), hover)


def heat_map(
    chart_id: str,
    title: str,
    values: Array,
    spans: Sequence[tuple[int, int]],
    places: Sequence[str],
    *,
    high: float,
    name: str,
    tokens: Array,
    counted: str,
) -> Chart:
    """Share by bin of rounds (across) and place in the answer (down, the first on top); NaN: no data.

    Args:
        values: [bins, places], each 0..high. high: share that has the strongest colour.
        places: name of each place. name: what the values are. tokens: [bins, places], what they were taken over.
        counted: name of `tokens`.
    """
    bins, rows = values.shape
    left, upper, width = 84.0, 28.0, 1024.0
    plot = width - left
    cell = min(26.0, max(5.5, 420.0 / max(rows, 1)))
    height = cell * rows
    wide = plot / bins
    parts = [f'<text class="title" x="0" y="14">{esc(title)}</text>']
    parts.append(f'<rect class="empty" x="{left}" y="{upper}" width="{plot}" height="{height:.2f}"/>')
    shades: list[list[str]] = [[] for _ in range(LEVELS)]
    for row in range(rows):
        run_from, run_level = 0, -1
        for column in range(bins + 1):
            value = values[column, row] if column < bins else math.nan
            shade = level(float(value) / high) if math.isfinite(value) else -1
            if shade != run_level:
                if run_level >= 0:  # neighbours of one colour are one piece
                    shades[run_level].append(f"M{run_from} {row}h{column - run_from}v1h-{column - run_from}z")
                run_from, run_level = column, shade
    transform = f"translate({left} {upper}) scale({wide:.5f} {cell:.4f})"
    parts.append(f'<g transform="{transform}" shape-rendering="crispEdges">')
    parts += [f'<path class="e{shade}" d="{"".join(cells)}"/>' for shade, cells in enumerate(shades) if cells]
    parts.append("</g>")
    every = max(1, math.ceil(15.0 / cell))
    for row in range(0, rows, every):
        middle = upper + cell * (row + 0.5) + 4
        parts.append(f'<text x="{left - 8}" y="{middle:.1f}" text-anchor="end">{esc(places[row])}</text>')
    parts.append(_round_axis(spans, left, plot, upper + height))
    parts.append('<rect class="cursor"/>')
    # [places, bins] in the script's order
    hover = {
        "left": left,
        "top": upper,
        "width": plot,
        "height": height,
        "xs": [_rounds(span) for span in spans],
        "ys": list(places),
        "layers": [
            _layer(name, values.T.reshape(-1), "percent"),
            _layer(counted, tokens.T.reshape(-1), "count"),
        ],
    }
    return Chart(_svg(chart_id, title, width, upper + height + 40, parts), hover)


def reliability_chart(groups: Sequence[tuple[str, Array, Array, Array]]) -> str:
    """Probability of the first choice against how often it was right, and how many tokens had that probability.

    Args:
        groups: at most two of (name, tokens, sum of probabilities, right ones), each [bins].
    """
    left, upper, side, width, below = 58.0, 30.0, 340.0, 520.0, 70.0
    parts = ['<text class="title" x="0" y="14">Accuracy of the first choice</text>']

    def x(share: float) -> float:
        return left + side * share

    def y(share: float) -> float:
        return upper + side * (1 - share)

    for tick in ticks(0.0, 1.0):
        parts.append(f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:g}%</text>')
        parts.append(
            f'<text x="{x(tick):.1f}" y="{upper + side + below + 34}" text-anchor="middle">{100 * tick:g}%</text>'
        )
    parts.append(f'<line class="mark" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    parts.append(f'<text x="{x(0.03)}" y="{y(0.93)}">above the diagonal: under-confident</text>')
    parts.append(f'<text x="{x(0.97)}" y="{y(0.04)}" text-anchor="end">below: over-confident</text>')
    base = upper + side + below + 16
    parts.append(f'<line class="axis" x1="{left}" x2="{left + side}" y1="{base}" y2="{base}"/>')
    most = max((int(tokens.max()) for _, tokens, _, _ in groups), default=1)
    for index, (style, (name, tokens, probability, right)) in enumerate(zip(STYLES, groups, strict=False)):
        slot = side / len(tokens)
        points = []
        for i in np.flatnonzero(tokens):
            count = int(tokens[i])
            p, accuracy = float(probability[i]) / count, float(right[i]) / count
            points.append(f"{x(p):.1f} {y(accuracy):.1f}")
            told = f"{name}: said with {100 * p:.1f}%, right {100 * accuracy:.1f}%, n = {count:,} tokens"
            tall = max(0.7, below * math.log1p(count) / math.log1p(most))
            at = left + slot * (i + 0.08 + 0.44 * index)
            parts.append(
                f'<rect class="bar {style}" x="{at:.1f}" y="{base - tall:.1f}" width="{slot * 0.40:.1f}" height="{tall:.1f}">'
                f"<title>{esc(told)}</title></rect>"
            )
            size = 3.0 + 4.0 * math.log1p(count) / math.log1p(most)
            shape = (
                f'<circle class="dot one" cx="{x(p):.1f}" cy="{y(accuracy):.1f}" r="{size:.1f}">'
                if style == "one"
                else f'<rect class="hole" x="{x(p) - size:.1f}" y="{y(accuracy) - size:.1f}" width="{2 * size:.1f}" '
                f'height="{2 * size:.1f}">'
            )
            tag = "circle" if style == "one" else "rect"
            parts.append(f"{shape}<title>{esc(told)}</title></{tag}>")
        if points:
            parts.insert(1, f'<path class="line {style}" stroke-opacity=".5" d="M{"L".join(points)}"/>')
        shown = upper + 12 + 22 * index
        mark = "●" if style == "one" else "□"
        parts.append(f'<text class="{style}" x="{left + side + 14}" y="{shown}">{mark} {esc(name)}</text>')
    parts.append(f'<text x="{left + side + 14}" y="{base - 4}">tokens (log scale)</text>')
    parts.append(
        f'<text x="{left + side / 2}" y="{base + 38}" text-anchor="middle">probability of the first choice</text>'
    )
    return _svg("", "Reliability of the Pilot's probabilities", width, base + 44, parts)


def _svg(chart_id: str, title: str, width: float, height: float, parts: Sequence[str]) -> str:
    told = f' data-chart="{esc(chart_id)}" tabindex="0"' if chart_id else ""
    return (
        f'<svg viewBox="0 0 {width:g} {height:.1f}" role="img" aria-label="{esc(title)}"{told}>'
        + "".join(parts)
        + "</svg>"
    )


def _round_axis(spans: Sequence[tuple[int, int]], left: float, plot: float, base: float) -> str:
    parts = [f'<line class="axis" x1="{left}" x2="{left + plot}" y1="{base:.1f}" y2="{base:.1f}"/>']
    first, last = spans[0][0], spans[-1][1]
    covered = len(spans) * (spans[0][1] - first + 1)  # the last bin may be short, its column is not
    room = (last - first) / max(plot / 70, 1)
    between = [round(tick) for tick in ticks(first, last, max(2, int(plot // 90)))]
    named = [tick for tick in dict.fromkeys(between) if tick - first > room and last - tick > room]
    for tick in dict.fromkeys([first, *named, last]):
        at = left + plot * (tick - first + 0.5) / covered
        parts.append(f'<text x="{at:.1f}" y="{base + 17:.1f}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text x="{left + plot / 2:.1f}" y="{base + 34:.1f}" text-anchor="middle">round</text>')
    return "".join(parts)


def _rounds(span: tuple[int, int]) -> str:
    return f"round {span[0]}" if span[0] == span[1] else f"rounds {span[0]} to {span[1]}"


def _layer(name: str, values: Array, kind: str) -> dict[str, Any]:
    digits = 5 if kind != "count" else 0
    told = [
        None if not math.isfinite(value) else int(value) if kind == "count" else round(float(value), digits)
        for value in values
    ]
    return {"name": name, "kind": kind, "values": told}


def _path(values: Array, x: Any, y: Any) -> str:
    parts, pen_down = [], False
    for column, value in enumerate(values):
        if math.isfinite(value):
            parts.append(f"{'L' if pen_down else 'M'}{x(column):.1f} {y(value):.1f}")
        pen_down = math.isfinite(value)
    return "".join(parts)


def _last(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else 0.0


def _apart(places: list[float], least: float) -> list[float]:
    """Label places moved so that two do not overlap."""
    if len(places) == 2 and abs(places[0] - places[1]) < 2 * least:
        middle, sign = sum(places) / 2, 1.0 if places[0] > places[1] else -1.0
        return [middle + sign * least, middle - sign * least]
    return places
