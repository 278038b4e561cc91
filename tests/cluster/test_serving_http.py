"""The server on a real Ray Serve: the stock openai client, streams, refusals, and clients that go away."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
import torch
from transformers import AutoTokenizer

from tc_ray.models.fusion import FusedModel
from tc_ray.serving.errors import ServingError
from tc_ray.serving.launch import Server, start_server
from tests.serving_samples import make_export

PROMPT = "Tom has 3 apples"
KEY = "a key for the tests"
LONG_TOKENS = 19_000
"""So many tokens take far longer than the tests wait for the worker to be free."""
FREE_WITHIN_S = 3.0


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("demo"), positions=20_000)


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key_file = export.parent / "key"
    key_file.write_text(KEY)
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    try:
        server = start_server(
            export.parent, port=port, key_file=key_file, max_tokens=LONG_TOKENS, max_queued=2, threads=1
        )
        yield server
        server.stop()
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def offline(export: Path, lam: float | None) -> str:
    tokenizer = AutoTokenizer.from_pretrained(export / "pilot")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = FusedModel.from_pretrained(export).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, lam=lam
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_health_and_models(server: Server, http: httpx.Client, client: openai.OpenAI) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "reason": None}
    assert [model.id for model in client.models.list()] == [server.model]
    assert httpx.get(f"{server.url}/v1/models").status_code == 401


@pytest.mark.parametrize("lam", [None, 0.0, 3.0])
def test_completion_equals_offline_and_stream_equals_both(
    server: Server, client: openai.OpenAI, export: Path, lam: float | None
) -> None:
    options: dict[str, Any] = {"model": server.model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    options["extra_body"] = {} if lam is None else {"lambda": lam}
    whole = client.completions.create(**options)
    assert whole.choices[0].text == offline(export, lam)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    chunks = list(client.completions.create(stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert len(chunks) > 5


def test_chat_stream_equals_whole(server: Server, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "user", "content": "What is 12 + 345?"}],
        "max_completion_tokens": 24,
        "temperature": 0.7,
        "seed": 5,
        "extra_body": {"copilot": {"lambda": 0.5}},
    }
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_stream_is_not_held_back(server: Server, http: httpx.Client) -> None:
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": True}
    arrivals = []
    with http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line:
                arrivals.append(time.monotonic())
                last = line
    assert last == "data: [DONE]"
    assert arrivals[0] < arrivals[-1] - 0.1


def test_refusals(server: Server, client: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=server.model, prompt=PROMPT, n=2)
    assert refused.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.completions.create(model=server.model, prompt=PROMPT, logit_bias={"5": 1})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    response = http.post("/v1/completions", content=b"{nonsense", headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    assert http.post("/v1/completions", content=b"x" * (2**20 + 1)).status_code == 413


def assert_worker_soon_free(http: httpx.Client, model: str) -> None:
    begun = time.monotonic()
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert time.monotonic() - begun < FREE_WITHIN_S


def test_stream_whose_client_leaves_frees_the_worker(server: Server, http: httpx.Client) -> None:
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": LONG_TOKENS, "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    assert_worker_soon_free(http, server.model)


def test_request_whose_client_leaves_frees_the_worker(server: Server, http: httpx.Client) -> None:
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": LONG_TOKENS, "temperature": 0}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=1.0)
    assert_worker_soon_free(http, server.model)


def test_full_queue_is_told(server: Server, http: httpx.Client) -> None:
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": LONG_TOKENS, "temperature": 0, "stream": True}
    request = http.build_request("POST", "/v1/completions", json=body)
    streams = []
    try:
        for _ in range(3):  # one runs and two wait
            streams.append(http.send(request, stream=True))
            assert streams[-1].status_code == 200
            time.sleep(0.3)
        refused = http.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
        assert http.get("/health").status_code == 200
    finally:
        for stream in streams:
            stream.close()
    assert_worker_soon_free(http, server.model)


def test_second_server_in_the_cluster_is_refused(server: Server, export: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServingError, match="runs Ray Serve already"):
        start_server(export, port=port)


def test_example_names_the_key_variable(server: Server) -> None:
    example = server.example()
    assert "$TC_RAY_API_KEY" in example
    assert KEY not in example
    assert json.loads(example.split("-d '")[1].rstrip("'"))["model"] == server.model
