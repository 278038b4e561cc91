"""The way from a body to the engine, and the health of the engines: what the routes of one replica share.

Invariant: a request is checked from the cheap to the costly: fields, limits, model, places in the engine, then prompts. A
model that is swapped in between is looked up again. Made by app.py.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from starlette.requests import Request

from tc_ray.config.serving import ServingSection
from tc_ray.serving.errors import RequestError
from tc_ray.serving.http.feed import Feed
from tc_ray.serving.http.generate import Work
from tc_ray.serving.http.metrics import Metrics
from tc_ray.serving.models.registry import ModelRegistry, ServedModel

HEALTH_S = 1.0
"""A health check holds for this long: /health needs no key and must not be a way to keep the engines busy."""
_STOPPED = frozenset({"worker_stopped", "shutting_down"})


SomeWork = TypeVar("SomeWork", bound=Work)


@dataclass
class Service:
    """One replica's models and metrics."""

    registry: ModelRegistry
    limits: ServingSection
    metrics: Metrics
    _checking: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _checked_s: float = field(default=-math.inf, init=False)
    _unhealthy: str | None = field(default=None, init=False)

    def deadline_s(self, timeout_s: float) -> float:
        """When a request fails, in `time.monotonic()`. timeout_s: what the client asks for."""
        return time.monotonic() + min(timeout_s, self.limits.request_timeout_s)

    async def submit(
        self, request: Request, name: str, places: int, make: Callable[[ServedModel], SomeWork]
    ) -> tuple[SomeWork, Feed]:
        """Hold places in a model's engine, encode in a worker thread, and submit. Raises RequestError.

        places: most engine requests that `make` gives.
        """
        while True:
            served = self.registry.find(name)
            request.state.model = served.name
            try:
                with served.engine.reserve(places) as reservation:
                    work = await asyncio.to_thread(make, served)
                    first_token = partial(self._first_token, request, served.name)
                    return work, Feed(reservation, work.requests, first_token)
            except RequestError as error:
                if error.code not in _STOPPED or self.registry.find(name) is served:
                    raise
                # swapped since it was looked up

    def _first_token(self, request: Request, model: str) -> None:
        self.metrics.first_token(model, time.perf_counter() - request.state.began_s)

    async def unhealthy(self) -> str | None:
        """What is wrong with this replica, None when all is well. Simultaneous callers share one check."""
        async with self._checking:
            if time.monotonic() - self._checked_s > HEALTH_S:
                self._unhealthy = await self._check()
                self._checked_s = time.monotonic()
            return self._unhealthy

    async def _check(self) -> str | None:
        models = list(self.registry)
        if not models:
            return "no model is loaded"
        reasons = await asyncio.gather(*(asyncio.to_thread(served.engine.unhealthy) for served in models))
        found = [
            f"{served.name}: {reason}"
            for served, reason in zip(models, reasons, strict=True)
            # the engine of a model that was swapped meanwhile is stopped, which is no fault
            if reason and self.registry.find(served.name) is served
        ]
        return "; ".join(found) or None
