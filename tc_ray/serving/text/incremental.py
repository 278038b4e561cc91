"""Token ids to text: of a generation, piece by piece, and of single tokens.

Invariants: pieces are whole characters and nothing of a stop string; joined, they are the decoded text up to the first stop
string, however the ids are divided among calls. A single token has the same text wherever it stands; one that is no whole
character by itself is written as its bytes, so that different tokens do not look alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTEXT_TOKENS = 5
"""Prompt tokens that are decoded before the new ones: some tokenizers drop the blank at the beginning of a text."""
UNFINISHED = "\ufffd"
"""What a tokenizer makes of an incomplete character."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_BLANK = "\u2581"
_ALPHABET = {character: byte for byte, character in bytes_to_unicode().items()}
"""The characters by which byte-level tokenizers write bytes."""


class IncrementalText:
    """Decodes one generation.

    prompt_ids: ids before the first new token. stops: strings that end the text. special: special tokens are shown.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int] = (), stops: Iterable[str] = (), *, special: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = not special
        self._textless = frozenset() if special else frozenset(tokenizer.all_special_ids)
        self._stops = tuple(stops)
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        if self._decode(self._ids).endswith(UNFINISHED):
            self._ids = []
        self._start, self._decoded = 0, len(self._ids)
        self._held = ""
        self.stopped = False
        self.decoded = 0
        """Characters of all ids so far, held ones too."""
        self.released = 0
        """Characters of all pieces."""

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain after the new `ids`; may be empty. After `stopped` it is always empty."""
        piece = ""
        for token in ids:
            if self.stopped:
                break
            if token in self._textless:  # held, many of them would be decoded again with each new one
                continue
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
            self.released = self.decoded
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
        self.decoded += len(text)
        # The stop string that is complete first wins, so the result does not depend on how the text was divided.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            piece, self._held, self.stopped = self._held[: min(found)[1]], "", True
            self.released += len(piece)
            return piece
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        self.released += cut
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (and is shorter than it)."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TokenTexts:
    """Texts of a tokenizer's tokens, made once each."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def text(self, token: int) -> str:
        """With its leading blank; `bytes:\\xf0\\x9f` where it is no whole character; "" for ids of padding."""
        return self._both(token)[0]

    def utf8(self, token: int) -> bytes:
        """UTF-8, or the part of a character that it is."""
        return self._both(token)[1]

    def _both(self, token: int) -> tuple[str, bytes]:
        if token not in self._known:
            self._known[token] = self._decode(token)
        return self._known[token]

    def _decode(self, token: int) -> tuple[str, bytes]:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # the model's vocabulary is padded beyond the tokenizer's
            return "", b""
        text = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if UNFINISHED in text:
            raw = _raw_bytes(piece)
            if raw is not None:
                return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw
        # SentencePiece drops the blank before what it takes for the first word
        if piece.startswith(_SENTENCEPIECE_BLANK) and not text.startswith(" "):
            text = f" {text}"
        return text, text.encode("utf-8")


def _raw_bytes(piece: str) -> bytes | None:
    """Bytes of a piece of a byte-level or byte-fallback vocabulary; None if it is neither."""
    if found := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    if all(character in _ALPHABET for character in piece):
        return bytes(_ALPHABET[character] for character in piece)
    return None
