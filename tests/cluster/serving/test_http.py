"""The server on a real Ray Serve: the stock openai client, streams, refusals, and clients that go away."""

from __future__ import annotations

import contextlib
import itertools
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
from tc_ray.serving.deploy.launch import Server, start_server
from tc_ray.serving.deploy.settings import command_settings
from tc_ray.serving.errors import ServingError
from tests.support.ports import free_port
from tests.support.raw_http import PIECE_BYTES, chunked, exchange
from tests.support.serving_cluster import PROMPT, metric, replica_pids, server_of, soon
from tests.support.serving_process import forget_peak, memory_bytes
from tests.support.serving_samples import make_export

KEY = "a-key-for-the-tests"
BEARER = f"Bearer {KEY}"
OTHER_KEY = "a-second-key"
SECRET = "zebra quilt 81723"
LONG_TOKENS = 19_000
"""So many tokens take far longer than the tests wait for the engine to be free."""
FREE_WITHIN_S = 10.0
BIG_BODY_BYTES = 200_000_000
MAX_GROWTH_BYTES = 50_000_000


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("demo"), positions=20_000)


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[Server]:
    key_file = export.parent / "key"
    key_file.write_text(f"# of the tests\n{KEY}\n{OTHER_KEY}\n")
    options: dict[str, Any] = {"max_tokens": LONG_TOKENS, "max_running": 2, "max_waiting": 1, "threads": 1}
    with server_of([export.parent, f"second={export}"], key_file=key_file, **options) as server:
        yield server


@pytest.fixture(scope="module")
def model(server: Server) -> str:
    return next(iter(server.settings.models))


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": BEARER}, timeout=30) as client:
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


def test_health_and_models(server: Server, client: openai.OpenAI) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "reason": None}
    assert [model.id for model in client.models.list()] == list(server.settings.models)
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/-/routes").status_code == 404  # of Serve, which asks for no key


@pytest.mark.parametrize("lam", [None, 0.0, 3.0])
def test_completion_equals_offline_and_stream_equals_both(
    model: str, client: openai.OpenAI, export: Path, lam: float | None
) -> None:
    options: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    options["extra_body"] = {} if lam is None else {"copilot": {"lambda": lam}}
    whole = client.completions.create(**options)
    assert whole.choices[0].text == offline(export, lam)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    chunks = list(client.completions.create(stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert len(chunks) > 5


def test_chat_stream_equals_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "second",
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
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_stream_is_not_held_back(model: str, http: httpx.Client) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": True}
    arrivals = []
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["x-tc-ray-failover"] == "1"
        for line in response.iter_lines():
            if line:
                arrivals.append(time.monotonic())
                last = line
    assert last == "data: [DONE]"
    assert arrivals[0] < arrivals[-1] - 0.1


def test_refusals(model: str, client: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model=model, prompt=PROMPT, suffix="and so on")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="../other", prompt=PROMPT)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    response = http.post("/v1/completions", content=b"{nonsense", headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    response = http.post("/v1/completions", content=b"x" * (2**20 + 1))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert http.get("/v1/models", headers={b"X-Request-Id": b"\xff"}).status_code == 200


@pytest.mark.parametrize("key", [None, "wrong", "# of the tests"])
def test_nothing_but_health_without_a_key_of_the_file(server: Server, model: str, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30) as http:
        asked = {path: http.get(path) for path in ("/v1/models", "/openapi.json", "/nothing")}
        for stream in (False, True):
            asked[f"stream {stream}"] = http.post("/v1/completions", json={**body, "stream": stream})
        for what, answer in asked.items():
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), what
            assert "www-authenticate" in answer.headers, what
        assert http.get("/health").status_code == http.get("/").status_code == 200


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
def test_each_key_of_the_file_opens_all(server: Server, model: str, key: str) -> None:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as http:
        assert [http.get(path).status_code for path in ("/v1/models", "/health")] == [200] * 2
        body = {"model": model, "prompt": PROMPT, "max_tokens": 1}
        assert http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("way", ["of a stated length", "in chunks", "of a client that does not listen"])
def test_big_body_is_not_held_by_the_proxy(server: Server, way: str) -> None:
    headers = {"Authorization": BEARER, "Content-Type": "application/json"}
    port = int(server.url.rpartition(":")[2])
    pieces = itertools.repeat(b" " * PIECE_BYTES, BIG_BODY_BYTES // PIECE_BYTES)
    [proxy] = replica_pids("ProxyActor")
    before, _ = memory_bytes(proxy)
    forget_peak(proxy)
    if way == "of a client that does not listen":
        # goes on after the refusal until the connection breaks
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection(("127.0.0.1", port), timeout=30) as connection,
        ):
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}".encode())
            connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
            for piece in chunked(pieces):
                connection.sendall(piece)
    else:
        if way == "of a stated length":
            headers["Content-Length"] = str(BIG_BODY_BYTES // PIECE_BYTES * PIECE_BYTES)
        answer = exchange(port, "POST", "/v1/completions", headers, pieces)
        assert (answer.status, answer.json()["error"]["code"]) == (413, "body_too_large")
        print(f"refused after {answer.sent_bytes / 1e6:.1f} MB in {answer.seconds:.2f} s")
    now, peak = memory_bytes(proxy)
    print(f"proxy: {before / 1e6:.0f} MB before, {now / 1e6:.0f} MB after, {peak / 1e6:.0f} MB at most")
    assert peak - before < MAX_GROWTH_BYTES
    assert httpx.get(f"{server.url}/health").status_code == 200


def in_progress() -> float:
    return metric("tc_ray_running_sequences") + metric("tc_ray_waiting_sequences")


def test_stream_whose_client_leaves_is_stopped(server: Server, model: str, http: httpx.Client) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": LONG_TOKENS, "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: an iterator that is dropped closes the connection
        next(lines)
        assert soon(lambda: in_progress() == 1, 20)  # Ray exports metrics late on a busy machine
    assert soon(lambda: in_progress() == 0, FREE_WITHIN_S)


def test_request_whose_client_leaves_is_stopped(server: Server, model: str, http: httpx.Client) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": LONG_TOKENS, "temperature": 0}
    request = http.build_request("POST", "/v1/completions", json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection((request.url.host, request.url.port)) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        assert soon(lambda: in_progress() == 1, 20)  # metrics come late: without this look, 0 may be an old value
    assert soon(lambda: in_progress() == 0, FREE_WITHIN_S)


def test_full_queue_is_refused(server: Server, model: str, http: httpx.Client) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": LONG_TOKENS, "temperature": 0, "stream": True}
    request = http.build_request("POST", "/v1/completions", json=body)
    streams = []
    try:
        for _ in range(3):  # two run and one waits
            streams.append(http.send(request, stream=True))
            assert streams[-1].status_code == 200
        refused = http.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert http.get("/health").status_code == 200
    finally:
        for stream in streams:
            stream.close()
    assert soon(lambda: in_progress() == 0, FREE_WITHIN_S)


def test_prompts_are_in_no_log(server: Server, model: str, http: httpx.Client) -> None:
    good = {"model": model, "prompt": f"{SECRET} is", "max_tokens": 2}
    assert http.post("/v1/completions", json=good).status_code == 200
    assert http.post("/v1/completions", json={**good, "temperature": SECRET}).status_code == 400
    assert http.get("/v1/models", params={SECRET: SECRET}).status_code in (200, 400)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    files = [path for path in logs.rglob("*") if path.is_file()]
    assert any("replica" in path.name for path in files)
    told = [path.name for path in files if SECRET.encode() in path.read_bytes() or b"zebra" in path.read_bytes()]
    assert told == []


def test_second_server_in_the_cluster_is_refused(server: Server, export: Path) -> None:
    with pytest.raises(ServingError, match="runs Ray Serve already"):
        start_server(command_settings([str(export), f"serving.port={free_port()}"]))
