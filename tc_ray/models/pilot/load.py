"""The Pilot: a pretrained language model, its adapters, and the training forward that leaves a record.

Invariant: one forward pass gives the loss, the logits of the target tokens only, and the tapped hidden states. The
vocabulary projection runs on the rows that predict a target token, never on the prompt. Called by the Pilot's engine
and by the tests' single-process reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tc_ray.config.schema import PilotSection
from tc_ray.models.families import family_of
from tc_ray.models.pilot.taps import LayerTap
from tc_ray.models.pilot.token_errors import SparseErrors, full_errors, sparse_errors
from tc_ray.models.weights import check_adapters, load_whole

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_pilot(
    path: Path | str,
    *,
    dtype: torch.dtype,
    random_weights: bool = False,
    safetensors: bool | None = None,
    names_only: bool = False,
) -> Any:
    """Load a language model, decoder-only or encoder-decoder, from a folder or hub id. Code that comes with it is never run.

    Args:
        random_weights: read only its config.
        safetensors: True: weights in no other format; None: other formats where there is no such file.
        names_only: on the meta device, without reading a weight: to check the folder, or to look at the model's shape.

    Raises:
        UnknownFamilyError: a family without an adapter, found out before any weight is read.
        OSError: no weights of the format. WeightsError, NotFiniteError: see `load_whole`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    auto = AutoModelForSeq2SeqLM if family_of(config).encoder_decoder else AutoModelForCausalLM
    if random_weights:
        return auto.from_config(config, dtype=dtype)
    place = {"device_map": "meta"} if names_only else {}
    return load_whole(auto, path, dtype=dtype, use_safetensors=safetensors, **place)


def add_adapters(model: Any, config: PilotSection) -> Any:
    """Wrap with LoRA when `config.method` says so; every weight stays trainable for full fine-tuning.

    Raises:
        ValueError: `lora.first_layer` leaves no layer, or is set for an encoder-decoder; or see `check_adapters`.
    """
    if config.method == "full":
        return model
    check_adapters(model, config)
    from peft import LoraConfig, get_peft_model

    family, lora = family_of(model), config.lora
    count = len(family.layers(model))
    if lora.first_layer >= count:
        raise ValueError(f"pilot.lora.first_layer {lora.first_layer} leaves no layer: the model has {count}")
    if lora.first_layer and family.encoder_decoder:
        raise ValueError("pilot.lora.first_layer must be 0 for an encoder-decoder: it would name layers of both stacks")
    chosen = {"layers_to_transform": list(range(lora.first_layer, count)), "layers_pattern": family.layers_pattern}
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules or list(family.lora_targets),
            task_type="SEQ_2_SEQ_LM" if family.encoder_decoder else "CAUSAL_LM",
            **(chosen if lora.first_layer else {}),
        ),
    )


class StepRecord(NamedTuple):
    """What one micro-batch leaves for the Mistake Log; N target tokens in batch order.

    errors: sparse l. token_loss: fp32 [N]. token_correct: bool [N].
    rationale: fp32 [B, S, d] pooled hidden states of the layers, or [B, S, layers, d] unpooled in the model's dtype; those that predict token
    j + 1 of the sequence stand at position j.
    question: fp32 [B, Q, d] encoder output; None where X~ follows from the token ids (decoder-only).
    """

    errors: SparseErrors
    rationale: torch.Tensor
    token_loss: torch.Tensor
    token_correct: torch.Tensor
    question: torch.Tensor | None = None


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
        model: language model or its peft wrapper.
        top_k: probabilities kept per token in the record.
        record: False skips taps and errors (plain fine-tuning).
        pooling: how states are pooled over layers, or `taps.UNPOOLED`.
        layers: decoder layers tapped, ascending from 0; None: all.
        dense: the record has the errors of all V tokens; top_k does not matter then.
    """

    def __init__(
        self,
        model: Any,
        *,
        top_k: int,
        record: bool = True,
        pooling: str = "mean",
        layers: Sequence[int] | None = None,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.top_k, self.dense = top_k, dense
        self._family = family_of(model)
        self._read = _encoder_decoder_states if self._family.encoder_decoder else _decoder_only_states
        self._tap = LayerTap(self._family.layers(model), pooling, layers) if record else None

    def forward(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, target_start: torch.Tensor, loss_scale: float
    ) -> tuple[torch.Tensor, StepRecord | None]:
        """Summed cross-entropy of the completion tokens times `loss_scale`, and the record.

        Args:
            input_ids: int64 [B, S], right padded: prompt and completion (encoder-decoder: source and target).
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
        passed = self._read(self.model, self._family.decoder(self.model), self._tap, input_ids, lengths, target_start)
        rows = target_rows(input_ids.shape[1], lengths, target_start)
        targets = input_ids[:, 1:][rows]
        log_probs = self._family.logits(self.model, passed.final).float().log_softmax(-1)
        token_loss = -log_probs.gather(1, targets[:, None])[:, 0]
        if passed.rationale is None:
            return Measured(log_probs, targets, token_loss, None)
        with torch.no_grad():
            errors = full_errors(log_probs, targets) if self.dense else sparse_errors(log_probs, targets, self.top_k)
            # the true token is ranked first when it beats the best other token: the first of the sparse ones
            best = -errors.values[:, 1:].amin(1) if self.dense else -errors.values[:, 1]
            correct = 1.0 - errors.values[:, 0] >= best
        record = StepRecord(errors, passed.rationale, token_loss.detach(), correct, passed.question)
        return Measured(log_probs, targets, token_loss, record)


class _Pass(NamedTuple):
    """final: [N, d] states of the target rows, after the final norm. rationale and question as in StepRecord."""

    final: torch.Tensor
    rationale: torch.Tensor | None
    question: torch.Tensor | None


def _decoder_only_states(
    _model: Any,
    decoder: Any,
    tap: LayerTap | None,
    input_ids: torch.Tensor,
    lengths: torch.Tensor,
    target_start: torch.Tensor,
) -> _Pass:
    rows = target_rows(input_ids.shape[1], lengths, target_start)
    # a causal model needs no mask for padding on the right
    if tap is None:
        final = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        return _Pass(final[:, :-1][rows], None, None)
    with tap.recording():
        final = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
    return _Pass(final[:, :-1][rows], tap.take(), None)


def _encoder_decoder_states(
    model: Any,
    decoder: Any,
    tap: LayerTap | None,
    input_ids: torch.Tensor,
    lengths: torch.Tensor,
    target_start: torch.Tensor,
) -> _Pass:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    source_mask = position[: int(target_start.max())] < target_start[:, None]
    source = input_ids[:, : source_mask.shape[1]].masked_fill(~source_mask, 0)
    question = base.get_encoder()(input_ids=source, attention_mask=source_mask).last_hidden_state
    # decoder input: the start token, then all targets but the last; row i stands at position target_start - 1 + i
    counts = lengths - target_start
    index = torch.arange(int(counts.max()), device=input_ids.device)
    at = (target_start - 1)[:, None] + index
    fed = input_ids.gather(1, at.clamp_max(input_ids.shape[1] - 1))
    fed[:, 0] = base.config.decoder_start_token_id
    row_mask = index < counts[:, None]

    def decode() -> torch.Tensor:
        # rows past a sequence's end are padding on the right: a causal decoder needs no mask for them
        out = decoder(
            input_ids=fed, encoder_hidden_states=question, encoder_attention_mask=source_mask, use_cache=False
        )
        final: torch.Tensor = out.last_hidden_state
        return final[row_mask]

    if tap is None:
        return _Pass(decode(), None, None)
    with tap.recording():
        final = decode()
    taken = tap.take()
    states = taken.new_zeros(*input_ids.shape, *taken.shape[2:])
    states[:, :-1][target_rows(input_ids.shape[1], lengths, target_start)] = taken[row_mask]
    return _Pass(final, states, question.detach().float())


def target_rows(width: int, lengths: torch.Tensor, target_start: torch.Tensor) -> torch.Tensor:
    """Bool [B, width - 1]: position j predicts a target token, that is target_start - 1 <= j < length - 1."""
    position = torch.arange(width - 1, device=lengths.device)
    return (position >= (target_start - 1)[:, None]) & (position < (lengths - 1)[:, None])
