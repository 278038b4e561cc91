"""Tiny models of every family with random weights, saved as folders with the byte-level tokenizer of tests/support/tiny_model.py.

Each has what makes its family different (windows, caps, norms, biases, rope variants, heads of another width), set so small
that it matters within twenty tokens. Weights are drawn here, not by the library, whose first weights hide mistakes: zero
biases, norms of one, logits so flat that every distribution is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.support.tiny_model import make_tokenizer

VOCAB = 258
END = 1
LOGIT_STD = 4.0
"""Of the logits on random tokens: the likeliest token has a probability of 0.2 to 0.9."""

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": END,
    "bos_token_id": None,
    "tie_word_embeddings": True,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    # unlike numbers of layers; not more decoder than encoder layers, for which the library's `generate` makes no cache
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_heads": 4,
    # 0 to 3 exact, then bins that begin at 4, 6, 9 and 14: no bin begins at a whole number, where rounding would decide
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": END,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2

# name: model type, what differs from the common settings, what differs further in the narrow model
_FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    # Llama 3: one frequency is kept, one is interpolated, two are divided by the factor; the head is not tied
    "llama3": (
        "llama",
        {
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {},
    ),
    "mistral": ("mistral", {"sliding_window": 5, "tie_word_embeddings": False}, {"sliding_window": 4}),
    "qwen2": ("qwen2", {}, {}),
    "qwen2_sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": False},
        {"max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 12}, {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 12.0,
            "sliding_window": 4,
            "layer_types": _ALTERNATING,
        },
        {"head_dim": 8, "layer_types": _ALTERNATING[:3]},
    ),
    # local and global rope, the global one stretched as in the models of 4B and more
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
            },
        },
        {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ),
    "t5": ("t5", {"feed_forward_proj": "relu"}, {}),
    "flan_t5": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, {}),
    "mt5": ("mt5", {"feed_forward_proj": "gated-gelu", "num_heads": 3}, {}),
}
ENCODER_DECODER = ("t5", "flan_t5", "mt5")
DECODER_ONLY = tuple(name for name in _FAMILIES if name not in ENCODER_DECODER)
FAMILIES = tuple(_FAMILIES)


def make_pilot(family: str, folder: Path, *, vocab: int = VOCAB, seed: int = 0) -> Path:
    """A Pilot of width 32 in `folder`; `vocab` above 258 pads the vocabulary."""
    return _save(family, folder, {"vocab_size": vocab}, seed)


def make_narrow(family: str, folder: Path, *, vocab: int = VOCAB, seed: int = 100) -> Path:
    """A base of the same family for a Copilot of another size: width 24, fewer layers, other heads."""
    if family in ENCODER_DECODER:
        smaller = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}
    else:
        smaller = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
        smaller |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return _save(family, folder, smaller | _FAMILIES[family][2] | {"vocab_size": vocab}, seed)


def load(folder: Path) -> Any:
    """The library's own model of a folder, fp32, in evaluation mode: what the reference reads."""
    kind = AutoModelForSeq2SeqLM if folder.name.split("-")[0] in ENCODER_DECODER else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def _save(family: str, folder: Path, changes: dict[str, Any], seed: int) -> Path:
    model_type, special, _ = _FAMILIES[family]
    common = _T5 if family in ENCODER_DECODER else _DECODER
    config = CONFIG_MAPPING[model_type](**(common | special | changes))
    kind = AutoModelForSeq2SeqLM if family in ENCODER_DECODER else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32).eval()
    if special.get("tie_word_embeddings") is False and family in ENCODER_DECODER:
        # the library ties the head of a new T5 whatever its config says; a saved head of its own stays apart
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    _draw_weights(model, seed)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def _draw_weights(model: Any, seed: int) -> None:
    """Every weight random, and the last norm scaled so that the logits have LOGIT_STD."""
    torch.manual_seed(seed)
    gemma = model.config.model_type.startswith("gemma")
    # large enough for tokens to differ, small enough for float32 noise to stay below 1e-5
    gain = 1.4 if model.config.is_encoder_decoder else 1.6
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.2)
        elif getattr(getattr(module, "weight", None), "ndim", 0) == 1:
            nn.init.normal_(module.weight, mean=0.0 if gemma else 1.0, std=0.3)
    width = model.get_input_embeddings().weight.shape[1]
    for module in model.modules():  # after the linear layers: a tied head is one of them
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3 / (width**0.5 if gemma else 1))
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter)
        elif name.endswith(("SelfAttention.q.weight", "EncDecAttention.q.weight")):
            parameter.mul_(model.config.d_kv**-0.5)  # T5 does not scale its scores: the weights do
    ids = torch.randint(2, VOCAB, (4, 16))
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    stretch = LOGIT_STD / float(model(input_ids=ids, **given).logits.std())
    decoder = model.get_decoder()
    last = decoder.final_layer_norm if model.config.is_encoder_decoder else decoder.norm
    last.weight.copy_((1 + last.weight) * stretch - 1 if gemma else last.weight * stretch)
