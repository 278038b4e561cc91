"""A scoring under way: log-probabilities of a given text under Pilot and fused model, computed part by part between steps.

Invariant: the given token has one log-probability wherever it stands, also among the likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from tc_ray.models.fusion import FusedModel
from tc_ray.models.fusion.scoring import Completions, log_probs_of, teacher_forced_rows
from tc_ray.models.weights import NotFiniteError
from tc_ray.serving.engine.contract import Scored, ScoredToken, ScoreRequest

_SCORED_ROWS = 16
"""Rows scored between two steps of the batch."""


def scored(
    model: FusedModel, request: ScoreRequest, positions: int, encode: Callable[[tuple[int, ...], bytes], torch.Tensor]
) -> Iterator[Scored | None]:
    """Yields None after each part of the work, and the scores of `request` at the end.

    positions: of the Pilot's forward pass that are computed in one part; an encoder-decoder's is one part. encode: gives the
    encoder's output of an owner's source. Raises NotFiniteError for a score that is NaN.
    """
    lam = float(model.default_lam if request.lam is None else request.lam)
    texts, question = [(request.ids, request.start, lam)], None
    if model.family.encoder_decoder:
        question = encode(request.ids[: request.start], request.owner)
        texts = [((model.pilot.config.decoder_start_token_id, *request.ids[request.start :]), 1, lam)]
    if request.before and request.start > 1:
        texts.insert(0, (request.ids[: request.start], 1, 0.0))
    tokens: list[ScoredToken] = []
    for ids, start, weight in texts:
        for more in _parts(model, ids, start, weight, request.top, positions, question):
            tokens += more
            yield None
    yield Scored(tuple(tokens))


def _parts(
    model: FusedModel,
    ids: tuple[int, ...],
    start: int,
    lam: float,
    count: int,
    positions: int,
    question: torch.Tensor | None,
) -> Iterator[list[ScoredToken]]:
    """The scores of `ids[start:]`, some at a time; none after a part of the Pilot's pass."""
    device = model.get_input_embeddings().weight.device
    columns = torch.tensor([ids], device=device)
    given = Completions(
        columns,
        torch.ones_like(columns, dtype=torch.bool),
        start,
        torch.tensor([len(ids) - start], device=device),
        torch.tensor([lam], dtype=torch.float32, device=device),
        question,
        None if question is None else question.new_ones(question.shape[:2], dtype=torch.bool),
    )
    part = positions if question is None else None
    for rows in teacher_forced_rows(model, given, rows_at_a_time=_SCORED_ROWS, positions_at_a_time=part):
        chosen = given.tokens[:, rows.span]
        pilot, fused = (log_probs_of(logits, chosen)[0].tolist() for logits in (rows.pilot, rows.fused))
        if any(map(math.isnan, (*pilot, *fused))):
            raise NotFiniteError("scores that are not finite")
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(pilot)
        if count:
            values, places = rows.fused[0].topk(min(count, rows.fused.shape[-1]))
            values -= rows.fused.logsumexp(2)[0, :, None]  # as `log_probs_of`: the given token has one value everywhere
            pairs = zip(places.tolist(), values.tolist(), strict=True)
            tops = [tuple(zip(at, value, strict=True)) for at, value in pairs]
        yield [ScoredToken(*one) for one in zip(chosen[0].tolist(), pilot, fused, tops, strict=True)]
