"""A prompt being computed, and computed prompts that later prompts begin with, so a system prompt is computed once.

Invariants: a prompt is computed by itself, exactly as `generate` computes it. It reuses prompts of its own owner only: a
quick answer would show what others have asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tc_ray.models.fusion.cache import FusedCache
from tc_ray.models.fusion.core import fuse
from tc_ray.models.fusion.model import FusedModel

MIN_TOKENS = 16
"""Shorter beginnings are computed again: copying them saves nothing."""


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


class Prefill:
    """A prompt being computed, some tokens at a time. The Copilot runs unless lam is 0.

    `pilot` and `fused`: fp32 [1, V] logits of the first new token, when `done`.
    """

    def __init__(self, model: FusedModel, ids: Sequence[int], lam: float, prefix: PromptPrefix | None = None) -> None:
        self.ids, self.lam = tuple(ids), lam
        self._model = model
        self.cache: FusedCache = model.new_cache()
        self._states: list[torch.Tensor] = []
        self.reused = 0
        """Tokens whose computation a prefix saved."""
        if prefix is not None:
            # the last token is computed again in any case: its logits are wanted
            self.reused = _common(prefix.ids, self.ids[:-1])
            for layer, (keys, values) in enumerate(prefix.entries if self.reused else ()):
                self.cache.update(keys[:, :, : self.reused], values[:, :, : self.reused], layer)
            self._states.append(prefix.states[:, : self.reused])
        self._computed = self.reused
        self.pilot = self.fused = torch.empty(0)

    @property
    def done(self) -> bool:
        """The whole prompt is computed."""
        return self._computed == len(self.ids)

    @torch.inference_mode()
    def advance(self, tokens: int) -> int:
        """Compute up to `tokens` more tokens; returns how many."""
        model, first = self._model, self._computed
        count = min(tokens, len(self.ids) - first)
        device = model.get_input_embeddings().weight.device
        ids = torch.tensor([self.ids[first : first + count]], device=device)
        with model.tap.recording():
            out = model.pilot(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self._states.append(model.tap.take())
        self._computed += count
        if self.done:
            self._finish(out.logits)
        return count

    def _finish(self, logits: torch.Tensor) -> None:
        model = self._model
        self.pilot = self.fused = logits[:, -1].float()
        if not self.lam:
            return
        ids = torch.tensor([self.ids], device=logits.device)
        attended = torch.ones_like(ids, dtype=torch.bool)
        states = torch.cat(self._states, 1)
        self.cache.copilot.ask(model.question_memory(ids), attended)
        f = model.corrections(logits, self.cache.copilot, ids, states, attended)[:, 0]
        weight = torch.full((1,), self.lam, device=logits.device)
        self.fused = fuse(self.pilot, f, weight, model.space)

    def prefix(self) -> PromptPrefix | None:
        """What another prompt can begin with; None where a layer does not keep every token (sliding windows)."""
        entries = [(layer.keys, layer.values) for layer in self.cache.layers]
        if any(keys is None or keys.shape[2] != len(self.ids) for keys, _ in entries):
            return None
        return PromptPrefix(self.ids, tuple(entries), torch.cat(self._states, 1))


class Prefixes:
    """The prompts used last, within a number of bytes; 0 keeps none."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._kept: OrderedDict[tuple[bytes, tuple[int, ...]], PromptPrefix] = OrderedDict()
        self.nbytes = 0
        """Bytes held."""

    def longest(self, ids: tuple[int, ...], owner: bytes = b"") -> PromptPrefix | None:
        """The owner's kept prompt that shares the longest beginning with `ids`, if that is worth it."""
        best, shared = None, MIN_TOKENS - 1
        for (whose, _), prefix in self._kept.items():
            if whose == owner and prefix.ids[: shared + 1] == ids[: shared + 1]:  # otherwise it shares no more
                count = _common(prefix.ids, ids)
                if count > shared:
                    best, shared = prefix, count
        if best is not None:
            self._kept.move_to_end((owner, best.ids))
        return best

    def keep(self, prefill: Prefill, owner: bytes = b"") -> None:
        """Keep a computed prompt; drop the least recently used ones beyond the budget."""
        if not self._budget or len(prefill.ids) < MIN_TOKENS or (owner, prefill.ids) in self._kept:
            return
        prefix = prefill.prefix()
        if prefix is None or prefix.nbytes > self._budget:
            return
        self._kept[owner, prefix.ids] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self._budget:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    most = min(len(a), len(b))
    return next((i for i in range(most) if a[i] != b[i]), most)
