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


_SAFE_TOTAL = 1e-3
"""fp32 sums of probabilities are good to about 1e-7: a total above this is good to 1e-4 of itself."""


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


def fuse_at(logits: torch.Tensor, f: torch.Tensor, places: torch.Tensor, lam: torch.Tensor, space: str) -> torch.Tensor:
    """`fuse` of a correction that is 0 except on a few tokens: the others only shift, so V is read twice, not six times.

    logits: fp32 [B, V]. f: [B, A] at tokens `places`, int64 [A], each once. lam: fp32 [B]. space: as for `fuse`.
    """
    weight = lam[:, None]
    if space == "logits":
        return logits.index_add(1, places, weight * f.float())
    log_total = logits.logsumexp(1, keepdim=True)
    before = (logits[:, places] - log_total).exp()
    after = (before + weight * f.float()).clamp_min(0.0)
    total = 1 - before.sum(1, keepdim=True) + after.sum(1, keepdim=True)
    shifted = logits - (log_total + total.clamp_min(_SAFE_TOTAL).log())
    fused = shifted.index_copy(1, places, (after / total.clamp_min(_SAFE_TOTAL)).log())
    # if nearly all mass is taken away the difference above is noise: such rows take the dense form
    lost = (total < _SAFE_TOTAL)[:, 0].nonzero()[:, 0]
    if len(lost):
        dense = torch.zeros_like(logits[lost]).index_copy(1, places, f[lost].float())
        fused[lost] = _in_probability_space(logits[lost], dense, weight[lost])
    return torch.where(weight == 0, logits, fused)
