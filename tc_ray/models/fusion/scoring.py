"""Given completions scored by Pilot and fused model, row by row as decoding would have seen them (equation 8).

The Pilot makes one pass over the whole sequences; its head, the Copilot's rows and the fusion run on a few positions at a time, so
no tensor of size completion x V is made. Used by `FusedModel.score`, explanations and the serving engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tc_ray.models.fusion.cache import CopilotCache
from tc_ray.models.fusion.core import FusedCore, fuse
from tc_ray.models.pilot.taps import UNPOOLED, LayerTap

CHUNK_ELEMENTS = 2**22
"""Logits held at a time, over the whole batch (16 MiB in fp32, a few tensors of that size)."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of B completions padded to n tokens.

    tokens: int64 [B, n]. mask: bool [B, n], False beyond a completion's end. pilot_logprobs, fused_logprobs: fp32 [B, n]:
    log p^ and log p~ of each token, -inf if the correction took away all of p~, and 0 beyond the end.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    pilot_logprobs: torch.Tensor
    fused_logprobs: torch.Tensor


@dataclass(frozen=True)
class Completions:
    """Prompts and completions; all completions begin at one column.

    ids: int64 [B, S]; the decoder reads all but the last column. attended: bool [B, S], False in the padding on the left of
    a prompt. start: first column of the completions. lengths: int64 [B], tokens of each completion. lam: fp32 [B].
    question: fp32 [B, Q, d_P], the encoder's output, and question_mask: bool [B, Q], its real positions (None: decoder-only).
    """

    ids: torch.Tensor
    attended: torch.Tensor
    start: int
    lengths: torch.Tensor
    lam: torch.Tensor
    question: torch.Tensor | None = None
    question_mask: torch.Tensor | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [B, n]."""
        return self.ids[:, self.start :]

    @property
    def mask(self) -> torch.Tensor:
        """Bool [B, n]."""
        return torch.arange(self.tokens.shape[1], device=self.ids.device) < self.lengths[:, None]


class Rows(NamedTuple):
    """c neighbouring tokens of completions.

    span: their places in the completions. pilot, fused: fp32 [B, c, V] logits. f: fp32 [B, c, V], None if the Copilot did
    not run. layers: [B, c, d] after each decoder layer of the Pilot, before the final norm; empty if not asked for.
    """

    span: slice
    pilot: torch.Tensor
    fused: torch.Tensor
    f: torch.Tensor | None
    layers: Sequence[torch.Tensor]


@torch.no_grad()
def teacher_forced_rows(
    model: FusedCore,
    given: Completions,
    *,
    corrections: bool = False,
    layers: bool = False,
    rows_at_a_time: int | None = None,
    positions_at_a_time: int | None = None,
) -> Iterator[Rows]:
    """What decoding saw at each token of the completions, in order.

    corrections: run the Copilot even if every lam is 0. layers: give the Pilot's layers too.
    rows_at_a_time: most tokens given together; default: CHUNK_ELEMENTS of logits.
    positions_at_a_time: split the Pilot's pass into parts of so many positions (decoder-only, no padding, no `layers`) and give
    empty rows after each, so that the caller can do other work; default: one pass.
    """
    if given.ids.shape[1] <= given.start:
        return
    family, copilot = model.family, model.copilot
    # every position of an encoder-decoder's decoder makes a row, those of a forced prefix too
    first = given.start - 1 if given.question is None else 0
    hooked = family.layers(model.pilot) if layers else []
    by_layer: Sequence[torch.Tensor] = ()
    if positions_at_a_time is None:
        with closing(LayerTap(hooked, UNPOOLED)) as lens, model.tap.recording(), lens.recording(first):
            final = _final_states(model, given)
        rationale = model.tap.take()
        by_layer = lens.take().unbind(2) if layers else ()
    else:
        parts = []
        for part in _pilot_parts(model, given, positions_at_a_time):
            parts.append(part)
            none = torch.zeros(len(given.ids), 0, model.vocab_size, device=given.ids.device)
            yield Rows(slice(0, 0), none, none, None, ())
        final, rationale = (torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))
        del parts
    runs = corrections or bool((given.lam != 0).any())
    cache = CopilotCache()
    if runs and given.question is None:
        cache.ask(model.question_memory(given.ids[:, : given.start]), given.attended[:, : given.start])
    elif runs:
        assert given.question is not None and given.question_mask is not None
        cache.ask(copilot.question_memory(given.question), given.question_mask)
    size = rows_at_a_time or max(1, CHUNK_ELEMENTS // (len(given.ids) * model.vocab_size))
    for at in range(first, final.shape[1], size):
        end = min(at + size, final.shape[1])
        pilot = family.logits(model.pilot, final[:, at:end]).float()
        f, fused = None, pilot
        if runs:
            since = at if cache.rows else 0  # positions before the first row are part of its memory
            new = slice(since, end)
            f = model.corrections(pilot, cache, given.ids[:, new], rationale[:, new], given.attended[:, new]).float()
            fused = fuse(pilot, f, given.lam, model.space)
        skipped = max(0, given.start - 1 - at)
        if skipped < end - at:
            place = max(at, given.start - 1) - (given.start - 1)
            yield Rows(
                slice(place, end - (given.start - 1)),
                pilot[:, skipped:],
                fused[:, skipped:],
                None if f is None else f[:, skipped:],
                [layer[:, at - first + skipped : end - first] for layer in by_layer],
            )


def _final_states(model: FusedCore, given: Completions) -> torch.Tensor:
    """States [B, S - 1, d] of every position but the last, after the final norm."""
    inputs = given.ids[:, :-1]
    attended = given.attended[:, :-1]
    arguments: dict[str, Any] = {"input_ids": inputs, "use_cache": False}
    if not attended.all():
        arguments["attention_mask"] = attended.long()
    if given.question is None:
        arguments["position_ids"] = (attended.long().cumsum(1) - 1).clamp_min(0)
    else:
        arguments |= {"encoder_hidden_states": given.question, "encoder_attention_mask": given.question_mask}
    return model.family.decoder(model.pilot)(**arguments).last_hidden_state


def _pilot_parts(model: FusedCore, given: Completions, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Final states and rationale of sequences without padding, `size` positions at a time."""
    inputs, cache = given.ids[:, :-1], model.new_cache()
    for first in range(0, inputs.shape[1], size):
        part = inputs[:, first : first + size]
        with model.tap.recording():
            out = model.family.decoder(model.pilot)(input_ids=part, past_key_values=cache, use_cache=True)
        yield out.last_hidden_state, model.tap.take()


def log_probs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[token]: fp32 [B, c, V], int64 [B, c] -> fp32 [B, c]."""
    return logits.gather(2, tokens[:, :, None])[:, :, 0] - logits.logsumexp(2)


def score_completions(model: FusedCore, given: Completions) -> Scores:
    """log p^ and log p~ of the completions' tokens."""
    pilot = torch.zeros(given.tokens.shape, device=given.ids.device)
    fused = torch.zeros_like(pilot)
    for rows in teacher_forced_rows(model, given):
        tokens = given.tokens[:, rows.span]
        pilot[:, rows.span] = log_probs_of(rows.pilot, tokens)
        fused[:, rows.span] = log_probs_of(rows.fused, tokens)
    beyond = ~given.mask
    return Scores(given.tokens, given.mask, pilot.masked_fill_(beyond, 0), fused.masked_fill_(beyond, 0))


def up_to_the_end(tokens: torch.Tensor, ends: int | Sequence[int] | None) -> torch.Tensor:
    """Tokens [B] of each completion, up to and including its first end token."""
    if ends is None:
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    is_end = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device))
    before = (is_end.long().cumsum(1) - is_end.long()) == 0
    return before.sum(1)
