"""Replicas that come when there is work for them: a second one starts under load, and both answer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving_cluster import PROMPT, replica_pids, server_of
from tests.support.serving_load import outcomes_of, start_load
from tests.support.serving_samples import make_export

LOAD_S = 100.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_second_replica_comes_under_load(tmp_path: Path) -> None:
    export = make_export(tmp_path / "demo", positions=512)
    bodies = tmp_path / "bodies.json"
    bodies.write_text(json.dumps([{"model": "demo", "prompt": PROMPT, "max_tokens": 200, "temperature": 0}]))
    options: dict[str, Any] = {"threads": 1, "cache_bytes": 2 * 10**8, "max_running": 8, "max_waiting": 64}
    with server_of([f"demo={export}"], replicas=1, max_replicas=2, **options) as server:
        assert len(replica_pids()) == 1
        began = time.monotonic()
        load = start_load(server.url, bodies, 40, LOAD_S)  # 6 under way a replica is what it aims at
        while len(replica_pids()) < 2:
            assert load.poll() is None and time.monotonic() - began < LOAD_S, "no second replica while the load lasted"
            time.sleep(1.0)
        print(f"a second replica answers after {time.monotonic() - began:.0f} s of load")
        outcomes = outcomes_of(load, LOAD_S + 200)
    assert {(outcome.status, outcome.end) for outcome in outcomes} == {(200, "[DONE]")}
    assert len({outcome.text for outcome in outcomes}) == 1
