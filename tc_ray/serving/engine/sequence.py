"""One generation on its way: its sampler, its text, its place in the batch. Used by the engine's thread alone."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch

from tc_ray.serving.engine.batch import Prefill, Room
from tc_ray.serving.engine.contract import Finished, GenerationRequest, Piece, Ticket
from tc_ray.serving.engine.sampling import Sampler, described
from tc_ray.serving.text.incremental import IncrementalText


class Sequence:
    """A generation under way.

    Args:
        end_ids: tokens that end a text; they count as tokens and are not part of the text.
        lam: weight of the Copilot. room: what it needs in the caches.
    """

    def __init__(self, ticket: Ticket, tokenizer: Any, end_ids: frozenset[int], lam: float, room: Room) -> None:
        assert isinstance(ticket.request, GenerationRequest)
        self.ticket, self.request = ticket, ticket.request
        self.lam, self.room = lam, room
        self.prefill: Prefill | None = None
        self.sampler = Sampler(self.request)
        self.last = -1
        """The token said last."""
        self.ended = False
        """The client has been told so, or is just being told: its place is free for the next."""
        self._text = IncrementalText(tokenizer, self.request.prompt_ids, self.request.stops)
        self._end_ids = end_ids
        self._count = 0
        self._cached = 0

    def start(self, prefill: Prefill) -> None:
        """Its prompt is being computed."""
        self.prefill, self._cached = prefill, prefill.reused

    def say(self, chosen: int, pilot: torch.Tensor, fused: torch.Tensor) -> bool:
        """Take the chosen token, tell the client, and whether that was the last one.

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
            self.ended = True
            text += self._text.finish()
        self.ticket.send(Piece(text, (described(self.request, chosen, pilot, fused),)))
        if reason is not None:
            self.ticket.send(Finished(reason, len(self.request.prompt_ids), self._count, self._cached))
        return reason is not None


def end_ids_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in itertools.chain([tokenizer.eos_token_id], listed) if token is not None)
