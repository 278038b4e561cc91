"""Single tokens as text and as bytes, for log-probabilities and explanations.

Invariant: a token has the same text wherever it stands. One that is no whole character by itself is written as its bytes,
so that different tokens do not look alike. Used by the event loop alone, with a tokenizer of its own.
"""

from __future__ import annotations

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_BLANK = "\u2581"
_UNFINISHED = "\ufffd"


_ALPHABET = {character: byte for byte, character in bytes_to_unicode().items()}
"""The characters by which byte-level tokenizers write bytes."""


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
        if _UNFINISHED in text:
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
