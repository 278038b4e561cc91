"""Configuration of a Copilot, saved as config.json beside its weights."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class CopilotConfig(PreTrainedConfig):
    """Shape of a Copilot.

    Args:
        decoder: `to_dict()` of the decoder family's config, with the Copilot's own number of layers.
        pilot_hidden_size: width d_P of the Pilot's states and embeddings.
        vocab_size: V, width of the Pilot's logits at training; another Pilot's is aligned by token id.
        pattern: of layers that attend to the Pilot (table 18). producing_state: add the state that produced p^_i to input row i.
        pooling, tap_layers, positions: of the rationale (table 19, `log`). tap: the same in words.
        output_size: A, tokens that f can be non-zero for; 0 is all of V.
        tokenizer: `vocabulary_hash` of the tokenizer of its token ids; empty: unknown. source: of its first weights.
    """

    model_type = "tc_ray_copilot"

    decoder: dict[str, Any] = field(default_factory=dict)
    pilot_hidden_size: int = 0
    vocab_size: int = 0
    pattern: str = "alternate"
    producing_state: bool = True
    pooling: str = "mean"
    tap_layers: list[int] | None = None
    tap: str = ""
    positions: str = "all"
    output_size: int = 0
    tokenizer: str = ""
    source: str = ""

    def decoder_config(self) -> PreTrainedConfig:
        """The family's own config object."""
        fields = dict(self.decoder)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
