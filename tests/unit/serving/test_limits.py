"""Keys, limits and back-pressure of the HTTP API: who is let in, what is refused, and what that costs."""

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
from fastapi.testclient import TestClient

from tc_ray.config.serving import ServingSection
from tc_ray.serving.deploy.settings import KEY_VARIABLE, configured_digests, digest, require_key_for
from tc_ray.serving.errors import ServingError
from tc_ray.serving.http.gate import Gate
from tc_ray.serving.http.metrics import Metrics
from tc_ray.serving.models.registry import ModelRegistry
from tests.support.recorded_metrics import RecordedMetrics
from tests.support.serving_client import COMPLETION, PATHS, SCORE, client_of, make_app, served, settings_of
from tests.support.serving_samples import make_export
from tests.support.waiting import until


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("serving"), positions=4096)


@pytest.fixture(scope="module")
def keyed(export: Path) -> Iterator[TestClient]:
    settings = settings_of(export, keys=(digest("secret"), digest("other")), max_body_bytes=20_000)
    with client_of(settings) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [{}, bearer("wrong"), {"Authorization": "secret"}, {"Authorization": "Basic secret"}, bearer("")],
    ids=str,
)
def test_without_a_key_nothing_but_health(keyed: TestClient, headers: dict[str, str]) -> None:
    asked = [keyed.post(path, json=body, headers=headers) for path, body in [*PATHS.items(), ("/v1/score", SCORE)]]
    for path in ("/v1/models", "/v1/models/demo", "/openapi.json", "/nowhere"):
        asked.append(keyed.get(path, headers=headers))
    for response in asked:
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
    # before the body is looked at
    assert keyed.post("/v1/completions", content=b"x" * 50_000, headers=headers).status_code == 401
    assert keyed.get("/health").json() == {"status": "ok", "reason": None}


def test_each_key_opens(keyed: TestClient) -> None:
    for key in ("secret", "other"):
        assert keyed.post("/v1/completions", json=COMPLETION, headers=bearer(key)).status_code == 200
    twice = [("Authorization", "Bearer secret"), ("Authorization", "Bearer secret")]
    assert keyed.get("/v1/models", headers=twice).status_code == 401


def test_keys_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert configured_digests() == ()
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst \n\n  second\nfirst\n")
    assert configured_digests(file) == (digest("first"), digest("second"))
    file.write_text("# nobody\n\n")
    with pytest.raises(ServingError, match="no key"):
        configured_digests(file)
    with pytest.raises(ServingError, match="cannot be read"):
        configured_digests(tmp_path / "absent")
    monkeypatch.setenv(KEY_VARIABLE, " third ")
    assert configured_digests() == (digest("third"),)
    monkeypatch.setenv(KEY_VARIABLE, " ")
    with pytest.raises(ServingError, match="no key"):
        configured_digests()


def test_open_address_needs_a_key() -> None:
    require_key_for("127.0.0.1", ())
    require_key_for("0.0.0.0", (digest("a"),))
    require_key_for("0.0.0.0", (), allow_open=True)
    with pytest.raises(ServingError, match=r"serving\.allow_open=true"):
        require_key_for("0.0.0.0", ())


def test_body_that_is_too_long(keyed: TestClient) -> None:
    response = keyed.post("/v1/completions", json={**COMPLETION, "prompt": "x" * 30_000}, headers=bearer("secret"))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    unstated = keyed.post("/v1/completions", content=endless(), headers=bearer("secret"))
    assert unstated.status_code == 413


def test_body_that_never_comes() -> None:
    sent: list[Any] = []

    async def app(*_: Any) -> None:
        raise AssertionError("the app must not see it")

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    gate = Gate(app, ModelRegistry(), ServingSection(), (), Metrics(), timeout_s=0.05)
    asyncio.run(gate(scope, receive, send))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_timeout"


def test_long_prompt_is_refused_without_being_read_to_its_end(export: Path) -> None:
    with client_of(settings_of(export, max_prompt_tokens=100, max_body_bytes=2**22)) as client:
        text = "ab " * 10**6
        for path, body in (
            ("/v1/completions", {**COMPLETION, "prompt": text}),
            (
                "/v1/chat/completions",
                {**PATHS["/v1/chat/completions"], "messages": [{"role": "user", "content": text}]},
            ),
            ("/v1/completions", {**COMPLETION, "prompt": [5] * 101}),
        ):
            response = client.post(path, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
            assert "100" in error["message"] and "ab " not in error["message"]
        assert client.post("/v1/completions", json={**COMPLETION, "prompt": [5] * 100}).status_code == 200


def test_model_name_is_only_looked_up(keyed: TestClient) -> None:
    for name in ("../../etc/passwd", "demo/../demo", "demo\x00", "", "Demo", "%2e%2e"):
        response = keyed.post("/v1/completions", json={**COMPLETION, "model": name}, headers=bearer("secret"))
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    for path in ("..%2f..%2fetc%2fpasswd", "%00", "demo%2f", "%ff"):
        assert keyed.get(f"/v1/models/{path}", headers=bearer("secret")).status_code == 404


def slow_body(tokens: int) -> dict[str, Any]:
    return {**COMPLETION, "max_tokens": tokens, "stream": True}


def test_full_queue_and_key_limit(export: Path, recorded: RecordedMetrics) -> None:
    """Real clients fill the places; all that are refused learn so at once, and those let in come to their end."""
    settings = settings_of(
        export,
        max_running=2,
        max_waiting=2,
        keys=(digest("a"), digest("b")),
        max_key_requests=3,
        max_tokens=4000,
        max_body_bytes=10**6,
    )
    app = make_app(settings)
    with served(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        running = app.state.registry.find("demo").engine
        ended: list[str] = []

        def read(key: str) -> None:
            with httpx.stream(
                "POST", f"{url}/v1/completions", json=slow_body(400), headers=bearer(key), timeout=60
            ) as one:
                ended.append([line for line in one.iter_lines() if line][-1])

        readers = [threading.Thread(target=read, args=(key,)) for key in "aaab"]
        for reader in readers[:3]:
            reader.start()
        until(lambda: running.free_places() == 1)
        refused = http.post("/v1/completions", json=slow_body(4), headers=bearer("a"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "key_limit")
        # the last place is not enough for two choices: all or none
        both = http.post("/v1/completions", json={**slow_body(4), "n": 2}, headers=bearer("b"))
        assert (both.status_code, both.json()["error"]["code"]) == (429, "queue_full")
        readers[3].start()
        until(lambda: running.free_places() == 0)
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            refused = http.post("/v1/completions", content=b"x" * 100_000, headers=bearer("b"))
            times.append(time.perf_counter() - begun)
            # no body is read: what was sent here would be a 400
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert refused.headers["Retry-After"] == "1"
        assert sorted(times)[len(times) // 2] < 0.05, times
        for reader in readers:
            reader.join(timeout=60)
        assert ended == ["data: [DONE]"] * 4
        assert http.post("/v1/completions", json=COMPLETION, headers=bearer("a")).status_code == 200
        assert recorded("tc_ray_refusals", reason="key_limit") == 1
        assert recorded("tc_ray_refusals", reason="queue_full") == 21
