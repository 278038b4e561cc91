"""Figures of a server in Prometheus's text format: what was asked, what came of it, what the engines do.

Invariant: labels hold names of this server only (routes, served models, error codes), never what a client sent. Figures of
the engines are read when somebody asks. Each replica has its own and names itself in the label `replica`; `merged` makes one
text of several. Used by the middleware below, the routes, and board.py.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:  # the board's process needs none of the engine, which takes seconds and 400 MB to import
    from tc_ray.serving.models.registry import Catalogue

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GONE = 499
"""Status in the figures of a request whose client went away."""
ROUTES = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/v1/score", "/v1/models", "/health", "/ready", "/metrics"}
)
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUEST_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The figures of one replica."""

    def __init__(self, catalogue: Catalogue, replica: str) -> None:
        self.replica = replica
        self._registry = CollectorRegistry()
        self._registry.register(_EngineFigures(catalogue, replica))
        self._requests = Counter(
            "tc_ray_requests",
            "Requests answered, by HTTP status (499: the client went away)",
            ["replica", "route", "model", "status"],
            registry=self._registry,
        )
        self._refused = Counter(
            "tc_ray_rejections",
            "Requests refused or failed, by the code of the error; streams that broke off too",
            ["replica", "reason"],
            registry=self._registry,
        )
        self._cancelled = Counter(
            "tc_ray_cancellations", "Requests whose client went away", ["replica", "route"], registry=self._registry
        )
        self._first_token_s = Histogram(
            "tc_ray_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            ["replica", "model"],
            buckets=_FIRST_TOKEN_S,
            registry=self._registry,
        )
        self._request_s = Histogram(
            "tc_ray_request_seconds",
            "From the arrival of a request to the end of its answer",
            ["replica", "route"],
            buckets=_REQUEST_S,
            registry=self._registry,
        )

    def first_token(self, model: str, seconds: float) -> None:
        """A request has got its first token."""
        self._first_token_s.labels(self.replica, model).observe(seconds)

    def answered(self, route: str, model: str, status: int, seconds: float, refused: str | None) -> None:
        """A request is over."""
        self._requests.labels(self.replica, route, model, str(status)).inc()
        self._request_s.labels(self.replica, route).observe(seconds)
        if status == GONE:
            self._cancelled.labels(self.replica, route).inc()
        if refused is not None:
            self._refused.labels(self.replica, refused).inc()

    def text(self) -> str:
        """All figures."""
        return generate_latest(self._registry).decode("utf-8")


class _EngineFigures(Collector):
    """What the engines tell when they are asked."""

    def __init__(self, catalogue: Catalogue, replica: str) -> None:
        self._catalogue, self._replica = catalogue, replica

    def collect(self) -> Iterator[Metric]:
        """One family a figure, one sample a model."""
        loads = [(served.name, served.engine.load()) for served in self._catalogue]
        for field, name, help_text in _GAUGES:
            gauge = GaugeMetricFamily(name, help_text, labels=["replica", "model"])
            for model, load in loads:
                gauge.add_metric([self._replica, model], getattr(load, field))
            yield gauge
        for field, name, help_text in _TOTALS:
            total = CounterMetricFamily(name, help_text, labels=["replica", "model"])
            for model, load in loads:
                total.add_metric([self._replica, model], getattr(load, field))
            yield total


_GAUGES = (
    ("running", "tc_ray_running_sequences", "Sequences in the batch"),
    ("waiting", "tc_ray_waiting_sequences", "Sequences that wait for a place in the batch"),
    ("cache_bytes", "tc_ray_cache_bytes", "Memory of the keys and values of Pilot and Copilot"),
    ("cache_budget_bytes", "tc_ray_cache_budget_bytes", "What that memory may grow to"),
)
_TOTALS = (
    ("generated_tokens", "tc_ray_generated_tokens", "Tokens generated"),
    ("prompt_tokens", "tc_ray_prompt_tokens", "Prompt tokens computed"),
    ("cached_tokens", "tc_ray_cached_tokens", "Prompt tokens reused"),
    ("steps", "tc_ray_engine_steps", "Steps of the batch"),
)


def merged(texts: Sequence[str]) -> str:
    """The figures of several replicas as one text, each family once with the samples of all."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family, known = "", False
        for line in text.splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ", 3)[2]
                known = family in heads
                heads.setdefault(family, [])
            if not line.startswith("#"):
                samples.setdefault(family, []).append(line)
            elif not known:
                heads[family].append(line)
    lines = (line for family, head in heads.items() for line in (*head, *samples.get(family, ())))
    return "".join(f"{line}\n" for line in lines)


class Observed:
    """ASGI middleware: counts and times each request, and gives each answer an X-Request-Id."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["began_s"] = began_s = time.perf_counter()
        status = GONE
        request_id = _request_id(scope["headers"])

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500  # answered further out
            raise
        finally:
            told = GONE if state.get("gone") else status
            route = scope["path"] if scope["path"] in ROUTES else "other"
            seconds = time.perf_counter() - began_s
            self._metrics.answered(route, state.get("model", ""), told, seconds, state.get("refused"))


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own if it is plain, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and 0 < len(value) <= 128 and value.replace(b"-", b"").replace(b"_", b"").isalnum():
            return value.decode("ascii")
    return uuid.uuid4().hex
