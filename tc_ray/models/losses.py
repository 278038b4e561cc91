"""The Copilot's losses between predicted errors f and logged errors l (equation 7, table 20).

f [N, V] is W_out h on the output tokens and 0 on every other token; l [N, V] is sparse. Every loss is a function of both over the
whole V. A true token outside the output counts: f cannot reduce it (rmse), or it is a logit that stays 0 (kl, cross_entropy).

| `copilot.loss` | sum over tokens S | the step's loss |
| --- | --- | --- |
| rmse | sum_j (f_j - l_j)^2 | sqrt(S / N) |
| kl | KL(softmax(l) || softmax(f)) | S / N |
| cross_entropy | -log softmax(f)[true token] | S / N |

The paper names the losses of table 20 without their form; kl and cross_entropy are our reading of it.
Invariant: f = H W^T is never held as one [N, A] tensor. A block of W's rows gives a block of f's columns, the loss turns it into
its derivative in place, and both gradients take their share before the next block. Used by the Copilot's learner.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
"""Numbers in a block of f and the rows of W it comes from: a CPU's caches hold it; on a GPU it hides the start of a product."""
LEAST_COLUMNS = 256


class Outputs:
    """f = H W^T on the output tokens, and the derivatives made from it, a block of columns at a time.

    states: [N, d]. weight: [A, d]. product: type of the products. wide: type in which blocks of f are given.
    scale: factor of both derivatives (a power of two costs no digit).
    """

    def __init__(
        self, states: torch.Tensor, weight: torch.Tensor, *, product: torch.dtype, wide: torch.dtype, scale: float = 1.0
    ) -> None:
        self.weight, self.wide, self.scale = weight, wide, scale
        self.states = states.to(product)
        self._scaled_states = self.states * scale
        self.d_states = torch.zeros_like(states, dtype=_summing_dtype(states))
        self.d_weight = torch.empty_like(weight, dtype=_summing_dtype(states))
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


class TokenLoss(ABC):
    """A loss between f and l, summed over target tokens, and how sums over ranks make one loss.

    With S and N summed over all ranks, `value(S, N)` is the step's loss and `gradient_factor(S, N)` its derivative by S, by which
    gradients of S, added over ranks, are multiplied. scale: factor that `measure` leaves out of the derivatives. in_float64: whether
    blocks of f are float64. vocab_size: V; rmse does not depend on it.
    """

    scale = 1.0
    in_float64 = False

    def __init__(self, vocab_size: int = 0) -> None:
        self.vocab_size = vocab_size

    def total(
        self, states: torch.Tensor, weight: torch.Tensor, places: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """S, the loss summed over tokens: a float64 scalar, differentiable once in states and weight.

        states: [N, d] final states h, already scaled, so that f = h W^T. weight: [A, d], W_out.
        places: int64 [N, k+1], row of W_out of each listed token, the true token first; -1: not an output token.
        values: fp32 [N, k+1], l of the listed tokens, each listed once.
        Products of [N, A] size run in autocast's type where that is on; sums and gradients are kept in float32.
        """
        return _Sum.apply(self, states, weight, places, values, _product_dtype(states))

    def value(self, total: float, tokens: float) -> float:
        """The step's loss from S and N over all ranks."""
        return total / tokens

    def gradient_factor(self, total: float, tokens: float) -> float:
        """Derivative of `value` by S."""
        return 1.0 / tokens

    @abstractmethod
    def measure(self, outputs: Outputs, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """S as a float64 scalar; `outputs` takes dS/df of every block. Runs without autograd."""

    def _log_of_others(self, outputs: int) -> float:
        """log of what the V - A tokens outside the output, whose f is 0, add to Z_f = sum exp(f)."""
        return math.log(self.vocab_size - outputs) if self.vocab_size > outputs else -math.inf


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
        wide = torch.float64 if loss.in_float64 else _summing_dtype(states)
        with torch.autocast(states.device.type, enabled=False):
            outputs = Outputs(states, weight, product=product, wide=wide, scale=loss.scale)
            total = loss.measure(outputs, places, values)
        ctx.gradients = outputs.d_states.mul_(loss.scale).to(states.dtype), outputs.d_weight.to(weight.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # given away, not kept: an [A, d] tensor should become the weight's gradient without a copy
        if ctx.gradients is None:
            raise RuntimeError("backward ran already: the gradients of this loss are given out once")
        d_states, d_weight = ctx.gradients
        ctx.gradients = None
        return None, d_states.mul_(outer), d_weight.mul_(outer), None, None, None


class RootMeanSquare(TokenLoss):
    """sqrt(S / N), S = sum over tokens and vocabulary of (f - l)^2 (equation 7).

    The root is taken once, over the whole batch and all ranks: a root per token pulls f to zero (docs/decisions.md).
    """

    scale = 2.0

    def value(self, total: float, tokens: float) -> float:
        return math.sqrt(total / tokens)

    def gradient_factor(self, total: float, tokens: float) -> float:
        return 0.5 / math.sqrt(max(total, 1e-30) * tokens)

    def measure(self, outputs: Outputs, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        # dS/df = 2 (f - l), formed at the listed entries: nothing cancels however small it gets
        total = values.masked_fill(places >= 0, 0.0).double().square().sum()
        for first, residual in outputs.blocks():
            _add_listed(residual, first, places, -values)
            # a norm per row and their squares in float64: one float32 sum over the block loses digits
            total = total + torch.linalg.vector_norm(residual, dim=1).double().square().sum()
            outputs.take(first, residual)
        return total


class CrossEntropy(TokenLoss):
    """Mean over tokens of -log softmax(f)[true token], the true token being the first listed; l is not used otherwise.

    This loss and the next go twice over the blocks of f, once for Z_f and once for the derivative, and hold none.
    """

    def measure(self, outputs: Outputs, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        truth = places[:, :1]
        log_z = torch.full_like(outputs.states[:, 0], self._log_of_others(len(outputs.weight)), dtype=outputs.wide)
        true_logit = torch.zeros_like(log_z)
        for first, f in outputs.blocks():
            log_z = torch.logaddexp(log_z, f.logsumexp(1))
            true_logit += _listed_outputs(f, first, truth)[:, 0]
        for first, f in outputs.blocks():
            derivative = f.sub_(log_z[:, None]).exp_()
            _add_listed(derivative, first, truth, torch.full_like(truth, -1, dtype=outputs.wide))
            outputs.take(first, derivative)
        return (log_z.double() - true_logit.double()).sum()


class Divergence(TokenLoss):
    """Mean over tokens of KL(softmax(l) || softmax(f)), with softmax(l) in closed form: no second [N, A] tensor.

    Unlisted tokens have l = 0, so q = softmax(l) is exp(l_j) / Z_l with Z_l = V + sum_listed (exp(l) - 1), and

        KL = sum_j q_j l_j - log Z_l - sum_j q_j f_j + log Z_f
        sum_j q_j f_j = (sum_A f + sum_listed (exp(l) - 1) f) / Z_l

    l is in [-1, 1], so KL is of the size |f - l|^2 / 2V and a difference of numbers near log V: blocks of f are float64.
    """

    in_float64 = True

    def measure(self, outputs: Outputs, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        errors = values.double()
        above_one = errors.expm1()
        z_errors = self.vocab_size + above_one.sum(1)
        log_z = torch.full_like(z_errors, self._log_of_others(len(outputs.weight)))
        expected = torch.zeros_like(z_errors)
        for first, f in outputs.blocks():
            log_z = torch.logaddexp(log_z, f.logsumexp(1))
            expected += f.sum(1) + (above_one * _listed_outputs(f, first, places)).sum(1)
        q = 1.0 / z_errors
        total = q * ((above_one + 1.0) * errors).sum(1) - z_errors.log() - q * expected + log_z
        for first, f in outputs.blocks():
            derivative = f.sub_(log_z[:, None]).exp_().sub_(q[:, None])
            _add_listed(derivative, first, places, -above_one * q[:, None])
            outputs.take(first, derivative)
        return total.sum()


LOSSES: dict[str, type[TokenLoss]] = {"rmse": RootMeanSquare, "kl": Divergence, "cross_entropy": CrossEntropy}
"""By the name in `copilot.loss`."""


def inner_products(
    states: torch.Tensor, weight: torch.Tensor, places: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """l.l, l.f and f.f, summed over tokens and all of V: float64 [3]. Arguments: those of `TokenLoss.total`.

    S of the rmse for lam f in place of f is l.l - 2 lam l.f + lam^2 f.f, for every lam.
    """
    product = _product_dtype(states)
    with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
        outputs = Outputs(states, weight, product=product, wide=_summing_dtype(states))
        own = values.double().square().sum()
        across, squares = torch.zeros_like(own), torch.zeros_like(own)
        for first, f in outputs.blocks():
            across += (_listed_outputs(f, first, places).double() * values).sum()
            squares += torch.linalg.vector_norm(f, dim=1).double().square().sum()
    return torch.stack([own, across, squares])


def _product_dtype(states: torch.Tensor) -> torch.dtype:
    """Type of products of [N, A] size: autocast's where that is on."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _summing_dtype(states: torch.Tensor) -> torch.dtype:
    """Type of sums and gradients: float32, or float64 for float64 states."""
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _add_listed(block: torch.Tensor, first: int, places: torch.Tensor, values: torch.Tensor) -> None:
    """block[n, places[n, j] - first] += values[n, j] for the places within the block."""
    at, inside = _within(block, first, places)
    block.scatter_add_(1, at, torch.where(inside, values, 0.0).to(block.dtype))


def _listed_outputs(block: torch.Tensor, first: int, places: torch.Tensor) -> torch.Tensor:
    """f at the listed places [N, j] within the block, 0 at the others."""
    at, inside = _within(block, first, places)
    return torch.where(inside, block.gather(1, at), 0.0)


def _within(block: torch.Tensor, first: int, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at = places - first
    inside = (places >= 0) & (at >= 0) & (at < block.shape[1])
    return torch.where(inside, at, 0), inside
