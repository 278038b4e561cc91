"""Texts of token ids: from the tokenizer that made them, or the bare ids where it is not found.

Invariant: a text comes from a tokenizer with the hash that the log's metadata names. `quoted` and `flowing` show characters
that could move a cursor, turn the writing direction or hide as escapes. Used by everything here that shows tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.models.hub import BUILTIN_MODELS, default_cache
from tc_ray.models.identity import tokenizer_hash
from tc_ray.text import first_line, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "␣"
NEWLINE = "↵"
_REPLACEMENT = "\ufffd"
_BLANK_PIECE = "▁"


class TokenizerError(ValueError):
    """The tokenizer that the user named is not the one that made the log's tokens."""


class TokenTexts:
    """Texts of single tokens.

    Args:
        tokenizer: None: ids are shown.
        note: for the user: where the tokenizer came from, or why there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, note: str) -> None:
        self.note = note
        self.known = tokenizer is not None
        self._tokenizer = tokenizer
        self._size = len(tokenizer) if tokenizer is not None else 0
        self._cache: dict[int, str] = {}

    def raw(self, token: int) -> str:
        """The characters of a token; `#id` where they are no whole character, or without a tokenizer."""
        if token not in self._cache:
            self._cache[token] = self._text(token)
        return self._cache[token]

    def quoted(self, token: int) -> str:
        """One line for tables, with visible blanks and line ends. An unknown token (-1) is a question mark."""
        if token < 0:
            return "?"
        text = visible(self.raw(token)).replace("\n", NEWLINE)
        return text.replace(" ", SPACE) if text else "(empty)"

    def flowing(self, token: int) -> str:
        """For running text: blanks stay, a line end is marked and kept."""
        return visible(self.raw(token)).replace("\n", NEWLINE + "\n")

    def sequence(self, tokens: Sequence[int]) -> str:
        """Text of several tokens, decoded together, because a character may be cut into several tokens."""
        if self._tokenizer is None:
            return " ".join(self.raw(int(token)) for token in tokens)
        known = [int(token) for token in tokens if 0 <= int(token) < self._size]
        return str(self._tokenizer.decode(known, clean_up_tokenization_spaces=False))

    def _text(self, token: int) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(token) if self._tokenizer and 0 <= token < self._size else None
        if self._tokenizer is None or piece is None:
            return f"#{token}"
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if _REPLACEMENT in text and _REPLACEMENT not in piece:
            return f"#{token}"
        # SentencePiece drops the blank of the first piece
        return f" {text}" if piece.startswith(_BLANK_PIECE) and not text.startswith(" ") else text


def find_tokenizer(metadata: LogMetadata, run_folder: Path | None = None, given: str | None = None) -> TokenTexts:
    """The tokenizer that made a log's tokens: the given one, else that of the run folder, else that of the log's Pilot.

    Only a tokenizer that the user names is downloaded.

    Args:
        given: folder or hub id from the user.

    Raises TokenizerError: the given one cannot be read or has another hash.
    """
    folders = [] if run_folder is None else [run_folder / "pilot" / "final", run_folder / "export" / "pilot"]
    own = [*(str(folder) for folder in folders if (folder / "tokenizer_config.json").is_file()), metadata.pilot]
    why = []
    for place in own if given is None else [given]:
        try:
            tokenizer = _load(place, local_only=given is None)
        except (OSError, ValueError) as error:
            why.append(f"no tokenizer can be read at {place} ({first_line(error)})")
            continue
        if tokenizer_hash(tokenizer) == metadata.tokenizer_hash:
            return TokenTexts(tokenizer, f"tokenizer of {place}")
        why.append(f"that of {place} is another, whose texts would be wrong")
    text = f"the tokenizer of {metadata.pilot} (hash {metadata.tokenizer_hash}) was not found: {'; '.join(why)}"
    if given is not None:
        raise TokenizerError(f"--tokenizer {given}: {text}")
    return TokenTexts(None, f"token ids are shown: {text}; name it with --tokenizer")


def _load(place: str, local_only: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    folder = Path(place).expanduser()
    if place.startswith((".", "/", "~")) and not folder.is_dir():
        raise OSError(f"there is no folder {place}")
    name = str(folder) if folder.is_dir() else str(default_cache() / place) if place in BUILTIN_MODELS else place
    return AutoTokenizer.from_pretrained(name, local_files_only=local_only, trust_remote_code=False)
