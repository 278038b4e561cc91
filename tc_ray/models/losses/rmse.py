"""RMSE between predicted and logged errors (equation 7).

The square root is of the mean over target tokens of the squared error summed over V, over the whole batch and all ranks: a
root per token pulls f to zero (docs/decisions.md).
"""

from __future__ import annotations

import math

import torch

from tc_ray.models.losses.base import Measured, Outputs, TokenLoss, add_listed, summing_dtype


class RootMeanSquare(TokenLoss):
    """sqrt(S / N), S = sum over tokens and vocabulary of (f - l)^2.

    A token outside the output has f = 0: its l^2 counts and nothing can be learned from it.
    """

    def value(self, total: float, tokens: float) -> float:
        """sqrt(S / N)."""
        return math.sqrt(total / tokens)

    def gradient_factor(self, total: float, tokens: float) -> float:
        """d sqrt(S / N) / dS = 1 / (2 sqrt(S N))."""
        return 0.5 / math.sqrt(max(total, 1e-30) * tokens)

    def measure(
        self,
        states: torch.Tensor,
        weight: torch.Tensor,
        places: torch.Tensor,
        values: torch.Tensor,
        product: torch.dtype,
    ) -> Measured:
        """dS/df = 2 (f - l). The residual is formed at the listed entries, so nothing cancels however small it gets."""
        outputs = Outputs(states, weight, product=product, wide=summing_dtype(states), scale=2.0)
        total = values.masked_fill(places >= 0, 0.0).double().square().sum()
        for first, residual in outputs.blocks():
            add_listed(residual, first, places, -values)
            # a norm per row and their squares in float64: one float32 sum over the block loses digits
            total = total + torch.linalg.vector_norm(residual, dim=1).double().square().sum()
            outputs.take(first, residual)
        return outputs.measured(total)
