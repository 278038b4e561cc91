"""An encoder-decoder behind the server: what it generates and scores is what offline `generate` and `score` give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoTokenizer

from tc_ray.evaluation.decode import rankings
from tc_ray.evaluation.item_trie import ItemTrie
from tc_ray.evaluation.rows import HeldOut
from tc_ray.models.fusion import FusedModel
from tc_ray.serving.deploy.settings import find_export
from tc_ray.serving.engine.contract import Finished, GenerationRequest
from tc_ray.serving.engine.engine import SOURCE_TOKENS, Engine
from tc_ray.serving.errors import RequestError
from tc_ray.serving.http.answers import LOG_OF_ZERO
from tc_ray.serving.text.prompt import PromptEncoder, Room
from tests.support.family_samples import make_copilot, new_pilot, prompts, quiet
from tests.support.serving_client import client_of, events, post, settings_of
from tests.support.serving_samples import CHAT_TEMPLATE, LIMITS, Collector
from tests.support.tiny_model import make_tokenizer
from tests.support.waiting import until

PROMPT = "Tom has 3 apples"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet()
    folder = tmp_path_factory.mktemp("t5") / "export"
    FusedModel.join(new_pilot("flan_t5"), make_copilot("flan_t5")[0], lam=0.5).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "pilot")
    assert find_export(folder) == folder
    return folder


@pytest.fixture(scope="module")
def model(export: Path) -> FusedModel:
    return FusedModel.from_pretrained(export)


@pytest.fixture(scope="module")
def tokenizer(export: Path) -> Any:
    return AutoTokenizer.from_pretrained(export / "pilot")


@pytest.fixture
def engine(model: FusedModel, tokenizer: Any) -> Iterator[Engine]:
    engine = Engine(model, tokenizer, LIMITS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(export: Path) -> Iterator[TestClient]:
    with client_of(settings_of(export)) as client:
        yield client


def source_of(tokenizer: Any, text: str = PROMPT) -> tuple[int, ...]:
    return (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)


def offline(model: FusedModel, source: tuple[int, ...], **options: Any) -> list[int]:
    """What `generate` alone gives after the start token; no end token ends it."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(torch.tensor([source]), **options)[0, 1:].tolist()  # type: ignore[no-any-return]


def test_sequences_of_one_batch_are_as_if_alone(engine: Engine, model: FusedModel) -> None:
    sources = [tuple(ids) for ids in prompts(4)]
    requests = [
        GenerationRequest(ids, 8 + 5 * i, lam=(0.5, 0.0, 1.0, 0.3)[i], ignore_end=True) for i, ids in enumerate(sources)
    ]
    requests.append(GenerationRequest(sources[0], 12, temperature=0.8, top_p=0.9, seed=7, ignore_end=True))
    requests.append(GenerationRequest(sources[1], 12, repetition_penalty=1.5, lam=1.0, ignore_end=True))
    gone = Collector(engine, GenerationRequest(sources[2], 300, ignore_end=True))
    gone.next()
    collectors = [Collector(engine, request) for request in requests[:3]]
    collectors[0].next()
    gone.handle.cancel()
    collectors += [Collector(engine, request) for request in requests[3:]]
    for collector, request in zip(collectors, requests, strict=True):
        assert collector.all()[1] == Finished("length", len(request.prompt_ids), request.max_new_tokens)
    until(lambda: engine.load().running == 0)
    assert 0 < engine.load().cache_bytes <= LIMITS.cache_bytes
    for collector, request in zip(collectors, requests, strict=True):
        options: dict[str, Any] = {"max_new_tokens": request.max_new_tokens, "lam": request.lam}
        if request.temperature:
            torch.manual_seed(7)
            options |= {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
        if request.repetition_penalty != 1:
            options["repetition_penalty"] = request.repetition_penalty
        assert [token.id for token in collector.tokens] == offline(model, request.prompt_ids, **options), request


def test_a_source_that_does_not_fit_is_refused(model: FusedModel, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer, LIMITS.model_copy(update={"cache_bytes": 2**22}))
    try:
        assert engine.unhealthy() is None
        with pytest.raises(RequestError, match="do not fit into the server's cache"):
            engine.submit([GenerationRequest((5,) * 500, 8)], lambda *_: None)
    finally:
        engine.close()


def test_a_source_is_read_once_for_requests_that_follow_each_other(engine: Engine) -> None:
    first, again = (Collector(engine, GenerationRequest((5, 6, 7), 4, lam=lam)).all()[1] for lam in (0.0, 0.0))
    assert first == again
    assert (engine.load().prompt_tokens, engine.load().cached_tokens) == (4, 2)


def test_completions(client: TestClient, model: FusedModel, tokenizer: Any) -> None:
    """Text, log-probabilities, usage and stream; the prompt takes no room from the answer and is its encoder's source."""
    source = source_of(tokenizer)
    expected = offline(model, source, max_new_tokens=24)
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    answer = post(client, "/v1/completions", {**body, "logprobs": 1, "copilot": {"explain": True}})
    assert answer["usage"] == {"prompt_tokens": len(source), "completion_tokens": 24, "total_tokens": len(source) + 24}
    [choice] = answer["choices"]
    text = tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    sequence = torch.tensor([[0, *expected]])
    scores = model.score(sequence, source=torch.tensor([source]), attention_mask=torch.ones_like(sequence))
    found = torch.tensor(choice["logprobs"]["token_logprobs"])
    torch.testing.assert_close(found, scores.fused_logprobs[0], atol=1e-3, rtol=1e-3)
    pilot = torch.tensor([token["pilot"] for token in choice["copilot"]["tokens"]])
    torch.testing.assert_close(pilot, scores.pilot_logprobs[0].exp(), atol=1e-3, rtol=1e-3)
    streamed = events(client.post("/v1/completions", json={**body, "stream": True}))
    assert "".join(one["choices"][0]["text"] for one in streamed if one["choices"]) == text
    stop = text[len(text) // 2 :][:3]
    assert post(client, "/v1/completions", {**body, "stop": stop})["choices"][0]["text"] == text[: text.find(stop)]
    [echoed] = post(client, "/v1/completions", {**body, "echo": True})["choices"]
    [by_ids] = post(client, "/v1/completions", {**body, "prompt": list(source)})["choices"]
    assert (echoed["text"], by_ids["text"]) == (PROMPT + text, text)


def test_choices_draw_like_offline(client: TestClient, model: FusedModel, tokenizer: Any) -> None:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 8, "seed": 3, "n": 2, "ignore_eos": True}
    choices = post(client, "/v1/completions", body)["choices"]
    for number, choice in enumerate(choices):
        torch.manual_seed(3 + number)
        ids = offline(model, source_of(tokenizer), max_new_tokens=8, do_sample=True, top_k=0)
        assert choice["text"] == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_scores_rank_items_with_one_pass_of_the_encoder(
    export: Path, model: FusedModel, tokenizer: Any, lam: float
) -> None:
    items, passes = ["3 pears", "no", "apples and pears"], []
    with client_of(settings_of(export)) as client:
        encoders = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: passes.append(module) if is_encoder(module) else None
        )
        try:
            body = {"model": "demo", "prompt": PROMPT, "completion": items, "copilot": {"lambda": lam}}
            answer = post(client, "/v1/score", {**body, "end_token": True, "top_logprobs": 2})
        finally:
            encoders.remove()
    assert len(passes) == 1
    source = source_of(tokenizer)
    total, sequences = 0, []
    for item, found in zip(items, answer["completions"], strict=True):
        ids = [*tokenizer(item)["input_ids"], tokenizer.eos_token_id]
        scores = model.score(torch.tensor([[0, *ids]]), source=torch.tensor([source]), lam=lam)
        assert [token["id"] for token in found["tokens"]] == ids
        for name in ("pilot", "fused"):
            expected = getattr(scores, f"{name}_logprobs")[0].clamp_min(LOG_OF_ZERO)
            torch.testing.assert_close(torch.tensor([token[name] for token in found["tokens"]]), expected)
            assert found[name] == pytest.approx(float(expected.sum()), abs=1e-3)
        total += len(ids)
        sequences.append(ids)
    assert answer["usage"]["prompt_tokens"] == len(source) + total
    row = HeldOut(0, list(source), len(source), "", PROMPT)
    [ranked] = next(rankings(model, tokenizer, [row], [("probability", lam)], ItemTrie(sequences), beams=len(items)))
    by_score = sorted(range(len(items)), key=lambda item: -answer["completions"][item]["fused"])
    # the evaluation does not rank an item of probability 0, which this f makes of all
    assert ranked == ([] if lam else by_score)


def is_encoder(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "T5Stack" and not module.is_decoder


def test_limits_and_refusals(client: TestClient, tokenizer: Any) -> None:
    def refused(path: str, **fields: Any) -> dict[str, Any]:
        response = client.post(path, json={"model": "demo", **fields})
        assert response.status_code == 400, response.text
        return response.json()["error"]  # type: ignore[no-any-return]

    longest = [5] * SOURCE_TOKENS
    given = {"max_tokens": 2, "ignore_eos": True}
    answer = post(client, "/v1/completions", {"model": "demo", "prompt": longest, **given})
    assert answer["usage"]["completion_tokens"] == 2
    error = refused("/v1/completions", prompt=[*longest, 5], max_tokens=2)
    assert error["code"] == "context_length_exceeded"
    assert (
        f"maximum context length is {SOURCE_TOKENS} tokens; you asked for {SOURCE_TOKENS + 1} + 0" in error["message"]
    )
    error = refused("/v1/completions", prompt=PROMPT, echo=True, logprobs=1)
    assert error["param"] == "echo" and "/v1/score" in error["message"]
    assert (
        "use /v1/completions" in refused("/v1/chat/completions", messages=[{"role": "user", "content": "a"}])["message"]
    )
    assert client.get("/v1/models/demo").json()["context_tokens"] == SOURCE_TOKENS
    assert client.get("/health").status_code == 200


def test_sources_end_as_in_training(tokenizer: Any) -> None:
    chatty = make_tokenizer()
    chatty.chat_template = CHAT_TEMPLATE
    encoder = PromptEncoder(chatty, len(chatty), encoder_decoder=True)
    ids = encoder.chat([{"role": "user", "content": "a"}], Room(100))
    assert ids[-1] == encoder.end and ids[-2] != encoder.end
    assert encoder.ids("ab", Room(100)) == (*chatty("ab")["input_ids"], encoder.end)
    assert encoder.ids("ab", Room(100), special=False) == tuple(chatty("ab")["input_ids"])
    assert encoder.ids([5, 6], Room(100)) == (5, 6)


def test_a_limit_of_sources_is_none_of_answers(model: FusedModel, tokenizer: Any) -> None:
    """Answers were cut at `serving.max_prompt_tokens`."""
    for most, longest in ((8, SOURCE_TOKENS), (SOURCE_TOKENS + 8, SOURCE_TOKENS + 8)):
        engine = Engine(model, tokenizer, LIMITS.model_copy(update={"max_prompt_tokens": most}))
        try:
            assert engine.room_after(5) == engine.context_tokens == longest
        finally:
            engine.close()
