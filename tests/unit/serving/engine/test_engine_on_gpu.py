"""The engine on a CUDA device: same tokens, scores and log-probabilities as offline `generate` and `score` there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tc_ray.models.fusion import FusedModel
from tc_ray.serving.engine.contract import GenerationRequest, Scored, ScoreRequest
from tc_ray.serving.engine.engine import Engine
from tests.support.serving_samples import Collector

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(scope="module")
def model(export: Path) -> FusedModel:
    model = FusedModel.from_pretrained(export)
    return FusedModel.join(model.pilot.to(DEVICE), model.copilot.to(DEVICE), lam=0.5)


def offline(model: FusedModel, prompt: tuple[int, ...], **options: object) -> list[int]:
    ids = torch.tensor([prompt], device=DEVICE)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return [int(token) for token in out[0, len(prompt) :]]


def test_tokens_do_not_depend_on_what_else_is_in_the_batch(
    engine: Engine, model: FusedModel, prompt: tuple[int, ...]
) -> None:
    requests = [GenerationRequest(prompt[: 3 + i], 20 + 7 * i, lam=lam) for i, lam in enumerate((0.0, 0.5, 1.0, 0.0))]
    requests += [GenerationRequest(prompt, 25, temperature=0.8, top_p=0.9, seed=11)]
    collectors = [Collector(engine, request) for request in requests[:3]]
    collectors[0].next()
    collectors += [Collector(engine, request) for request in requests[3:]]
    for collector in collectors:
        collector.all()
    for collector, request in zip(collectors, requests, strict=True):
        options: dict[str, object] = {"max_new_tokens": request.max_new_tokens, "lam": request.lam, "do_sample": False}
        if request.temperature:
            torch.manual_seed(request.seed or 0)
            options |= {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
        assert [token.id for token in collector.tokens] == offline(model, request.prompt_ids, **options), request


def test_scores_equal_offline_beside_a_generation(engine: Engine, model: FusedModel, prompt: tuple[int, ...]) -> None:
    ids = prompt + tuple(offline(model, prompt, max_new_tokens=40, do_sample=False))
    running = Collector(engine, GenerationRequest(prompt, 200))
    scored = Collector(engine, ScoreRequest(ids, len(prompt), lam=0.7, top=2)).all()[1]
    running.all()
    assert isinstance(scored, Scored)
    expected = model.score(torch.tensor([ids], device=DEVICE), prompt_length=len(prompt), lam=0.7)
    for name in ("pilot", "fused"):
        given = torch.tensor([getattr(token, name) for token in scored.tokens])
        torch.testing.assert_close(given, getattr(expected, f"{name}_logprobs")[0].cpu(), atol=1e-4, rtol=1e-4)


def test_a_cancelled_request_gives_its_device_memory_back(engine: Engine, prompt: tuple[int, ...]) -> None:
    held = []
    for _ in range(4):
        for _ in range(20):
            collector = Collector(engine, GenerationRequest(prompt, 400))
            collector.next()
            collector.handle.cancel()
        Collector(engine, GenerationRequest(prompt, 4)).all()  # after the last one's cache has gone
        held.append(torch.cuda.memory_allocated())
    print(held)
    assert held[-1] - held[1] < 2**18, held  # after the first the batch keeps its size
