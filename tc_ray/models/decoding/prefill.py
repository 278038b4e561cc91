"""A prompt being computed, by itself and some tokens at a time, or with others in one pass; and what another can begin with.

An encoder-decoder's prompt is its source: the encoder reads it at once, and the decoder begins with its start token.

Invariant: by itself a prompt is computed exactly as `generate` computes it alone, with others up to rounding. Used by the serving
engine and the evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from tc_ray.models.decoding.alone import PilotAlone
from tc_ray.models.fusion.core import fuse
from tc_ray.models.fusion.model import FusedModel


@dataclass(frozen=True)
class PromptPrefix:
    """Keys, values and states of the first tokens of a prompt, to begin another prompt with.

    entries: of each layer, keys and values [1, heads, n, head_dim]. states: fp32 [1, n, d].
    """

    ids: tuple[int, ...]
    entries: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    states: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.states.nbytes + sum(keys.nbytes + values.nbytes for keys, values in self.entries)


class _PromptLayer(DynamicLayer):
    """Keys and values of a prompt of `tokens` tokens, written in place: with `DynamicLayer` each part would copy all before it."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens
        self._room = torch.empty(0)
        """[2, B, heads, tokens, head_dim]"""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, heads, n, head_dim]; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, width = key_states.shape
            self._room = key_states.new_empty(2, rows, heads, self._tokens, width)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, begin:end] = states
        self.keys, self.values = self._room[:, :, :, :end]
        return self.keys, self.values


class Prefill:
    """A prompt being computed, some tokens at a time. The Copilot runs unless lam is 0.

    question: of an encoder-decoder, the encoder's output for `ids` (see `encoded`).
    `pilot` and `fused`: fp32 [1, V] logits of the first new token, when `done`.
    """

    def __init__(
        self,
        model: FusedModel | PilotAlone,
        ids: Sequence[int],
        lam: float,
        prefix: PromptPrefix | None = None,
        question: torch.Tensor | None = None,
    ) -> None:
        self.ids, self.lam = tuple(ids), lam
        self._model, self._question = model, question
        self.cache: Any = model.new_cache()
        if question is None:
            self.cache.layers = [  # those that keep every token; a window keeps the last ones
                _PromptLayer(len(self.ids)) if type(layer) is DynamicLayer else layer for layer in self.cache.layers
            ]
        self._states: list[torch.Tensor] = []
        self.reused = 0
        """Tokens whose computation a prefix saved."""
        if prefix is not None:
            # the last token is computed again in any case: its logits are wanted
            self.reused = shared_length(prefix.ids, self.ids[:-1])
            for layer, (keys, values) in enumerate(prefix.entries if self.reused else ()):
                self.cache.update(keys[:, :, : self.reused], values[:, :, : self.reused], layer)
            self._states.append(prefix.states[:, : self.reused])
        self.computed = self.reused
        """Tokens that are done."""
        self.pilot = self.fused = self._f = torch.empty(0)

    @property
    def done(self) -> bool:
        """The whole prompt is computed."""
        return self.computed == len(self.ids)

    @torch.inference_mode()
    def advance(self, tokens: int) -> int:
        """Compute up to `tokens` more tokens; returns how many."""
        model, first = self._model, self.computed
        count = len(self.ids) - first
        if self._question is None:
            count = min(tokens, count)
            given = {"input_ids": self._tensor(self.ids[first : first + count]), "logits_to_keep": 1}
        else:
            encoder_outputs = BaseModelOutput(last_hidden_state=self._question)
            given = {"decoder_input_ids": self._tensor(self._read), "encoder_outputs": encoder_outputs}
        with model.tap.recording() if model.tap else nullcontext():
            out = model.pilot(**given, past_key_values=self.cache, use_cache=True)
        if model.tap:
            self._states.append(model.tap.take())
        self.computed += count
        if self.done:
            self._finish(out.logits)
        return count

    @property
    def _read(self) -> tuple[int, ...]:
        """What the decoder reads."""
        return self.ids if self._question is None else (self._model.pilot.config.decoder_start_token_id,)

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self._model.get_input_embeddings().weight.device)

    def _finish(self, logits: torch.Tensor) -> None:
        model = self._model
        self.pilot = self.fused = logits[:, -1].float()
        if not self.lam:
            return
        assert isinstance(model, FusedModel)
        ids, states = self._tensor(self._read), torch.cat(self._states, 1)
        given = self._question
        memory = model.question_memory(ids) if given is None else model.copilot.question_memory(given)
        self.cache.copilot.ask(memory, memory.new_ones(memory.shape[:2], dtype=torch.bool))
        attended = torch.ones_like(ids, dtype=torch.bool)
        self._f = model.corrections(logits, self.cache.copilot, ids, states, attended)[:, 0]
        self.fused = self._fused(self.lam)

    def _fused(self, lam: float) -> torch.Tensor:
        assert isinstance(self._model, FusedModel)
        return fuse(self.pilot, self._f, torch.full((1,), lam, device=self.pilot.device), self._model.space)

    def weighted(self, lam: float) -> Prefill:
        """The same computed prompt for another lam, in the model's space of now; nothing is computed again. A prompt that was
        computed with lam 0 has no other."""
        other = copy.copy(self)
        other.lam, other.fused = lam, self._fused(lam) if lam else self.pilot
        return other

    def prefix(self) -> PromptPrefix | None:
        """What another prompt can begin with; None without states, for an encoder-decoder, or where a layer does not keep
        every token (sliding windows)."""
        if not self._states or self._question is not None:
            return None
        entries = [(layer.keys, layer.values) for layer in self.cache.layers]
        if any(keys is None or keys.shape[2] != len(self.ids) for keys, _ in entries):
            return None
        return PromptPrefix(self.ids, tuple(entries), torch.cat(self._states, 1))


@torch.inference_mode()
def advance_together(prefills: Sequence[Prefill]) -> int:
    """Compute whole prompts of a decoder-only model, none of them begun, in one pass; returns its tokens, padding among them.

    They are padded on the left, as `generate` pads a batch; each prompt takes a copy of what is its own.
    """
    model, widest = prefills[0]._model, max(len(prefill.ids) for prefill in prefills)
    lefts = [widest - len(prefill.ids) for prefill in prefills]
    device = model.get_input_embeddings().weight.device
    padded = [(0,) * left + prefill.ids for left, prefill in zip(lefts, prefills, strict=True)]
    ids = torch.tensor(padded, device=device)
    attended = torch.arange(widest, device=device) >= torch.tensor(lefts, device=device)[:, None]
    positions, cache, states = (attended.cumsum(1) - 1).clamp_min(0), model.new_cache(), None
    given = {"input_ids": ids, "attention_mask": attended.long(), "position_ids": positions, "logits_to_keep": 1}
    with model.tap.recording() if model.tap else nullcontext():
        out = model.pilot(**given, past_key_values=cache, use_cache=True)
    if model.tap:
        states = model.tap.take()
    pilot, f = out.logits[:, -1].float(), None
    if any(prefill.lam for prefill in prefills):
        assert isinstance(model, FusedModel) and states is not None
        cache.copilot.ask(model.question_memory(ids), attended)
        f = model.corrections(out.logits, cache.copilot, ids, states, attended)[:, 0]
    for row, prefill in enumerate(prefills):
        prefill.computed = len(prefill.ids)
        prefill.pilot = prefill.fused = pilot[row : row + 1]
        _copy_row(cache, prefill.cache, row, attended[row])
        if states is not None:
            prefill._states.append(states[row : row + 1, lefts[row] :].clone())
        if prefill.lam and f is not None:
            prefill._f = f[row : row + 1]
            prefill.fused = prefill._fused(prefill.lam)
            ours, own = cache.copilot, prefill.cache.copilot
            assert ours.visible is not None and ours.feedback is not None
            _copy_row(ours.self_attention, own.self_attention, row, attended.new_ones(ours.rows))
            _copy_row(ours.memory, own.memory, row, ours.visible[row])
            own.see(ours.visible[row : row + 1, ours.visible[row]])
            own.feed(ours.feedback[row : row + 1].clone())
    return ids.numel()


def _copy_row(source: Any, target: Any, row: int, real: torch.Tensor) -> None:
    """Put the `real` (bool [columns]) keys and values of a row into the empty cache `target`; windows keep the last columns."""
    for number, layer in enumerate(source.layers):
        if layer.is_initialized:
            kept = real[-layer.keys.shape[2] :]
            target.update(layer.keys[row : row + 1, :, kept], layer.values[row : row + 1, :, kept], number)


@torch.inference_mode()
def encoded(model: FusedModel, ids: Sequence[int]) -> torch.Tensor:
    """What the encoder makes of a source: [1, Q, d]."""
    source = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    states: torch.Tensor = model.pilot.get_encoder()(input_ids=source).last_hidden_state
    return states


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    most = min(len(a), len(b))
    return next((i for i in range(most) if a[i] != b[i]), most)
