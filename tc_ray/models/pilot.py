"""The Pilot: a pretrained causal language model, its adapters, and the training forward that leaves a record.

Invariant: one forward pass gives the loss, the logits of the target tokens only, and the tapped hidden states. The
vocabulary projection runs on the rows that predict a target token, never on the prompt. Called by the Pilot's engine
and by the tests' single-process reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tc_ray.config.schema import PilotSection
from tc_ray.models.errors import SparseErrors, sparse_errors
from tc_ray.models.taps import LayerMeanTap, backbone, decoder_layers

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_causal_lm(path: Path | str, *, dtype: torch.dtype, random_weights: bool = False) -> Any:
    """Load a causal language model from a folder or hub id; with `random_weights`, only its config is read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if random_weights:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def add_adapters(model: Any, config: PilotSection) -> Any:
    """Wrap with LoRA when `config.method` says so; every weight stays trainable for full fine-tuning."""
    if config.method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    layers = list(range(config.lora.first_layer, len(decoder_layers(model))))
    if not layers:
        raise ValueError(
            f"pilot.lora.first_layer {config.lora.first_layer} leaves no layer: the model has {len(decoder_layers(model))}"
        )
    return get_peft_model(
        model,
        LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=config.lora.target_modules,
            layers_to_transform=layers,
            task_type="CAUSAL_LM",
        ),
    )


class StepRecord(NamedTuple):
    """What one micro-batch leaves for the Mistake Log; N target tokens in batch order.

    errors: sparse l. states: fp32 [B, S, d] layer-mean hidden states. token_loss: fp32 [N]. token_correct: bool [N].
    """

    errors: SparseErrors
    states: torch.Tensor
    token_loss: torch.Tensor
    token_correct: torch.Tensor


class Measured(NamedTuple):
    """One forward pass: log_probs fp32 [N, V] and targets int64 [N] of the target rows, token_loss fp32 [N] with
    gradient, and the record (None when not recording)."""

    log_probs: torch.Tensor
    targets: torch.Tensor
    token_loss: torch.Tensor
    record: StepRecord | None


class PilotStep(nn.Module):
    """The Pilot's training forward.

    Args:
        model: causal language model or its peft wrapper.
        top_k: probabilities kept a token in the record.
        record: False skips taps and errors (plain fine-tuning).
    """

    def __init__(self, model: Any, *, top_k: int, record: bool = True) -> None:
        super().__init__()
        self.model = model
        self.top_k = top_k
        self._tap = LayerMeanTap(decoder_layers(model)) if record else None

    def forward(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, target_start: torch.Tensor, loss_scale: float
    ) -> tuple[torch.Tensor, StepRecord | None]:
        """Summed cross-entropy of the completion tokens times `loss_scale`, and the record.

        Args:
            input_ids: int64 [B, S], right padded; a causal model needs no mask for padding on the right.
            lengths: int64 [B]. target_start: int64 [B]; targets are input_ids[b, target_start[b]:lengths[b]].
            loss_scale: 1 / target tokens of the whole round, so that any split of a round gives the same gradient.
        """
        measured = self.measure(input_ids, lengths, target_start)
        return measured.token_loss.sum() * loss_scale, measured.record

    def close(self) -> None:
        """Take the taps off the model again."""
        if self._tap is not None:
            self._tap.close()

    def measure(self, input_ids: torch.Tensor, lengths: torch.Tensor, target_start: torch.Tensor) -> Measured:
        """The forward pass itself: log-probabilities and targets of the N target rows, and the record."""
        decoder = backbone(self.model)
        if self._tap is None:
            states = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        else:
            with self._tap.recording():
                states = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        rows = target_rows(input_ids.shape[1], lengths, target_start)
        targets = input_ids[:, 1:][rows]
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        log_probs = base.lm_head(states[:, :-1][rows]).float().log_softmax(-1)
        token_loss = -log_probs.gather(1, targets[:, None])[:, 0]
        if self._tap is None:
            return Measured(log_probs, targets, token_loss, None)
        with torch.no_grad():
            errors = sparse_errors(log_probs, targets, self.top_k)
            # the true token is ranked first when it beats the best other token
            correct = 1.0 - errors.values[:, 0] >= -errors.values[:, 1]
        record = StepRecord(errors, self._tap.take(), token_loss.detach(), correct)
        return Measured(log_probs, targets, token_loss, record)


def target_rows(width: int, lengths: torch.Tensor, target_start: torch.Tensor) -> torch.Tensor:
    """Bool [B, width - 1]: position j predicts a target token, that is target_start - 1 <= j < length - 1."""
    position = torch.arange(width - 1, device=lengths.device)
    return (position >= (target_start - 1)[:, None]) & (position < (lengths - 1)[:, None])
