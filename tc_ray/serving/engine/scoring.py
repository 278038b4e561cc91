"""Scoring of given text beside a running batch, some positions and rows at a time. Used by the engine's thread alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from tc_ray.models.finite import NotFiniteError
from tc_ray.models.fusion import FusedModel
from tc_ray.models.fusion.scoring import Completions, log_probs_of, teacher_forced_rows
from tc_ray.serving.engine.contract import Scored, ScoredToken, ScoreRequest

_ROWS = 16
"""Rows scored between two steps of the batch."""


def scored(model: FusedModel, request: ScoreRequest, positions: int) -> Iterator[Scored | None]:
    """Yields None after each part of the work, and the scores of `request` at the end.

    positions: of the Pilot's forward pass that are computed in one part. Raises NotFiniteError for a score that is NaN.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([request.ids], device=device)
    lam = model.default_lam if request.lam is None else request.lam
    given = Completions(
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        request.start,
        torch.tensor([len(request.ids) - request.start], device=device),
        torch.tensor([lam], dtype=torch.float32, device=device),
    )
    tokens: list[ScoredToken] = []
    for rows in teacher_forced_rows(model, given, rows_at_a_time=_ROWS, positions_at_a_time=positions):
        chosen = given.tokens[:, rows.span]
        pilot, fused = (log_probs_of(logits, chosen)[0].tolist() for logits in (rows.pilot, rows.fused))
        if any(map(math.isnan, (*pilot, *fused))):
            raise NotFiniteError("scores that are not finite")
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(pilot)
        if request.top:
            values, places = rows.fused[0].log_softmax(-1).topk(min(request.top, rows.fused.shape[-1]))
            pairs = zip(places.tolist(), values.tolist(), strict=True)
            tops = [tuple(zip(at, value, strict=True)) for at, value in pairs]
        tokens += [ScoredToken(*one) for one in zip(chosen[0].tolist(), pilot, fused, tops, strict=True)]
        yield None
    yield Scored(tuple(tokens))
