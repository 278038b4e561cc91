"""Token ids to text, piece by piece: whole characters only, and nothing of a stop string.

Invariant: the joined pieces are the decoded text up to the first stop string, however the ids are divided among calls.
Used by the engine, one per generation, and for echoed prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

CONTEXT_TOKENS = 5
"""Prompt tokens that are decoded before the new ones: some tokenizers drop the blank at the beginning of a text."""
UNFINISHED = "\ufffd"
"""What a tokenizer makes of an incomplete character."""


class IncrementalText:
    """Decodes one generation.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_ids: ids before the first new token. stops: strings that end the text.
        special: show special tokens; else they are left out of the text.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int] = (), stops: Iterable[str] = (), *, special: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = not special
        self._stops = tuple(stops)
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        if self._decode(self._ids).endswith(UNFINISHED):
            self._ids = []
        self._start, self._decoded = 0, len(self._ids)
        self._held = ""
        self.stopped = False

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain after the new `ids`; may be empty. After `stopped` it is always empty."""
        piece = ""
        for token in ids:
            if self.stopped:
                break
            self._ids.append(token)
            piece += self._release(self._new_text(final=False))
        return piece

    def finish(self) -> str:
        """The rest at the end of the generation: held beginnings of stop strings and incomplete characters."""
        if self.stopped:
            return ""
        piece = self._release(self._new_text(final=True))
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(ids, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False)
        )

    def _new_text(self, final: bool) -> str:
        """Text of the ids that are not yet released; empty while it ends within a character."""
        before = self._decode(self._ids[self._start : self._decoded])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(before) or (text.endswith(UNFINISHED) and not final):
            return ""
        self._start, self._decoded = self._decoded, len(self._ids)
        return text[len(before) :]

    def _release(self, text: str) -> str:
        """The part of held + new text that cannot belong to a stop string any more."""
        self._held += text
        # The stop string that is complete first wins, so the result does not depend on how the text was divided.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            piece, self._held, self.stopped = self._held[: min(found)[1]], "", True
            return piece
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (and is shorter than it)."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
