"""The engine: same tokens as offline `generate`, stop strings, cancellation within a token, honest ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tc_ray.models.fusion import FusedModel
from tc_ray.serving.engine import Engine, Failed, Finished, GenerationRequest, Piece
from tc_ray.serving.errors import RequestError
from tests.serving_samples import Collector, make_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def model(export: Path) -> FusedModel:
    return FusedModel.from_pretrained(export)


@pytest.fixture
def engine(model: FusedModel, export: Path) -> Iterator[Engine]:
    engine = Engine(model, AutoTokenizer.from_pretrained(export / "pilot"), max_queued=2)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompt(export: Path) -> tuple[int, ...]:
    return tuple(AutoTokenizer.from_pretrained(export / "pilot")("Tom has 3 apples")["input_ids"])


def offline(model: FusedModel, export: Path, prompt: tuple[int, ...], **options: object) -> str:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return str(AutoTokenizer.from_pretrained(export / "pilot").decode(out[0, len(prompt) :], skip_special_tokens=True))


def test_greedy_equals_offline(engine: Engine, model: FusedModel, export: Path, prompt: tuple[int, ...]) -> None:
    pieces, end = Collector(engine, GenerationRequest(prompt, 40)).all()
    assert "".join(pieces) == offline(model, export, prompt, max_new_tokens=40, do_sample=False)
    assert end == Finished("length", len(prompt), 40)
    assert len(pieces) > 5


def test_lam_of_the_request(engine: Engine, model: FusedModel, export: Path, prompt: tuple[int, ...]) -> None:
    texts = {
        lam: "".join(Collector(engine, GenerationRequest(prompt, 24, lam=lam)).all()[0])
        for lam in (0.0, 0.5, 3.0, None)
    }
    pilot = AutoModelForCausalLM.from_pretrained(export / "pilot")
    assert texts[0.0] == offline(pilot, export, prompt, max_new_tokens=24, do_sample=False)
    assert texts[0.5] == texts[None] == offline(model, export, prompt, max_new_tokens=24, do_sample=False)
    assert texts[3.0] == offline(model, export, prompt, max_new_tokens=24, do_sample=False, lam=3.0)
    assert len({texts[0.0], texts[0.5], texts[3.0]}) == 3


def test_seeded_sampling_equals_offline(
    engine: Engine, model: FusedModel, export: Path, prompt: tuple[int, ...]
) -> None:
    request = GenerationRequest(prompt, 24, temperature=0.8, top_p=0.9, seed=11)
    served = ["".join(Collector(engine, request).all()[0]) for _ in range(2)]
    torch.manual_seed(11)
    expected = offline(
        model, export, prompt, max_new_tokens=24, do_sample=True, temperature=0.8, top_p=0.9, top_k=0, lam=None
    )
    assert served == [expected, expected]
    assert "".join(Collector(engine, GenerationRequest(prompt, 24, temperature=0.8, seed=12)).all()[0]) != expected


def test_seed_does_not_pin_later_requests(engine: Engine, prompt: tuple[int, ...]) -> None:
    free = GenerationRequest(prompt, 24, temperature=1.0)
    texts = []
    for _ in range(2):
        Collector(engine, GenerationRequest(prompt, 4, temperature=1.0, seed=1)).all()
        texts.append("".join(Collector(engine, free).all()[0]))
    assert texts[0] != texts[1]


def test_stop_string(engine: Engine, prompt: tuple[int, ...]) -> None:
    full = "".join(Collector(engine, GenerationRequest(prompt, 60)).all()[0])
    stop = full[len(full) // 2 : len(full) // 2 + 3]
    pieces, end = Collector(engine, GenerationRequest(prompt, 60, stops=(stop,))).all()
    assert "".join(pieces) == full[: full.index(stop)]
    assert isinstance(end, Finished)
    assert end.finish_reason == "stop"
    assert end.completion_tokens < 60


def test_end_token(export: Path, prompt: tuple[int, ...]) -> None:
    model = FusedModel.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export / "pilot")
    out = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
    model.generation_config.eos_token_id = out[3]
    engine = Engine(model, tokenizer)
    try:
        pieces, end = Collector(engine, GenerationRequest(prompt, 60)).all()
    finally:
        engine.close()
    used = out.index(out[3])
    assert end == Finished("stop", len(prompt), used + 1)
    assert "".join(pieces) == tokenizer.decode(out[:used])


def test_cancelled_within_one_token(engine: Engine, model: FusedModel, prompt: tuple[int, ...]) -> None:
    forwards: list[int] = []
    cancelled_at: list[int] = []
    box: list[Collector] = []
    ready = threading.Event()
    handle = model.pilot.register_forward_pre_hook(lambda *_: forwards.append(1))

    def deliver(event: object) -> None:
        ready.wait()
        if isinstance(event, Piece) and not cancelled_at:
            cancelled_at.append(len(forwards))
            generation.cancel()

    try:
        generation = engine.submit(GenerationRequest(prompt, 3000), deliver)
        ready.set()
        # The next generation starts only after the cancelled one has ended.
        box.append(Collector(engine, GenerationRequest(prompt, 1)))
        box[0].all()
    finally:
        handle.remove()
    assert len(forwards) - 1 <= cancelled_at[0] + 1


def test_cancelled_in_the_queue_never_runs(engine: Engine, prompt: tuple[int, ...]) -> None:
    running = Collector(engine, GenerationRequest(prompt, 3000))
    running.next()
    waiting = [Collector(engine, GenerationRequest(prompt, 4)) for _ in range(2)]
    with pytest.raises(RequestError) as refused:
        Collector(engine, GenerationRequest(prompt, 4))
    assert refused.value.status == 429
    assert refused.value.headers == {"Retry-After": "1"}
    waiting[0].generation.cancel()
    later = Collector(engine, GenerationRequest(prompt, 4))
    running.generation.cancel()
    assert isinstance(waiting[1].all()[1], Finished)
    assert isinstance(later.all()[1], Finished)
    assert waiting[0].nothing_more()


def test_failed_generation_says_so_and_the_next_one_runs(engine: Engine, prompt: tuple[int, ...]) -> None:
    pieces, end = Collector(engine, GenerationRequest((10**6,), 4)).all()
    assert (pieces, end) == ([], Failed("Generation failed in the server (IndexError)."))
    assert isinstance(Collector(engine, GenerationRequest(prompt, 4)).all()[1], Finished)
    assert engine.unhealthy() is None


def test_close_fails_what_is_unfinished(model: FusedModel, export: Path, prompt: tuple[int, ...]) -> None:
    engine = Engine(model, AutoTokenizer.from_pretrained(export / "pilot"))
    running, waiting = (Collector(engine, GenerationRequest(prompt, 3000)) for _ in range(2))
    running.next()
    engine.close()
    assert running.all()[1] == Failed("The server is shutting down.")
    assert waiting.all()[1] == Failed("The generation worker has stopped.")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dead_worker_is_told(export: Path, prompt: tuple[int, ...]) -> None:
    def deadly(*_: object, **__: object) -> torch.Tensor:
        raise KeyboardInterrupt  # no Exception: ends the thread

    dying = FusedModel.from_pretrained(export)
    dying.generate = deadly  # type: ignore[method-assign]
    engine = Engine(dying, AutoTokenizer.from_pretrained(export / "pilot"))
    assert engine.unhealthy() is None
    assert Collector(engine, GenerationRequest(prompt, 4)).all()[1] == Failed("The generation worker has stopped.")
    engine.close()
    assert engine.unhealthy() == "the generation worker has stopped"
    with pytest.raises(RequestError) as refused:
        Collector(engine, GenerationRequest(prompt, 4))
    assert refused.value.status == 503
