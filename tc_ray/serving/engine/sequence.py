"""One generation: its sampler, its text, its need of cache.

Invariant: the same logits and seed give the token that transformers' `generate` draws (bias, repetition penalty, end tokens that are
too early; then temperature, top-k, top-p), whatever else is in the batch: each sequence has its own generator. A token is reported
with its text, one of a stop string not at all.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import torch

from tc_ray.models.decoding.batch import CacheNeed
from tc_ray.models.decoding.prefill import Prefill, shared_length
from tc_ray.models.weights import NotFiniteError
from tc_ray.serving.engine.contract import Explained, Finished, GenerationRequest, Piece, RequestHandle, Token
from tc_ray.serving.engine.prefixes import MIN_TOKENS
from tc_ray.serving.text.incremental import IncrementalText

_LIKELY = 256
"""Tokens sorted at first for top-p; all tokens are sorted only if these do not reach it."""


def top_k_only(scores: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Scores [V], -inf for all below the k-th."""
    if top_k is None or top_k >= len(scores):
        return scores
    return scores.masked_fill(scores < scores.topk(top_k).values[-1], -math.inf)


def top_p_only(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Scores [V], -inf for all tokens that are not needed for a probability of top_p; the likeliest always stays."""
    if top_p >= 1:
        return scores
    total = scores.logsumexp(0)
    for count in (min(_LIKELY, len(scores)), len(scores)):
        values, ids = scores.topk(count)
        before = (values - total).exp().cumsum(0)
        if float(before[-1]) >= top_p or count == len(scores):
            break
    # a token is kept if those before it sum to less than top_p
    kept = 1 + int((before[:-1] < top_p).sum())
    return torch.full_like(scores, -math.inf).index_copy(0, ids[:kept], values[:kept])


def described(request: GenerationRequest, chosen: int, pilot: torch.Tensor, fused: torch.Tensor) -> Token:
    """The chosen token with what the request asks for. pilot, fused: fp32 [V] logits."""
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


class Sequence:
    """A generation under way.

    end_ids: tokens that end a text; they count as tokens and are not part of it. need: cache entries up to its last token.
    before: what the decoder reads before the first new token: the prompt, or an encoder-decoder's start token.
    """

    def __init__(
        self,
        handle: RequestHandle,
        tokenizer: Any,
        end_ids: frozenset[int],
        lam: float,
        need: CacheNeed,
        before: tuple[int, ...],
    ) -> None:
        assert isinstance(handle.request, GenerationRequest)
        self.handle, self.request = handle, handle.request
        self.lam, self.need = lam, need
        self.prefill: Prefill | None = None
        self.pace = 0.0
        """Tokens of the prompt per second in its last part; 0: none was computed."""
        self.last = -1
        """The token chosen last."""
        self._text = IncrementalText(tokenizer, before, self.request.stops)
        self._end_ids = end_ids
        self._held: list[tuple[int, Token]] = []
        """Tokens that are not reported yet, each with the place of its first character."""
        self._used = list(dict.fromkeys(before)) if self.request.repetition_penalty != 1 else []
        """Tokens that the repetition penalty is about."""
        self._count = 0
        self._generator: torch.Generator | None = None

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are not computed."""
        return len(self.request.prompt_ids) - (self.prefill.computed if self.prefill else 0)

    def begins_like(self, *earlier: Sequence) -> bool:
        """Whether its prompt is not begun and one of these computes half of it or more, which can be reused once it is done."""
        request, ids = self.request, self.request.prompt_ids
        return self.prefill is None and any(
            other.request.owner == request.owner
            and other.request.prompt_ids[:MIN_TOKENS] == ids[:MIN_TOKENS]
            and 2 * shared_length(other.request.prompt_ids, ids) >= len(ids)
            for other in earlier
        )

    def choose(self, logits: torch.Tensor, likeliest: int) -> int:
        """The next token for fused logits, fp32 [V], which are not changed; `likeliest` is their argmax.

        Raises NotFiniteError: what the request forbids are the only tokens that can come.
        """
        request = self.request
        shaped = self._shaped(logits)
        if shaped is not logits and not shaped.max().isfinite():
            raise NotFiniteError("no token is left")
        if request.temperature == 0:
            return likeliest if shaped is logits else int(shaped.argmax())
        logits = shaped
        scores = top_p_only(top_k_only(logits / request.temperature, request.top_k), request.top_p)
        if self._generator is None:
            self._generator = torch.Generator(scores.device)
            if request.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(request.seed)
        return int(torch.multinomial(scores.softmax(0)[None], 1, generator=self._generator))

    def _shaped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [V] with bias, repetition penalty and without end tokens that come too early; the same tensor if nothing is asked."""
        request, early = self.request, self._count < self.request.min_new_tokens
        if not (request.bias or self._used or early):
            return logits
        shaped = logits.clone()
        for token, more in request.bias:
            shaped[token] += more
        if self._used:
            used = torch.tensor(self._used, device=shaped.device)
            found, penalty = shaped[used], request.repetition_penalty
            shaped[used] = torch.where(found < 0, found * penalty, found / penalty)
        if early:
            shaped[list(self._end_ids)] = -math.inf
        return shaped

    def append(self, chosen: int, pilot: torch.Tensor, fused: torch.Tensor) -> bool:
        """Append the token chosen from these fp32 [V] logits and send it to the client. Returns whether it was the last."""
        self.last = chosen
        self._count += 1
        if self._used and chosen not in self._used:
            self._used.append(chosen)
        self._held.append((self._text.decoded, described(self.request, chosen, pilot, fused)))
        ended = chosen in self._end_ids
        text = "" if ended else self._text.push([chosen])
        reason: Literal["stop", "length"] | None = None
        if ended or self._text.stopped:
            reason = "stop"
        elif self._count >= self.request.max_new_tokens:
            reason = "length"
        if reason is not None:
            text += self._text.finish()
        whole = reason is not None and not self._text.stopped
        listed = [token for begin, token in self._held if whole or begin < self._text.released]
        self._held = self._held[len(listed) :]
        self.handle.send(Piece(text, tuple(listed)))
        if reason is not None:
            self.handle.end(Finished(reason, len(self.request.prompt_ids), self._count))
        return reason is not None


def end_ids_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in itertools.chain([tokenizer.eos_token_id], listed) if token is not None)
