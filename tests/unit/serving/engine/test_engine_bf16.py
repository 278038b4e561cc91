"""Serving in bf16: half the bytes, and what may differ from offline decoding of the same model in bf16.

A product in another batch is added in another order, and bf16 keeps eight bits of it. What holds (docs/serving.md): given the text
before it, a token is offline decoding's where the two likeliest are further apart than TOLERANCE of the largest logit, and the
log-probability of a token that is not nearly impossible agrees to that. Measured with these weights: up to a third of it (0.13 of 0.37).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tc_ray.models.decoding.batch import FusedBatch
from tc_ray.models.fusion import FusedModel
from tc_ray.models.fusion.scoring import Completions, teacher_forced_rows
from tc_ray.serving.deploy.replica import Replica
from tc_ray.serving.engine.contract import GenerationRequest, Scored, ScoreRequest
from tc_ray.serving.engine.engine import Engine
from tests.support.serving_client import settings_of
from tests.support.serving_samples import LIMITS, Collector, failure, offline

TOLERANCE = 2**-5
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def half(export: Path) -> FusedModel:
    """The exported model in bf16."""
    return FusedModel.from_pretrained(export, dtype=BF16)


@pytest.fixture
def half_engine(half: FusedModel, export: Path) -> Iterator[Engine]:
    engine = Engine(half, AutoTokenizer.from_pretrained(export / "pilot"), LIMITS)
    yield engine
    engine.close()


def given(model: FusedModel, prompt: tuple[int, ...], tokens: list[int], lam: float) -> tuple[torch.Tensor, float]:
    """Offline: log-probabilities [n, V] of each token of a text after a prompt, and the size of the Pilot's largest logit."""
    ids = torch.tensor([[*prompt, *tokens]])
    asked = Completions(
        ids, torch.ones_like(ids, dtype=torch.bool), len(prompt), torch.tensor([len(tokens)]), torch.tensor([lam])
    )
    rows = list(teacher_forced_rows(model, asked))
    largest = max(float(row.pilot.abs().max()) for row in rows)
    return torch.cat([row.fused[0].log_softmax(-1) for row in rows]), largest


def test_weights_and_caches_are_half_as_large(export: Path, prompt: tuple[int, ...]) -> None:
    replicas = {name: Replica(settings_of(export, dtype=name)) for name in ("fp32", "bf16")}
    engines = {name: replica.registry.find("demo").engine for name, replica in replicas.items()}
    try:
        planned = []
        for name, engine in engines.items():
            assert {one.dtype for one in engine.model.parameters()} == {BF16 if name == "bf16" else torch.float32}
            assert engine.unhealthy() is None
            collector = Collector(engine, GenerationRequest(prompt, 60))
            collector.next(), collector.next()  # by the second token it is in the batch
            batch = FusedBatch(engine.model)
            planned.append(batch.planned_bytes([batch.need(len(prompt), 60, True)]))
            assert engine.load().cache_bytes == planned[-1] > 0
            collector.all()
        assert planned[0] == 2 * planned[1]
    finally:
        for engine in engines.values():
            engine.close()


def test_tokens_and_log_probabilities_are_those_of_offline_decoding_in_bf16(
    half_engine: Engine, half: FusedModel, prompt: tuple[int, ...]
) -> None:
    requests = [
        GenerationRequest(prompt[: 3 + i], 30 + 7 * i, lam=lam, logprobs=0)
        for i, lam in enumerate((0.0, 0.5, 1.0, 0.0))
    ]
    collectors = [Collector(half_engine, request) for request in requests]
    for collector in collectors:
        collector.all()
    clear = 0
    for request, collector in zip(requests, collectors, strict=True):
        tokens = [token.id for token in collector.tokens]
        expected, largest = given(half, request.prompt_ids, tokens, float(request.lam or 0))
        best = expected.topk(2, 1)
        apart = best.values[:, 0] - best.values[:, 1] > TOLERANCE * largest
        assert torch.equal(torch.tensor(tokens)[apart], best.indices[:, 0][apart])
        found = torch.tensor([token.logprob for token in collector.tokens])
        chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(found, chosen, atol=TOLERANCE * largest, rtol=0)
        decoded = offline(half, request.prompt_ids, max_new_tokens=len(tokens), do_sample=False, lam=request.lam)
        first = next((place for place, is_apart in enumerate(apart.tolist()) if not is_apart), len(tokens))
        assert tokens[:first] == decoded[:first], "two texts part where two tokens are nearly equal, not before"
        clear += int(apart.sum())
    assert clear > 0.3 * sum(request.max_new_tokens for request in requests), "the test shows little"


def test_scores_are_those_of_offline_scoring_in_bf16(
    half_engine: Engine, half: FusedModel, prompt: tuple[int, ...]
) -> None:
    ids = tuple(range(40, 140))
    scored = Collector(half_engine, ScoreRequest(ids, 9, lam=0.7)).all()[1]
    assert isinstance(scored, Scored)
    expected = half.score(torch.tensor([ids]), prompt_length=9, lam=0.7)
    _, largest = given(half, ids[:9], list(ids[9:]), 0.7)
    pilot = torch.tensor([token.pilot for token in scored.tokens])
    torch.testing.assert_close(pilot, expected.pilot_logprobs[0], atol=TOLERANCE * largest, rtol=0)
    # the fused probability of a token may be 0 on one side only: compared as probabilities
    fused = torch.tensor([token.fused for token in scored.tokens]).exp()
    torch.testing.assert_close(fused, expected.fused_logprobs[0].exp(), atol=TOLERANCE, rtol=0)


def test_what_is_not_finite_fails_in_bf16_too(half_engine: Engine, half: FusedModel, prompt: tuple[int, ...]) -> None:
    weight = half.copilot.output.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        for request in (GenerationRequest(prompt, 4, lam=1.0), ScoreRequest(prompt, 1, lam=1.0)):
            assert failure(Collector(half_engine, request).all()[1])[1] == "generation_failed"
    finally:
        with torch.no_grad():
            weight.copy_(before)
