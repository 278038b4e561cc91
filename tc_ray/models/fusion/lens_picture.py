"""The logit lens as a picture (figure 4): a heat map of layers over generated tokens.

Columns are the generated tokens, rows the Pilot's layers from the lowest up; above them the outputs of Pilot and fused model.
Needs an explanation and the tokenizer, no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tc_ray.models.fusion.explain import Explanation, token_text

FONT = "DejaVu Sans"  # comes with matplotlib
LOW, HIGH, MARK = "#ffffff", "#0f4c8a", "#d9480f"
CELL_WIDTH, CELL_HEIGHT = 0.82, 0.235
"""Inches."""
GAP = 0.4
"""Between the layers and the outputs, in cells."""
LONGEST_TEXT = 10
COLUMNS = 16
"""Tokens a panel; more tokens take more panels, one below the other."""


@dataclass(frozen=True)
class _Row:
    """One row of the picture over all tokens shown: token ids and probabilities [n]."""

    label: str
    ids: list[int]
    probabilities: list[float]


def draw_logit_lens(
    explanation: Explanation,
    tokenizer: Any,
    path: Path | str | None = None,
    *,
    sequence: int = 0,
    first: int = 0,
    count: int = 2 * COLUMNS,
    max_layers: int = 32,
) -> Any:
    """The logit lens of one sequence as a matplotlib figure, also written to `path` as PNG.

    Args:
        explanation: made with `Explain(logit_lens=True)`.
        sequence: which of its sequences. first, count: which of its tokens, from 0.
        max_layers: a deeper model is drawn with every second, third, ... layer, always with the last.

    Raises:
        ValueError: an explanation without logit lens, or no tokens to draw.
    """
    if explanation.logit_lens is None:
        raise ValueError("the explanation has no logit lens: generate with explain=Explain(logit_lens=True)")
    total = int(explanation.mask[sequence].sum())
    places = slice(first, min(first + count, total))
    if places.start >= places.stop:
        raise ValueError(f"no tokens to draw: sequence {sequence} has {total}, asked for those from {first} on")

    # without pyplot: no global state, no display needed
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    said = explanation.tokens[sequence, places].tolist()
    layers, outputs = _rows(explanation, sequence, places, max_layers)
    words = _Words(tokenizer, {*said, *(token for row in layers + outputs for token in row.ids)})
    panels = [range(at, min(at + COLUMNS, len(said))) for at in range(0, len(said), COLUMNS)]
    across = max(len(panel) for panel in panels)
    cells = len(layers) + GAP + len(outputs)
    colours = LinearSegmentedColormap.from_list("probability", [LOW, HIGH])
    figure = Figure(
        figsize=(max(across * CELL_WIDTH + 1.9, 7.5), len(panels) * (cells * CELL_HEIGHT + 0.85) + 1.1),
        dpi=130,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for panel, places_in in zip(axes, panels, strict=True):
        _draw_panel(panel, layers, outputs, said, places_in, first, across, words, colours)
    figure.suptitle(
        "Logit lens: what each layer of the Pilot would predict next", fontsize=12, x=0.01, ha="left", fontweight="bold"
    )
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=axes, fraction=0.03, pad=0.01, aspect=30)
    bar.set_label("probability of the token shown", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.supxlabel(
        f"Tokens {places.start + 1} to {places.stop} of {total}; lambda {float(explanation.lam[sequence]):g}, "
        f"{explanation.space} space. Bold: the token that was generated.\n"
        f"Frame: the fused model's first choice is not the Pilot's.\n{_Words.LEGEND}",
        fontsize=8,
        x=0.01,
        ha="left",
    )
    if path is not None:
        figure.savefig(path, format="png")
    return figure


def _rows(explanation: Explanation, sequence: int, places: slice, max_layers: int) -> tuple[list[_Row], list[_Row]]:
    """Rows of the layers, lowest first, and of the outputs."""
    lens = explanation.logit_lens
    assert lens is not None
    depth = lens.ids.shape[2]
    every = -(-depth // max_layers)
    layers = [
        _Row(
            f"layer {layer + 1}",
            lens.ids[sequence, places, layer].tolist(),
            lens.probabilities[sequence, places, layer].tolist(),
        )
        for layer in range(depth - 1, -1, -every)[::-1]
    ]
    pilot, fused = explanation.pilot_top, explanation.fused_top
    outputs = [
        _Row("Pilot", pilot.ids[sequence, places, 0].tolist(), pilot.pilot[sequence, places, 0].tolist()),
        _Row("fused", fused.ids[sequence, places, 0].tolist(), fused.fused[sequence, places, 0].tolist()),
    ]
    return layers, outputs


def _draw_panel(
    axes: Any,
    layers: list[_Row],
    outputs: list[_Row],
    said: list[int],
    places: range,
    first: int,
    across: int,
    words: _Words,
    colours: Any,
) -> None:
    from matplotlib.patches import Rectangle

    bottoms = [float(y) for y in range(len(layers))] + [len(layers) + GAP + y for y in range(len(outputs))]
    for row, bottom in zip(layers + outputs, bottoms, strict=True):
        for x, place in enumerate(places):
            token, probability = row.ids[place], row.probabilities[place]
            axes.add_patch(
                Rectangle((x, bottom), 1, 1, facecolor=colours(probability), edgecolor="#d0d4da", linewidth=0.5)
            )
            axes.text(
                x + 0.5,
                bottom + 0.46,
                words[token],
                ha="center",
                va="center",
                fontsize=7 if len(words[token]) > 2 else 10,  # a lone comma must be seen
                color="white" if probability > 0.5 else "#1a1a1a",
                fontweight="bold" if token == said[place] else "normal",
                family=words.fonts,
                parse_math=False,
            )
    for x, place in enumerate(places):
        if outputs[0].ids[place] != outputs[1].ids[place]:
            axes.add_patch(
                Rectangle((x, bottoms[-2]), 1, 2, fill=False, edgecolor=MARK, linewidth=2, zorder=3, joinstyle="miter")
            )
    axes.set_xlim(0, across)
    axes.set_ylim(-0.02, bottoms[-1] + 1.02)
    axes.set_yticks([bottom + 0.5 for bottom in bottoms], [row.label for row in layers + outputs], fontsize=7)
    for label in axes.get_yticklabels()[-len(outputs) :]:
        label.set_fontweight("bold")
    axes.set_xticks(
        [x + 0.5 for x in range(len(places))],
        [words[said[place]] for place in places],
        fontsize=8,
        fontweight="bold",
        family=words.fonts,
        parse_math=False,
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    below = axes.secondary_xaxis("bottom")
    below.set_xticks([x + 0.5 for x in range(len(places))], [str(first + place + 1) for place in places], fontsize=7)
    below.tick_params(length=0, colors="#6b7280")
    for spines in (axes.spines, below.spines):
        spines[:].set_visible(False)
    axes.set_title("generated:", fontsize=8, loc="left", color="#6b7280")


class _Words(dict[int, str]):
    """The text of a cell for each token: short, with everything unprintable made visible."""

    LEGEND = "\u2423 blank   \u21b5 new line   \u21e5 tab   \u2026 cut   #n: token n, no whole character"
    _VISIBLE = str.maketrans({" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"})

    def __init__(self, tokenizer: Any, tokens: Iterable[int]) -> None:
        texts = {token: token_text(tokenizer, token).translate(self._VISIBLE) for token in tokens}
        self.fonts, known = _fonts_for({c for text in texts.values() for c in text})
        super().__init__({token: self._word(token, text, known) for token, text in texts.items()})

    @staticmethod
    def _word(token: int, text: str, known: set[str]) -> str:
        if not text or "\ufffd" in text:
            return f"#{token}"
        shown = [c if c in known and c.isprintable() else c.encode("unicode_escape").decode() for c in text]
        short = ""
        for character in shown:
            if len(short) + len(character) > LONGEST_TEXT:
                return short[: LONGEST_TEXT - 1] + "\u2026"
            short += character
        return short


def _fonts_for(characters: set[str]) -> tuple[list[str], set[str]]:
    """Installed fonts that draw these characters, DejaVu Sans first, and the characters that they have."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    fonts, known = [FONT], set[str]()
    known |= _drawn_by(get_font(findfont(FontProperties(family=FONT))), characters)
    for entry in sorted(fontManager.ttflist, key=lambda e: e.name):
        if known >= characters:
            break
        more = _drawn_by(get_font(entry.fname), characters - known)
        if more and entry.name not in fonts:
            fonts.append(entry.name)
            known |= more
    return fonts, known


def _drawn_by(font: Any, characters: set[str]) -> set[str]:
    return {c for c in characters if font.get_char_index(ord(c))}
