"""Fusion of the Pilot's distribution with the Copilot's correction (equation 8)."""

from __future__ import annotations

import torch


def _in_probability_space(logits: torch.Tensor, f: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """log of clamp(p + lam f, 0) renormalised. p~ can leave [0, 1]; a token whose p~ is clamped gets -inf."""
    mass = (logits.softmax(-1) + weight * f).clamp_min(0.0)
    total = mass.sum(-1, keepdim=True)
    # if the correction takes away every token there is no p~: the row keeps p^. NaN stays NaN, because a correction that is
    # not finite must not look like the Pilot
    return torch.where(total == 0, logits, (mass / total).log())


def fuse(logits: torch.Tensor, f: torch.Tensor, lam: torch.Tensor, space: str) -> torch.Tensor:
    """Logits of the fused distribution, fp32 [B, .., V].

    logits: [B, .., V] Pilot. f: [B, .., V] Copilot. lam: fp32 [B].
    space: `probability`: equation 8, clamped and renormalised; `logits`: logits + lam f.

    A sequence with lam 0 keeps the Pilot's logits unchanged. In probability space a row whose every p~ is 0 does too.
    """
    logits, f = logits.float(), f.float()
    weight = lam.view(-1, *[1] * (logits.ndim - 1))
    fused = logits + weight * f if space == "logits" else _in_probability_space(logits, f, weight)
    return torch.where(weight == 0, logits, fused)
