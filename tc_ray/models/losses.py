"""The Copilot's loss: RMSE between predicted and logged errors (equation 7).

The square root is of the mean over target tokens of the squared error summed over V, over the whole batch: a root per
token pulls f to zero (method.md). The sum of squares and the token count are returned apart, so that micro-batches and
learner workers add up to exactly the loss of the undivided batch.
"""

from __future__ import annotations

import torch


def squared_error(f: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sum over tokens and vocabulary of (f - l)^2, fp32 scalar, with l sparse.

    Args:
        f: [N, V] Copilot output. ids: int64 [N, k+1]. values: fp32 [N, k+1]; zero entries are padding.

    The residual is formed at the listed entries, so nothing cancels however small it gets.
    """
    return f.float().scatter_add(1, ids, -values.float()).square().sum()
