"""Teacher-forced measures of Pilot and fused model: squared error, NLL and token accuracy on the gold tokens.

The Copilot reads the Pilot's true errors on the gold prefix, as in training, so one pass gives every lambda. A ratio
E||p - p~||^2 / E||p - p^||^2 (theorem 4.1) below 1 means that the Copilot works; it is no proxy for accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tc_ray.evaluation.decode import HeldOut
from tc_ray.models.copilot import CopilotBatch
from tc_ray.models.fusion import FusedModel, fuse
from tc_ray.models.pilot.step import PilotStep

CHUNK_ELEMENTS = 2**20
NLL_FLOOR = 1e-8
"""Probability below which a token's NLL stops growing: a clamped p~ can be exactly 0."""


@dataclass(frozen=True)
class TeacherForced:
    """Means over gold tokens of one (space, lam): squared error of the distribution, its ratio to the Pilot's, NLL in
    nats, share of tokens ranked first."""

    squared_error: float
    error_ratio: float
    nll: float
    token_accuracy: float
    tokens: int


@torch.no_grad()
def teacher_forced(
    fused: FusedModel,
    examples: Sequence[HeldOut],
    choices: Sequence[tuple[str, float]],
    *,
    batch_size: int,
) -> dict[tuple[str, float], TeacherForced]:
    """Measures of every (space, lam) in `choices`; examples without gold tokens are left out."""
    examples = [e for e in examples if len(e.input_ids) > e.target_start]
    if not examples:
        return {}
    device = fused.pilot.device
    top_k = fused.vocab_size - 1 if fused.vocab_size < 1024 else 256
    tap = fused.copilot.config
    question = tap.question == "states"
    step = PilotStep(fused.pilot, top_k=top_k, pooling=tap.pooling, layers=tap.tap_layers, question=question).eval()
    sums = {choice: np.zeros(3) for choice in choices}
    base, tokens = 0.0, 0
    for at in range(0, len(examples), batch_size):
        part = examples[at : at + batch_size]
        ids = pad_sequence([torch.tensor(e.input_ids) for e in part], batch_first=True)
        lengths = torch.tensor([len(e.input_ids) for e in part])
        starts = torch.tensor([e.target_start for e in part])
        out = step.measure(ids.to(device), lengths.to(device), starts.to(device))
        assert out.record is not None
        batch = CopilotBatch.from_step(out.record, ids, lengths, starts, positions=tap.positions).to(device)
        f = fused.copilot.compact(batch).float()
        tokens += len(f)
        # a few rows at a time, so that [rows, V] stays in the processor's cache over all choices
        for rows in torch.arange(len(f)).split(max(1, CHUNK_ELEMENTS // fused.vocab_size)):
            log_probs, targets = out.log_probs[rows], out.targets[rows]
            dense = fused.copilot.expand(f[rows], log_probs.shape[1])
            base += _squared_error(log_probs.exp(), targets)
            for space, lam in choices:
                p = fuse(log_probs, dense, torch.full((len(rows),), lam, device=device), space).softmax(-1)
                nll = -p.gather(1, targets[:, None]).clamp_min(NLL_FLOOR).log().sum()
                right = (p.argmax(-1) == targets).sum()
                sums[space, lam] += [_squared_error(p, targets), float(nll), float(right)]
    step.close()
    return {
        choice: TeacherForced(total[0] / tokens, total[0] / base, total[1] / tokens, total[2] / tokens, tokens)
        for choice, total in sums.items()
    }


def _squared_error(p: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum over rows of ||onehot(target) - p||^2 = 1 - 2 p(target) + ||p||^2."""
    return float((1.0 - 2.0 * p.gather(1, targets[:, None])[:, 0] + p.square().sum(-1)).sum())
