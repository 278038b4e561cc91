"""The logit lens as a picture (figure 4): a heat map of layers over generated tokens.

Columns are the generated tokens, rows the Pilot's layers from the lowest up; above them the outputs of Pilot and fused model.
Needs an explanation and the tokenizer, no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tc_ray.models.fusion.explain import Explanation, token_text

FONT = "DejaVu Sans"  # comes with matplotlib
LOW, HIGH, MARK = "#ffffff", "#0f4c8a", "#d9480f"
CELL_WIDTH, CELL_HEIGHT = 0.82, 0.235
"""Inches."""
LONGEST_TEXT = 10


def draw_logit_lens(
    explanation: Explanation,
    tokenizer: Any,
    path: Path | str | None = None,
    *,
    sequence: int = 0,
    first: int = 0,
    count: int = 16,
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
    lens = explanation.logit_lens
    if lens is None:
        raise ValueError("the explanation has no logit lens: generate with explain=Explain(logit_lens=True)")
    total = int(explanation.mask[sequence].sum())
    places = slice(first, min(first + count, total))
    if places.start >= places.stop:
        raise ValueError(f"no tokens to draw: sequence {sequence} has {total}, asked for those from {first} on")
    depth, pilot, fused = lens.ids.shape[2], explanation.pilot_top, explanation.fused_top
    layers = list(range(depth - 1, -1, -max(1, -(-depth // max_layers))))[::-1]
    at = sequence, places
    ids = torch.cat([lens.ids[at][:, layers], pilot.ids[at][:, :1], fused.ids[at][:, :1]], 1)
    shown = [lens.probabilities[at][:, layers], pilot.pilot[at][:, :1], fused.fused[at][:, :1]]
    figure = _heat_map(
        [*(f"layer {layer + 1}" for layer in layers), "Pilot", "fused"],
        ids.T.tolist(),
        torch.cat(shown, 1).T.tolist(),
        explanation.tokens[at].tolist(),
        tokenizer,
    )
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


def _heat_map(
    labels: list[str], ids: list[list[int]], probabilities: list[list[float]], said: list[int], tokenizer: Any
) -> Any:
    """Cells row by row, the lowest row first; said: the generated token of each column."""
    # without pyplot: no global state, no display needed
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    words = _Words(tokenizer, {*said, *(token for row in ids for token in row)})
    size = max(len(said) * CELL_WIDTH + 1.9, 7.5), len(labels) * CELL_HEIGHT + 1.95
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("probability", [LOW, HIGH])
    image = axes.imshow(probabilities, cmap=colours, vmin=0, vmax=1, origin="lower", aspect="auto")
    text: dict[str, Any] = {"family": words.fonts, "parse_math": False}
    for y, row in enumerate(ids):
        for x, token in enumerate(row):
            axes.text(
                x,
                y,
                words[token],
                ha="center",
                va="center",
                fontsize=7 if len(words[token]) > 2 else 10,  # a lone comma must be seen
                color="white" if probabilities[y][x] > 0.5 else "#1a1a1a",
                fontweight="bold" if token == said[x] else "normal",
                **text,
            )
    outputs = len(labels) - 2
    axes.axhline(outputs - 0.5, color="#1a1a1a", linewidth=1)
    for x in range(len(said)):
        if ids[outputs][x] != ids[outputs + 1][x]:
            frame = Rectangle((x - 0.5, outputs - 0.5), 1, 2, fill=False, edgecolor=MARK, linewidth=2, zorder=3)
            axes.add_patch(frame)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xticks(range(len(said)), [words[token] for token in said], fontsize=8, fontweight="bold", **text)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_title("generated:", fontsize=8, loc="left", color="#6b7280")
    title = "Logit lens: what each layer of the Pilot would predict next"
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, aspect=30)
    bar.set_label("probability of the token shown", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


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
