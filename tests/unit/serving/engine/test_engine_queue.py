"""The engine's queue and its clock: order of arrival, long prompts between the steps of others, and an engine that stalls."""

from __future__ import annotations

import queue
import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from tc_ray.models.decoding.batch import FusedBatch
from tc_ray.models.fusion import FusedModel
from tc_ray.serving.engine import engine as engine_module
from tc_ray.serving.engine import worker as worker_module
from tc_ray.serving.engine.contract import Finished, GenerationRequest, Piece
from tc_ray.serving.engine.engine import Engine
from tc_ray.serving.errors import RequestError
from tests.support.serving_samples import LIMITS, Collector, offline


def test_places_are_given_in_the_order_of_arrival(model: FusedModel, export: Path, prompt: tuple[int, ...]) -> None:
    """Also to one that needs much cache, though one behind it would fit at once."""
    batch = FusedBatch(model)

    def planned(*new: int) -> int:
        return batch.planned_bytes([batch.need(len(prompt), tokens, True) for tokens in new])

    # the caches grow by eight rows: beside eight of 600 tokens small ones fit and a large one does not
    early, large, small = [600] * 8, 1500, [5] * 3
    budget = planned(large)
    assert planned(*early, *small) <= budget < planned(*early, large)
    limits = LIMITS.model_copy(update={"max_running": 16, "max_waiting": 8, "cache_bytes": budget, "prefix_bytes": 0})
    engine = Engine(model, AutoTokenizer.from_pretrained(export / "pilot"), limits)
    begun: list[int] = []
    done = threading.Event()

    def deliver(number: int, event: object) -> None:
        if number not in begun:
            begun.append(number)
            if len(begun) == 1 + len(small):
                done.set()

    try:
        running = [Collector(engine, GenerationRequest(prompt, new)) for new in early]
        for one in running:
            one.next()
        engine.submit([GenerationRequest(prompt, new) for new in (large, *small)], deliver)
        time.sleep(0.1)
        assert engine.load().running == len(early) and not begun, "nothing was held back: the test shows nothing"
        for one in running:
            one.handle.cancel()
        assert done.wait(60)
        assert begun == [0, 1, 2, 3]
    finally:
        engine.close()


def test_a_long_prompt_is_computed_between_the_steps_of_others(
    engine: Engine, model: FusedModel, prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work of at most `prefill_tokens` at a time, so that streams under way are not held up by it. A token that attends to many
    is more work: the parts become smaller."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(worker_module, "_DELAY", 1e9)
    running = Collector(engine, GenerationRequest(prompt, 400))
    running.next()
    handle = model.pilot.register_forward_pre_hook(
        lambda _module, _args, given: calls.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        long = Collector(engine, GenerationRequest((prompt * 100)[: 10 * LIMITS.prefill_tokens + 1], 2))
        assert isinstance(long.next(), Piece)
    finally:
        handle.remove()
        running.handle.cancel()
        long.handle.cancel()
    parts = [at for at, (_, width) in enumerate(calls) if width > 1]
    config, weights = model.pilot.config, sum(one.numel() for one in model.pilot.parameters())
    computed = 0
    for at in parts:
        # flops of the part against those of `prefill_tokens` at the beginning of a text
        attention = 4 * config.num_hidden_layers * config.hidden_size * computed
        work = calls[at][1] * (2 * weights + attention) / (2 * weights)
        assert 0.8 * LIMITS.prefill_tokens < work <= LIMITS.prefill_tokens or at == parts[-1]
        computed += calls[at][1]
    assert calls[parts[0]][1] == LIMITS.prefill_tokens > 1.5 * calls[parts[-2]][1]
    assert all(calls[at + 1] == (1, 1) for at in parts[:-1]), "a step of the other one after each part"


def test_a_long_prompt_holds_up_others_by_two_of_their_steps(
    model: FusedModel, export: Path, prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step takes 1 s, a token of the prompt 0.05 s at its beginning and four times that far behind."""
    now_s, computed, widths = 0.0, 0, []

    def passes(_module: object, _arguments: object, given: dict[str, torch.Tensor]) -> None:
        nonlocal now_s, computed
        width = given["input_ids"].shape[1]
        if width > 1:
            widths.append(width)
            computed += width
        now_s += 1.0 if width == 1 else width * (0.05 if computed < 400 else 0.2)

    limits = LIMITS.model_copy(update={"prefill_tokens": 1000, "prefix_bytes": 0})
    engine = Engine(model, AutoTokenizer.from_pretrained(export / "pilot"), limits)
    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    handle = model.pilot.register_forward_pre_hook(passes, with_kwargs=True)
    try:
        running = Collector(engine, GenerationRequest(prompt, 400))
        for _ in range(3):
            running.next()
        long = Collector(engine, GenerationRequest((prompt * 200)[:1201], 2))
        assert isinstance(long.next(), Piece)
    finally:
        handle.remove()
        engine.close()
    # two steps have room for 40 tokens at the beginning, and then for ten
    assert set(widths[2:8]) <= {39, 40} and set(widths[-20:-1]) <= {9, 10}, widths


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one(engine: Engine, prompt: tuple[int, ...]) -> None:
    long = Collector(engine, GenerationRequest((prompt * 300)[:3000], 2))
    while engine.load().prompt_tokens == 0:
        time.sleep(0.001)
    short = [Collector(engine, GenerationRequest(prompt, 2)) for _ in range(2)]
    for one in short:
        assert isinstance(one.next(), Piece)
    assert long.nothing_more(), "the long prompt was done: the test shows nothing"
    assert isinstance(long.next(), Piece), "and the short ones do not hold it up for good"


def test_prompts_that_begin_alike_are_computed_once(engine: Engine, prompt: tuple[int, ...]) -> None:
    """As the choices of one request: beside each other they would be computed as often as there are choices."""
    given = (prompt * 40)[:400]
    many = [Collector(engine, GenerationRequest(given, 2, temperature=1.0, seed=seed)) for seed in range(4)]
    for one in many:
        one.all()
    load = engine.load()
    assert load.prompt_tokens < 1.2 * len(given) and load.cached_tokens > 2.8 * len(given)


def test_prompts_of_like_length_are_computed_in_one_pass(
    engine: Engine, model: FusedModel, prompt: tuple[int, ...]
) -> None:
    """Those that wait in a round, within its work; a prompt of another length, or without the Copilot, is computed by itself."""
    shapes: list[tuple[int, int]] = []
    lengths = (8, 9, 8, 20, 8)
    requests = [GenerationRequest((*range(60 + 9 * i, 60 + 9 * i + n),), 6) for i, n in enumerate(lengths)]
    requests[4] = replace(requests[4], lam=0.0)
    handle = model.pilot.register_forward_pre_hook(
        lambda _module, _args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        found = many(engine, requests)
    finally:
        handle.remove()
    # 32 tokens a round: half of them for the oldest, and what is like it; then the shortest ones. Now others run, and the one of
    # nine tokens is not begun with the eight that are left
    assert [shape for shape in shapes if shape[1] > 1][:3] == [(2, 8), (1, 8), (1, 9)]
    for request, tokens in zip(requests, found, strict=True):
        assert tokens == offline(model, request.prompt_ids, max_new_tokens=6, do_sample=False, lam=request.lam)


def test_no_prompt_is_computed_twice_in_a_round(model: FusedModel, export: Path) -> None:
    """The second is too short for the first one's pass, but like the third, which has entered the batch with the first."""
    limits = LIMITS.model_copy(update={"prefill_tokens": 300, "prefix_bytes": 0})
    engine = Engine(model, AutoTokenizer.from_pretrained(export / "pilot"), limits)
    dice = random.Random(4)
    requests = [GenerationRequest(tuple(dice.choices(range(3, 260), k=n)), 6) for n in (48, 44, 46)]
    try:
        found = many(engine, requests)
        assert engine.load().prompt_tokens == 48 + 44 + 46
    finally:
        engine.close()
    for request, tokens in zip(requests, found, strict=True):
        assert tokens == offline(model, request.prompt_ids, max_new_tokens=6, do_sample=False)


def many(engine: Engine, requests: list[GenerationRequest]) -> list[list[int] | RequestError]:
    """Tokens of requests that are submitted at once, or what they failed by."""
    events: queue.Queue[tuple[int, object]] = queue.Queue()
    engine.submit(requests, lambda number, event: events.put((number, event)))
    tokens: list[list[int]] = [[] for _ in requests]
    ended: dict[int, RequestError] = {}
    left = len(requests)
    while left:
        number, event = events.get(timeout=60)
        if isinstance(event, Piece):
            tokens[number] += [token.id for token in event.tokens]
        else:
            left -= 1
            if isinstance(event, RequestError):
                ended[number] = event
    return [ended.get(number, given) for number, given in enumerate(tokens)]


def test_a_pass_over_several_prompts_that_fails_fails_these_only(engine: Engine, prompt: tuple[int, ...]) -> None:
    running = Collector(engine, GenerationRequest(prompt, 200))
    running.next()
    found = many(engine, [GenerationRequest(ids, 4) for ids in ((9,) * 8, (10**6,) * 8, tuple(range(60, 75)))])
    assert [isinstance(one, RequestError) for one in found] == [True, True, False]
    assert isinstance(running.all()[1], Finished)


def test_a_busy_engine_that_computes_nothing_is_unhealthy(
    engine: Engine, model: FusedModel, prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, stuck = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        stuck.set()
        go_on.wait(30)

    monkeypatch.setattr(engine_module, "STALL_S", 0.3)
    handle = model.pilot.register_forward_pre_hook(hang)
    try:
        waiting = Collector(engine, GenerationRequest(prompt, 4))
        assert stuck.wait(10)
        assert engine.unhealthy() is None, "it has only begun"
        time.sleep(0.5)
        reason = engine.unhealthy()
        assert reason is not None and reason.startswith("the engine has given no token for ")
    finally:
        handle.remove()
        go_on.set()
    assert isinstance(waiting.all()[1], Finished)
    assert engine.unhealthy() is None
