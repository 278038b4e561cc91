"""Token-level errors of the Pilot: `l = onehot(truth) - softmax(logits)` (paper section 2.2), kept sparse.

A sparse error of one target token has k + 1 entries: the true token, then the other tokens with the k largest predicted
probabilities, each with its exact value; `rest` is the probability mass not listed. A full error lists all V tokens, the
others by id. Made by the Pilot's step, read by the Copilot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_BLOCK = 64


class SparseErrors(NamedTuple):
    """Errors of N target tokens.

    ids: int64 [N, k+1], true token first. values: fp32 [N, k+1], first in [0, 1], others in [-1, 0].
    rest: fp32 [N], predicted mass of the tokens not listed, so that values.sum(-1) - rest == 0.
    """

    ids: torch.Tensor
    values: torch.Tensor
    rest: torch.Tensor


def sparse_errors(log_probs: torch.Tensor, targets: torch.Tensor, top_k: int) -> SparseErrors:
    """`1 - p(true)`, `-p(id)` of the k largest others (V - 1 at most), and the rest (section 2.2).

    log_probs: fp32 [N, V], log softmax of the Pilot's logits. targets: int64 [N], true tokens.
    """
    top_k = min(top_k, log_probs.shape[1] - 1)
    others, mass = _others(log_probs, targets)
    values, ids = _top_k(others, top_k)
    rest = (mass - values.sum(-1)).clamp_min_(0.0)
    return SparseErrors(torch.cat([targets[:, None], ids], 1), torch.cat([mass[:, None], -values], 1), rest)


def full_errors(log_probs: torch.Tensor, targets: torch.Tensor) -> SparseErrors:
    """Errors of all V tokens: the true one, then the others by id; `rest` is 0. Arguments as above."""
    others, mass = _others(log_probs, targets)
    index = torch.arange(others.shape[1] - 1, device=others.device)
    ids = index + (index >= targets[:, None])
    values = torch.cat([mass[:, None], -others.gather(1, ids)], 1)
    return SparseErrors(torch.cat([targets[:, None], ids], 1), values, torch.zeros_like(mass))


def _others(log_probs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [N, V] with 0 for the true token, and their sum [N]."""
    others = log_probs.detach().exp()
    others.scatter_(1, targets[:, None], 0.0)
    # 1 - p(true) as the sum of the others: the difference loses every digit as p(true) approaches 1
    return others, others.sum(-1)


def _top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exactly `torch.topk(values, k)` of non-negative rows [N, V], in one cheap pass over V.

    The k largest entries are in the k blocks with the largest maxima, so only those blocks are searched.
    """
    rows, vocab = values.shape
    if vocab < 4 * k * _BLOCK:
        return torch.topk(values, k)
    blocks = vocab // _BLOCK
    body = values[:, : blocks * _BLOCK].view(rows, blocks, _BLOCK)
    chosen = torch.topk(body.amax(-1), k, sorted=False).indices
    ids = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=values.device)).view(rows, -1)
    tail = torch.arange(blocks * _BLOCK, vocab, device=values.device).expand(rows, -1)
    ids = torch.cat([ids, tail], 1)
    found, at = torch.topk(values.gather(1, ids), k)
    return found, ids.gather(1, at)
