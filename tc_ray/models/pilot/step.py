"""The Pilot's training forward: one pass gives the loss, the record and the logits of the target tokens only.

Errors are l = onehot(truth) - softmax(logits) (paper section 2.2). A sparse one has k + 1 entries: the true token, then the others
with the k largest probabilities, each exact. A full one lists all V tokens.
Invariant: no second forward. The vocabulary projection runs on the rows that predict a target token, never on the prompt.
Called by the Pilot's engine, its export, the evaluation and the tests' single-process reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from tc_ray.models.families import family_of, unwrapped
from tc_ray.models.pilot.taps import LayerTap

_BLOCK = 64


class SparseErrors(NamedTuple):
    """Errors of N target tokens: ids int64 [N, k+1], true token first; values fp32 [N, k+1], first in [0, 1], others in [-1, 0].

    rest: fp32 [N], predicted mass of the tokens not listed, so that values.sum(-1) - rest == 0.
    """

    ids: torch.Tensor
    values: torch.Tensor
    rest: torch.Tensor


class StepRecord(NamedTuple):
    """What one micro-batch leaves for the Mistake Log; N target tokens in batch order.

    token_loss: fp32 [N]. token_correct: bool [N]. rationale: fp32 [B, S, d] pooled hidden states, or [B, S, layers, d] unpooled in
    the model's dtype; position j predicts token j + 1. question: fp32 [B, Q, d] encoder output; decoder-only: token embeddings of at
    least the prompts, None if they follow from the ids.
    """

    errors: SparseErrors
    rationale: torch.Tensor
    token_loss: torch.Tensor
    token_correct: torch.Tensor
    question: torch.Tensor | None = None


class Packed(NamedTuple):
    """The same sequences in fewer rows: ids, positions int64 [R, W], positions beginning at 0 with each sequence; places int64
    [B, S], the index into the R * W tokens of each token of the batch."""

    ids: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor


class Measured(NamedTuple):
    """One forward pass: log_probs fp32 [N, V] and targets int64 [N] of the target rows, token_loss fp32 [N] with
    gradient, and the record (None when not recording)."""

    log_probs: torch.Tensor
    targets: torch.Tensor
    token_loss: torch.Tensor
    record: StepRecord | None


_Pass = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""[N, d] states of the target rows after the final norm; rationale and question as in StepRecord."""


class PilotStep(nn.Module):
    """The Pilot's training forward.

    top_k: probabilities kept per token. record: False skips taps and errors. dense: errors of all V tokens; top_k is ignored.
    pooling: how states are pooled over layers, or `taps.UNPOOLED`. layers: those tapped, ascending from 0; None: all.
    question: a decoder-only record has X~ too.
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
        question: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.top_k, self.dense, self._question = top_k, dense, question
        self._family = family_of(model)
        self._tap = LayerTap(self._family.layers(model), pooling, layers) if record else None

    def forward(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        target_start: torch.Tensor,
        loss_scale: float,
        earlier: torch.Tensor | None = None,
        packed: Packed | None = None,
    ) -> tuple[torch.Tensor, StepRecord | None]:
        """Summed cross-entropy of the completion tokens times `loss_scale`, and the record.

        input_ids: int64 [B, S], right padded: prompt and completion (encoder-decoder: source and target). lengths: int64 [B].
        target_start: int64 [B]; targets are input_ids[b, target_start[b]:lengths[b]]. loss_scale: 1 / target tokens of the round.
        earlier: int64 [B, K, 2], decoder-only: start and end of further targets of each row, 0 and 0 for none.
        packed: decoder-only: the rows that are computed in place of these, see `tc_ray.data.prepared.packing`.
        """
        measured = self.measure(input_ids, lengths, target_start, earlier, packed)
        return measured.token_loss.sum() * loss_scale, measured.record

    def close(self) -> None:
        """Remove the taps from the model."""
        if self._tap is not None:
            self._tap.close()

    def measure(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        target_start: torch.Tensor,
        earlier: torch.Tensor | None = None,
        packed: Packed | None = None,
    ) -> Measured:
        """The forward pass itself: log-probabilities and targets of the N target rows, and the record. Arguments: of `forward`."""
        position = torch.arange(input_ids.shape[1] - 1, device=lengths.device)
        # position j predicts a target token if target_start - 1 <= j < length - 1
        rows = (position >= (target_start - 1)[:, None]) & (position < (lengths - 1)[:, None])
        if earlier is not None:
            within = (position + 1 >= earlier[..., :1]) & (position + 1 < earlier[..., 1:])
            rows = rows | within.any(1)
        if self._family.encoder_decoder:
            final, rationale, question = self._encoder_decoder(input_ids, lengths, target_start, rows)
        else:
            final, rationale, question = self._decoder_only(input_ids, rows, packed)
        targets = input_ids[:, 1:][rows]
        log_probs = self._family.logits(self.model, final).float().log_softmax(-1)
        token_loss = -log_probs.gather(1, targets[:, None])[:, 0]
        if rationale is None:
            return Measured(log_probs, targets, token_loss, None)
        with torch.no_grad():
            errors = full_errors(log_probs, targets) if self.dense else sparse_errors(log_probs, targets, self.top_k)
            # correct: the true token beats the best other token, which is the first of the sparse ones
            best = -errors.values[:, 1:].amin(1) if self.dense else -errors.values[:, 1]
            correct = 1.0 - errors.values[:, 0] >= best
        record = StepRecord(errors, rationale, token_loss.detach(), correct, question)
        return Measured(log_probs, targets, token_loss, record)

    def _decoder_only(self, input_ids: torch.Tensor, rows: torch.Tensor, packed: Packed | None) -> _Pass:
        if packed is None:
            # a causal model needs no mask for padding on the right
            final = self._decode(input_ids=input_ids)[:, :-1][rows]
        else:
            # without a mask the library makes one by the positions: a sequence sees itself alone
            states = self._decode(input_ids=packed.ids, position_ids=packed.positions)
            final = states.flatten(0, 1)[packed.places[:, :-1][rows]]
        if self._tap is None:
            return final, None, None
        rationale = self._tap.take()
        if packed is not None:
            rationale = rationale.flatten(0, 1)[packed.places]
        question = None
        if self._question:
            with torch.no_grad():  # looked up once more: that is no pass through the model
                question = unwrapped(self.model).get_input_embeddings()(input_ids).float()
        return final, rationale, question

    def _encoder_decoder(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> _Pass:
        base = unwrapped(self.model)
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        source_mask = position[: int(starts.max())] < starts[:, None]
        source = input_ids[:, : source_mask.shape[1]].masked_fill(~source_mask, 0)
        question = base.get_encoder()(input_ids=source, attention_mask=source_mask).last_hidden_state
        # decoder input: the start token, then all targets but the last; row i has position target_start - 1 + i
        counts = lengths - starts
        index = torch.arange(int(counts.max()), device=input_ids.device)
        fed = input_ids.gather(1, ((starts - 1)[:, None] + index).clamp_max(input_ids.shape[1] - 1))
        fed[:, 0] = base.config.decoder_start_token_id
        row_mask = index < counts[:, None]
        # rows past a sequence's end are padding on the right: a causal decoder needs no mask for them
        final = self._decode(input_ids=fed, encoder_hidden_states=question, encoder_attention_mask=source_mask)
        if self._tap is None:
            return final[row_mask], None, None
        taken = self._tap.take()
        rationale = taken.new_zeros(*input_ids.shape, *taken.shape[2:])
        rationale[:, :-1][rows] = taken[row_mask]
        return final[row_mask], rationale, question.detach().float()

    def _decode(self, **given: torch.Tensor) -> torch.Tensor:
        """States after the final norm of the decoder's one pass, which the tap records."""
        with nullcontext() if self._tap is None else self._tap.recording():
            final: torch.Tensor = self._family.decoder(self.model)(**given, use_cache=False).last_hidden_state
        return final


def sparse_errors(log_probs: torch.Tensor, targets: torch.Tensor, top_k: int) -> SparseErrors:
    """`1 - p(true)`, `-p(id)` of the k largest others (V - 1 at most), and the rest (section 2.2).

    log_probs: fp32 [N, V], log softmax of the Pilot's logits. targets: int64 [N], true tokens.
    """
    top_k = min(top_k, log_probs.shape[1] - 1)
    others, mass = _others(log_probs, targets)
    values, ids = _top_k(others, top_k)
    rest = (mass - values.sum(-1)).clamp_min_(0.0)
    return SparseErrors(torch.cat([targets[:, None], ids], 1), torch.cat([mass[:, None], -values], 1), rest)


def full_errors(log_probs: torch.Tensor, targets: torch.Tensor) -> SparseErrors:
    """Errors of all V tokens: the true one, then the others by id; `rest` is 0. Arguments as above."""
    others, mass = _others(log_probs, targets)
    index = torch.arange(others.shape[1] - 1, device=others.device)
    ids = index + (index >= targets[:, None])
    values = torch.cat([mass[:, None], -others.gather(1, ids)], 1)
    return SparseErrors(torch.cat([targets[:, None], ids], 1), values, torch.zeros_like(mass))


def _others(log_probs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [N, V] with 0 for the true token, and their sum [N]."""
    others = log_probs.detach().exp()
    others.scatter_(1, targets[:, None], 0.0)
    # 1 - p(true) as the sum of the others: the difference loses every digit as p(true) approaches 1
    return others, others.sum(-1)


def _top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exactly `torch.topk(values, k)` of non-negative rows [N, V], in one cheap pass over V.

    The k largest entries are in the k blocks with the largest maxima, so only those blocks are searched.
    """
    rows, vocab = values.shape
    if vocab < 4 * k * _BLOCK:
        return torch.topk(values, k)
    blocks = vocab // _BLOCK
    body = values[:, : blocks * _BLOCK].view(rows, blocks, _BLOCK)
    chosen = torch.topk(body.amax(-1), k, sorted=False).indices
    ids = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=values.device)).view(rows, -1)
    tail = torch.arange(blocks * _BLOCK, vocab, device=values.device).expand(rows, -1)
    ids = torch.cat([ids, tail], 1)
    found, at = torch.topk(values.gather(1, ids), k)
    return found, ids.gather(1, at)
