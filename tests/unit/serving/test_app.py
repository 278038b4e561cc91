"""The HTTP application without Ray: shapes, choices, prompts, and refusals that name the field."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from transformers import AutoTokenizer

from tc_ray.serving.errors import RequestError
from tc_ray.serving.http.requests import ChatRequest, CompletionRequest, ScoreBody, Weighted
from tests.support.serving_client import CHAT, COMPLETION, PATHS, events, post


def test_completion(client: TestClient) -> None:
    answer = client.post("/v1/completions", json=COMPLETION).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == "demo"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"][0]["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    chunks = events(client.post("/v1/completions", json={**COMPLETION, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_chat(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json=CHAT).json()
    assert answer["object"] == "chat.completion"
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    streamed = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(client.post("/v1/chat/completions", json=streamed))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] or "" for chunk in chunks[:-1])
    assert text == message["content"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == answer["usage"]


def test_chat_uses_the_template(client: TestClient) -> None:
    rendered = "<|im_start|>user\n12 + 345?<|im_end|>\n<|im_start|>assistant\n"
    chat = client.post("/v1/chat/completions", json=CHAT).json()
    plain = client.post("/v1/completions", json={**COMPLETION, "prompt": rendered}).json()
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    parts = [{"type": "text", "text": "12 + "}, {"type": "text", "text": "345?"}]
    in_parts = client.post(
        "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": parts}]}
    ).json()
    assert in_parts["choices"] == chat["choices"]


def test_prompt_as_token_ids(client: TestClient, export: Path) -> None:
    ids = AutoTokenizer.from_pretrained(export / "pilot")(COMPLETION["prompt"])["input_ids"]
    by_ids = post(client, "/v1/completions", {**COMPLETION, "prompt": ids})
    assert by_ids["choices"] == post(client, "/v1/completions", COMPLETION)["choices"]


def test_several_prompts_come_prompt_by_prompt(client: TestClient, export: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export / "pilot")
    texts = ["Tom has 3 apples", "the end"]
    sampled = {**COMPLETION, "temperature": 1, "seed": 5, "n": 2}
    alone = [
        choice["text"]
        for text in texts
        for choice in post(client, "/v1/completions", {**sampled, "prompt": text})["choices"]
    ]
    assert len(set(alone)) == 4
    for prompt in (texts, [tokenizer(text)["input_ids"] for text in texts]):
        answer = post(client, "/v1/completions", {**sampled, "prompt": prompt})
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] for choice in answer["choices"]] == alone
        assert answer["usage"]["prompt_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in texts)
        assert answer["usage"]["completion_tokens"] == 4 * 12


@pytest.mark.parametrize("path", list(PATHS))
def test_choices_are_seeded_one_after_the_other(client: TestClient, path: str) -> None:
    sampled = {**PATHS[path], "temperature": 1}

    def texts(**fields: Any) -> list[str]:
        choices = post(client, path, {**sampled, **fields})["choices"]
        return [choice.get("text", choice.get("message", {}).get("content")) for choice in choices]

    three = texts(n=3, seed=70)
    assert three == [*texts(seed=70), *texts(seed=71), *texts(seed=72)]
    assert len(set(three)) == 3
    streamed = [""] * 3
    for chunk in events(client.post(path, json={**sampled, "n": 3, "seed": 70, "stream": True})):
        [choice] = chunk["choices"]
        streamed[choice["index"]] += choice.get("text", choice.get("delta", {}).get("content")) or ""
    assert streamed == three


def test_a_drawn_seed_is_in_the_header(client: TestClient) -> None:
    sampled = {**COMPLETION, "temperature": 1}
    first = client.post("/v1/completions", json=sampled)
    seed = int(first.headers["X-TC-Ray-Seed"])
    assert post(client, "/v1/completions", {**sampled, "seed": seed})["choices"] == first.json()["choices"]
    assert client.post("/v1/completions", json=sampled).headers["X-TC-Ray-Seed"] != str(seed)
    assert client.post("/v1/completions", json={**sampled, "seed": -7}).headers["X-TC-Ray-Seed"] == "-7"


def test_lambda_of_a_request(client: TestClient) -> None:
    def text(**fields: Any) -> str:
        answer = client.post("/v1/completions", json={**COMPLETION, **fields})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    assert text(copilot={"lambda": 0}) != text(copilot={"lambda": 3.0})
    assert text() == text(copilot={"lambda": 0.5}) == text(copilot={})


def test_neutral_values_are_taken(client: TestClient) -> None:
    neutral = {
        "n": 1,
        "stop": None,
        "top_p": 1,
        "seed": 3,
        "copilot": None,
    }
    for path, body in PATHS.items():
        assert client.post(path, json={**body, **neutral}).status_code == 200
    assert client.post("/v1/completions", json={**COMPLETION, "echo": False}).status_code == 200


REFUSED = [
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": 10**6}, "n"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": "yes"}, "logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"user": 5}, "user"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"100000000": 1}}, "logit_bias"),
    ({"logit_bias": {"five": 1}}, "logit_bias.five"),
    ({"stop_token_ids": [5, 100_000_000]}, "stop_token_ids"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"lam": 0.5}, "lam"),
    ({"temprature": 0}, "temprature"),
    ({"lambda": 0.5}, "lambda"),
    *[({"copilot": {"lambda": given}}, "copilot.lambda") for given in (-0.1, 11, "0.5", True, 10**400)],
    ({"copilot": {"explain": 1}}, "copilot.explain"),
    ({"copilot": {"layers": True}}, "copilot.layers"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 65}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "12"}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": 5}, "stop"),
    ({"stop": "x" * 201}, "stop"),
    ({"stop": ["a"] * 10_000}, "stop"),
    ({"seed": 2**63}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
]


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize(
    ("fields", "param"), REFUSED, ids=lambda value: repr(value)[:40] if isinstance(value, dict) else None
)
def test_refused_by_name(client: TestClient, path: str, fields: dict[str, Any], param: str) -> None:
    body = json.dumps({**PATHS[path], **fields})
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert f"`{param.split('[')[0]}" in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs.x"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"copilot": {"score_after": "x"}}, "copilot.score_after"),
        ({"echo": True}, "echo"),
        ({"messages": [{"role": "user", "content": "ab " * 300}]}, "messages"),
    ],
)
def test_refused_chat_bodies(client: TestClient, fields: dict[str, Any], param: str) -> None:
    response = client.post("/v1/chat/completions", json={**CHAT, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 6}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": ["a", "b", "c"], "n": 3}, "n"),
        ({"suffix": "."}, "suffix"),
        ({"copilot": {"score_after": "x"}}, "copilot.score_after"),
        ({"copilot": {"score_after": "x"}, "echo": True}, "copilot.score_after"),
        ({"copilot": {"score_after": "pears"}, "echo": True, "logprobs": 1}, "copilot.score_after"),
    ],
    ids=str,
)
def test_refused_completion_bodies(client: TestClient, fields: dict[str, Any], param: str) -> None:
    response = client.post("/v1/completions", json={**COMPLETION, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "query", "param"),
    [
        ("/v1/completions", "score_after=", "score_after"),
        ("/v1/completions", "score_after=" + "x" * 201, "score_after"),
        *[("/v1/completions", f"lambda={given}", "lambda") for given in ("", "-1", "10.1", "NaN", "1e999", "a")],
    ],
)
def test_refused_queries(client: TestClient, path: str, query: str, param: str) -> None:
    response = client.post(f"{path}?{query}", json=COMPLETION)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [[]],
        ["a", ""],
        ["a", 5],
        [5, "a"],
        [[5], "a"],
        [5, -1],
        [5, 320_000],
        [5, True],
        7,
        {"a": 1},
        None,
        "ab " * 300,
        "\ud800",
    ],
    ids=lambda v: repr(v)[:20],
)
def test_refused_prompts(client: TestClient, prompt: Any) -> None:
    raw = json.dumps({**COMPLETION, "prompt": prompt})
    response = client.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    if prompt != "\ud800":  # the parser refuses it before any field is known
        assert response.json()["error"]["param"].startswith("prompt")
    untyped = client.post("/v1/completions", content=raw)
    assert untyped.json()["error"]["code"] == "invalid_body"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"5",
        b"null",
        b'"text"',
        b'{"model": "demo", "prompt": "a", "temperature": NaN}',
        b'{"model": "demo", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b"\xff\xfe{}",
        b'{"model": "demo", "prompt": "a", "\\ud800": 1}',
        b'{"model": "demo", "prompt": "a", "stop": "\\ud800"}',
        b"[" * 9000 + b"]" * 9000,
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
        b"{" + b",".join(b'"k%d":1' % i for i in range(1500)) + b"}",
    ],
    ids=lambda raw: raw[:20].decode("latin-1"),
)
def test_malformed_bodies(client: TestClient, raw: bytes) -> None:
    for path in PATHS:
        response = client.post(path, content=raw, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("content", ["a \ud800", [{"type": "text", "text": "\udc00"}]])
def test_half_a_character_in_a_message_is_refused(client: TestClient, content: Any) -> None:
    """A fault found by attack: it reached the tokenizer, which ended the request with status 500."""
    raw = json.dumps({**CHAT, "messages": [{"role": "user", "content": content}]})
    response = client.post("/v1/chat/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text


def test_either_name_of_the_limit_may_be_null(client: TestClient) -> None:
    """A fault found by attack: clients that send both names, one as null, were told of an unknown field."""
    path, limits = "/v1/chat/completions", {"max_tokens": None, "max_completion_tokens": 3}
    assert post(client, path, {**CHAT, **limits})["usage"]["completion_tokens"] == 3
    assert (
        post(client, path, {**CHAT, "max_completion_tokens": None, "max_tokens": 3})["usage"]["completion_tokens"] == 3
    )
    assert client.post(path, json={**CHAT, "max_tokens": None, "max_completion_tokens": None}).status_code == 200
    error = client.post(path, json={**CHAT, "max_completion_tokens": 3}).json()["error"]
    assert error["param"] == "max_completion_tokens" and "differ" in error["message"]
    for name, body in PATHS.items():  # guidellm sends both
        both = {**body, "max_tokens": 3, "max_completion_tokens": 3}
        assert post(client, name, both)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, ScoreBody])
def test_very_many_unknown_fields_are_refused_at_once(kind: type[Weighted]) -> None:
    """A fault found by attack: an error for each of them held up the replica."""
    parsed = {f"k{i}": 1 for i in range(80_000)}
    begun = time.process_time()
    with pytest.raises((ValidationError, RequestError)) as refused:
        kind.model_validate(parsed)
    if isinstance(refused.value, ValidationError):
        refused.value.errors()  # as FastAPI does
    assert time.process_time() - begun < 0.1


def test_missing_field_is_named(client: TestClient) -> None:
    error = client.post("/v1/completions", json={"model": "demo"}).json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "missing_field")


def test_unknown_model_and_route(client: TestClient) -> None:
    for name in ("other", "../../etc/passwd"):
        response = client.post("/v1/completions", json={**COMPLETION, "model": name})
        assert (response.status_code, response.json()["error"]["param"]) == (404, "model")
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/nowhere").json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/completions").status_code == 405


def test_models(client: TestClient) -> None:
    [card] = client.get("/v1/models").json()["data"]
    assert (card["id"], card["copilot"]["lambda"], card["context_tokens"]) == ("demo", 0.5, 256)
    assert client.get("/v1/models/demo").json() == card
