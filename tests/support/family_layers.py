"""Layers of every family, slow and obvious: decoder-only layers and T5 blocks written out from their definitions.

One sequence at a time, no cache, no padding. Of a layer only its linear projections and the weights of its norms are used.
tests/support/family_reference.py builds the Copilot and the Pilot's last layer from them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last axis."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def softmax_attention(scores: torch.Tensor, visible: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One head: scores [n, M], visible bool [n, M], values [M, w] -> [n, w]."""
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ values


def rope_frequencies(config: Any, layer_type: str | None) -> list[float]:
    """Angle a position for each pair of coordinates: theta^(-2i/w), and what the scaling of the family makes of it."""
    rope = config.rope_parameters
    rope = rope.get(layer_type, rope)  # Gemma 3 has one for each type of layer
    width = head_width(config)
    found = []
    for i in range(width // 2):
        frequency = rope["rope_theta"] ** (-2.0 * i / width)
        if rope["rope_type"] == "linear":
            frequency /= rope["factor"]
        elif rope["rope_type"] == "llama3":
            # turns in the context of pretraining: many are kept, few are slowed down, linear in between
            turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            kept = min(1.0, max(0.0, (turns - low) / (high - low)))
            frequency = kept * frequency + (1 - kept) * frequency / rope["factor"]
        else:
            assert rope["rope_type"] == "default"
        found.append(frequency)
    return found


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def turned(x: torch.Tensor, frequencies: list[float]) -> torch.Tensor:
    """Rotary positions 0, 1, ... on [rows, heads, width]: the two halves of a head are the two coordinates."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i, frequency in enumerate(frequencies):
        angle = torch.arange(len(x), dtype=torch.float32) * frequency
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        out[..., i] = x[..., i] * cos - x[..., i + half] * sin
        out[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
    return out


def decoder_layer(
    layer: Any,
    config: Any,
    layer_type: str | None,
    x: torch.Tensor,
    memory: torch.Tensor | None,
    sees: torch.Tensor,
    *,
    numbered: bool = True,
    memory_norm: bool = True,
) -> torch.Tensor:
    """A layer on rows x [n, d]: self-attention with `memory` None, else attention to memory [M, d] without positions.

    sees: bool [n, n] or [n, M]. layer_type: `sliding_attention`, `full_attention`, or None where the family has no types.
    numbered: self-attention knows the rows' numbers. memory_norm: the memory passes the layer's first norm.
    """
    gemma = config.model_type.startswith("gemma")
    own, width, eps = layer.self_attn, head_width(config), config.rms_norm_eps

    def norm(y: torch.Tensor, module: Any) -> torch.Tensor:
        return rms(y, 1 + module.weight if gemma else module.weight, eps)

    asking = norm(x, layer.input_layernorm)
    asked = asking
    if memory is not None:
        asked = norm(memory, layer.input_layernorm) if memory_norm else memory
    q = own.q_proj(asking).view(len(asking), -1, width)
    k = own.k_proj(asked).view(len(asked), -1, width)
    v = own.v_proj(asked).view(len(asked), -1, width)
    if config.model_type in ("qwen3", "gemma3_text"):
        q, k = norm(q, own.q_norm), norm(k, own.k_norm)
    if memory is None:
        if numbered:
            frequencies = rope_frequencies(config, layer_type)
            q, k = turned(q, frequencies), turned(k, frequencies)
        if config.model_type == "mistral" or layer_type == "sliding_attention":
            distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
            sees = sees & (distance < config.sliding_window)
    scale = config.query_pre_attn_scalar**-0.5 if gemma else width**-0.5
    heads = []
    for head in range(q.shape[1]):
        group = head // (q.shape[1] // k.shape[1])
        scores = scale * (q[:, head] @ k[:, group].T)
        if config.model_type == "gemma2":
            scores = config.attn_logit_softcapping * torch.tanh(scores / config.attn_logit_softcapping)
        heads.append(softmax_attention(scores, sees, v[:, group]))
    attended = own.o_proj(torch.cat(heads, -1))

    def feed_forward(y: torch.Tensor) -> torch.Tensor:
        gate = layer.mlp.gate_proj(y)
        gate = F.gelu(gate, approximate="tanh") if gemma else F.silu(gate)
        return layer.mlp.down_proj(gate * layer.mlp.up_proj(y))

    if gemma:
        x = x + norm(attended, layer.post_attention_layernorm)
        return x + norm(feed_forward(norm(x, layer.pre_feedforward_layernorm)), layer.post_feedforward_layernorm)
    x = x + attended
    return x + feed_forward(norm(x, layer.post_attention_layernorm))


def layer_types(config: Any) -> list[str | None]:
    """The type of each layer of a decoder-only model; None where the family knows no types."""
    return list(getattr(config, "layer_types", None) or [None] * config.num_hidden_layers)


def final_norm(norm: Any, config: Any, x: torch.Tensor) -> torch.Tensor:
    if config.is_encoder_decoder:
        return rms(x, norm.weight, config.layer_norm_epsilon)
    return rms(x, 1 + norm.weight if config.model_type.startswith("gemma") else norm.weight, config.rms_norm_eps)


# -- T5 blocks ----------------------------------------------------------------------------------------------------


def distance_bucket(distance: int, buckets: int, furthest: int) -> int:
    """T5's bin of a distance back: half of the bins are one distance each, the others grow like a logarithm."""
    exact = buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(furthest / exact)
    return min(buckets - 1, exact + int(share * (buckets - exact)))


def position_bias(table: torch.Tensor, rows: int, config: Any) -> torch.Tensor:
    """What is added to the scores of each head, [heads, rows, rows]; table [buckets, heads]."""
    bias = torch.zeros(table.shape[1], rows, rows)
    for i in range(rows):
        for j in range(i + 1):
            bucket = distance_bucket(
                i - j, config.relative_attention_num_buckets, config.relative_attention_max_distance
            )
            bias[:, i, j] = table[bucket]
    return bias


def t5_attention(
    own: Any, config: Any, asking: torch.Tensor, asked: torch.Tensor, bias: torch.Tensor | None, sees: torch.Tensor
) -> torch.Tensor:
    """T5's attention: no scaling; bias [heads, n, M] or none."""
    width = config.d_kv
    q, k, v = (p(y).view(len(y), -1, width) for p, y in ((own.q, asking), (own.k, asked), (own.v, asked)))
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head].T
        scores = scores if bias is None else scores + bias[head]
        heads.append(softmax_attention(scores, sees, v[:, head]))
    return own.o(torch.cat(heads, -1))


def t5_block(
    block: Any, config: Any, x: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None, sees: torch.Tensor
) -> torch.Tensor:
    """A decoder block on rows x [n, d]: causal self-attention, attention to memory [M, d], feed-forward."""
    itself, across, forward = block.layer
    eps = config.layer_norm_epsilon
    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    y = rms(x, itself.layer_norm.weight, eps)
    x = x + t5_attention(itself.SelfAttention, config, y, y, bias, causal)
    y = rms(x, across.layer_norm.weight, eps)
    x = x + t5_attention(across.EncDecAttention, config, y, memory, None, sees)
    y = rms(x, forward.layer_norm.weight, eps)
    dense = forward.DenseReluDense
    if config.feed_forward_proj == "gated-gelu":
        return x + dense.wo(F.gelu(dense.wi_0(y), approximate="tanh") * dense.wi_1(y))
    assert config.feed_forward_proj == "relu"
    return x + dense.wo(torch.relu(dense.wi(y)))
