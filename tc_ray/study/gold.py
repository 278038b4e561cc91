"""Teacher-forced log-probabilities of gold tokens, a few tokens at a time, and what is measured on them row by row.

Invariant: the pieces of two Pilots with one vocabulary over the same rows are the same pieces, so they can be joined.
Called by `measure` and `pilots`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from tc_ray.evaluation.decode import HeldOut
from tc_ray.evaluation.teacher_forced import CHUNK_ELEMENTS, NLL_FLOOR
from tc_ray.models.copilot import Copilot, CopilotBatch
from tc_ray.models.pilot.step import PilotStep

TOP_K = 256
"""Errors kept per gold token for the Copilot's input; of a small vocabulary all."""


@dataclass(frozen=True)
class GoldTokens:
    """c gold tokens. owner: int64 [c], index of the row. log_probs: fp32 [c, V], the Pilot's. targets: int64 [c].

    f: fp32 [c, V], the Copilot's correction; None without a Copilot.
    """

    owner: torch.Tensor
    log_probs: torch.Tensor
    targets: torch.Tensor
    f: torch.Tensor | None


@dataclass(frozen=True)
class GoldMeasures:
    """nll: nats per gold token of each row, None for a row without any; tokens: of each row. See `results.Model`."""

    nll: list[float | None]
    tokens: list[int]
    error_ratio: float | None
    correction: float | None


@torch.no_grad()
def gold_tokens(
    pilot: Any, examples: Sequence[HeldOut], *, batch_size: int, copilot: Copilot | None = None
) -> Iterator[GoldTokens]:
    """All gold tokens of the rows. batch_size: rows of one forward pass."""
    known = [(i, e) for i, e in enumerate(examples) if len(e.input_ids) > e.target_start]
    options: dict[str, Any] = {"record": False, "top_k": 1}
    if copilot is not None:
        vocab, tap = copilot.config.vocab_size, copilot.config
        options = {"top_k": vocab - 1 if vocab < 4 * TOP_K else TOP_K, "pooling": tap.pooling, "layers": tap.tap_layers}
    step = PilotStep(pilot, **options).eval()
    try:
        for at in range(0, len(known), batch_size):
            part = known[at : at + batch_size]
            ids = pad_sequence([torch.tensor(e.input_ids) for _, e in part], batch_first=True)
            lengths = torch.tensor([len(e.input_ids) for _, e in part])
            starts = torch.tensor([e.target_start for _, e in part])
            owner = torch.tensor([i for i, _ in part]).repeat_interleave(lengths - starts).to(pilot.device)
            out = step.measure(ids.to(pilot.device), lengths.to(pilot.device), starts.to(pilot.device))
            f = None
            if copilot is not None:
                positions = copilot.config.positions
                batch = CopilotBatch.from_step(out.record, ids, lengths, starts, positions=positions).to(pilot.device)
                f = copilot.compact(batch).float()
            width = out.log_probs.shape[1]
            for rows in torch.arange(len(owner), device=pilot.device).split(max(1, CHUNK_ELEMENTS // width)):
                dense = None if f is None or copilot is None else copilot.expand(f[rows], width)
                yield GoldTokens(owner[rows], out.log_probs[rows], out.targets[rows], dense)
    finally:
        step.close()


def gold_measures(
    pieces: Iterable[GoldTokens], rows: int, adjusted: Callable[[GoldTokens], torch.Tensor] | None = None
) -> GoldMeasures:
    """Measures over all pieces. adjusted: log-probabilities of the model that is measured; None: the Pilot's own."""
    nll, tokens = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
    error = base = moved = 0.0
    for piece in pieces:
        log_probs = piece.log_probs if adjusted is None else adjusted(piece)
        gold = log_probs.gather(1, piece.targets[:, None])[:, 0]
        owner = piece.owner.cpu()
        nll.index_add_(0, owner, -gold.exp().clamp_min(NLL_FLOOR).log().cpu().double())
        tokens.index_add_(0, owner, torch.ones_like(owner))
        if adjusted is not None:
            p, q = piece.log_probs.exp(), log_probs.exp()
            base += squared_error(p, piece.targets)
            error += squared_error(q, piece.targets)
            moved += float((q - p).abs().sum() / 2)
    counts = tokens.tolist()
    shares = [total / count if count else None for total, count in zip(nll.tolist(), counts, strict=True)]
    if adjusted is None or not base:
        return GoldMeasures(shares, counts, None, None)
    return GoldMeasures(shares, counts, error / base, moved / sum(counts))


def squared_error(p: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum over rows of ||onehot(target) - p||^2 = 1 - 2 p(target) + ||p||^2."""
    return float((1.0 - 2.0 * p.gather(1, targets[:, None])[:, 0] + p.square().sum(-1)).sum())
