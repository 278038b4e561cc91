"""The engine when things go wrong: deadlines, failed prompts and steps, a broken Copilot, its end, its death."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tc_ray.models.decoding.batch import FusedBatch
from tc_ray.models.fusion import FusedModel
from tc_ray.models.weights import NotFiniteError
from tc_ray.serving.engine.contract import Finished, GenerationRequest, ScoreRequest
from tc_ray.serving.engine.engine import FAILURES, Engine, Turns
from tc_ray.serving.engine.sequence import Sequence
from tc_ray.serving.errors import RequestError
from tests.support.serving_samples import LIMITS, Collector, failure, offline


def generation_failed(kind: str) -> tuple[str, str, int]:
    return f"Generation failed in the server ({kind}).", "generation_failed", 500


def test_deadline(engine: Engine, prompt: tuple[int, ...]) -> None:
    collector = Collector(engine, GenerationRequest(prompt, 3000, deadline_s=time.monotonic() + 0.3))
    pieces, end = collector.all()
    assert pieces
    assert failure(end) == ("The request was not done by its deadline.", "deadline_exceeded", 504)
    late = Collector(engine, ScoreRequest(prompt, 1, deadline_s=time.monotonic() - 1))
    assert failure(late.all()[1]) == failure(end)


def test_a_failed_prompt_fails_alone(engine: Engine, prompt: tuple[int, ...]) -> None:
    beside = Collector(engine, GenerationRequest(prompt, 200))
    beside.next()
    pieces, end = Collector(engine, GenerationRequest((10**6,), 4)).all()
    assert pieces == []
    assert failure(end) == generation_failed("IndexError")
    assert isinstance(beside.all()[1], Finished)


def test_failed_step_ends_those_in_it_and_the_next_begin_anew(
    model: FusedModel, export: Path, prompt: tuple[int, ...]
) -> None:
    engine = Engine(model, AutoTokenizer.from_pretrained(export / "pilot"), LIMITS)
    steps: list[int] = []

    def break_once(*_: object) -> None:
        steps.append(1)
        if len(steps) == 5:
            raise RuntimeError("out of memory")

    handle = model.pilot.register_forward_pre_hook(break_once)
    try:
        collectors = [Collector(engine, GenerationRequest(prompt, 3000)) for _ in range(2)]
        for collector in collectors:
            assert failure(collector.all()[1]) == generation_failed("RuntimeError")
        assert isinstance(Collector(engine, GenerationRequest(prompt, 4)).all()[1], Finished)
        assert engine.unhealthy() is None
    finally:
        handle.remove()
        engine.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_their_own_request_and_the_health_check(
    model: FusedModel, export: Path, prompt: tuple[int, ...], value: float
) -> None:
    """Fault 5, weights that turn bad: requests with the Copilot fail, the Pilot's own request beside them continues."""
    engine = Engine(model, AutoTokenizer.from_pretrained(export / "pilot"), LIMITS)
    weight = model.copilot.output.weight
    before = weight.detach().clone()
    try:
        assert engine.unhealthy() is None
        alone = Collector(engine, GenerationRequest(prompt, 400, lam=0.0))
        corrected = Collector(engine, GenerationRequest(prompt, 3000, lam=1.0))
        alone.next(), corrected.next()
        with torch.no_grad():
            weight.fill_(value)
        failed = generation_failed("NotFiniteError")
        assert failure(corrected.all()[1]) == failed
        assert failure(Collector(engine, GenerationRequest(prompt, 4, lam=1.0)).all()[1]) == failed
        assert failure(Collector(engine, ScoreRequest(prompt, 1, lam=1.0)).all()[1]) == failed
        assert isinstance(alone.all()[1], Finished)
        while engine._busy():  # a finished sequence may still be in the batch, and a busy engine is not probed
            time.sleep(0.01)
        assert engine.unhealthy() == failed[0]
        with torch.no_grad():
            weight.copy_(before)
        assert engine.unhealthy() is None
    finally:
        with torch.no_grad():
            weight.copy_(before)
        engine.close()


def test_a_request_that_leaves_no_token_fails_alone(
    engine: Engine, model: FusedModel, prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens end the text, and none may yet: greedy decoding gave token 0, drawing failed all in the batch."""
    forbidden = {"end_ids": frozenset(range(model.vocab_size)), "min_new_tokens": 3}
    for temperature in (0.0, 1.0):
        request = GenerationRequest(prompt, 8, temperature=temperature, **forbidden)
        assert failure(Collector(engine, request).all()[1]) == generation_failed("NotFiniteError")
    choose = Sequence.choose

    def late(self: Sequence, logits: torch.Tensor, likeliest: int) -> int:
        if self.request.min_new_tokens and self._count == 2:
            raise NotFiniteError("no token is left")
        return choose(self, logits, likeliest)

    monkeypatch.setattr(Sequence, "choose", late)
    other, fails = (Collector(engine, GenerationRequest(prompt, 40, min_new_tokens=least)) for least in (0, 1))
    assert failure(fails.all()[1]) == generation_failed("NotFiniteError")
    assert isinstance(other.all()[1], Finished)


def test_a_prompt_that_was_spoilt_once_spoils_no_later_request(
    model: FusedModel, export: Path, prompt: tuple[int, ...]
) -> None:
    """Fault 5: keys and values of a prompt whose logits were not finite are not kept for the next one that begins like it."""
    engine = Engine(
        model, AutoTokenizer.from_pretrained(export / "pilot"), LIMITS.model_copy(update={"prefix_bytes": 1 << 24})
    )
    asked = GenerationRequest(prompt * (1 + 64 // len(prompt)), 4, lam=0.0)
    weight = next(p for name, p in model.pilot.named_parameters() if "layers.0" in name)
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        assert failure(Collector(engine, asked).all()[1]) == generation_failed("NotFiniteError")
        with torch.no_grad():
            weight.copy_(before)
        assert isinstance(Collector(engine, asked).all()[1], Finished)
    finally:
        with torch.no_grad():
            weight.copy_(before)
        engine.close()


def test_an_engine_whose_batch_or_copilot_fails_is_unhealthy(
    engine: Engine, model: FusedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.unhealthy() is None

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    def idle() -> bool:
        """One that is busy is not tried."""
        until = time.monotonic() + 10
        while (busy := engine._busy()) and time.monotonic() < until:
            time.sleep(0.005)
        return not busy

    for name in ("step", "question_memory"):
        with monkeypatch.context() as patch:
            assert idle()
            patch.setattr(engine._worker.batch if name == "step" else model.copilot, name, broken)
            assert engine.unhealthy() == "Generation failed in the server (RuntimeError)."
        assert idle() and engine.unhealthy() is None


def test_an_engine_that_fails_time_after_time_is_unhealthy_though_requests_keep_coming(
    engine: Engine, prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their prompts are computed, which is progress, and it is never idle."""
    go_on = threading.Event()

    def broken(*_: object) -> None:
        go_on.wait(10)
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(FusedBatch, "step", broken)
        for failures in range(FAILURES):
            waiting = Collector(engine, GenerationRequest(prompt, 4))
            waiting.next()
            assert engine.unhealthy() is None, failures
            go_on.set()
            assert isinstance(waiting.all()[1], RequestError)
            go_on.clear()
        waiting = Collector(engine, GenerationRequest(prompt, 4))
        waiting.next()
        assert engine.unhealthy() == f"the engine failed {FAILURES} times, and no request was done in between"
        go_on.set()
        waiting.all()
    assert isinstance(Collector(engine, GenerationRequest(prompt, 4)).all()[1], Finished)
    beside = Collector(engine, GenerationRequest(prompt, 3000))
    beside.next()
    assert engine.unhealthy() is None


def test_close_lets_go_on_for_a_while_then_fails_the_rest(
    model: FusedModel, export: Path, prompt: tuple[int, ...]
) -> None:
    engine = Engine(
        model, AutoTokenizer.from_pretrained(export / "pilot"), LIMITS.model_copy(update={"max_running": 1})
    )
    short, long, waiting = (Collector(engine, GenerationRequest(prompt, count)) for count in (20, 3000, 5))
    closing = threading.Thread(target=engine.close, args=(3.0,))
    short.next()
    closing.start()
    assert isinstance(short.all()[1], Finished)
    with pytest.raises(RequestError) as refused:
        Collector(engine, GenerationRequest(prompt, 4))
    assert (refused.value.status, refused.value.code) == (503, "shutting_down")
    closing.join()
    shut = ("The server is shutting down.", "shutting_down", 503)
    assert failure(long.all()[1]) == shut
    assert failure(waiting.all()[1]) == shut
    assert engine.unhealthy() == "the engine has stopped"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_reported(export: Path, prompt: tuple[int, ...]) -> None:
    def deadly(*_: object) -> None:
        raise KeyboardInterrupt  # no Exception: ends the thread

    dying = FusedModel.from_pretrained(export)
    engine = Engine(dying, AutoTokenizer.from_pretrained(export / "pilot"))
    assert engine.unhealthy() is None
    dying.pilot.register_forward_pre_hook(deadly)
    assert isinstance(Collector(engine, GenerationRequest(prompt, 4)).all()[1], RequestError)
    engine.close()
    assert engine.unhealthy() == "the engine has stopped"
    with pytest.raises(RequestError) as refused:
        Collector(engine, GenerationRequest(prompt, 4))
    assert refused.value.status == 503


def test_two_engines_of_one_pilot_take_turns(model: FusedModel, export: Path, prompt: tuple[int, ...]) -> None:
    """As while a newer Copilot takes over: both tap the same Pilot."""
    other = FusedModel.join(model.pilot, FusedModel.from_pretrained(export).copilot, lam=2.0)
    turn, tokenizers = Turns(), [AutoTokenizer.from_pretrained(export / "pilot") for _ in range(2)]
    engines = [Engine(one, own, LIMITS, turn=turn) for one, own in zip((model, other), tokenizers, strict=True)]
    try:
        collectors = [Collector(engine, GenerationRequest(prompt, 40)) for engine in engines * 3]
        for collector in collectors:
            collector.all()
        for number, collector in enumerate(collectors):
            expected = offline(model, prompt, max_new_tokens=40, do_sample=False, lam=(0.5, 2.0)[number % 2])
            assert [token.id for token in collector.tokens] == expected
    finally:
        for engine in engines:
            engine.close()
