"""Text for people: the first line of an error, sizes in bytes, and foreign text made safe for a terminal.

Invariant: what `visible` returns cannot move a cursor, colour a terminal or turn the writing direction. Imports nothing of
the package; used everywhere.
"""

from __future__ import annotations


def first_line(error: BaseException, limit: int | None = None) -> str:
    """The first line of an error's text, or its type if it has none; `limit` in characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:limit]


def byte_size(count: float) -> str:
    """Bytes in a decimal unit that leaves at most four digits, for instance "1.3 MB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def visible(text: str) -> str:
    """The text with every character that does not print (except line ends) as an escape: escape codes, direction marks, ..."""
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )
