"""Metrics of a replica, exported by Ray: requests, times, and the load of the engines.

Ray's Prometheus endpoint shows each as `ray_` and its name, counters with `_total`, and adds the labels `deployment`,
`replica` and `application` inside Serve. Invariant: labels hold names of this server only (routes, served models, error
codes), never what a client sent.
"""

from __future__ import annotations

import asyncio

from ray.serve.metrics import Counter, Gauge, Histogram

from tc_ray.serving.engine.contract import Load
from tc_ray.serving.models.registry import ModelRegistry

GONE = 499
"""Status in the metrics of a request whose client went away."""
LOAD_PERIOD_S = 1.0
"""Between two reports of the engines' load."""
_FIRST_TOKEN_S = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
_REQUEST_S = [0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600]
_GAUGES = {
    "running": ("tc_ray_running_sequences", "Sequences in the batch"),
    "waiting": ("tc_ray_waiting_sequences", "Sequences that wait for a place in the batch"),
    "cache_bytes": ("tc_ray_cache_bytes", "Memory of the keys and values of Pilot and Copilot"),
    "cache_budget_bytes": ("tc_ray_cache_budget_bytes", "Bound of that memory"),
}
_COUNTERS = {
    "generated_tokens": ("tc_ray_generated_tokens", "Tokens generated"),
    "prompt_tokens": ("tc_ray_prompt_tokens", "Prompt tokens computed"),
    "cached_tokens": ("tc_ray_cached_tokens", "Prompt tokens reused"),
    "steps": ("tc_ray_engine_steps", "Steps of the batch"),
}
"""Fields of an engine's Load -> name and meaning of the metric."""


class Metrics:
    """The metrics of one replica. Outside Ray they are recorded and exported nowhere."""

    def __init__(self) -> None:
        self._requests = Counter(
            "tc_ray_requests", "Requests answered; status 499: the client went away", ("route", "model", "status")
        )
        self._refusals = Counter(
            "tc_ray_refusals", "Requests refused or failed, by error code; broken streams too", ("reason",)
        )
        self._first_token_s = Histogram(
            "tc_ray_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            boundaries=_FIRST_TOKEN_S,
            tag_keys=("model",),
        )
        self._request_s = Histogram(
            "tc_ray_request_seconds",
            "From the arrival of a request to the end of its response",
            boundaries=_REQUEST_S,
            tag_keys=("route",),
        )
        self._gauges = {field: Gauge(name, text, ("model",)) for field, (name, text) in _GAUGES.items()}
        self._counters = {field: Counter(name, text, ("model",)) for field, (name, text) in _COUNTERS.items()}
        self._reported: dict[str, tuple[object, Load]] = {}
        """Of each model, the engine and the load that were reported last."""

    def first_token(self, model: str, seconds: float) -> None:
        """A request has got its first token."""
        self._first_token_s.observe(seconds, {"model": model})

    def answered(self, route: str, model: str, status: int, seconds: float, refused: str | None) -> None:
        """A request is over."""
        self._requests.inc(1, {"route": route, "model": model, "status": str(status)})
        self._request_s.observe(seconds, {"route": route})
        if refused is not None:
            self._refusals.inc(1, {"reason": refused})

    def report_load(self, registry: ModelRegistry) -> None:
        """Set the gauges of the engines, and add to their counters what came since the last report."""
        for served in registry:
            load, labels = served.engine.load(), {"model": served.name}
            engine, before = self._reported.get(served.name, (served.engine, Load(0, 0, 0, 0)))
            if engine is not served.engine:  # a new Copilot has an engine of its own, which begins at 0
                before = Load(0, 0, 0, 0)
            for field, gauge in self._gauges.items():
                gauge.set(getattr(load, field), labels)
            for field, counter in self._counters.items():
                if more := getattr(load, field) - getattr(before, field):
                    counter.inc(more, labels)
            self._reported[served.name] = served.engine, load

    async def run(self, registry: ModelRegistry) -> None:
        """Report the load every LOAD_PERIOD_S until cancelled."""
        while True:
            self.report_load(registry)
            await asyncio.sleep(LOAD_PERIOD_S)
