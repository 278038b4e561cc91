"""Texts of token ids, for people: from the tokenizer that made them, or the bare ids where it cannot be had.

Invariant: a text comes from a tokenizer with the hash that the log's metadata names, and holds no character that could
move a cursor, turn the writing direction or hide: those are written as escapes. Used by everything here that shows tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.models.builtin import BUILTIN_MODELS, default_cache
from tc_ray.models.identity import tokenizer_hash
from tc_ray.text import visible

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
        note: where the tokenizer came from, or why there is none; for the user.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, note: str) -> None:
        self.note = note
        self.known = tokenizer is not None
        self._tokenizer = tokenizer
        self._size = len(tokenizer) if tokenizer is not None else 0
        self._cache: dict[int, str] = {}

    def raw(self, token: int) -> str:
        """The characters a token stands for; bytes that are no whole character as `\\xNN`; `#id` without a tokenizer."""
        text = self._cache.get(token)
        if text is None:
            text = self._cache[token] = self._text(token)
        return text

    def quoted(self, token: int) -> str:
        """One line for tables: blanks and line ends are visible. An unknown token (-1) is a question mark."""
        if token < 0:
            return "?"
        text = visible(self.raw(token)).replace("\n", NEWLINE)
        return text.replace(" ", SPACE) if text else "(empty)"

    def flowing(self, token: int) -> str:
        """For a running sequence: blanks stay, a line end is marked and kept."""
        return visible(self.raw(token)).replace("\n", NEWLINE + "\n")

    def sequence(self, tokens: Sequence[int]) -> str:
        """Text of several tokens, decoded together, so that characters of several tokens are whole."""
        if self._tokenizer is None:
            return " ".join(self.raw(int(token)) for token in tokens)
        known = [int(token) for token in tokens if 0 <= int(token) < self._size]
        return str(self._tokenizer.decode(known, clean_up_tokenization_spaces=False))

    def _text(self, token: int) -> str:
        if self._tokenizer is None or not 0 <= token < self._size:
            return f"#{token}"
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"#{token}"
        if _REPLACEMENT in text and _REPLACEMENT not in piece:
            return _byte_text(piece)
        # SentencePiece drops the blank of a first piece
        if piece.startswith(_BLANK_PIECE) and not text.startswith(" "):
            text = " " + text
        return text


def find_tokenizer(metadata: LogMetadata, run_folder: Path | None = None, given: str | None = None) -> TokenTexts:
    """The tokenizer that made a log's tokens: the one given, else of the run folder, else of the Pilot the log names.

    Nothing is downloaded unless the user names it.

    Args:
        given: folder or hub id from the user.

    Raises:
        TokenizerError: the given one cannot be read or has another hash.
    """
    if given is not None:
        try:
            tokenizer = _load(given, local_only=False)
        except (OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TokenizerError(f"--tokenizer {given}: no tokenizer can be read there ({first})") from None
        found = tokenizer_hash(tokenizer)
        if found != metadata.tokenizer_hash:
            raise TokenizerError(
                f"--tokenizer {given}: its hash is {found}, but the log's tokens were made by {metadata.tokenizer_hash} "
                f"(Pilot {metadata.pilot}); its texts would be wrong"
            )
        return TokenTexts(tokenizer, f"tokenizer of {given}")
    others = []
    for place in _places(metadata, run_folder):
        try:
            tokenizer = _load(str(place), local_only=True)
        except (OSError, ValueError):
            continue
        if tokenizer_hash(tokenizer) == metadata.tokenizer_hash:
            return TokenTexts(tokenizer, f"tokenizer of {place}")
        others.append(str(place))
    why = f"the tokenizers of {', '.join(others)} are others" if others else "none is on this machine"
    return TokenTexts(
        None,
        f"token ids are shown: the tokenizer of {metadata.pilot} (hash {metadata.tokenizer_hash}) was not found, {why}; "
        "name it with --tokenizer",
    )


def _places(metadata: LogMetadata, run_folder: Path | None) -> Iterable[Path | str]:
    if run_folder is not None:
        candidates = (run_folder / "pilot" / "final", run_folder / "export" / "pilot")
        yield from (folder for folder in candidates if (folder / "tokenizer_config.json").is_file())
    if metadata.pilot in BUILTIN_MODELS:
        yield default_cache() / metadata.pilot
    else:
        yield metadata.pilot


def _load(place: str, local_only: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    folder = Path(place).expanduser()
    if place.startswith((".", "/", "~")) and not folder.is_dir():
        raise OSError(f"there is no folder {place}")
    name = str(folder) if folder.is_dir() else str(default_cache() / place) if place in BUILTIN_MODELS else place
    return AutoTokenizer.from_pretrained(name, local_files_only=local_only, trust_remote_code=False)


def _byte_text(piece: str) -> str:
    """A byte-level piece that is no whole character, its bytes as escapes; other pieces as they are."""
    table = _byte_alphabet()
    if not all(character in table for character in piece):
        return piece
    return "".join(
        f"\\x{table[character]:02x}" if table[character] > 126 else chr(table[character]) for character in piece
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte -> the byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(rest)}
