"""One generation: its sampler, its text, its need of cache. Used by the engine's thread alone."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch

from tc_ray.serving.engine.batch import CacheNeed, Prefill
from tc_ray.serving.engine.contract import Finished, GenerationRequest, Piece, RequestHandle
from tc_ray.serving.engine.sampling import Sampler, described
from tc_ray.serving.text.incremental import IncrementalText


class Sequence:
    """A generation under way.

    Args:
        end_ids: tokens that end a text; they count as tokens and are not part of the text.
        lam: weight of the Copilot. need: cache entries up to its last token.
    """

    def __init__(
        self, handle: RequestHandle, tokenizer: Any, end_ids: frozenset[int], lam: float, need: CacheNeed
    ) -> None:
        assert isinstance(handle.request, GenerationRequest)
        self.handle, self.request = handle, handle.request
        self.lam, self.need = lam, need
        self.prefill: Prefill | None = None
        self.sampler = Sampler(self.request)
        self.last = -1
        """The token chosen last."""
        self._text = IncrementalText(tokenizer, self.request.prompt_ids, self.request.stops)
        self._end_ids = end_ids
        self._count = 0
        self._cached = 0

    def start(self, prefill: Prefill) -> None:
        """Its prompt is being computed."""
        self.prefill, self._cached = prefill, prefill.reused

    def append(self, chosen: int, pilot: torch.Tensor, fused: torch.Tensor) -> bool:
        """Append the chosen token and send it to the client. Returns whether it was the last one.

        Args:
            pilot, fused: fp32 [V] logits that it was chosen from.
        """
        self.last = chosen
        self._count += 1
        ended = chosen in self._end_ids
        text = "" if ended else self._text.push([chosen])
        reason: Literal["stop", "length"] | None = None
        if ended or self._text.stopped:
            reason = "stop"
        elif self._count >= self.request.max_new_tokens:
            reason = "length"
        if reason is not None:
            text += self._text.finish()
        self.handle.send(Piece(text, (described(self.request, chosen, pilot, fused),)))
        if reason is not None:
            self.handle.end(Finished(reason, len(self.request.prompt_ids), self._count, self._cached))
        return reason is not None


def end_ids_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in itertools.chain([tokenizer.eos_token_id], listed) if token is not None)
