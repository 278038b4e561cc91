"""`/ready` tells a balancer to send no more, `/health` a supervisor that all is well: a full server is the one and not the other."""

from __future__ import annotations

import time
from pathlib import Path

import httpx

from tc_ray.serving.settings import EngineLimits
from tests.serving_client import COMPLETION, make_app, served, settings_of
from tests.serving_samples import make_export


def test_a_full_server_is_healthy_and_not_ready(tmp_path: Path) -> None:
    export = make_export(tmp_path / "run", positions=4096)
    app = make_app(settings_of(export, engine=EngineLimits(max_running=1, max_waiting=0), max_tokens=4000))
    body = {**COMPLETION, "max_tokens": 3000, "stream": True}
    with served(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert http.get("/ready").status_code == http.get("/health").status_code == 200
        with http.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_lines())
            full = http.get("/ready")
            assert (full.status_code, full.json()["reason"]) == (503, "as many requests run and wait as may")
            assert http.get("/health").status_code == 200
        until = time.monotonic() + 10
        while http.get("/ready").status_code != 200:
            assert time.monotonic() < until, "the place of a client that left is not free again"
            time.sleep(0.05)
