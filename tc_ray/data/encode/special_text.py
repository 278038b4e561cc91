"""Token ids of prompts in which the name of a special token, written by a user, is plain text.

A prompt is a template's text around an example's text. Special tokens of the template stay special; "<eos>" in a user's
message or a completion is encoded as its characters. Invariant: text without such a name is encoded exactly as the tokenizer
does it. Called by `tokenize` and by serving.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# private-use characters: no real text holds these marks
_HELD = "\ue000tc-ray-text-{}\ue001"
_ALIAS = "\ue000tc-ray-token-{}\ue001"


class SpecialTextError(ValueError):
    """The text of a special token cannot be kept apart with this tokenizer."""


def named_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the special tokens whose names stand in these texts."""
    apart = _apart(tokenizer)
    return {token_id for text in texts for token_id in apart.ids_in(text)}


def encode_content(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a text that comes from an example alone; no token is added."""
    if _apart(tokenizer).found_in(text):
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_rendered(
    contents: Sequence[str], render: Callable[[Sequence[str]], str], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Ids of `render(contents)`: special tokens that the rendering adds are special, those in `contents` are text.

    Raises SpecialTextError: the tokenizer is not a fast one, and a content holds the name of a special token.
    """
    apart = _apart(tokenizer)
    if not any(map(apart.found_in, contents)):
        return list(tokenizer(render(contents), add_special_tokens=False)["input_ids"])
    return apart.encode(render([apart.hold(content) for content in contents]))


@lru_cache(maxsize=4)
def _apart(tokenizer: PreTrainedTokenizerBase) -> _Apart:
    return _Apart(tokenizer)


class _Apart:
    """A copy of a tokenizer that reads special tokens only under aliases, so that their own names are plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        # longest first: <|end|> must not be taken for a shorter name within it
        self._ids = {token.content: i for i, token in sorted(special.items(), key=lambda p: -len(p[1].content))}
        self._names = list(self._ids)
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self._special, self._tokenizer = special, tokenizer
        self._copy: Any = None
        self._alias_ids: dict[int, int] = {}

    def found_in(self, text: str) -> bool:
        return self._pattern.search(text) is not None

    def ids_in(self, text: str) -> set[int]:
        """Ids of the special tokens whose names stand in the text."""
        return {self._ids[match.group()] for match in self._pattern.finditer(text)}

    def hold(self, text: str) -> str:
        """The text with a mark in place of each name of a special token."""
        return self._pattern.sub(lambda match: _HELD.format(self._names.index(match.group())), text)

    def encode(self, text: str) -> list[int]:
        """Ids of a text with marks of `hold` in it, which become the characters of the names."""
        if self._copy is None:
            self._make_copy()
        text = self._pattern.sub(lambda match: _ALIAS.format(self._names.index(match.group())), text)
        for index, name in enumerate(self._names):
            text = text.replace(_HELD.format(index), name)
        return [self._alias_ids.get(i, i) for i in self._copy.encode(text, add_special_tokens=False).ids]

    def _make_copy(self) -> None:
        from tokenizers import AddedToken, Tokenizer

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise SpecialTextError("holds the text of a special token, which only a fast tokenizer can keep apart")
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        for index, name in enumerate(self._names):
            token = self._special[self._ids[name]]
            alias = AddedToken(
                _ALIAS.format(index),
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=False,
                special=False,  # a special one would be plain text too
            )
            copy.add_tokens([alias])
            alias_id = copy.token_to_id(alias.content)
            assert alias_id is not None  # added above
            self._alias_ids[alias_id] = self._ids[name]
        copy.encode_special_tokens = True
        self._copy = copy
