"""RMSE between predicted and logged errors (equation 7), exactly and by the Gram matrix of W_out.

The square root is of the mean over target tokens of the squared error summed over V, over the whole batch and all ranks: a
root per token pulls f to zero (docs/decisions.md).

Two forms of the same sum and gradients:

blocks    the residual R = f - l itself, in blocks of columns: 6 N A d operations.
gram      S = sum_n h^T G h - 2 sum l f + sum l^2 with G = W^T W,  dS/dH = 2 (H G - L W),  dS/dW = 2 (W C - L^T H) with C = H^T H;
          L [N, A] is l, of which only the listed rows of W are touched: about 3.3 A d^2 operations.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tc_ray.models.losses.base import (
    BLOCK_ELEMENTS,
    Measured,
    Outputs,
    TokenLoss,
    add_listed,
    merged,
    summing_dtype,
)

GUARD = 0.05
"""Share of sum l^2 below which the identity's S is not believed. It subtracts numbers of the size of sum l^2 known to 7 digits:
measured against float64, S is off by 2e-7 at a share of 0.05, 2e-6 at 0.01, 2e-4 at 1e-4 and 2e-2 at 1e-6, and the
gradients lose half as many digits."""

REDUCED_SPEED = {"cpu": 4.0, "cuda": 12.0}
"""Speed of bf16 products against float32's: 3.7 measured on a CPU with AVX512-BF16; 10 to 16 by the data sheets of GPUs."""
SYMMETRIC_COST = 2 / 3
"""Time of `_squared` against the whole product: 5/8 of the operations, 0.67 measured."""
LISTED_COST = 64.0
"""Operations of a product that take as long as handling one listed number (a gathered and an added row of W), measured."""


class RootMeanSquare(TokenLoss):
    """sqrt(S / N), S = sum over tokens and vocabulary of (f - l)^2.

    A token outside the output has f = 0: its l^2 counts and nothing can be learned from it.

    Args:
        form: `dense` (blocks), `gram`, or `auto`: the one with fewer operations (`gram_is_cheaper`). Memory does not
            decide: neither form holds a tensor of size N x A.
    """

    def __init__(self, form: str = "auto") -> None:
        self.form = form

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
        """S and its derivatives by the configured form; by blocks where the identity cancels."""
        found = None
        if self.form == "gram" or (
            self.form == "auto"
            and gram_is_cheaper(
                *states.shape, outputs=len(weight), listed=places.shape[1], product=product, device=states.device.type
            )
        ):
            found = by_gram(states, weight, places, values, product)
        return by_blocks(states, weight, places, values, product) if found is None else found


def gram_is_cheaper(tokens: int, width: int, *, outputs: int, listed: int, product: torch.dtype, device: str) -> bool:
    """Whether `by_gram` takes fewer operations than `by_blocks`, in float32 operations.

    blocks: 6 N A d / s, with s the speed of the product's type against float32 (1 for float32 itself).
    gram:   2 d^2 (2/3 (A + N) + N) + 2 A d^2 / s + 64 N (k+1) d: G and C, H G, W C, the listed rows. Only W C may be rounded.

    With k << A and N << A: N > 0.56 d in float32, N > 1.2 d in bf16 on a CPU and N > 3 d on a GPU.
    """
    speed = REDUCED_SPEED.get(device, REDUCED_SPEED["cpu"]) if product in (torch.bfloat16, torch.float16) else 1.0
    blocks = 6 * tokens * outputs * width / speed
    exact = SYMMETRIC_COST * (outputs + tokens) + tokens
    gram = 2 * width**2 * (exact + outputs / speed) + LISTED_COST * tokens * listed * width
    return gram < blocks


def by_blocks(
    states: torch.Tensor, weight: torch.Tensor, places: torch.Tensor, values: torch.Tensor, product: torch.dtype
) -> Measured:
    """Arguments and result as for `TokenLoss.measure`. The residual is formed at the listed entries, so nothing cancels
    however small it gets."""
    outputs = Outputs(states, weight, product=product, wide=summing_dtype(states), scale=2.0)
    total = values.masked_fill(places >= 0, 0.0).double().square().sum()
    for first, residual in outputs.blocks():
        add_listed(residual, first, places, -values)
        # a norm a row and their squares in float64: one float32 sum over the block loses digits
        total = total + torch.linalg.vector_norm(residual, dim=1).double().square().sum()
        outputs.take(first, residual)
    return outputs.measured(total)


def by_gram(
    states: torch.Tensor,
    weight: torch.Tensor,
    places: torch.Tensor,
    values: torch.Tensor,
    product: torch.dtype,
    *,
    guard: float = GUARD,
) -> Measured | None:
    """The identity; None where it cancels: S < guard sum l^2, both over the output tokens. The others add their l^2.

    G, C and everything S is made of are float32 from unrounded states and weights (float64 for float64 states): S is a
    difference, and float32 has digits to lose. It wants products that are not rounded to TF32, torch's default. W C is
    part of a gradient and as large as f h, so `product` rounds it no more than it rounds f in `by_blocks`.
    """
    wide = summing_dtype(states)
    h, w = states.to(wide), weight.to(wide)
    places, values = merged(places, values.to(wide))
    reached = places >= 0
    at, listed = places.clamp_min(0), values.masked_fill(~reached, 0.0)
    d_states = h @ _squared(w)
    # sum_k l_k W_k, the rows gathered and added in one pass
    summed = F.embedding_bag(at, w, mode="sum", per_sample_weights=listed)
    size = listed.double().square().sum()
    total = (h * d_states).sum(dtype=torch.float64) - 2 * (h * summed).sum(dtype=torch.float64) + size
    if bool(total < guard * size):
        return None
    total = total + values.masked_fill(reached, 0.0).double().square().sum()
    d_states = (d_states - summed).mul_(2)
    d_weight = torch.empty_like(w)
    moment = _squared(h).mul_(2).to(product)
    rows = max(1, BLOCK_ELEMENTS.get(w.device.type, BLOCK_ELEMENTS["cpu"]) // w.shape[1])
    for part, out in zip(w.split(rows), d_weight.split(rows), strict=True):
        out.copy_(part.to(product) @ moment)
    tokens = max(1, rows // at.shape[1])
    for where, value, state in zip(at.split(tokens), listed.split(tokens), h.split(tokens), strict=True):
        d_weight.index_add_(0, where.flatten(), (value[:, :, None] * state[:, None]).flatten(0, 1), alpha=-2)
    return Measured(total, d_states, d_weight)


def _squared(x: torch.Tensor) -> torch.Tensor:
    """x^T x [d, d] of x [n, d], in four stripes that leave out most of what symmetry gives."""
    width = x.shape[1]
    product = x.new_empty(width, width)
    stripe = -(-width // 4)
    for first in range(0, width, stripe):
        last = first + stripe
        part = x[:, first:last].T @ x[:, first:]
        product[first:last, first:] = part
        product[first:, first:last] = part.T
    return product
