"""The stock openai client, unchanged, against the app behind a real HTTP server; and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from fastapi import FastAPI

from tc_ray.serving.deploy.settings import digest
from tests.support.serving_client import CHAT, COMPLETION, PATHS, SCORE, make_app, served, settings_of
from tests.support.serving_samples import make_export

KEY = "a key for the tests"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    export: Path = make_export(tmp_path_factory.mktemp("serving"), positions=256)
    return make_app(settings_of(export, keys=(digest(KEY),)))


@pytest.fixture(scope="module")
def url(app: FastAPI) -> Iterator[str]:
    with served(app) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        yield http


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list()
    assert model.id == "demo"
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completions(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**COMPLETION, "temperature": 0.8, "top_p": 0.9, "seed": 3, "n": 2}
    asked |= {"stop": ["\n\n", "zz"], "logprobs": 2, "echo": True}
    whole = client.completions.create(**asked, extra_body={"copilot": {"lambda": 0.5, "explain": True}, "top_k": 20})
    assert [choice.index for choice in whole.choices] == [0, 1]
    first = whole.choices[0]
    assert first.text.startswith(COMPLETION["prompt"])
    assert first.logprobs is not None and first.logprobs.token_logprobs is not None
    assert first.logprobs.token_logprobs[0] is None
    assert whole.usage is not None and whole.usage.prompt_tokens == 12
    assert set(first.copilot["tokens"][0]) == {"token", "pilot_token", "pilot", "fused", "moved"}  # type: ignore[attr-defined]
    texts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True, extra_body={"copilot": {"lambda": 0.5}, "top_k": 20}):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**CHAT, "n": 2, "temperature": 1, "seed": 8, "logprobs": True, "top_logprobs": 3}
    asked |= {"max_tokens": openai.NOT_GIVEN, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**asked)
    content = whole.choices[1].logprobs.content  # type: ignore[union-attr]
    assert content is not None and len(content) == 12 and len(content[0].top_logprobs) == 3
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts = ["", ""]
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24


def test_streaming_helper_of_the_client(client: openai.OpenAI) -> None:
    long = client.chat.completions.create(**CHAT).choices[0].message.content
    assert long is not None
    # the helper refuses what ends by its length
    with client.chat.completions.stream(**CHAT, stop=long[-1]) as stream:
        for _ in stream:
            pass
        [choice] = stream.get_final_completion().choices
    assert choice.finish_reason == "stop"
    assert choice.message.content == long[: long.index(long[-1])]


def test_errors_are_the_clients_own(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**CHAT, extra_body={"temprature": 1})
    assert (refused.value.param, refused.value.code) == ("temprature", "unsupported_field")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**COMPLETION, "model": "other"})
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that jsonschema can follow references from."""
    return {**schema, "components": document["components"]}


def test_document_names_every_route_and_its_answers(app: FastAPI, http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    documented = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    routes = {
        (route.path.replace(":path", ""), method)
        for route in every_route(app)
        for method in route.methods
        if route.path.startswith(("/v1/", "/health")) and method != "HEAD"
    }
    assert documented == routes
    for path, item in document["paths"].items():
        for operation in item.values():
            assert "422" not in operation["responses"]
            assert operation["security"] == [{"HTTPBearer": []}, *([{}] if path == "/health" else [])]


def every_route(app: Any) -> list[Any]:
    """Routes with a path and methods, those of included routers too."""
    found: list[Any] = []
    for route in app.routes:
        inner = getattr(route, "original_router", None)
        found += every_route(inner) if inner is not None else [route] if hasattr(route, "methods") else []
    return found


BODIES = [
    *(
        (path, {**body, **more})
        for path, body in PATHS.items()
        for more in ({}, {"n": 2}, {"copilot": {"explain": True}})
    ),
    ("/v1/completions", {**COMPLETION, "logprobs": 2, "echo": True, "max_tokens": 0}),
    ("/v1/completions", {**COMPLETION, "prompt": [[5, 6], [7]], "n": 4}),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "temperature": 0.5}),
    ("/v1/score", SCORE),
    ("/v1/score", {**SCORE, "completion": ["a", "b"], "top_logprobs": 1}),
]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=str)
def test_bodies_and_answers_are_as_documented(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    document = http.get("/openapi.json").json()
    operation = document["paths"][path]["post"]
    asked = resolved(document, operation["requestBody"]["content"]["application/json"]["schema"])
    jsonschema.validate(body, asked)
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    given = operation["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(response.json(), resolved(document, given))


FORBIDDEN = [
    ("/v1/completions", {"temperature": 2.5}),
    ("/v1/completions", {"user": 5}),
    ("/v1/chat/completions", {"tools": [{}]}),
]
"""The document forbids these."""
ALLOWED_ELSEWHERE = [
    ("/v1/completions", {"max_tokens": 65}),
    ("/v1/completions", {"prompt": ["a"] * 9}),
    ("/v1/score", {"model": "other"}),
    ("/v1/completions", {"stream": False, "stream_options": {}}),
    ("/v1/completions", {"copilot": {"score_after": "x"}, "logprobs": 1}),
    ("/v1/chat/completions", {"logprobs": False, "top_logprobs": 1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}),
    ("/v1/completions", {"stop_token_ids": [10**8]}),
]
"""These break the limits of this server or a rule between two fields, which only the description of a field states."""


@pytest.mark.parametrize(("path", "fields"), [*FORBIDDEN, *ALLOWED_ELSEWHERE], ids=str)
def test_what_the_document_forbids_is_refused(http: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    document = http.get("/openapi.json").json()
    operation = document["paths"][path]["post"]
    body = {**PATHS.get(path, SCORE), **fields}
    asked = resolved(document, operation["requestBody"]["content"]["application/json"]["schema"])
    valid = jsonschema.Draft202012Validator(asked).is_valid(body)
    assert valid == ((path, fields) in ALLOWED_ELSEWHERE)
    response = http.post(path, json=body)
    assert response.status_code in (400, 404), response.text
    error = operation["responses"]["default"]["content"]["application/json"]["schema"]
    jsonschema.validate(response.json(), resolved(document, error))
