"""KL and cross-entropy with f as logits over the whole vocabulary (our reading of table 20).

f is 0 outside the A output tokens, so softmax(f) has Z_f = sum_A exp(f) + (V - A). Both losses go twice over the blocks of f,
once for Z_f and once for the derivative: f is computed twice (8 N A d operations instead of 6) and not held.
"""

from __future__ import annotations

import math

import torch

from tc_ray.models.losses.base import MeanLoss, Measured, Outputs, add_listed, listed_outputs, merged, summing_dtype


class _SoftmaxLoss(MeanLoss):
    """Mean over tokens of a loss with softmax(f) over V = vocab_size tokens."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def _others(self, outputs: int) -> float:
        """log of what the tokens outside the output add to Z_f."""
        return math.log(self.vocab_size - outputs) if self.vocab_size > outputs else -math.inf


class CrossEntropy(_SoftmaxLoss):
    """Mean over tokens of -log softmax(f)[true token], the true token being the first listed; l is not used otherwise.

    A true token outside the output has logit 0: the loss is log Z_f, which f can still lower by lowering its outputs.
    """

    def measure(
        self,
        states: torch.Tensor,
        weight: torch.Tensor,
        places: torch.Tensor,
        values: torch.Tensor,
        product: torch.dtype,
    ) -> Measured:
        """dS/df = softmax(f) - onehot(true token)."""
        outputs = Outputs(states, weight, product=product, wide=summing_dtype(states))
        truth = places[:, :1]
        log_z = states.new_full((len(states),), self._others(len(weight)), dtype=outputs.wide)
        true_logit = torch.zeros_like(log_z)
        for first, f in outputs.blocks():
            log_z = torch.logaddexp(log_z, f.logsumexp(1))
            true_logit += listed_outputs(f, first, truth)[:, 0]
        for first, f in outputs.blocks():
            derivative = f.sub_(log_z[:, None]).exp_()
            add_listed(derivative, first, truth, torch.full_like(truth, -1, dtype=outputs.wide))
            outputs.take(first, derivative)
        return outputs.measured((log_z.double() - true_logit.double()).sum())


class Divergence(_SoftmaxLoss):
    """Mean over tokens of KL(softmax(l) || softmax(f)), with softmax(l) in closed form: no second [N, A] tensor.

    Unlisted tokens have l = 0, so q = softmax(l) is exp(l_j) / Z_l with Z_l = V + sum_listed (exp(l) - 1), and

        KL = sum_j q_j l_j - log Z_l - sum_j q_j f_j + log Z_f
        sum_j q_j f_j = (sum_A f + sum_listed (exp(l) - 1) f) / Z_l

    A true token outside the output keeps its q and has f = 0. l is in [-1, 1], so q is nearly uniform, KL is of the size
    |f - l|^2 / 2V and a difference of numbers near log V: blocks of f are float64.
    """

    def measure(
        self,
        states: torch.Tensor,
        weight: torch.Tensor,
        places: torch.Tensor,
        values: torch.Tensor,
        product: torch.dtype,
    ) -> Measured:
        """dS/df = softmax(f) - softmax(l)."""
        outputs = Outputs(states, weight, product=product, wide=torch.float64)
        places, errors = merged(places, values.double())
        above_one = errors.expm1()
        z_errors = self.vocab_size + above_one.sum(1)
        log_z = torch.full_like(z_errors, self._others(len(weight)))
        expected = torch.zeros_like(z_errors)
        for first, f in outputs.blocks():
            log_z = torch.logaddexp(log_z, f.logsumexp(1))
            expected += f.sum(1) + (above_one * listed_outputs(f, first, places)).sum(1)
        q = 1.0 / z_errors
        total = q * ((above_one + 1.0) * errors).sum(1) - z_errors.log() - q * expected + log_z
        for first, f in outputs.blocks():
            derivative = f.sub_(log_z[:, None]).exp_().sub_(q[:, None])
            add_listed(derivative, first, places, -above_one * q[:, None])
            outputs.take(first, derivative)
        return outputs.measured(total.sum())
