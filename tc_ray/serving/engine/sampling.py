"""From the logits of one sequence to its next token, and what a client may ask to know about that token.

Invariant: the same logits and seed give the token that transformers' `generate` draws (temperature, then top-k, then top-p),
whatever else is in the batch: each sequence has a generator of its own. Used by the engine, once a token.
"""

from __future__ import annotations

import math
from collections import Counter

import torch

from tc_ray.serving.engine.contract import Explained, GenerationRequest, Token

_LIKELY = 256
"""Tokens sorted at first for top-p; all are where these do not reach it."""


class Sampler:
    """Chooses the tokens of one generation."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._generator: torch.Generator | None = None
        self._said: Counter[int] = Counter()
        self._penalised = bool(request.presence_penalty or request.frequency_penalty)

    @property
    def is_argmax(self) -> bool:
        """The likeliest token is always chosen: `choose` need not be asked."""
        return self._request.temperature == 0 and not self._penalised

    def choose(self, logits: torch.Tensor) -> int:
        """The next token for fused logits, fp32 [V], which are left as they are."""
        request = self._request
        if self._said and self._penalised:
            ids = torch.tensor(list(self._said), device=logits.device)
            counts = torch.tensor(list(self._said.values()), dtype=logits.dtype, device=logits.device)
            logits = logits.index_add(0, ids, -request.presence_penalty - request.frequency_penalty * counts)
        if request.temperature == 0:
            chosen = int(logits.argmax())
        else:
            chosen = self._draw(top_p_only(top_k_only(logits / request.temperature, request.top_k), request.top_p))
        if self._penalised:
            self._said[chosen] += 1
        return chosen

    def _draw(self, scores: torch.Tensor) -> int:
        if self._generator is None:
            self._generator = torch.Generator(scores.device)
            if self._request.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self._request.seed)
        return int(torch.multinomial(scores.softmax(0)[None], 1, generator=self._generator))


def top_k_only(scores: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Scores [V], -inf for all below the k-th."""
    if top_k is None or top_k >= len(scores):
        return scores
    return scores.masked_fill(scores < scores.topk(top_k).values[-1], -math.inf)


def top_p_only(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Scores [V], -inf for all that are not needed for a probability of top_p; the likeliest stays."""
    if top_p >= 1:
        return scores
    total = scores.logsumexp(0)
    for count in (min(_LIKELY, len(scores)), len(scores)):
        values, ids = scores.topk(count)
        before = (values - total).exp().cumsum(0)
        if float(before[-1]) >= top_p or count == len(scores):
            break
    # kept: those before which less than top_p is gathered
    kept = 1 + int((before[:-1] < top_p).sum())
    return torch.full_like(scores, -math.inf).index_copy(0, ids[:kept], values[:kept])


def described(request: GenerationRequest, chosen: int, pilot: torch.Tensor, fused: torch.Tensor) -> Token:
    """The chosen token with what the request asks to know.

    Args:
        pilot, fused: fp32 [V] logits.
    """
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    if request.logprobs is not None:
        total = fused.logsumexp(0)
        logprob = float(fused[chosen] - total)
        if request.logprobs:
            values, ids = fused.topk(min(request.logprobs, len(fused)))
            top = tuple(zip(ids.tolist(), (values - total).tolist(), strict=True))
    explained = None
    if request.explain:
        before = pilot.softmax(0)
        after = before if fused is pilot else fused.softmax(0)
        explained = Explained(
            pilot_id=int(pilot.argmax()),
            pilot=float(before[chosen]),
            fused=float(after[chosen]),
            moved=min(1.0, 0.5 * float((after - before).abs().sum())),
        )
    return Token(chosen, logprob, top, explained)
