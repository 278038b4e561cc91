"""Metrics of a replica: what is recorded, under which labels."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tc_ray.serving.http.metrics import Metrics
from tests.support.recorded_metrics import RecordedMetrics
from tests.support.serving_client import COMPLETION, client_of, post, settings_of
from tests.support.serving_samples import make_export


def test_requests_times_and_load(tmp_path: Path, recorded: RecordedMetrics) -> None:
    with client_of(settings_of(make_export(tmp_path))) as client:
        for _ in range(2):
            post(client, "/v1/completions", COMPLETION)
        client.post("/v1/completions", json={**COMPLETION, "usr": "x"})
        client.get("/secret-path")
        state: Any = client.app.state  # type: ignore[attr-defined]
        [served] = state.registry
        until = time.monotonic() + 10
        while served.engine.load().running and time.monotonic() < until:
            time.sleep(0.005)  # a response is sent before its sequence leaves the batch
        for _ in range(2):
            state.metrics.report_load(state.registry)
        load = served.engine.load()
    assert recorded("tc_ray_requests", route="/v1/completions", model="demo", status="200") == 2
    assert recorded("tc_ray_requests", route="/v1/completions", model="", status="400") == 1
    assert recorded("tc_ray_requests", route="other", model="", status="404") == 1
    assert recorded("tc_ray_refusals", reason="unsupported_field") == 1
    assert recorded("tc_ray_time_to_first_token_seconds", model="demo") == 2
    assert recorded("tc_ray_request_seconds", route="/v1/completions") == 3
    assert recorded("tc_ray_generated_tokens", model="demo") == load.generated_tokens >= 24
    assert recorded("tc_ray_prompt_tokens", model="demo") == load.prompt_tokens
    assert recorded("tc_ray_cached_tokens", model="demo") == load.cached_tokens
    assert recorded("tc_ray_engine_steps", model="demo") == load.steps
    assert recorded("tc_ray_running_sequences", model="demo") == recorded("tc_ray_waiting_sequences", model="demo") == 0
    assert 0 < recorded("tc_ray_cache_bytes", model="demo") <= recorded("tc_ray_cache_budget_bytes", model="demo")
    assert not any("secret" in label for label in recorded.labels())


def test_counters_of_a_new_engine_are_added_to_those_of_the_old_one(recorded: RecordedMetrics) -> None:
    class Served:
        name = "demo"

        def __init__(self, tokens: int) -> None:
            self.engine = self
            self.tokens = tokens

        def load(self) -> Any:
            from tc_ray.serving.engine.contract import Load

            return Load(0, 0, 0, 0, generated_tokens=self.tokens)

    metrics, old, new = Metrics(), Served(5), Served(2)
    for served in (old, old, new):
        metrics.report_load([served])  # type: ignore[arg-type]
    assert recorded("tc_ray_generated_tokens", model="demo") == 7
