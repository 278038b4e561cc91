"""Layers of an encoder-decoder Copilot (section 3.1): the decoder blocks of T5, unchanged, over error rows and memory.

Every block keeps its self-attention, here over the error rows, with the family's relative position bias over row numbers. Its
cross-attention reads the memory instead of the encoder's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, DynamicCache

from tc_ray.models.copilot.config import CopilotConfig
from tc_ray.models.copilot.decoder_only import attention_mask


class EncoderDecoderStack(nn.Module):
    """Decoder blocks and final norm of a T5."""

    def __init__(self, config: CopilotConfig) -> None:
        super().__init__()
        decoder = AutoModel.from_config(config.decoder_config(), dtype=torch.get_default_dtype()).decoder
        self.block, self.final_layer_norm, self.dropout = decoder.block, decoder.final_layer_norm, decoder.dropout
        self._eager = decoder.config._attn_implementation == "eager"

    def load_layers(self, base: nn.Module, layers: Sequence[int]) -> None:
        """Copy these decoder blocks, the relative position bias (block 0 holds it) and the final norm of a base."""
        decoder: Any = base.decoder
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        for number, (own, index) in enumerate(zip(self.block, layers, strict=True)):
            weights = decoder.block[index].state_dict()
            weights.pop(bias, None)
            if number == 0:
                weights[bias] = decoder.block[0].state_dict()[bias]
            own.load_state_dict(weights)
        self.final_layer_norm.load_state_dict(decoder.final_layer_norm.state_dict())

    def forward(
        self,
        rows: torch.Tensor,
        memory: torch.Tensor,
        visible: torch.Tensor,
        *,
        first_row: int,
        self_cache: DynamicCache | None,
        memory_cache: DynamicCache | None,
    ) -> torch.Tensor:
        """Final states; see `Copilot.decode`."""
        count = rows.shape[1]
        row_mask = None
        if count > 1:
            query = torch.arange(first_row, first_row + count, device=rows.device)[:, None]
            seen = torch.arange(first_row + count, device=rows.device) <= query
            row_mask = attention_mask(seen[None, None], rows.dtype, added=self._eager)
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
        final: torch.Tensor = self.dropout(self.final_layer_norm(rows))
        return final
