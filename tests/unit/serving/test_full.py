"""A server at its limits: healthy while it is full, and one limit for all clients where no keys are set."""

from __future__ import annotations

import time
from pathlib import Path

import httpx

from tests.support.serving_client import COMPLETION, make_app, served, settings_of
from tests.support.serving_samples import make_export


def test_a_full_server_is_healthy(tmp_path: Path) -> None:
    export = make_export(tmp_path / "run", positions=4096)
    app = make_app(settings_of(export, max_running=1, max_waiting=0, max_tokens=4000))
    body = {**COMPLETION, "max_tokens": 3000, "stream": True}
    with served(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()  # kept: an iterator that is dropped closes the connection
            next(lines)
            assert http.post("/v1/completions", json=COMPLETION).status_code == 429
            assert http.get("/health").status_code == 200
        until = time.monotonic() + 10
        while http.post("/v1/completions", json=COMPLETION).status_code != 200:
            assert time.monotonic() < until, "the place of a client that left is not free again"
            time.sleep(0.05)


def test_without_keys_the_limit_of_a_key_is_that_of_all(tmp_path: Path) -> None:
    """Whatever clients call themselves: an unchecked bearer key is no key."""
    export = make_export(tmp_path / "run", positions=4096)
    body = {**COMPLETION, "max_tokens": 3000, "stream": True}
    app = make_app(settings_of(export, max_tokens=4000, max_key_requests=2))
    with served(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        first = http.send(http.build_request("POST", "/v1/completions", json=body), stream=True)
        named = {"Authorization": "Bearer somebody"}
        second = http.send(http.build_request("POST", "/v1/completions", json=body, headers=named), stream=True)
        assert first.status_code == second.status_code == 200
        third = http.post("/v1/completions", json=body, headers={"Authorization": "Bearer another"})
        assert (third.status_code, third.json()["error"]["code"]) == (429, "key_limit")
        assert int(third.headers["Retry-After"]) >= 1
        first.close()
        second.close()
