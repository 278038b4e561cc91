"""What the losses share: their interface, f in blocks of columns, and gradients made together with the sum.

f = H W^T is never held as one [N, A] tensor. A block of W's rows gives a block of f's columns, the loss turns it into its
derivative in place, and both gradients take their share before the next block. The gradient of W, which is needed anyway, is
written once, block by block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
"""Numbers in a block of f and the rows of W it comes from: few enough for a CPU's caches; on a GPU, enough to hide the start
of a product."""
LEAST_COLUMNS = 256


class Measured(NamedTuple):
    """total: float64 scalar, the loss summed over tokens. d_states [N, d] and d_weight [A, d]: its derivatives."""

    total: torch.Tensor
    d_states: torch.Tensor
    d_weight: torch.Tensor


class TokenLoss(ABC):
    """A loss between f and l, summed over target tokens, and how sums over micro-batches and ranks make one loss.

    With S and N summed over all ranks, `value(S, N)` is the step's loss and `gradient_factor(S, N)` its derivative by S:
    gradients of S, added over ranks and multiplied by it, are the gradient of the loss of the undivided batch.
    """

    def total(
        self, states: torch.Tensor, weight: torch.Tensor, places: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """S, the loss summed over tokens: a float64 scalar, differentiable once in states and weight.

        Args:
            states: [N, d] final states h, already scaled, so that f = h W^T.
            weight: [A, d], W_out.
            places: int64 [N, k+1], row of W_out of each listed token, the true token first; -1: not an output token.
            values: fp32 [N, k+1], l of the listed tokens. A token listed twice has the sum of its values.

        Products of [N, A] size run in autocast's type where autocast is on, else in that of the states; sums and
        gradients are kept in float32 (float64 for float64 states).
        """
        kind = states.device.type
        reduced = torch.is_autocast_enabled(kind)
        product = torch.get_autocast_dtype(kind) if reduced else states.dtype
        total: torch.Tensor = _Sum.apply(self, states, weight, places, values, product)
        return total

    @abstractmethod
    def value(self, total: float, tokens: float) -> float:
        """The step's loss from S and N over all ranks."""

    @abstractmethod
    def gradient_factor(self, total: float, tokens: float) -> float:
        """Derivative of `value` by S."""

    @abstractmethod
    def measure(
        self,
        states: torch.Tensor,
        weight: torch.Tensor,
        places: torch.Tensor,
        values: torch.Tensor,
        product: torch.dtype,
    ) -> Measured:
        """S and its derivatives, arguments as for `total`; large products in `product`. Runs without autograd."""


class MeanLoss(TokenLoss):
    """S / N."""

    def value(self, total: float, tokens: float) -> float:
        """S / N."""
        return total / tokens

    def gradient_factor(self, total: float, tokens: float) -> float:
        """d (S / N) / dS = 1 / N."""
        return 1.0 / tokens


class _Sum(torch.autograd.Function):
    """`TokenLoss.measure` for autograd: forward computes the gradients, backward multiplies them and gives them out."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: TokenLoss,
        states: torch.Tensor,
        weight: torch.Tensor,
        places: torch.Tensor,
        values: torch.Tensor,
        product: torch.dtype,
    ) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            measured = loss.measure(states, weight, places, values, product)
        ctx.gradients = measured.d_states.to(states.dtype), measured.d_weight.to(weight.dtype)
        return measured.total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # given away, not kept: an [A, d] tensor should become the weight's gradient without a copy
        if ctx.gradients is None:
            raise RuntimeError("backward ran already: the gradients of this loss are given out once")
        d_states, d_weight = ctx.gradients
        ctx.gradients = None
        return None, d_states.mul_(outer), d_weight.mul_(outer), None, None, None


def summing_dtype(states: torch.Tensor) -> torch.dtype:
    """Type of sums and gradients: float32, or float64 for float64 states."""
    return torch.float64 if states.dtype == torch.float64 else torch.float32


class Outputs:
    """f = H W^T on the output tokens, and the derivatives made from it, a block of columns at a time.

    Args:
        states: [N, d]. weight: [A, d]. product: type of the products.
        wide: type in which blocks of f are given; sums and gradients have `summing_dtype`.
        scale: factor of both derivatives (a power of two costs no digit).
    """

    def __init__(
        self,
        states: torch.Tensor,
        weight: torch.Tensor,
        *,
        product: torch.dtype,
        wide: torch.dtype,
        scale: float = 1.0,
    ) -> None:
        self.weight, self.wide, self.scale = weight, wide, scale
        self.states = states.to(product)
        self._scaled_states = self.states * scale
        self.d_states = torch.zeros_like(states, dtype=summing_dtype(states))
        self.d_weight = torch.empty_like(weight, dtype=summing_dtype(states))
        room = BLOCK_ELEMENTS.get(states.device.type, BLOCK_ELEMENTS["cpu"])
        self.columns = max(LEAST_COLUMNS, room // sum(states.shape))

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first column, f [N, columns] of type `wide`); the caller may change f in place."""
        for first in range(0, len(self.weight), self.columns):
            self._rows = self.weight[first : first + self.columns].to(self.states.dtype)
            yield first, (self.states @ self._rows.T).to(self.wide)

    def take(self, first: int, derivative: torch.Tensor) -> None:
        """Add the share of the block that `blocks` gave last to both gradients; derivative: [N, columns], dS/df."""
        derivative = derivative.to(self.states.dtype)
        self.d_states += derivative @ self._rows
        self.d_weight[first : first + len(self._rows)] = derivative.T @ self._scaled_states

    def measured(self, total: torch.Tensor) -> Measured:
        """The result, when every block has been taken."""
        return Measured(total, self.d_states.mul_(self.scale), self.d_weight)


def add_listed(block: torch.Tensor, first: int, places: torch.Tensor, values: torch.Tensor) -> None:
    """block[n, places[n, j] - first] += values[n, j] for the places within the block; those listed twice add up."""
    at, inside = _within(block, first, places)
    block.scatter_add_(1, at, torch.where(inside, values, 0.0).to(block.dtype))


def listed_outputs(block: torch.Tensor, first: int, places: torch.Tensor) -> torch.Tensor:
    """f at the listed places [N, j] within the block, 0 at the others."""
    at, inside = _within(block, first, places)
    return torch.where(inside, block.gather(1, at), 0.0)


def _within(block: torch.Tensor, first: int, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at = places - first
    inside = (places >= 0) & (at >= 0) & (at < block.shape[1])
    return torch.where(inside, at, 0), inside


def merged(places: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same l with each output token listed once per row: places and values [N, k+1], filled up with (-1, 0).

    Entries at -1 stay apart, since nothing says whether two of them are the same token.
    """
    ordered, order = places.sort(1)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]) | (ordered[:, 1:] < 0)
    run = starts.cumsum(1) - 1
    return (
        torch.full_like(places, -1).scatter_(1, run, ordered),
        torch.zeros_like(values).scatter_add_(1, run, values.gather(1, order)),
    )
