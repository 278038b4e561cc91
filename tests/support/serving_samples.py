"""A tiny exported fused model (random weights, a real byte-level tokenizer) and a way to collect an engine's events."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tc_ray.config.serving import ServingSection
from tc_ray.models.copilot import Copilot
from tc_ray.models.fusion import FusedModel
from tc_ray.serving.engine.contract import Finished, Piece, Request, RequestHandle, Scored, Token
from tc_ray.serving.engine.engine import Engine
from tc_ray.serving.errors import RequestError

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = [("t", "h"), ("th", "e"), ("a", "n"), ("Ġ", "a"), ("Ġa", "n"), ("Ġ", "3"), ("l", "e"), ("p", "le"), ("ð", "Ł")]
"""Ġ is the blank; ðŁ are the first two bytes of an emoji, so that characters break at odd places."""

LIMITS = ServingSection(max_running=6, max_waiting=4, cache_bytes=2**26, prefill_tokens=32)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with SmolLM2's special tokens, the same in every process."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [first + second for first, second in MERGES]
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(names[:3])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_export(folder: Path, *, positions: int = 4096, lam: float = 0.5) -> Path:
    """Write an export folder (pilot/ with tokenizer, copilot/, fusion.json) and return it."""
    torch.manual_seed(5)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pilot = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # The end token is out of reach, so that the tests decide where a text ends.
        pilot.lm_head.weight[tokenizer.eos_token_id] = 0.0
    pilot.save_pretrained(folder / "base")
    copilot = Copilot.from_decoder(folder / "base", [0, 1], pilot=pilot, random_weights=True)
    with torch.no_grad():
        copilot.output.weight.normal_(std=0.3)
        # random weights would amplify rounding from row to row until tokens differ; trained ones do not
        copilot.error_projection.weight.mul_(0.05)
        copilot.output.weight[tokenizer.eos_token_id] = 0.0
    export = folder / "export"
    FusedModel.join(pilot, copilot, lam=lam).save_pretrained(export)
    tokenizer.save_pretrained(export / "pilot")
    return export


def offline(model: FusedModel, prompt: tuple[int, ...], **options: object) -> list[int]:
    """Tokens that `generate` alone gives after the prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def failure(event: object) -> tuple[str, str | None, int]:
    """Message, code and status of the event that ends a failed request."""
    assert isinstance(event, RequestError), event
    return event.message, event.code, event.status


class Collector:
    """Submits one request and waits for its events. `tokens`: those of the pieces taken so far."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._events: queue.Queue[Any] = queue.Queue()
        self.tokens: list[Token] = []
        self.handle: RequestHandle
        [self.handle] = engine.submit([request], lambda _, event: self._events.put(event))

    def next(self, timeout_s: float = 30) -> Piece | Finished | Scored | RequestError:
        """The next event."""
        event: Piece | Finished | Scored | RequestError = self._events.get(timeout=timeout_s)
        if isinstance(event, Piece):
            self.tokens += event.tokens
        return event

    def all(self) -> tuple[list[str], Finished | Scored | RequestError]:
        """Texts of all pieces that have any, and the last event."""
        pieces: list[str] = []
        while isinstance(event := self.next(), Piece):
            pieces += [event.text] if event.text else []
        return pieces, event

    def text(self) -> str:
        """The whole text."""
        return "".join(self.all()[0])

    def nothing_more(self) -> bool:
        """Whether no event waits."""
        return self._events.empty()
