"""Text for people: the first line of an error, and strings from outside made safe for a terminal.

Invariant: what `visible` returns cannot move a cursor, colour a terminal or turn the writing direction.
"""

from __future__ import annotations


def first_line(error: BaseException, limit: int | None = None) -> str:
    """The first line of an error's text, or its type when it has none; `limit` in characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:limit]


def visible(text: str) -> str:
    """The text with every character that does not print (but line ends) as an escape: escape codes, direction marks, ..."""
    if all(character.isprintable() or character == "\n" for character in text):
        return text
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )
