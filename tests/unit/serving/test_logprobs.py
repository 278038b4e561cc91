"""Log-probabilities, echoed prompts, explanations and scores of the API against the offline fused model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoTokenizer

from tc_ray.models.fusion import FusedModel
from tc_ray.serving.text.incremental import TokenTexts
from tests.support.serving_client import CHAT, COMPLETION, SCORE, events, post

CLOSE = 2e-4
FLOOR = -88.0
NEW = 12


@pytest.fixture(scope="module")
def model(export: Path) -> FusedModel:
    return FusedModel.from_pretrained(export)


@pytest.fixture(scope="module")
def tokenizer(export: Path) -> Any:
    return AutoTokenizer.from_pretrained(export / "pilot")


def close(found: list[float | None], expected: list[float]) -> bool:
    """Equal to rounding; log 0 is the floor."""
    floored = [max(value, FLOOR) for value in expected]
    return len(found) == len(floored) and all(
        math.isclose(one, other, abs_tol=CLOSE) for one, other in zip(found, floored, strict=True)
    )


def offline(model: FusedModel, tokenizer: Any, text: str, lam: float | None = None) -> Any:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        lam=lam,
        logprobs=True,
        explain=True,
    )


def scored(model: FusedModel, ids: list[int], start: int, lam: float | None) -> tuple[list[float], list[float]]:
    scores = model.score(torch.tensor([ids]), prompt_length=start, attention_mask=torch.ones(1, len(ids)), lam=lam)
    return scores.pilot_logprobs[0].tolist(), scores.fused_logprobs[0].tolist()


@pytest.mark.parametrize("lam", [0.5, 0.0, 2.0])
def test_completion_logprobs_equal_offline(client: TestClient, model: FusedModel, tokenizer: Any, lam: float) -> None:
    expected = offline(model, tokenizer, COMPLETION["prompt"], lam)
    found = post(client, "/v1/completions", {**COMPLETION, "logprobs": 3, "copilot": {"lambda": lam}})
    [choice] = found["choices"]
    logprobs = choice["logprobs"]
    new = expected.sequences[0, -NEW:].tolist()
    texts = TokenTexts(tokenizer)
    assert logprobs["tokens"] == [texts.text(id) for id in new]
    assert close(logprobs["token_logprobs"], expected.fused_logprobs[0].tolist())
    for own, logprob, top in zip(*(logprobs[n] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        # Greedy: the chosen token is the likeliest, and has one number everywhere.
        assert 3 <= len(top) <= 4
        assert top[own] == logprob == max(top.values())


def test_streamed_logprobs_equal_whole(client: TestClient) -> None:
    asked = {**COMPLETION, "logprobs": 2, "temperature": 1, "seed": 4, "copilot": {"explain": True}}
    [choice] = post(client, "/v1/completions", asked)["choices"]
    chunks = [chunk["choices"][0] for chunk in events(client.post("/v1/completions", json={**asked, "stream": True}))]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    assert [one for chunk in chunks for one in chunk["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
    streamed = [one for chunk in chunks for one in chunk["logprobs"]["token_logprobs"]]
    assert close(streamed, choice["logprobs"]["token_logprobs"])
    assert len([one for chunk in chunks for one in chunk["copilot"]["tokens"]]) == NEW
    # a chunk without text is the last of its choice
    assert all(chunk["text"] for chunk in chunks[:-1])


def test_chat_logprobs(client: TestClient, tokenizer: Any) -> None:
    [choice] = post(client, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2})["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == NEW
    assert (
        bytes(byte for one in content for byte in one["bytes"]).decode("utf-8", "replace")
        == choice["message"]["content"]
    )
    for one in content:
        assert [top["logprob"] for top in one["top_logprobs"]] == sorted(
            (top["logprob"] for top in one["top_logprobs"]), reverse=True
        )
        first = one["top_logprobs"][0]
        assert (first["token"], first["logprob"], first["bytes"]) == (one["token"], one["logprob"], one["bytes"])
    [plain] = post(client, "/v1/chat/completions", {**CHAT, "logprobs": True})["choices"]
    assert all(one["top_logprobs"] == [] for one in plain["logprobs"]["content"])
    assert post(client, "/v1/chat/completions", CHAT)["choices"][0]["logprobs"] is None


def test_explanations_equal_offline(client: TestClient, model: FusedModel, tokenizer: Any) -> None:
    expected = offline(model, tokenizer, COMPLETION["prompt"]).explanation
    [choice] = post(client, "/v1/completions", {**COMPLETION, "copilot": {"explain": True}})["choices"]
    found = choice["copilot"]["tokens"]
    texts = TokenTexts(tokenizer)
    assert [one["token"] for one in found] == [texts.text(id) for id in expected.tokens[0].tolist()]
    assert [one["pilot_token"] for one in found] == [texts.text(id) for id in expected.pilot_top.ids[0, :, 0].tolist()]
    for name, values in (("pilot", expected.chosen.pilot), ("fused", expected.chosen.fused)):
        assert [one[name] for one in found] == pytest.approx(values[0, :, 0].tolist(), abs=CLOSE)
    assert all(0 < one["moved"] <= 1 for one in found)
    unmoved = post(client, "/v1/completions", {**COMPLETION, "copilot": {"explain": True, "lambda": 0}})["choices"][0]
    assert all(one["moved"] == 0 and one["pilot"] == one["fused"] for one in unmoved["copilot"]["tokens"])


@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_as_lm_eval_asks(client: TestClient, model: FusedModel, tokenizer: Any, as_ids: bool) -> None:
    texts = ["Tom has 3 apples", "the 漢 end"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    body = {"model": "demo", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = post(client, "/v1/completions", {**body, "prompt": ids if as_ids else texts})
    for choice, text, prompt in zip(answer["choices"], texts, ids, strict=True):
        logprobs = choice["logprobs"]
        assert choice["text"].startswith(text)
        assert all(len(column) == len(prompt) + 1 for column in logprobs.values())
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        _, fused = scored(model, prompt, 1, None)
        assert close(logprobs["token_logprobs"][1:-1], fused)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


@pytest.mark.parametrize("place", ["query", "body", "ids", "lambda in the query"])
def test_copilot_begins_after_the_marker(client: TestClient, model: FusedModel, tokenizer: Any, place: str) -> None:
    question, answer = "Q: the Answer: no\nAnswer:", " an apple"
    ids = tokenizer(question + answer)["input_ids"]
    border = len(tokenizer(question)["input_ids"])
    assert ids[:border] == tokenizer(question)["input_ids"]
    body: dict[str, Any] = {"model": "demo", "max_tokens": 0, "logprobs": 1, "echo": True}
    if place != "lambda in the query":
        body["copilot"] = {"lambda": 2.0}
    body["prompt"] = ids if place == "ids" else question + answer
    if place == "body":
        body["copilot"]["score_after"] = "Answer:"
    # the body's values come before the query's
    query = "score_after=Answer:&lambda=2.0" if "copilot" not in body else "score_after=Answer:&lambda=0.5"
    path = "/v1/completions" if place == "body" else f"/v1/completions?{query}"
    [choice] = post(client, path, body)["choices"]
    pilot, _ = scored(model, ids, 1, 0.0)
    _, fused = scored(model, ids, border, 2.0)
    assert close(choice["logprobs"]["token_logprobs"][1:], [*pilot[: border - 1], *fused])
    assert choice["text"] == question + answer
    assert choice["finish_reason"] == "length"


def test_echo_with_streams_and_choices(client: TestClient) -> None:
    asked = {
        **COMPLETION,
        "echo": True,
        "logprobs": 0,
        "n": 2,
        "temperature": 1,
        "seed": 3,
        "prompt": ["ab", "the end"],
    }
    whole = post(client, "/v1/completions", asked)["choices"]
    texts, logprobs = [""] * 4, [[] for _ in range(4)]
    for chunk in events(client.post("/v1/completions", json={**asked, "stream": True})):
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        logprobs[choice["index"]] += choice["logprobs"]["token_logprobs"]
    assert texts == [choice["text"] for choice in whole]
    for found, choice in zip(logprobs, whole, strict=True):
        assert found[0] is None
        assert close(found[1:], choice["logprobs"]["token_logprobs"][1:])
        assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"][1:])
    [plain] = post(client, "/v1/completions", {**COMPLETION, "echo": True})["choices"]
    [silent] = post(client, "/v1/completions", COMPLETION)["choices"]
    assert plain["text"] == COMPLETION["prompt"] + silent["text"]


@pytest.mark.parametrize("lam", [0.0, 0.5, 3.0])
def test_score_equals_offline(client: TestClient, model: FusedModel, tokenizer: Any, lam: float) -> None:
    completions = [" and 3 pears", "the 🦜"]
    body = {**SCORE, "completion": completions, "copilot": {"lambda": lam}, "top_logprobs": 2}
    answer = post(client, "/v1/score", body)
    assert answer["lambda"] == lam
    prompt = tokenizer(SCORE["prompt"])["input_ids"]
    for found, text in zip(answer["completions"], completions, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pilot, fused = scored(model, prompt + ids, len(prompt), lam)
        assert [token["id"] for token in found["tokens"]] == ids
        assert found["token_count"] == len(ids)
        assert close([token["pilot"] for token in found["tokens"]], pilot)
        assert close([token["fused"] for token in found["tokens"]], fused)
        assert found["pilot"] == pytest.approx(sum(max(one, FLOOR) for one in pilot), abs=CLOSE * len(ids))
        assert found["fused"] == pytest.approx(sum(max(one, FLOOR) for one in fused), abs=CLOSE * len(ids))
        assert all(len(token["top_logprobs"]) == 2 for token in found["tokens"])
        assert all(token["fused"] <= token["top_logprobs"][0]["fused"] + CLOSE for token in found["tokens"])
    by_ids = {**body, "prompt": prompt, "completion": [tokenizer(text)["input_ids"] for text in completions]}
    again = post(client, "/v1/score", by_ids)["completions"]
    assert [[token["id"] for token in one["tokens"]] for one in again] == [
        [token["id"] for token in one["tokens"]] for one in answer["completions"]
    ]


def test_score_without_options(client: TestClient) -> None:
    answer = post(client, "/v1/score", SCORE)
    assert answer["lambda"] == 0.5
    [found] = answer["completions"]
    assert all(token["top_logprobs"] is None for token in found["tokens"])
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > found["token_count"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"completion": ""}, "completion"),
        ({"completion": []}, "completion"),
        ({"completion": ["a", ""]}, "completion[1]"),
        ({"completion": ["a", "b " * 300]}, "completion[1]"),
        ({"completion": ["a"] * 9}, "completion"),
        ({"completion": [[5], [999_999]]}, "completion[1]"),
        ({"prompt": ["a"]}, "prompt[0]"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"lambda": 1}, "lambda"),
        ({"copilot": {"explain": True}}, "copilot.explain"),
        ({"temperature": 0}, "temperature"),
    ],
    ids=str,
)
def test_refused_scores(client: TestClient, fields: dict[str, Any], param: str) -> None:
    response = client.post("/v1/score", json={**SCORE, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert client.post("/v1/score", json={**SCORE, "model": "other"}).status_code == 404
