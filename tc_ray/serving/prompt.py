"""Prompts of requests as token ids, checked against what the model can take.

Invariant: the tokenizer here is not shared with the engine's thread (fast tokenizers may not be used by two threads at
once) and one lock guards it. Used by app.py.
"""

from __future__ import annotations

import threading
from typing import Any

from tc_ray.serving.errors import RequestError
from tc_ray.serving.protocol import ChatRequest, CompletionRequest


class PromptEncoder:
    """Encodes prompts. tokenizer: a transformers tokenizer of its own; vocab_size: ids the model embeds."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()

    def encode(self, request: CompletionRequest | ChatRequest) -> tuple[int, ...]:
        """Token ids of the prompt, at least one. Raises RequestError naming the field."""
        if isinstance(request, ChatRequest):
            return self._chat(request)
        prompt = request.prompt
        if isinstance(prompt, str):
            with self._lock:
                ids = self._tokenizer(prompt)["input_ids"]
            if not ids:
                raise RequestError("Field `prompt`: it has no tokens.", param="prompt", code="invalid_value")
            return tuple(ids)
        if max(prompt) >= self._vocab_size:
            raise RequestError(
                f"Field `prompt`: token ids must be below {self._vocab_size}.", param="prompt", code="invalid_value"
            )
        return tuple(prompt)

    def _chat(self, request: ChatRequest) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            raise RequestError(
                "This model has no chat template; use /v1/completions.", param="messages", code="no_chat_template"
            )
        messages = [{"role": message.role, "content": message.text()} for message in request.messages]
        from jinja2 import TemplateError

        with self._lock:
            try:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:
                raise RequestError(
                    f"Field `messages`: the model's chat template refuses them: {error}.",
                    param="messages",
                    code="invalid_value",
                ) from error
            # The template writes the special tokens itself.
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tuple(ids)
