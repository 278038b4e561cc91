"""Ray's Prometheus endpoint has every metric that the Grafana dashboard shows: of a run's Tracker and of a server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from tc_ray.config.schema import RunConfig
from tc_ray.tracking.tracker import start_tracker
from tests.support.serving_cluster import PROMPT, prometheus, server_of, soon
from tests.support.serving_samples import make_export

ROOT = Path(__file__).resolve().parents[3]


def queries(node: Any) -> Iterator[str]:
    """Every Prometheus query of a dashboard."""
    if isinstance(node, dict):
        yield from [node["expr"]] if "expr" in node else []
        node = list(node.values())
    for child in node if isinstance(node, list) else []:
        yield from queries(child)


@pytest.mark.timeout(300)
def test_every_metric_of_the_dashboard_is_scraped(tmp_path: Path) -> None:
    dashboard = json.loads((ROOT / "cluster/grafana-dashboard.json").read_text(encoding="utf-8"))
    wanted = {name for query in queries(dashboard) for name in re.findall(r"\bray_\w+", query)}
    assert {"ray_tc_ray_pilot_loss", "ray_tc_ray_copilot_loss", "ray_tc_ray_requests_total"} < wanted
    run = RunConfig.model_validate(
        {"run": {"name": "trial", "folder": tmp_path / "trial"}, "tracking": {"enabled": False}}
    )
    export = make_export(tmp_path / "demo", positions=512)
    with server_of([f"demo={export}"], threads=1, cache_bytes=2 * 10**8, max_tokens=64) as server:
        tracker = start_tracker(run, run.run.path)
        for round in (1, 2):
            ray.get(tracker.pilot.remote(round, {"loss": 1.5, "tokens": 100, "seconds": 0.5}))
        ray.get(tracker.copilot.remote(2, 1, {"loss": 0.25}))
        ray.get(tracker.log.remote({"bytes": 4096, "rows": 64, "lag_rounds": 1}))
        body = {"model": "demo", "prompt": PROMPT * 3, "max_tokens": 8, "stream": True}
        for _ in range(2):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert httpx.post(f"{server.url}/v1/completions", json={**body, "usr": "x"}).status_code == 400
        missing = lambda: {name for name in wanted if not re.search(rf"^{name}\{{", prometheus(), re.MULTILINE)}
        assert soon(lambda: not missing(), 30), f"not exported: {missing()}"
        assert re.search(r'^ray_tc_ray_pilot_loss\{.*run="trial".*\} 1\.5$', prometheus(), re.MULTILINE)
        ray.kill(tracker)
