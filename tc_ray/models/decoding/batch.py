"""A running batch of fused decoding that sequences join and leave at any token.

A prompt is computed by itself or with others (prefill.py), as `generate` computes it, then joins. `step` takes one token of every
sequence and returns the next distributions of all. Invariant: a sequence's numbers depend on the others by rounding only:
rows are independent in every operation, and masks hide what is not a row's own. Sequences with lam 0 do not run the
Copilot. An encoder-decoder's rows are its decoder's; the keys and values of each source, made once, have a store of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from tc_ray.models.decoding.alone import PilotAlone
from tc_ray.models.decoding.kv_rows import RowCache, RowLayer, RowStore
from tc_ray.models.decoding.prefill import Prefill
from tc_ray.models.fusion.core import fuse
from tc_ray.models.fusion.model import FusedModel


@dataclass(frozen=True)
class CacheNeed:
    """Entries that a sequence needs up to its last token: in the Pilot's cache, the Copilot's own, its memory, and of the source."""

    tokens: int
    rows: int
    memory: int
    source: int = 0


@dataclass(frozen=True)
class Step:
    """Logits of the next token, fp32 [R, V], row by row: the Pilot's and the fused ones (the same tensor if all lam are 0)."""

    pilot: torch.Tensor
    fused: torch.Tensor


class FusedBatch:
    """Sequences that decode one token per step, each with its own lam."""

    def __init__(self, model: FusedModel | PilotAlone) -> None:
        self.model = model
        self._weight = model.get_input_embeddings().weight
        self._device = self._weight.device
        config = model.family.decoder(model.pilot).config
        own = config if model.copilot is None else model.copilot.config.decoder_config()
        self._layers = ([], []) if model.copilot is None else model.copilot.stack.kinds
        """Of the Copilot: those that attend to its rows, and to its memory."""
        self._encodes, count = model.family.encoder_decoder, len(model.family.layers(model.pilot))
        self._pilot, self._source = self._store(config, count), self._store(config, count if self._encodes else 0)
        self._rows, self._memory = (self._store(own, len(layers)) for layers in self._layers)
        caches = [Cache(layers=[RowLayer(store, i) for i in range(count)]) for store in (self._pilot, self._source)]
        self._pilot_cache = EncoderDecoderCache(*caches) if self._encodes else caches[0]
        if self._encodes:  # the library does not make a source's keys and values again
            self._pilot_cache.is_updated = dict.fromkeys(range(count), True)
        self._row_cache, self._memory_cache = map(RowCache, (self._rows, self._memory), self._layers)
        self._copilot_of: list[int | None] = []
        """Of each row, its index among the corrected ones; None for lam 0."""
        self._lam: list[float] = []
        """Of each corrected row."""
        self._kept = torch.empty(0)
        """[corrected rows, 1, d_C], the feedback of the last Copilot row."""

    def _store(self, config: Any, layers: int) -> RowStore:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return RowStore(layers, heads, width, self._weight.dtype, self._device)

    def __len__(self) -> int:
        return len(self._pilot)

    def need(self, prompt: int, new: int, corrected: bool) -> CacheNeed:
        """What a sequence of `prompt` and `new` tokens needs."""
        read, source = (0, prompt) if self._encodes else (prompt, 0)  # prompt tokens that the decoder reads, and others
        rows, memory = (new, prompt + read + new) if corrected else (0, 0)
        return CacheNeed(read + new, rows, memory, source)

    def _sizes(self, needs: Sequence[CacheNeed]) -> list[tuple[RowStore, int, int]]:
        """Each store with the rows and columns that sequences of these needs take."""
        corrected = [need for need in needs if need.rows]
        return [
            (self._pilot, len(needs), max((need.tokens for need in needs), default=0)),
            (self._rows, len(corrected), max((need.rows for need in corrected), default=0)),
            (self._memory, len(corrected), max((need.memory for need in corrected), default=0)),
            (self._source, len(needs), max((need.source for need in needs), default=0)),
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
        return sum(store.nbytes for store in (self._pilot, self._rows, self._memory, self._source))

    @torch.inference_mode()
    def join(self, prefill: Prefill) -> int:
        """Add a computed prompt as the last row, for which `reserve` was called. Returns the row."""
        cache = prefill.cache
        own, source = (cache.self_attention_cache, cache.cross_attention_cache.layers) if self._encodes else (cache, [])
        self._source.join([(layer.keys, layer.values) for layer in source], len(prefill.ids) if source else 0)
        self._pilot.join([(layer.keys, layer.values) for layer in own.layers], 1 if source else len(prefill.ids))
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
        self._source.leave(row)
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
        given = self._inputs(last[:, None])
        with model.tap.recording() if model.tap and self._lam else nullcontext():
            out = model.pilot(**given, past_key_values=self._pilot_cache, use_cache=True)
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

    def _inputs(self, last: torch.Tensor) -> dict[str, Any]:
        """What the Pilot is given to read tokens [R, 1]."""
        visible, real = self._pilot.visible(1), self._source.visible(0)
        mask = None if visible is None else visible.long()
        if not self._encodes:
            positions = torch.tensor(self._pilot.lengths(), device=self._device)[:, None]
            return {"input_ids": last, "attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
        for number, layer in enumerate(self._pilot_cache.cross_attention_cache.layers):
            layer.keys, layer.values = self._source.read(number)
        # of the encoder's output only the size is read: its keys and values are there. T5 has no positions but the distances
        # between columns, which are right for rows that end in one column
        output = BaseModelOutput(last_hidden_state=self._weight.new_empty(len(self), self._source.width, 0))
        source_mask = None if real is None else real.long()
        given = {"decoder_input_ids": last, "decoder_attention_mask": mask}
        return given | {"encoder_outputs": output, "attention_mask": source_mask}

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
