"""The Copilot's loss: RMSE between predicted and logged errors (equation 7).

The square root is of the mean over target tokens of the squared error summed over V, over the whole batch: a root per
token pulls f to zero (method.md). The sum of squares and the token count are returned apart, so that micro-batches and
learner workers add up to exactly the loss of the undivided batch.
"""

from __future__ import annotations

import torch


def squared_error(f: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sum over tokens and vocabulary of (f - l)^2, fp32 scalar, with l sparse.

    Args:
        f: [N, A] Copilot output. values: fp32 [N, k+1] listed errors; zero entries are padding.
        places: int64 [N, k+1], column of f of each listed error; -1 where f is 0 and cannot learn (it still counts).

    The residual is formed at the listed entries, so nothing cancels however small it gets.
    """
    values = values.float()
    reached = places >= 0
    residual = f.float().scatter_add(1, places.clamp_min(0), -values * reached)
    return residual.square().sum() + values.masked_fill(reached, 0.0).square().sum()
