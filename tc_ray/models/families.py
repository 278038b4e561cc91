"""Families: where each model family keeps the parts that tc-ray reads.

A `Family` is a small adapter: it names the layers, head, embedding and projections of a family and holds no model code. All
other code goes through it, so adding a family is adding an entry here (docs/families.md).
Invariant: a model of an unlisted family is refused by name, never handled as another family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn


class UnknownFamilyError(ValueError):
    """The model's family has no adapter; the message lists those that have one."""


@dataclass(frozen=True)
class Family:
    """Adapter of one model family; this one fits Llama and what is laid out like it: `layers`, `norm`, `rotary_emb`, `lm_head`."""

    model_type: str
    """`config.model_type` of its language models."""
    encoder_decoder: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    """Attention and feed-forward projections, by module name."""
    layers_pattern: ClassVar[str] = "layers"
    """Name of the list that holds the decoder's layers."""

    def decoder(self, model: nn.Module) -> Any:
        """The headless decoder inside a language model or its peft wrapper."""
        return unwrapped(model).get_decoder()

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The decoder layers, in order; taps hook them."""
        return getattr(self.decoder(model), self.layers_pattern)

    def layer_count(self, config: Any) -> int:
        """Decoder layers of a model with this config."""
        return int(config.num_hidden_layers)

    def with_layers(self, config: Any, layers: Sequence[int]) -> dict[str, Any]:
        """`config.to_dict()` of a decoder that has only these layers of the model with `config`."""
        fields = _fields(config) | {"num_hidden_layers": len(layers)}
        if fields.get("layer_types"):
            fields["layer_types"] = [fields["layer_types"][index] for index in layers]
        return fields

    def final_norm(self, decoder: Any) -> nn.Module:
        """The norm between the last layer and the head."""
        return decoder.norm

    def logits(self, model: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Logits [.., V] of final decoder states [.., d], as the model's own head gives them."""
        base = unwrapped(model)
        logits = base.lm_head(states)
        cap = getattr(base.config, "final_logit_softcapping", None)  # Gemma 2
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def embedding_table(self, model: nn.Module) -> torch.Tensor:
        """Token embedding [V, d] as the layers see it, fp32, detached (Gemma multiplies it by sqrt(d))."""
        embedding = unwrapped(model).get_input_embeddings()
        table = embedding.weight.detach().float()
        scale = getattr(embedding, "scalar_embed_scale", 1.0)
        return table if scale == 1.0 else table * torch.tensor(scale, dtype=table.dtype, device=table.device)

    def rotation(
        self, rotary: Any, rows: torch.Tensor, positions: torch.Tensor, layer_type: str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of RoPE at `positions` [1, n] for a layer of `layer_type` (decoder-only)."""
        return rotary(rows, positions)

    def window(self, config: Any, layer_type: str | None) -> int | None:
        """How many rows back, itself included, a layer of `layer_type` sees; None: all (decoder-only)."""
        return config.sliding_window if layer_type == "sliding_attention" else None


class Mistral(Family):
    """Mistral has one window for every layer, or none."""

    def window(self, config: Any, layer_type: str | None) -> int | None:
        return config.sliding_window


class Gemma3(Family):
    """Gemma 3 has one RoPE for its local and one for its global layers."""

    def rotation(
        self, rotary: Any, rows: torch.Tensor, positions: torch.Tensor, layer_type: str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary(rows, positions, layer_type)


class T5(Family):
    """T5, FLAN-T5 (gated or not) and mT5: encoder, decoder of `block`s, one embedding for both."""

    encoder_decoder = True
    lora_targets = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
    layers_pattern = "block"

    def layer_count(self, config: Any) -> int:
        return int(config.num_decoder_layers)

    def with_layers(self, config: Any, layers: Sequence[int]) -> dict[str, Any]:
        # with the smallest encoder: only the decoder is used
        return _fields(config) | {"num_layers": 1, "num_decoder_layers": len(layers)}

    def final_norm(self, decoder: Any) -> nn.Module:
        return decoder.final_layer_norm

    def logits(self, model: nn.Module, states: torch.Tensor) -> torch.Tensor:
        base = unwrapped(model)
        # T5 1.0, whose head is its embedding; mT5 has no such setting
        if getattr(base.config, "scale_decoder_outputs", False):
            states = states * base.model_dim**-0.5
        return base.lm_head(states)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(Family(name) for name in ("llama", "qwen2", "qwen3", "gemma2")),
        Mistral("mistral"),
        Gemma3("gemma3_text"),
        *(T5(name) for name in ("t5", "mt5")),
    )
}


def family_of(model_or_config: Any) -> Family:
    """Adapter of a model, its peft wrapper, or its config. Raises UnknownFamilyError if its model type has none."""
    config = getattr(unwrapped(model_or_config), "config", model_or_config)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnknownFamilyError(
            f"model type {config.model_type!r} has no adapter in tc_ray.models.families; those that have one: "
            f"{', '.join(FAMILIES)}. docs/families.md shows how to add one."
        )
    return family


def _fields(config: Any) -> dict[str, Any]:
    """`config.to_dict()` without the folder it was read from: configs travel."""
    fields: dict[str, Any] = config.to_dict()
    fields.pop("_name_or_path", None)
    return fields


def unwrapped(model: Any) -> Any:
    """The language model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
