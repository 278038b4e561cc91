"""Sparse errors of the Pilot: exact values, exact top-k."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tc_ray.models.pilot.step import _top_k, sparse_errors

VOCAB = 258
WIDTH = 32
END = 1
# one target, many targets, one prompt token, the longest in the middle of the batch
SHAPES = [(9, 8), (12, 1), (17, 6), (5, 3)]


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [258, 1024, 4096, 5003, 49152])
@pytest.mark.parametrize("k", [1, 3, 16])
def test_blocked_top_k_is_top_k(vocab: int, k: int) -> None:
    torch.manual_seed(vocab + k)
    peaked = (6 * torch.randn(40, vocab)).softmax(-1)
    ordered = torch.rand(4, vocab).sort(-1).values  # the largest all in the last block or the tail
    in_one_block = torch.rand(4, vocab)
    in_one_block[:, 64:128] += 1.0
    for values in (peaked, ordered, in_one_block):
        found, ids = _top_k(values, k)
        expected = torch.topk(values, k)
        assert torch.equal(found, expected.values)
        assert torch.equal(ids, expected.indices)


def test_errors_keep_their_digits_for_a_sure_pilot() -> None:
    """1 - p(true) near p(true) = 1 must not be formed as a difference: it would be 0 or noise."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 30.0
    errors = sparse_errors(logits.log_softmax(-1), torch.tensor([3]), 4)
    exact = (VOCAB - 1) * np.exp(-30.0)
    assert float(errors.values[0, 0]) == pytest.approx(exact, rel=1e-4)
