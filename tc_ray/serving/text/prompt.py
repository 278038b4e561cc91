"""Prompts of requests as token ids, checked against what the model can take, and where each token stands in the text.

Invariant: the tokenizer here is not shared with the engine's thread, because two threads must not use a fast tokenizer at
once; a lock guards it.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tc_ray.data.encode.prompts import render_chat
from tc_ray.data.encode.special_text import SpecialTextError, encode_rendered, named_ids
from tc_ray.serving.errors import RequestError, invalid_value
from tc_ray.serving.text.incremental import IncrementalText, TokenTexts

_NO_VARIABLES = ("messages", "conversations", "self", "raise_exception", "strftime_now")
PROBE_CHARACTERS = 8
"""Characters per token in the part of a long text that is tokenised first; few texts have more."""
PROBE_SLACK_TOKENS = 16
"""At most this many tokens at the end of that part differ from those of the whole text."""


@dataclass(frozen=True)
class Room:
    """What a prompt has to fit into. tokens: of the longest prompt. context: of the model, where that is what bounds it; asked: new
    tokens that the client wants."""

    tokens: int
    context: int | None = None
    asked: int = 0

    def too_long(self, param: str, tokens: int, least: str = "") -> RequestError:
        """400 for a prompt of so many tokens. Clients know OpenAI's words "maximum context length is"."""
        if self.context is None:
            words = f"{least}{tokens} tokens are too many; the limit here is {self.tokens}"
        else:
            words = f"this model's maximum context length is {self.context} tokens; you asked for {least}{tokens} + {self.asked}"
        return RequestError(f"Field `{param}`: {words}.", param=param, code="context_length_exceeded")


@dataclass(frozen=True)
class PlacedPrompt:
    """A prompt as text, and where each of its tokens begins in it, in characters."""

    text: str
    begins: tuple[int, ...]

    def first_after(self, marker: str, param: str) -> int:
        """Index of the first token after the last `marker`; a token across the border counts as after it.

        Returns the number of tokens where nothing follows. Raises RequestError where the prompt lacks the marker.
        """
        found = self.text.rfind(marker)
        if found < 0:
            raise RequestError(
                f"Field `{param}`: the prompt does not contain this text.", param=param, code="score_after_not_found"
            )
        border = found + len(marker)
        for index, begin in enumerate(self.begins):
            end = self.begins[index + 1] if index + 1 < len(self.begins) else len(self.text)
            if begin >= border or end > border:
                return index
        return len(self.begins)


class PromptEncoder:
    """Encodes prompts. tokenizer: a transformers tokenizer that nothing else uses. vocab_size: ids that the model embeds.

    encoder_decoder: prompts are sources, which end with the end token, as in training.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, encoder_decoder: bool = False) -> None:
        self._tokenizer, self._sources = tokenizer, encoder_decoder
        self.vocab_size, self.end = vocab_size, tokenizer.eos_token_id
        self._lock = threading.Lock()
        self.texts = TokenTexts(copy.deepcopy(tokenizer))
        """Texts of single tokens. It has its own tokenizer, because the event loop must not wait for the lock."""

    def ids(
        self, given: str | Sequence[int], room: Room, param: str = "prompt", *, special: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a text or of ids, at least one. Raises RequestError naming `param`.

        special: with the tokens that a prompt begins and ends with, if there are any.
        """
        if isinstance(given, str):
            ids = self._tokenised(given, room, param, special)
            ids = self._ended(ids) if special and ids else ids
            if not ids:
                raise invalid_value(param, "it has no tokens")
        else:
            ids = tuple(given)
            if max(ids) >= self.vocab_size:
                raise invalid_value(param, f"token ids must be below {self.vocab_size}")
        if len(ids) > room.tokens:
            raise room.too_long(param, len(ids))
        return ids

    def chat(
        self,
        messages: list[dict[str, str]],
        room: Room,
        *,
        opens: bool = True,
        continues: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a conversation, rendered by the model's chat template. Raises RequestError.

        The name of a special token in a message is text, as in training. opens: up to where an answer begins. continues: the last
        message stays open. variables: of the template.
        """
        variables = variables or {}
        taken = {*_NO_VARIABLES, *inspect.signature(self._tokenizer.apply_chat_template).parameters}
        for name, value in variables.items():
            if name in taken or name in self._tokenizer.special_tokens_map:
                raise invalid_value(f"chat_template_kwargs.{name}", "this name is not one of the template's variables")
            if isinstance(value, str) and named_ids([value], self._tokenizer):
                raise invalid_value(f"chat_template_kwargs.{name}", "it names a special token")
        if not self._tokenizer.chat_template:
            raise RequestError(
                "This model has no chat template; use /v1/completions.", param="messages", code="no_chat_template"
            )
        from jinja2 import TemplateError

        contents = [message["content"] for message in messages]

        def render(contents: Sequence[str]) -> str:
            written = [{**message, "content": text} for message, text in zip(messages, contents, strict=True)]
            return render_chat(self._tokenizer, written, opens=opens, continues=continues, variables=variables)

        with self._lock:
            try:
                text = render(contents)
            except TemplateError as error:
                raise invalid_value("messages", f"the model's chat template refuses them: {error}") from error
            except Exception as error:  # a template is a program; the words of its errors may hold what clients sent
                param = "continue_final_message" if continues else "chat_template_kwargs" if variables else "messages"
                raise invalid_value(param, "the model's chat template fails with it") from error
        # The template writes the special tokens itself.
        ids = self.ids(text, room, "messages", special=False)
        with self._lock:
            try:
                if named_ids(contents, self._tokenizer):
                    ids = tuple(encode_rendered(contents, render, self._tokenizer))
            except SpecialTextError as error:
                raise invalid_value("messages", str(error)) from error
            except Exception as error:
                raise invalid_value("messages", "the model's chat template fails with it") from error
        ids = self._ended(ids)
        if len(ids) > room.tokens:
            raise room.too_long("messages", len(ids))
        return ids

    def _ended(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Many tokenizers end an encoder-decoder's source themselves."""
        return (*ids, self.end) if self._sources and ids[-1] != self.end else ids

    def placed(self, given: str | Sequence[int], ids: Sequence[int]) -> PlacedPrompt:
        """A prompt that was encoded to `ids`, as the text that an echo shows."""
        begins: list[int] = []
        with self._lock:
            if isinstance(given, str):
                end = 0
                for first, last in self._tokenizer(given, return_offsets_mapping=True)["offset_mapping"]:
                    # a blank that the tokenizer leaves out of a span belongs to the token
                    begins.append(min(first, end))
                    end = max(end, last)
                return PlacedPrompt(given, tuple(begins))
            decoder, text = IncrementalText(self._tokenizer, special=True), ""
            for token in ids:
                begins.append(len(text))
                text += decoder.push([token])
            return PlacedPrompt(text + decoder.finish(), tuple(begins))

    def _tokenised(self, text: str, room: Room, param: str, special: bool) -> tuple[int, ...]:
        probe = PROBE_CHARACTERS * (room.tokens + PROBE_SLACK_TOKENS)
        with self._lock:
            if len(text) > probe:
                begun = len(self._tokenizer(text[:probe], add_special_tokens=special)["input_ids"])
                if begun > room.tokens + PROBE_SLACK_TOKENS:
                    raise room.too_long(param, begun, "more than ")
            return tuple(self._tokenizer(text, add_special_tokens=special)["input_ids"])
