"""The HTTP application without Ray: shapes, refusals that name the field, streams, keys, limits, honest health."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tc_ray.serving.app import create_app
from tc_ray.serving.auth import digest
from tc_ray.serving.launch import ReplicaSettings, load_served
from tests.serving_samples import make_export

COMPLETION = {"model": "demo", "prompt": "Tom has 3 apples", "temperature": 0, "max_tokens": 12}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "12 + 345?"}], "temperature": 0, "max_tokens": 12}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ReplicaSettings:
    export = make_export(tmp_path_factory.mktemp("serving"), positions=256)
    return ReplicaSettings(export=str(export), name="demo", max_tokens=64, max_body_bytes=20_000, threads=1)


@pytest.fixture(scope="module")
def client(settings: ReplicaSettings) -> Iterator[TestClient]:
    with TestClient(create_app(load_served(settings)), raise_server_exceptions=False) as client:
        yield client


def events(response: Any) -> list[Any]:
    """Data of a stream's events; the last must be [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


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


def test_chat_uses_the_template(client: TestClient, settings: ReplicaSettings) -> None:
    rendered = "<|im_start|>user\n12 + 345?<|im_end|>\n<|im_start|>assistant\n"
    chat = client.post("/v1/chat/completions", json=CHAT).json()
    plain = client.post("/v1/completions", json={**COMPLETION, "prompt": rendered}).json()
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    parts = [{"type": "text", "text": "12 + "}, {"type": "text", "text": "345?"}]
    in_parts = client.post(
        "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": parts}]}
    ).json()
    assert in_parts["choices"] == chat["choices"]


def test_prompt_as_token_ids(client: TestClient, settings: ReplicaSettings) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(Path(settings.export) / "pilot")(COMPLETION["prompt"])["input_ids"]
    by_ids = client.post("/v1/completions", json={**COMPLETION, "prompt": ids}).json()
    assert by_ids["choices"] == client.post("/v1/completions", json=COMPLETION).json()["choices"]


def test_lambda_at_both_places(client: TestClient) -> None:
    def text(**fields: Any) -> str:
        answer = client.post("/v1/completions", json={**COMPLETION, **fields})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    assert text(**{"lambda": 3.0}) == text(copilot={"lambda": 3.0})
    assert text(**{"lambda": 0}) == text(copilot={"lambda": 0}) != text(**{"lambda": 3.0})
    assert text() == text(**{"lambda": 0.5})


def test_neutral_values_are_taken(client: TestClient) -> None:
    neutral = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "stop": None, "top_p": 1, "seed": 3}
    for path, body in PATHS.items():
        assert client.post(path, json={**body, **neutral}).status_code == 200
    assert client.post("/v1/completions", json={**COMPLETION, "echo": False, "best_of": 1}).status_code == 200


REFUSED = [
    ({"n": 2}, "n"),
    ({"n": 10**6}, "n"),
    ({"logprobs": 3}, "logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"tools": []}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"lam": 0.5}, "lam"),
    ({"temprature": 0}, "temprature"),
    ({"lambda": -0.1}, "lambda"),
    ({"lambda": 11}, "lambda"),
    ({"lambda": "0.5"}, "lambda"),
    ({"lambda": True}, "lambda"),
    ({"lambda": 10**400}, "lambda"),
    ({"copilot": {"lambda": 99}}, "copilot.lambda"),
    ({"copilot": {"explain": True}}, "copilot.explain"),
    ({"lambda": 0.5, "copilot": {"lambda": 0.5}}, "copilot.lambda"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 65}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "12"}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e-9}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": 0}, "top_k"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": 5}, "stop"),
    ({"stop": "x" * 201}, "stop"),
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
        ({"messages": [{"role": "user", "content": "x", "name": "Tom"}]}, "messages[0].name"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": 65}, "max_completion_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": [{"role": "user", "content": "ab " * 300}]}, "messages"),
    ],
)
def test_refused_chat_bodies(client: TestClient, fields: dict[str, Any], param: str) -> None:
    response = client.post("/v1/chat/completions", json={**CHAT, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "prompt",
    ["", [], ["two", "prompts"], [5, -1], [5, 320_000], 7, {"a": 1}, "ab " * 300, "\ud800"],
    ids=lambda v: repr(v)[:20],
)
def test_refused_prompts(client: TestClient, prompt: Any) -> None:
    response = client.post("/v1/completions", content=json.dumps({**COMPLETION, "prompt": prompt}))
    assert response.status_code == 400, response.text
    response = client.post(
        "/v1/completions",
        content=json.dumps({**COMPLETION, "prompt": prompt}),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith("prompt")


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
    ],
    ids=lambda raw: raw[:20].decode("latin-1"),
)
def test_malformed_bodies(client: TestClient, raw: bytes) -> None:
    for path in PATHS:
        response = client.post(path, content=raw, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]


def test_missing_field_is_named(client: TestClient) -> None:
    error = client.post("/v1/completions", json={"model": "demo"}).json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "missing_field")


def test_body_limit(client: TestClient) -> None:
    response = client.post("/v1/completions", json={**COMPLETION, "prompt": "x" * 30_000})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_unknown_model_and_route(client: TestClient) -> None:
    for name in ("other", "../../etc/passwd"):
        response = client.post("/v1/completions", json={**COMPLETION, "model": name})
        assert (response.status_code, response.json()["error"]["param"]) == (404, "model")
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/nowhere").json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/completions").status_code == 405


def test_models(client: TestClient) -> None:
    card = client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["copilot"]) == ("demo", {"lambda": 0.5})
    assert client.get("/v1/models/demo").json() == card


def test_failed_generation(settings: ReplicaSettings) -> None:
    served = load_served(settings)
    with TestClient(create_app(served), raise_server_exceptions=False) as client:
        # A real failure in the middle: the Copilot's output no longer fits the vocabulary.
        served.engine._model.copilot.output = None
        response = client.post("/v1/completions", json=COMPLETION)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        text = client.post("/v1/chat/completions", json={**CHAT, "stream": True}).text
        last = text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert "[DONE]" not in text
        # lambda 0 does not ask the Copilot: the server goes on.
        assert client.post("/v1/completions", json={**COMPLETION, "lambda": 0}).status_code == 200


def test_health_tells_of_a_stopped_worker(settings: ReplicaSettings) -> None:
    served = load_served(settings)
    with TestClient(create_app(served)) as client:
        assert client.get("/health").json() == {"status": "ok", "reason": None}
        served.engine.close()
        response = client.get("/health")
        assert response.status_code == 503
        assert response.json()["reason"] == "the generation worker has stopped"
        assert client.post("/v1/completions", json=COMPLETION).status_code == 503


def test_key(settings: ReplicaSettings) -> None:
    with TestClient(create_app(load_served(settings), digest("secret"))) as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Basic secret"},
        ):
            for response in (
                client.post("/v1/completions", json=COMPLETION, headers=headers),
                client.get("/v1/models", headers=headers),
            ):
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/openapi.json").status_code == 401
        assert client.get("/health").status_code == 200
        assert (
            client.post("/v1/completions", json=COMPLETION, headers={"Authorization": "Bearer secret"}).status_code
            == 200
        )


def test_response_cancelled_before_it_begins_frees_the_worker(settings: ReplicaSettings) -> None:
    from tc_ray.serving.app import EventStream, Listener
    from tc_ray.serving.engine import GenerationRequest

    served = load_served(settings)

    async def scenario() -> None:
        listener = Listener(served.engine, GenerationRequest((5, 6), 200))

        async def chunks() -> Any:
            yield "never read"

        async def send(_: Any) -> None:
            raise OSError("client is gone")

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        with pytest.raises(BaseException):  # noqa: B017 - starlette's own wrapping differs by version
            await EventStream(chunks(), listener)({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
        assert listener.generation.cancelled

    asyncio.run(scenario())
    served.engine.close()
