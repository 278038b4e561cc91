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
LEGEND = "\u2423 blank   \u21b5 new line   \u21e5 tab   \u2026 cut   #n: token n, no whole character"
_VISIBLE = str.maketrans({" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"})


def draw_logit_lens(
    explanation: Explanation,
    tokenizer: Any,
    path: Path | str | None = None,
    *,
    sequence: int = 0,
    first: int = 0,
    count: int = 16,
) -> Any:
    """The logit lens of one sequence as a matplotlib figure, also written to `path` as PNG.

    Args:
        explanation: made with `Explain(logit_lens=True)`.
        sequence: which of its sequences. first, count: which of its tokens, from 0.

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
    at, pilot, fused = (sequence, places), explanation.pilot_top, explanation.fused_top
    shown = torch.cat([lens.probabilities[at], pilot.pilot[at][:, :1], fused.fused[at][:, :1]], 1)
    figure = _heat_map(
        torch.cat([lens.ids[at], pilot.ids[at][:, :1], fused.ids[at][:, :1]], 1).T.tolist(),
        shown.T.tolist(),
        explanation.tokens[at].tolist(),
        tokenizer,
    )
    figure.supxlabel(
        f"Tokens {places.start + 1} to {places.stop} of {total}; lambda {float(explanation.lam[sequence]):g}, "
        f"{explanation.space} space. Bold: the token that was generated.\n"
        f"Frame: the fused model's first choice is not the Pilot's.\n{LEGEND}",
        fontsize=8,
        x=0.01,
        ha="left",
    )
    if path is not None:
        figure.savefig(path, format="png")
    return figure


def _heat_map(ids: list[list[int]], probabilities: list[list[float]], said: list[int], tokenizer: Any) -> Any:
    """Cells row by row, the lowest layer first, then Pilot and fused; said: the generated token of each column."""
    # without pyplot: no global state, no display needed
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    words = words_of(tokenizer, {*said, *(token for row in ids for token in row)})
    outputs = len(ids) - 2
    labels = [*(f"layer {layer + 1}" for layer in range(outputs)), "Pilot", "fused"]
    size = max(len(said) * CELL_WIDTH + 1.9, 7.5), len(labels) * CELL_HEIGHT + 1.95
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("probability", [LOW, HIGH])
    image = axes.imshow(probabilities, cmap=colours, vmin=0, vmax=1, origin="lower", aspect="auto")
    text: dict[str, Any] = {"family": FONT, "parse_math": False}
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


def words_of(tokenizer: Any, tokens: Iterable[int]) -> dict[int, str]:
    """The text of a cell for each token: short, with everything that FONT cannot draw as an escape."""
    from matplotlib.font_manager import findfont, get_font

    font, words = get_font(findfont(FONT)), {}
    for token in tokens:
        text = token_text(tokenizer, token).translate(_VISIBLE)
        drawn = [c if c.isprintable() and font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in text]
        word = "".join(drawn) if text and "\ufffd" not in text else f"#{token}"
        words[token] = word if len(word) <= LONGEST_TEXT else word[: LONGEST_TEXT - 1] + "\u2026"
    return words
