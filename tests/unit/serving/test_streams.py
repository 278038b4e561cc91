"""Streams that break off, go on elsewhere, or lose their client; deadlines; swapped models."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from starlette.types import Message

from tc_ray.serving.deploy.replica import Replica
from tc_ray.serving.http import routes
from tc_ray.serving.http.answers import ErrorDetail, as_json
from tests.support.recorded_metrics import RecordedMetrics
from tests.support.serving_client import (
    CHAT,
    COMPLETION,
    PATHS,
    SCORE,
    client_of,
    events,
    make_app,
    post,
    served,
    settings_of,
)
from tests.support.serving_samples import make_export

LONG_TOKENS = 3000
LONG = {**COMPLETION, "max_tokens": LONG_TOKENS}
"""Takes far longer than anything here waits."""
FREE_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("serving"), positions=4096)


@pytest.fixture(scope="module")
def settings(export: Path) -> Any:
    return settings_of(export, max_tokens=4000)


@pytest.fixture(scope="module")
def client(settings: Any) -> Iterator[TestClient]:
    with client_of(settings) as client:
        yield client


def engine_of(app: Any) -> Any:
    return next(iter(app.state.registry)).engine


def idle_within(engine: Any, seconds: float = FREE_WITHIN_S) -> bool:
    """Whether nothing runs or waits any more, in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        load = engine.load()
        if load.running == load.waiting == 0:
            return True
        time.sleep(0.02)
    return False


def busy_within(engine: Any, sequences: int, seconds: float = FREE_WITHIN_S) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if engine.load().running >= sequences:
            return True
        time.sleep(0.01)
    return False


def test_no_text_ends_the_line_it_is_sent_in() -> None:
    text = "a\x85b\u2028c\u2029d\x0b\x0c\x1c\x1d\x1e\r\nü\U0001f600"
    sent = as_json(ErrorDetail(message=text, type="server_error", param=None, code=None))
    assert sent.splitlines() == [sent] and json.loads(sent)["message"] == text


@pytest.mark.parametrize("path", [*PATHS, "/v1/score"])
@pytest.mark.parametrize("watched", [False, True])
def test_a_whole_answer_gives_signs_of_life_to_the_failover_proxy(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, watched: bool
) -> None:
    monkeypatch.setattr(routes, "ALIVE_S", 0.001)
    body = json.dumps({**(PATHS | {"/v1/score": SCORE})[path], **({} if path not in PATHS else {"max_tokens": 60})})
    headers = [(b"content-type", b"application/json"), *([(b"x-tc-ray-alive", b"1")] if watched else [])]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
    }
    given: list[Message] = [{"type": "http.request", "body": body.encode(), "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if given:
            return given.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(client.app(scope, receive, send))
    kinds = [message["type"] for message in sent]
    signs = kinds.index("http.response.start")
    assert kinds[:signs] == ["tc_ray.alive"] * signs and kinds[signs + 1 :] == ["http.response.body"]
    assert bool(signs) == watched and sent[signs]["status"] == 200


@pytest.mark.parametrize("path", list(PATHS))
def test_repeat_of_a_stream_has_the_same_chunks(client: TestClient, path: str) -> None:
    body = {
        **PATHS[path],
        "max_tokens": 24,
        "temperature": 1,
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": 1 if path == "/v1/completions" else True,
    }
    first = client.post(path, json=body)
    before = events(first)
    resume = json.dumps({"id": before[0]["id"], "created": before[0]["created"]})
    headers = {"X-TC-Ray-Resume": resume, "X-TC-Ray-Seed": first.headers["X-TC-Ray-Seed"]}
    again = events(client.post(path, json=body, headers=headers))

    def of_choice(chunks: list[Any], name: int) -> list[str]:
        return [without_numbers(one) for one in chunks if one["choices"] and one["choices"][0]["index"] == name]

    for index in (0, 1):
        assert of_choice(again, index) == of_choice(before, index) != []
    assert len(again) == len(before)


def without_numbers(chunk: dict[str, Any]) -> str:
    """A chunk but for log-probabilities: their last digits depend on what else was in the batch."""
    return json.dumps({**chunk, "choices": [{**choice, "logprobs": None} for choice in chunk["choices"]]})


@pytest.mark.parametrize(
    "headers",
    [
        {"X-TC-Ray-Resume": "nonsense"},
        {"X-TC-Ray-Resume": "[" * 5000},
        {"X-TC-Ray-Resume": '{"id": "x y", "created": 1}'},
        {"X-TC-Ray-Resume": '{"id": "x", "created": "1"}'},
        {"X-TC-Ray-Seed": "1.5"},
        {"X-TC-Ray-Seed": "9" * 19},
    ],
    ids=str,
)
def test_headers_that_cannot_be_used(client: TestClient, headers: dict[str, str]) -> None:
    response = client.post("/v1/completions", json=COMPLETION, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == next(iter(headers))


def test_deadline(export: Path) -> None:
    with client_of(settings_of(export, max_tokens=4000, request_timeout_s=1)) as client:
        begun = time.monotonic()
        response = client.post("/v1/completions", json=LONG)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert time.monotonic() - begun < FREE_WITHIN_S
        text = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 3000, "stream": True}).text
        assert text.count("data: ") > 1
        last = text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in text
        assert idle_within(engine_of(client.app))


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_stops_its_generations(settings: Any, stream: bool, recorded: RecordedMetrics) -> None:
    app = make_app(settings)
    engine = engine_of(app)
    with served(app) as url, httpx.Client(base_url=url, timeout=30) as http:
        body = {**LONG, "stream": stream, "n": 2, "temperature": 1}
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()  # kept: an iterator that is dropped closes the connection
                next(lines)
                assert busy_within(engine, 2)
                at_leaving = engine.load().generated_tokens
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=1)
            at_leaving = engine.load().generated_tokens
        assert idle_within(engine)
        after = engine.load().generated_tokens - at_leaving
        not_generated = 2 * LONG_TOKENS - at_leaving
        print(f"{at_leaving} tokens generated when the client left, {after} after it")
        # a few per choice until the broken connection is noticed, more on a busy machine; all of them if it is not noticed
        assert not_generated > 1000, "the client left too late for this test"
        assert after < not_generated / 10
        assert recorded("tc_ray_requests", route="/v1/completions", model="demo", status="499") == 1


def test_response_cancelled_before_it_begins_frees_the_engine(settings: Any) -> None:
    app = make_app(settings)
    engine = engine_of(app)
    raw = json.dumps({**LONG, "stream": True}).encode()

    async def scenario() -> None:
        messages = [{"type": "http.request", "body": raw, "more_body": False}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.sleep(60)

        async def send(_: Any) -> None:
            raise OSError("the client is gone")

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "root_path": ""}
        await app({**scope, "headers": [(b"content-type", b"application/json")]}, receive, send)

    asyncio.run(scenario())
    assert idle_within(engine)
    engine.close()


def test_failed_generation(settings: Any, recorded: RecordedMetrics) -> None:
    with client_of(settings) as client:
        # A real failure in the middle: the Copilot's output no longer fits the vocabulary.
        model = engine_of(client.app).model
        before = model.copilot.output.weight
        model.copilot.output.weight = torch.nn.Parameter(before[:-1].detach().clone())
        error = client.post("/v1/completions", json=COMPLETION)
        assert (error.status_code, error.json()["error"]["code"]) == (500, "generation_failed")
        text = client.post("/v1/chat/completions", json={**CHAT, "stream": True, "n": 2}).text
        last = text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert "[DONE]" not in text
        assert recorded("tc_ray_refusals", reason="generation_failed") == 2
        model.copilot.output.weight = before
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200


def test_engine_that_closes_ends_its_streams_with_an_error(settings: Any) -> None:
    with client_of(settings) as client:
        engine = engine_of(client.app)
        found: list[str] = []
        reader = threading.Thread(
            target=lambda: found.append(client.post("/v1/completions", json={**LONG, "stream": True}).text)
        )
        reader.start()
        assert busy_within(engine, 1)
        engine.close()
        reader.join(timeout=FREE_WITHIN_S)
        last = found[0].strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        refused = client.post("/v1/completions", json=COMPLETION)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json() == {"status": "unavailable", "reason": "demo: the engine has stopped"}


def test_model_that_is_swapped_while_requests_come(settings: Any) -> None:
    with client_of(settings) as client:
        app: Any = client.app
        registry = app.state.registry
        old = registry.find("demo")
        before = post(client, "/v1/completions", COMPLETION)["choices"]
        new = Replica(settings).registry.find("demo")
        real_find = registry.find
        looked_up = []

        def find(name: str) -> Any:
            # the first request gets the old model and finds its engine closed when it comes to it
            looked_up.append(name)
            if len(looked_up) > 1:
                return real_find(name)
            registry.replace(new)
            old.engine.close()
            return old

        registry.find = find
        assert post(client, "/v1/completions", COMPLETION)["choices"] == before
        assert len(looked_up) > 1
