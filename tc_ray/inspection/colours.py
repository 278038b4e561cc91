"""The colours of errors: one scale from no error to all of the probability on other tokens.

Invariant: lightness runs one way along the scale, so it reads in grey and with every kind of colour blindness. Text on a
colour has a contrast of at least 4.5 to 1. Used in the terminal and in pages.
"""

from __future__ import annotations

LEVELS = 20
"""Level 0 (error below 1/20) is no colour."""

# from small to large errors: darker on light pages, lighter on dark ones
_LIGHT = ((255, 247, 230), (254, 217, 142), (246, 140, 50), (196, 58, 20), (110, 14, 22))
_DARK = ((44, 30, 24), (96, 44, 22), (176, 72, 24), (240, 142, 52), (255, 224, 150))


def level(error: float) -> int:
    """0..LEVELS-1 of an error between 0 and 1."""
    return min(max(int(error * LEVELS), 0), LEVELS - 1)


def scale(dark: bool = False) -> list[tuple[str, str]]:
    """Background and text colour of each level, as #rrggbb."""
    anchors = _DARK if dark else _LIGHT
    colours = []
    for step in range(LEVELS):
        place = step / (LEVELS - 1) * (len(anchors) - 1)
        low = min(int(place), len(anchors) - 2)
        mix = [a + (b - a) * (place - low) for a, b in zip(anchors[low], anchors[low + 1], strict=True)]
        back = "#" + "".join(f"{round(value):02x}" for value in mix)
        colours.append((back, max(("#000000", "#ffffff"), key=lambda text: contrast(text, back))))
    return colours


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2)."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
