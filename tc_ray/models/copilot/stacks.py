"""The shape of a Copilot, and its layers (section 3.1, appendix E.2), taken from a pretrained decoder and run as they are.

Decoder-only: self-attention layers see the error rows. The others (insertion patterns, table 18) attend to the memory with the same
projections: the layer's own forward runs with the memory's keys and values and without rotation. So norms, softcaps, grouped heads
and residuals are the library's code for every family.

Encoder-decoder: the decoder blocks of T5, unchanged. Every block keeps its self-attention, here over the error rows, with the family's
relative position bias over row numbers. Its cross-attention reads the memory instead of the encoder's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedConfig

from tc_ray.models.families import family_of

Weights = list[tuple[str, torch.Tensor]]
"""Names and tensors."""
PATTERNS: dict[str, Callable[[int, int], bool]] = {
    "alternate": lambda layer, count: layer % 2 == 1,
    "early": lambda layer, count: layer < count // 2,
    "late": lambda layer, count: layer >= count - count // 2,
    "all": lambda layer, count: True,
}
"""(layer counted from 0, number of layers) -> the layer attends to the memory (table 18). `alternate` is the paper's best; the other
three are this project's reading of the table's alternatives."""


class CopilotConfig(PreTrainedConfig):
    """Shape of a Copilot.

    Args:
        decoder: `to_dict()` of the decoder family's config, with the Copilot's own number of layers.
        pilot_hidden_size: width d_P of the Pilot's states and embeddings.
        vocab_size: V, width of the Pilot's logits at training; another Pilot's is aligned by token id.
        pattern: of layers that attend to the Pilot (table 18). producing_state: where row i has the state that produced p^_i:
            `input` row and memory, `memory`, or `unseen`.
        row_positions, error_input, start_row, memory_norm, scaled_output: as in the `copilot` section of a run's config.
        pooling, tap_layers, positions: of the rationale (table 19, `log`). tap: the same in words. question: of a decoder-only Pilot,
            `ids`: X~ is made with the embedding kept here; `states`: it is given, in decoding by the Pilot's own embedding.
        output_size: A, tokens that f can be non-zero for; 0 is all of V.
        tokenizer: `vocabulary_hash` of the tokenizer of its token ids; empty: unknown. source: of its first weights.
    """

    model_type = "tc_ray_copilot"

    decoder: dict[str, Any] = field(default_factory=dict)
    pilot_hidden_size: int = 0
    vocab_size: int = 0
    pattern: str = "alternate"
    producing_state: str = "input"
    row_positions: bool = True
    error_input: str = "embedding"
    start_row: str = "learned"
    memory_norm: bool = True
    scaled_output: bool = True
    pooling: str = "mean"
    tap_layers: list[int] | None = None
    tap: str = ""
    positions: str = "all"
    question: str = "ids"
    output_size: int = 0
    tokenizer: str = ""
    source: str = ""

    def decoder_config(self) -> PreTrainedConfig:
        """The family's own config object."""
        fields = dict(self.decoder)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)


def memory_layers(pattern: str, count: int) -> list[bool]:
    """For each of `count` layers, whether it attends to the memory.

    Raises ValueError: an unknown pattern, or one that leaves no such layer: f would not depend on the Pilot's states.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"insertion pattern {pattern!r} is not one of {', '.join(PATTERNS)}")
    chosen = [PATTERNS[pattern](layer, count) for layer in range(count)]
    if not any(chosen):
        raise ValueError(
            f"a Copilot of {count} layer(s) has none that attends to the Pilot under pattern {pattern!r}: "
            "take more layers (copilot.layers, copilot.every) or pattern 'all'"
        )
    return chosen


class Places(NamedTuple):
    """Where R real positions stand in the memory of B sequences, M columns each. index: int64 [R], of B x M."""

    index: torch.Tensor
    sequences: int
    width: int

    @classmethod
    def of(cls, *parts: torch.Tensor) -> Places:
        """Of masks, bool [B, M_i], side by side: the real positions of the first part, of the second, ..."""
        sequences, width = len(parts[0]), sum(part.shape[1] for part in parts)
        columns = torch.arange(sequences * width, device=parts[0].device).view(sequences, width)
        each = columns.split([part.shape[1] for part in parts], 1)
        return cls(torch.cat([at[part] for at, part in zip(each, parts, strict=True)]), sequences, width)

    def spread(self, states: torch.Tensor) -> torch.Tensor:
        """[R, w] -> [B, M, w], zero in padding."""
        padded = states.new_zeros(self.sequences * self.width, states.shape[1]).index_copy(0, self.index, states)
        return padded.view(self.sequences, self.width, -1)


class DecoderOnlyStack(nn.Module):
    """Decoder layers and final norm; `attends_memory[j]` says what layer j attends to.

    kinds: the layers that attend to the Copilot's rows, and those that attend to the memory.
    """

    def __init__(self, config: CopilotConfig) -> None:
        super().__init__()
        decoder_config = config.decoder_config()
        family = family_of(decoder_config)
        # the dtype being loaded, not the one the base was saved in
        decoder = AutoModel.from_config(decoder_config, dtype=torch.get_default_dtype())
        self.layers, self.norm, self.rotary_emb = decoder.layers, decoder.norm, decoder.rotary_emb
        self.attends_memory = memory_layers(config.pattern, len(self.layers))
        self.kinds = tuple(
            [i for i, kind in enumerate(self.attends_memory) if kind is memory] for memory in (False, True)
        )
        types = getattr(decoder_config, "layer_types", None) or [None] * len(self.layers)
        self._types, self._family = types, family
        self._numbered, self._normed = config.row_positions, config.memory_norm
        self._windows = [family.window(decoder_config, kind) for kind in types]
        # eager attention (the only one with Gemma 2's softcap) adds its mask, and is causal only by the mask
        self._eager = decoder.config._attn_implementation == "eager"

    def load_layers(self, base: nn.Module, layers: Sequence[int]) -> Weights:
        """Copy these layers and the final norm of a pretrained `AutoModel`; returns each weight read, by its name in the base."""
        decoder: Any = base
        read: Weights = []
        for own, index in zip(self.layers, layers, strict=True):
            read += _copied(own, decoder.layers[index].state_dict(), f"layers.{index}")
        return read + _copied(self.norm, decoder.norm.state_dict(), "norm")

    def forward(
        self,
        rows: torch.Tensor,
        memory: torch.Tensor,
        visible: torch.Tensor,
        *,
        first_row: int,
        self_cache: DynamicCache | None,
        memory_cache: DynamicCache | None,
        places: Places | None = None,
        positions: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final states; see `Copilot.decode`."""
        if positions is None:
            positions = torch.arange(first_row, first_row + rows.shape[1], device=rows.device)[None]
        rotations = {
            kind: self._family.rotation(self.rotary_emb, rows, positions, kind) for kind in dict.fromkeys(self._types)
        }
        memory_mask = attention_mask(visible[:, None], rows.dtype, added=self._eager)
        for index, layer in enumerate(self.layers):
            rotation = rotations[self._types[index]]
            if self.attends_memory[index] or not self._numbered:
                rotation = torch.ones_like(rotation[0]), torch.zeros_like(rotation[1])
            if self.attends_memory[index]:
                # what the pretrained keys and values were made from
                source = layer.input_layernorm(memory) if self._normed else memory
                rows = _attend_to_memory(layer, rows, source, places, memory_mask, rotation, memory_cache)
            else:
                mask = self._row_mask(rows, first_row, self._windows[index], seen)
                rows = layer(rows, attention_mask=mask, position_embeddings=rotation, past_key_values=self_cache)
        return self.norm(rows)

    def _row_mask(
        self, rows: torch.Tensor, first_row: int, window: int | None, real: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Causal mask over all rows up to these, or None if none is needed. real: bool [B, first_row + n], no padding; None: all."""
        count = rows.shape[1]
        total = first_row + count
        if window is not None and window >= total:
            window = None
        if window is None and real is None and (count == 1 or (not self._eager and first_row == 0)):
            return None
        query = torch.arange(first_row, total, device=rows.device)[:, None]
        key = torch.arange(total, device=rows.device)
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        seen = seen[None, None] if real is None else seen & real[:, None, None]
        return attention_mask(seen, rows.dtype, added=self._eager)


def attention_mask(seen: torch.Tensor, dtype: torch.dtype, *, added: bool) -> torch.Tensor:
    """The bool mask itself, or 0 and the least number of `dtype` for attention that adds its mask."""
    if not added:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _copied(module: nn.Module, weights: dict[str, torch.Tensor], name: str) -> Weights:
    """Copy weights into a module; each of them, its name below `name`."""
    module.load_state_dict(weights)
    return [(f"{name}.{key}", weight) for key, weight in weights.items()]


class _Given:
    """A cache for one attention call: it returns the keys and values to attend to."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self._given = key, value

    def update(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._given


def _attend_to_memory(
    layer: Any,
    rows: torch.Tensor,
    source: torch.Tensor,
    places: Places | None,
    mask: torch.Tensor,
    unrotated: tuple[torch.Tensor, torch.Tensor],
    cache: DynamicCache | None,
) -> torch.Tensor:
    """The layer with queries from `rows`, keys and values from the memory `source` (equation 6), without RoPE."""
    attention = layer.self_attn
    key, value = attention.k_proj(source), attention.v_proj(source)
    if places is not None:
        key, value = places.spread(key), places.spread(value)
    shape = (*key.shape[:2], -1, attention.head_dim)
    key, value = key.view(shape).transpose(1, 2), value.view(shape).transpose(1, 2)
    if hasattr(attention, "k_norm"):
        key = attention.k_norm(key)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    return layer(rows, attention_mask=mask, position_embeddings=unrotated, past_key_values=_Given(key, value))


class EncoderDecoderStack(nn.Module):
    """Decoder blocks and final norm of a T5. kinds: as of `DecoderOnlyStack`; every block attends to both."""

    def __init__(self, config: CopilotConfig) -> None:
        super().__init__()
        decoder = AutoModel.from_config(config.decoder_config(), dtype=torch.get_default_dtype()).decoder
        self.block, self.final_layer_norm, self.dropout = decoder.block, decoder.final_layer_norm, decoder.dropout
        self.kinds = list(range(len(self.block))), list(range(len(self.block)))
        self._eager = decoder.config._attn_implementation == "eager"
        self._numbered = config.row_positions
        if not self._numbered:  # the library then adds zeros
            first = self.block[0].layer[0].SelfAttention
            first.has_relative_attention_bias = False
            del first.relative_attention_bias

    def load_layers(self, base: nn.Module, layers: Sequence[int]) -> Weights:
        """Copy these decoder blocks, the relative position bias (block 0 holds it) and the final norm of a base, as above."""
        decoder: Any = base.decoder
        read: Weights = []
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        for number, (own, index) in enumerate(zip(self.block, layers, strict=True)):
            weights = decoder.block[index].state_dict()
            weights.pop(bias, None)
            if number == 0 and self._numbered:
                weights[bias] = decoder.block[0].state_dict()[bias]
            read += _copied(own, weights, f"decoder.block.{index}")
        return read + _copied(self.final_layer_norm, decoder.final_layer_norm.state_dict(), "decoder.final_layer_norm")

    def forward(
        self,
        rows: torch.Tensor,
        memory: torch.Tensor,
        visible: torch.Tensor,
        *,
        first_row: int,
        self_cache: DynamicCache | None,
        memory_cache: DynamicCache | None,
        places: Places | None = None,
        positions: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final states; see `Copilot.decode`. positions: not read, T5 has distances between columns only."""
        memory = memory if places is None else places.spread(memory)
        count = rows.shape[1]
        if count > 1:
            query = torch.arange(first_row, first_row + count, device=rows.device)[:, None]
            seen = (torch.arange(first_row + count, device=rows.device) <= query)[None]
        elif seen is not None:
            seen = seen[:, None]
        row_mask = None if seen is None else attention_mask(seen[:, None], rows.dtype, added=self._eager)
        memory_mask = attention_mask(visible[:, None], rows.dtype, added=self._eager)
        row_bias = memory_bias = None
        rows = self.dropout(rows)
        for block in self.block:
            rows, row_bias, _ = block.layer[0](
                rows, attention_mask=row_mask, position_bias=row_bias, past_key_values=self_cache
            )
            rows, memory_bias, _ = block.layer[1](
                rows,
                key_value_states=memory,
                attention_mask=memory_mask,
                position_bias=memory_bias,
                past_key_values=memory_cache,
            )
            rows = block.layer[-1](rows)
        return self.dropout(self.final_layer_norm(rows))
