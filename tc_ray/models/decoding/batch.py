"""A running batch of fused decoding that sequences join and leave at any token.

A prompt is computed by itself, exactly as `generate` computes it (prefill.py), then joins. `step` takes one token of every
sequence and returns the next distributions of all. Invariant: a sequence's numbers depend on the others by rounding only:
rows are independent in every operation, and masks hide what is not a row's own. Sequences with lam 0 do not run the
Copilot. Decoder-only models.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from tc_ray.models.decoding.alone import PilotAlone
from tc_ray.models.decoding.kv_rows import RowCache, RowLayer, RowStore
from tc_ray.models.decoding.prefill import Prefill
from tc_ray.models.fusion.core import fuse
from tc_ray.models.fusion.model import FusedModel


@dataclass(frozen=True)
class CacheNeed:
    """Entries that a sequence needs up to its last token: in the Pilot's cache, the Copilot's own and its memory."""

    tokens: int
    rows: int
    memory: int


@dataclass(frozen=True)
class Step:
    """Logits of the next token, fp32 [R, V], row by row: the Pilot's and the fused ones (the same tensor if all lam are 0)."""

    pilot: torch.Tensor
    fused: torch.Tensor


class FusedBatch:
    """Sequences that decode one token per step, each with its own lam."""

    def __init__(self, model: FusedModel | PilotAlone) -> None:
        self.model = model
        weight = model.get_input_embeddings().weight
        self._device = weight.device
        config = model.family.decoder(model.pilot).config
        own = config if model.copilot is None else model.copilot.config.decoder_config()
        attends: tuple[bool, ...] = () if model.copilot is None else tuple(model.copilot.stack.attends_memory)
        place = {"dtype": weight.dtype, "device": weight.device}
        self._pilot = RowStore(config.num_hidden_layers, config.num_key_value_heads, _head_dim(config), **place)
        heads, width = own.num_key_value_heads, _head_dim(own)
        self._rows = RowStore(attends.count(False), heads, width, **place)
        self._memory = RowStore(attends.count(True), heads, width, **place)
        self._pilot_cache = Cache(layers=[RowLayer(self._pilot, i) for i in range(config.num_hidden_layers)])
        self._layers = tuple([i for i, memory in enumerate(attends) if memory is kind] for kind in (False, True))
        self._row_cache, self._memory_cache = map(RowCache, (self._rows, self._memory), self._layers)
        self._copilot_of: list[int | None] = []
        """Of each row, its index among the corrected ones; None for lam 0."""
        self._lam: list[float] = []
        """Of each corrected row."""
        self._kept = torch.empty(0)
        """[corrected rows, 1, d_C], the feedback of the last Copilot row."""

    def __len__(self) -> int:
        return len(self._pilot)

    def need(self, prompt: int, new: int, corrected: bool) -> CacheNeed:
        """What a sequence of `prompt` and `new` tokens needs."""
        return CacheNeed(prompt + new, new if corrected else 0, 2 * prompt + new if corrected else 0)

    def _sizes(self, needs: Sequence[CacheNeed]) -> list[tuple[RowStore, int, int]]:
        """Each store with the rows and columns that sequences of these needs take."""
        corrected = [need for need in needs if need.rows]
        return [
            (self._pilot, len(needs), max((need.tokens for need in needs), default=0)),
            (self._rows, len(corrected), max((need.rows for need in corrected), default=0)),
            (self._memory, len(corrected), max((need.memory for need in corrected), default=0)),
        ]

    def planned_bytes(self, needs: Sequence[CacheNeed]) -> int:
        """Bytes of the caches that hold sequences of these needs at once."""
        return sum(store.planned_bytes(rows, columns) for store, rows, columns in self._sizes(needs))

    @torch.inference_mode()
    def reserve(self, needs: Sequence[CacheNeed], budget_bytes: int = 0) -> None:
        """Resize the caches to sequences of these needs, those in the batch among them.

        They do not shrink while they stay below budget_bytes: each resize copies everything.
        """
        sizes = self._sizes(needs)
        kept = [(store, *store.at_least(rows, columns)) for store, rows, columns in sizes]
        if sum(store.planned_bytes(rows, columns) for store, rows, columns in kept) <= budget_bytes:
            sizes = kept
        for store, rows, columns in sizes:
            store.reserve(rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes that the caches hold."""
        return self._pilot.nbytes + self._rows.nbytes + self._memory.nbytes

    @torch.inference_mode()
    def join(self, prefill: Prefill) -> int:
        """Add a computed prompt as the last row, for which `reserve` was called. Returns the row."""
        cache = prefill.cache
        self._pilot.join([(layer.keys, layer.values) for layer in cache.layers], len(prefill.ids))
        if not prefill.lam:
            self._copilot_of.append(None)
            return len(self) - 1
        copilot = cache.copilot
        rows, memory = (
            [(source.layers[layer].keys, source.layers[layer].values) for layer in layers]
            for source, layers in zip((copilot.self_attention, copilot.memory), self._layers, strict=True)
        )
        self._rows.join(rows, copilot.rows)
        self._memory.join(memory, memory[0][0].shape[2] if memory else 0)
        self._copilot_of.append(len(self._lam))
        self._lam.append(prefill.lam)
        assert copilot.feedback is not None
        kept = copilot.feedback[:, -1:]
        self._kept = kept.clone() if len(self._lam) == 1 else torch.cat([self._kept, kept])
        return len(self) - 1

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        self._pilot.leave(row)
        gone = self._copilot_of[row]
        _fill(self._copilot_of, row)
        if gone is None:
            return
        last = len(self._lam) - 1
        self._rows.leave(gone)
        self._memory.leave(gone)
        _fill(self._lam, gone)
        if gone != last:
            self._kept[gone] = self._kept[last]
            self._copilot_of[self._copilot_of.index(last)] = gone
        self._kept = self._kept[:last]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Step:
        """Decode the last token of each row, in the order of rows; returns the logits of the next ones."""
        model = self.model
        last = torch.tensor(tokens, device=self._device)
        self._pilot.ensure_columns(1)
        visible = self._pilot.visible(1)
        with model.tap.recording() if model.tap and self._lam else nullcontext():
            out = model.pilot(
                input_ids=last[:, None],
                attention_mask=None if visible is None else visible.long(),
                position_ids=torch.tensor(self._pilot.lengths(), device=self._device)[:, None],
                past_key_values=self._pilot_cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._pilot.advance(1)
        pilot = out.logits[:, -1].float()
        if not model.tap or not self._lam:
            return Step(pilot, pilot)
        states = model.tap.take()
        if self._copilot_of == list(range(len(self))):
            return Step(pilot, self._corrected(pilot, last, states))
        rows = [self._copilot_of.index(place) for place in range(len(self._lam))]
        chosen = torch.tensor(rows, device=self._device)
        corrected = self._corrected(pilot[chosen], last[chosen], states[chosen])
        return Step(pilot, pilot.index_copy(0, chosen, corrected))

    def _corrected(self, pilot: torch.Tensor, last: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Fused logits [C, V] of the corrected rows, whose Copilot rows are decoded: see `FusedCore.corrections`."""
        model = self.model
        assert isinstance(model, FusedModel)  # only its prompts have another lam than 0
        copilot, feedback = model.copilot, model.strategy
        for store in (self._rows, self._memory):
            store.ensure_columns(1)
        seen, visible = self._rows.visible(1), self._memory.visible(1)
        if visible is None:
            visible = torch.ones(len(self._lam), self._memory.width + 1, dtype=torch.bool, device=self._device)
        row = feedback.row(self._kept, last)
        state = copilot.decode(
            copilot.with_producing_state(row, states),
            copilot.rationale_memory(states),
            copilot.seen_by_row(visible)[:, None],
            positions=torch.tensor(self._rows.lengths(), device=self._device)[:, None],
            seen=seen,
            first_row=self._rows.width,
            self_cache=self._row_cache,
            memory_cache=self._memory_cache,
        )[:, 0]
        self._rows.advance(1)
        self._memory.advance(1)
        self._kept = feedback.keep(state, pilot)
        lam = torch.tensor(self._lam, device=self._device)
        return fuse(pilot, copilot.expand(copilot.predict(state), pilot.shape[-1]), lam, model.space)


def _fill(numbers: list[Any], place: int) -> None:
    numbers[place] = numbers[-1]
    numbers.pop()


def _head_dim(config: Any) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)
