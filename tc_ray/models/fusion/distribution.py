"""Fusion of the Pilot's distribution with the Copilot's correction (equation 8), one function a space."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _in_probability_space(logits: torch.Tensor, f: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """log of clamp(p + lam f, 0) renormalised. p~ can leave [0, 1]; a token whose p~ is clamped gets -inf."""
    mass = (logits.softmax(-1) + weight * f).clamp_min(0.0)
    total = mass.sum(-1, keepdim=True)
    # nothing above 0 is left only where the correction takes away every token: then there is no p~ to speak of
    return torch.where(total > 0, (mass / total).log(), logits)


def _in_logit_space(logits: torch.Tensor, f: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """logits + lam f."""
    return logits + weight * f


FUSIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "probability": _in_probability_space,
    "logits": _in_logit_space,
}
SPACES = tuple(FUSIONS)


def fuse(logits: torch.Tensor, f: torch.Tensor, lam: torch.Tensor, space: str) -> torch.Tensor:
    """Logits of the fused distribution, fp32 [B, .., V].

    Args:
        logits: [B, .., V] Pilot. f: [B, .., V] Copilot. lam: fp32 [B].
        space: `probability`: equation 8, clamped and renormalised; `logits`: logits + lam f.

    A sequence with lam 0 keeps the Pilot's logits unchanged. In probability space a row whose every p~ is 0 does too.
    """
    logits, f = logits.float(), f.float()
    weight = lam.view(-1, *[1] * (logits.ndim - 1))
    return torch.where(weight == 0, logits, FUSIONS[space](logits, f, weight))
