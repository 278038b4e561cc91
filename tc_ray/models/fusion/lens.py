"""The logit lens: what the Pilot would predict after each of its layers (figure 4).

The output of every decoder layer goes through the model's own final norm and head, as if it were the last. Hooks keep the
layers' outputs at the completion's positions only, during the pass that runs anyway. Used by `scoring` and `explain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tc_ray.models.fusion.core import FusedCore


@contextmanager
def layer_states(layers: Sequence[nn.Module], first: int) -> Iterator[list[torch.Tensor]]:
    """Yields a list that the enclosed forward pass fills: each layer's output [B, S - first, d] from `first` on, detached."""
    kept: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        kept.append(state.detach()[:, first:].clone())  # a view would hold the prompt's states too

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class LogitLens:
    """For n tokens of B sequences and each of L layers, lowest first.

    ids: int64 [B, n, L], likeliest token; probabilities: fp32 [B, n, L], its probability. chosen_probability: fp32 [B, n, L]
    and chosen_rank: int64 [B, n, L], probability and rank (1 is the likeliest) of the generated token.
    """

    ids: torch.Tensor
    probabilities: torch.Tensor
    chosen_probability: torch.Tensor
    chosen_rank: torch.Tensor

    @staticmethod
    @torch.no_grad()
    def of(model: FusedCore, layers: Sequence[torch.Tensor], chosen: torch.Tensor) -> LogitLens:
        """softmax(head(norm(h_l))) of each layer l, one layer at a time.

        Args:
            layers: [B, c, d] after each layer. chosen: int64 [B, c].
        """
        family = model.family
        norm = family.final_norm(family.decoder(model.pilot))
        parts = []
        for states in layers:
            logits = family.logits(model.pilot, norm(states)).float()
            of_chosen = logits.gather(2, chosen[:, :, None])
            best, ids = logits.max(2)
            total = logits.logsumexp(2)
            rank = 1 + (logits > of_chosen).sum(2)
            parts.append((ids, (best - total).exp(), (of_chosen[:, :, 0] - total).exp(), rank))
        return LogitLens(*(torch.stack(part, 2) for part in zip(*parts, strict=True)))
