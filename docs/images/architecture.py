"""The architecture picture: `python docs/images/architecture.py > docs/images/architecture.svg`.

No background, colours of middle lightness outside the boxes: it reads on a light and on a dark page. A test compares the
file with what this makes.
"""

from __future__ import annotations

import sys
from html import escape

WIDTH, HEIGHT = 1000, 385
LINE, NOTE = "#7b8694", "#7b8694"
BLUE, AMBER, GREEN, GREY = (
    ("#dbe9ff", "#2f6fd0"),
    ("#ffedcc", "#c77d0a"),
    ("#dcf3e1", "#2c8a4b"),
    ("#eceff3", "#7b8694"),
)

HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" text-anchor="middle"
 font-family="-apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif">
<title>Training: the Pilot writes its mistakes to a log, from which the Copilot learns. Inference: the Copilot's output
corrects the Pilot's probabilities token by token.</title>
<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" orient="auto">
<path d="M0 0 L10 5 L0 10 z" fill="{LINE}"/></marker></defs>"""


def text(x: float, y: float, words: str, size: int = 14, style: str = "", colour: str = "#1b2430") -> str:
    """A line of text, centred at x."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" {style}>{escape(words)}</text>'


def lines(x: float, top: float, title: str, rest: list[str]) -> list[str]:
    """A bold title and lines under it."""
    made = [text(x, top, title, 18, 'font-weight="700"')]
    return made + [text(x, top + 24 + 19 * number, words) for number, words in enumerate(rest)]


def box(x: float, y: float, width: float, height: float, colours: tuple[str, str], title: str, rest: list[str]) -> str:
    """A rounded box with its words in the middle."""
    fill, edge = colours
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="12" fill="{fill}" stroke="{edge}" stroke-width="2"/>'
    top = y + height / 2 + 6 - (24 + 19 * (len(rest) - 1)) / 2 if rest else y + height / 2 + 6
    return "\n".join([shape, *lines(x + width / 2, top, title, rest)])


def barrel(x: float, y: float, width: float, height: float, title: str, rest: list[str]) -> str:
    """The log: a table that grows."""
    fill, edge = AMBER
    half, dip = width / 2, 14
    side = (
        f'<path d="M{x} {y + dip} v{height - 2 * dip} a{half} {dip} 0 0 0 {width} 0 v-{height - 2 * dip}" fill="{fill}" '
        f'stroke="{edge}" stroke-width="2"/>'
    )
    lid = f'<ellipse cx="{x + half}" cy="{y + dip}" rx="{half}" ry="{dip}" fill="{fill}" stroke="{edge}" stroke-width="2"/>'
    return "\n".join([side, lid, *lines(x + half, y + 58, title, rest)])


def arrow(x1: float, y1: float, x2: float, y2: float, above: str = "", below: str = "", dashed: bool = False) -> str:
    """An arrow with words above and below its middle."""
    dash = ' stroke-dasharray="6 5"' if dashed else ""
    shape = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{LINE}" stroke-width="2.5"{dash} marker-end="url(#head)"/>'
    middle = (x1 + x2) / 2
    words = [(above, min(y1, y2) - 9), (below, max(y1, y2) + 19)]
    return "\n".join([shape, *(text(middle, y, said, 14, colour=NOTE) for said, y in words if said)])


def aside(x: float, y: float, words: str) -> str:
    """A note that begins at x."""
    return text(x, y, words, 14, 'style="text-anchor: start"', NOTE)


def picture() -> str:
    """The whole file."""
    parts = [
        HEAD,
        text(70, 28, "TRAINING", 13, 'font-weight="700" letter-spacing="2"', NOTE),
        box(10, 75, 120, 80, GREY, "Examples", ["your data"]),
        arrow(130, 115, 183, 115),
        box(185, 50, 190, 130, BLUE, "Pilot", ["the model that is", "fine-tuned", "(Ray Train, DeepSpeed)"]),
        arrow(375, 115, 473, 115, "records", "never waits"),
        barrel(
            475,
            36,
            230,
            158,
            "Mistake Log",
            ["what it was asked,", "what it thought, and its", "error at every token", "(Delta table)"],
        ),
        arrow(705, 115, 798, 115, "batches", "follows"),
        box(800, 50, 190, 130, GREEN, "Copilot", ["learns to predict", "the Pilot's errors", "(Ray actors)"]),
        arrow(280, 180, 280, 243, dashed=True),
        aside(292, 217, "export"),
        arrow(895, 180, 895, 243, dashed=True),
        aside(907, 217, "export"),
        text(70, 238, "INFERENCE", 13, 'font-weight="700" letter-spacing="2"', NOTE),
        box(10, 270, 120, 80, GREY, "Prompt", ["and the answer", "so far"]),
        arrow(130, 310, 183, 310),
        box(185, 245, 190, 130, BLUE, "Pilot", ["probabilities p", "of the next token"]),
        arrow(375, 280, 473, 280, "p"),
        box(475, 231, 230, 98, GREY, "p + λ f", ["the next token; λ is chosen", "on validation data, 0 = Pilot"]),
        arrow(800, 280, 707, 280, "f"),
        box(800, 245, 190, 130, GREEN, "Copilot", ["correction f", "of the next token"]),
        arrow(375, 357, 798, 357, below="hidden states of every layer, pooled"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(picture())
