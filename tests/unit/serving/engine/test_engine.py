"""The engine: same tokens as offline `generate` whatever else runs, stop strings, cancellation, budgets, honest ends."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tc_ray.models.fusion import FusedModel
from tc_ray.serving.engine.contract import Finished, GenerationRequest, Piece, Scored, ScoreRequest
from tc_ray.serving.engine.engine import Engine
from tc_ray.serving.errors import RequestError
from tests.support.serving_samples import LIMITS, Collector, offline


def decoded(export: Path, ids: list[int]) -> str:
    return str(AutoTokenizer.from_pretrained(export / "pilot").decode(ids, skip_special_tokens=True))


def test_greedy_equals_offline(engine: Engine, model: FusedModel, export: Path, prompt: tuple[int, ...]) -> None:
    collector = Collector(engine, GenerationRequest(prompt, 40))
    pieces, end = collector.all()
    expected = offline(model, prompt, max_new_tokens=40, do_sample=False)
    assert [token.id for token in collector.tokens] == expected
    assert "".join(pieces) == decoded(export, expected)
    assert end == Finished("length", len(prompt), 40)
    assert len(pieces) > 5


def test_lam_of_the_request(engine: Engine, model: FusedModel, export: Path, prompt: tuple[int, ...]) -> None:
    texts = {lam: Collector(engine, GenerationRequest(prompt, 24, lam=lam)).text() for lam in (0.0, 0.5, 3.0, None)}
    pilot = AutoModelForCausalLM.from_pretrained(export / "pilot")
    assert texts[0.0] == decoded(export, offline(pilot, prompt, max_new_tokens=24, do_sample=False))
    assert texts[0.5] == texts[None] == decoded(export, offline(model, prompt, max_new_tokens=24, do_sample=False))
    assert texts[3.0] == decoded(export, offline(model, prompt, max_new_tokens=24, do_sample=False, lam=3.0))
    assert len({texts[0.0], texts[0.5], texts[3.0]}) == 3


SAMPLED = (
    {"temperature": 0.8, "top_p": 0.9, "seed": 11},
    {"temperature": 1.0, "seed": 12, "lam": 0.0},
    {"temperature": 0.7, "top_k": 5, "seed": -3, "lam": 2.0},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.5, "seed": 2**62},
)


def test_tokens_do_not_depend_on_what_else_is_in_the_batch(
    engine: Engine, model: FusedModel, prompt: tuple[int, ...]
) -> None:
    """Greedy and seeded requests of unlike lengths and lam, put in at once and late, against `generate` alone."""
    requests = [GenerationRequest(prompt[: 3 + i], 20 + 7 * i, lam=lam) for i, lam in enumerate((0.0, 0.5, 1.0, 0.0))]
    requests += [GenerationRequest(prompt, 25, **options) for options in SAMPLED]  # type: ignore[arg-type]
    collectors = [Collector(engine, request) for request in requests[:5]]
    collectors[0].next()
    collectors += [Collector(engine, request) for request in requests[5:]]
    for collector in collectors:  # the engine is idle when `generate` runs on the same model
        collector.all()
    for collector, request in zip(collectors, requests, strict=True):
        options: dict[str, object] = {"max_new_tokens": request.max_new_tokens, "lam": request.lam, "do_sample": False}
        if request.temperature:
            torch.manual_seed(request.seed or 0)
            options |= {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p}
            options["top_k"] = request.top_k or 0
        assert [token.id for token in collector.tokens] == offline(model, request.prompt_ids, **options), request


def test_seed_does_not_pin_later_requests(engine: Engine, prompt: tuple[int, ...]) -> None:
    texts = []
    for _ in range(2):
        Collector(engine, GenerationRequest(prompt, 4, temperature=1.0, seed=1)).all()
        texts.append(Collector(engine, GenerationRequest(prompt, 24, temperature=1.0)).text())
    assert texts[0] != texts[1]


def test_logprobs_and_explanation_equal_offline(engine: Engine, model: FusedModel, prompt: tuple[int, ...]) -> None:
    collector = Collector(engine, GenerationRequest(prompt, 12, lam=1.0, logprobs=3, explain=True))
    beside = Collector(engine, GenerationRequest(prompt[:2], 30))
    collector.all()
    beside.all()
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=12, do_sample=False, lam=1.0, logprobs=True, explain=True)
    found, tops = torch.tensor([token.logprob for token in collector.tokens]), [t.top for t in collector.tokens]
    torch.testing.assert_close(found, out.fused_logprobs[0], atol=1e-4, rtol=1e-4)
    explanation = out.explanation
    for at, token in enumerate(collector.tokens):
        assert len(tops[at]) == 3 and tops[at][0][0] == token.id  # greedy
        explained = token.explained
        assert explained is not None
        assert explained.pilot_id == explanation.pilot_top.ids[0, at, 0]
        assert explained.pilot == pytest.approx(float(explanation.chosen.pilot[0, at, 0]), abs=1e-4)
        assert explained.fused == pytest.approx(float(explanation.chosen.fused[0, at, 0]), abs=1e-4)
        assert abs(explained.fused - explained.pilot) - 1e-6 <= explained.moved <= 1
    assert max(token.explained.moved for token in collector.tokens if token.explained) > 0.1
    assert all(token.logprob is None and token.explained is None for token in beside.tokens)


def test_scores_equal_offline_beside_a_generation(engine: Engine, model: FusedModel, prompt: tuple[int, ...]) -> None:
    ids = prompt + tuple(offline(model, prompt, max_new_tokens=40, do_sample=False))
    running = Collector(engine, GenerationRequest(prompt, 200))
    scored = Collector(engine, ScoreRequest(ids, len(prompt), lam=0.7, top=2)).all()[1]
    assert isinstance(scored, Scored)
    assert isinstance(running.all()[1], Finished)
    expected = model.score(torch.tensor([ids]), prompt_length=len(prompt), lam=0.7)
    torch.testing.assert_close(torch.tensor([t.pilot for t in scored.tokens]), expected.pilot_logprobs[0])
    torch.testing.assert_close(torch.tensor([t.fused for t in scored.tokens]), expected.fused_logprobs[0])
    assert [token.id for token in scored.tokens] == list(ids[len(prompt) :])
    assert all(len(token.top) == 2 and token.top[0][1] >= token.fused - 1e-5 for token in scored.tokens)


def test_long_texts_are_scored_in_parts_and_one_at_a_time(
    engine: Engine, model: FusedModel, prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = (prompt * 20)[:100]
    parts: list[int] = []
    handle = model.pilot.model.register_forward_pre_hook(
        lambda _, __, given: parts.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        collectors = [Collector(engine, ScoreRequest(ids[:length], 5, lam=0.7)) for length in (100, 50)]
        found = [collector.all()[1] for collector in collectors]
    finally:
        handle.remove()
    assert parts == [32, 32, 32, 3, 32, 17]  # the second begins when the first has ended
    for length, scored in zip((100, 50), found, strict=True):
        assert isinstance(scored, Scored)
        expected = model.score(torch.tensor([ids[:length]]), prompt_length=5, lam=0.7)
        # fp32 sums in another order where the cache cuts the sequence
        for name in ("pilot", "fused"):
            given = torch.tensor([getattr(token, name) for token in scored.tokens])
            torch.testing.assert_close(given, getattr(expected, f"{name}_logprobs")[0], atol=1e-4, rtol=1e-4)


def test_stop_string(engine: Engine, prompt: tuple[int, ...]) -> None:
    full = Collector(engine, GenerationRequest(prompt, 60)).text()
    stop = full[len(full) // 2 : len(full) // 2 + 3]
    pieces, end = Collector(engine, GenerationRequest(prompt, 60, stops=(stop,))).all()
    assert "".join(pieces) == full[: full.index(stop)]
    assert isinstance(end, Finished)
    assert end.finish_reason == "stop"
    assert end.completion_tokens < 60


def test_end_token(export: Path, prompt: tuple[int, ...]) -> None:
    model = FusedModel.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export / "pilot")
    out = offline(model, prompt, max_new_tokens=6, do_sample=False)
    model.generation_config.eos_token_id = out[3]
    engine = Engine(model, tokenizer)
    try:
        pieces, end = Collector(engine, GenerationRequest(prompt, 60)).all()
    finally:
        engine.close()
    used = out.index(out[3])
    assert end == Finished("stop", len(prompt), used + 1)
    assert "".join(pieces) == tokenizer.decode(out[:used])


def test_prompts_begin_with_what_was_computed_before(engine: Engine, prompt: tuple[int, ...]) -> None:
    long = prompt * 8
    first, cached = cached_of(engine, GenerationRequest(long, 12))
    assert cached == 0
    again, cached = cached_of(engine, GenerationRequest(long, 12))
    assert cached == len(long) - 1 and again == first
    assert cached_of(engine, GenerationRequest((*long[:40], *prompt[::-1]), 12))[1] >= 40


def cached_of(engine: Engine, request: GenerationRequest) -> tuple[list[int], int]:
    """Tokens of a request, and how many tokens of its prompt were reused."""
    before = engine.load().cached_tokens
    collector = Collector(engine, request)
    assert isinstance(collector.all()[1], Finished)
    return [token.id for token in collector.tokens], engine.load().cached_tokens - before


def test_prompts_of_others_are_not_begun_with(engine: Engine, prompt: tuple[int, ...]) -> None:
    """A quick answer would show what the others asked."""
    owners = (b"a", b"b", b"", b"a")
    cached = [cached_of(engine, GenerationRequest(prompt * 8, 2, owner=owner))[1] for owner in owners]
    assert cached == [0, 0, 0, len(prompt) * 8 - 1]


def test_cancelled_within_one_token(engine: Engine, model: FusedModel, prompt: tuple[int, ...]) -> None:
    forwards: list[int] = []
    cancelled_at: list[int] = []
    ready, ended = threading.Event(), threading.Event()
    hook = model.pilot.register_forward_pre_hook(lambda *_: forwards.append(1))

    def deliver(_: int, event: object) -> None:
        ready.wait()
        if isinstance(event, Piece) and len(forwards) > 5 and not cancelled_at:
            cancelled_at.append(len(forwards))
            handle.cancel()
            ended.set()

    try:
        [handle] = engine.submit([GenerationRequest(prompt, 3000)], deliver)
        ready.set()
        assert ended.wait(30)
        while engine.load().running:
            time.sleep(0.01)
        assert len(forwards) == cancelled_at[0]
    finally:
        hook.remove()
    assert engine.unhealthy() is None


def test_what_waits_is_bounded_and_can_be_cancelled(engine: Engine, prompt: tuple[int, ...]) -> None:
    running = [Collector(engine, GenerationRequest(prompt, 3000)) for _ in range(6)]
    for collector in running:
        collector.next()
    waiting = [Collector(engine, GenerationRequest(prompt, 4)) for _ in range(4)]
    assert engine.free_places() == 0
    with pytest.raises(RequestError) as refused:
        Collector(engine, GenerationRequest(prompt, 4))
    assert refused.value.status == 429
    assert refused.value.headers == {"Retry-After": "1"}
    assert (engine.load().running, engine.load().waiting) == (6, 4)
    waiting[0].handle.cancel()
    running[0].handle.cancel()
    for collector in waiting[1:]:
        assert isinstance(collector.all()[1], Finished)
    assert waiting[0].nothing_more()
    for collector in running:
        collector.handle.cancel()


def test_the_place_of_one_that_has_ended_is_free_when_its_client_hears_of_it(
    model: FusedModel, export: Path, prompt: tuple[int, ...]
) -> None:
    """Its next request may be there before the batch is rid of the row: it must not be refused for that."""
    engine = Engine(
        model,
        AutoTokenizer.from_pretrained(export / "pilot"),
        LIMITS.model_copy(update={"max_running": 1, "max_waiting": 0}),
    )
    ends: list[object] = []
    done = threading.Event()

    def again(_: int, event: object) -> None:
        if isinstance(event, Piece):
            return
        ends.append(event)
        if len(ends) == 4:
            done.set()
            return
        try:
            engine.submit([GenerationRequest(prompt, len(ends))], again)
        except RequestError as error:
            ends.append(error)
            done.set()

    try:
        engine.submit([GenerationRequest(prompt, 4)], again)
        assert done.wait(30)
        assert [type(end) for end in ends] == [Finished] * 4, ends
    finally:
        engine.close()


def test_several_are_admitted_together_or_not_at_all(engine: Engine, prompt: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="needs 11 places, and the server has 10") as never:
        engine.submit([GenerationRequest(prompt, 4)] * 11, lambda *_: None)
    assert never.value.status == 400
    assert engine.load().waiting + engine.load().running == 0
    events: list[int] = []
    done = threading.Event()

    def deliver(number: int, event: object) -> None:
        if isinstance(event, Finished):
            events.append(number)
            if len(events) == 10:
                done.set()

    engine.submit([GenerationRequest(prompt, 4)] * 10, deliver)
    assert done.wait(30) and sorted(events) == list(range(10))


def test_caches_stay_within_their_budget(model: FusedModel, export: Path, prompt: tuple[int, ...]) -> None:
    budget = 3 * 2**20
    limits = LIMITS.model_copy(update={"cache_bytes": budget, "max_running": 64, "max_waiting": 64, "prefix_bytes": 0})
    engine = Engine(model, AutoTokenizer.from_pretrained(export / "pilot"), limits)
    try:
        with pytest.raises(RequestError) as refused:
            Collector(engine, GenerationRequest(prompt, 4000))
        assert (refused.value.status, refused.value.param) == (400, "max_tokens")
        collectors = [Collector(engine, GenerationRequest(prompt, 60 + 40 * (i % 3))) for i in range(40)]
        highest = most = 0
        while (load := engine.load()).running + load.waiting:
            highest, most = max(highest, load.cache_bytes), max(most, load.running)
            time.sleep(0.002)  # the engine needs Python's lock too
        for collector in collectors:
            assert isinstance(collector.all()[1], Finished)
        assert budget / 4 < highest <= budget
        assert 4 < most < 40
    finally:
        engine.close()
