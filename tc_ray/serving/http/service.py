"""What the routes of one replica share: models, limits, figures, and the way from a body to the engine.

Invariant: a request is checked from the cheap to the costly: fields, model, room in the queue, then prompts. A model that is
swapped in between is looked up again. Made by app.py.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

from starlette.requests import Request

from tc_ray.config.serving import ServingSection
from tc_ray.serving.engine import GenerationRequest
from tc_ray.serving.engine import Request as EngineRequest
from tc_ray.serving.errors import RequestError, invalid_value
from tc_ray.serving.http.feed import Feed
from tc_ray.serving.http.metrics import Metrics
from tc_ray.serving.http.requests import AnyBody, read_body
from tc_ray.serving.models.registry import Catalogue, ServedModel

TIMEOUT_HEADER = "X-Request-Timeout-S"
MIN_TIMEOUT_S = 1.0
VITALS_S = 1.0
"""A check of the engines holds for so long: /health needs no key and must not be a way to keep them busy."""
_LEAVING = frozenset({"worker_stopped", "shutting_down"})


class HasRequests(Protocol):
    """A plan."""

    @property
    def requests(self) -> Sequence[EngineRequest]:
        """What it asks of the engine."""


Planned = TypeVar("Planned", bound=HasRequests)


@dataclass
class Service:
    """One replica's models and figures."""

    catalogue: Catalogue
    limits: ServingSection
    metrics: Metrics
    _vitals: Vitals = field(init=False)

    def __post_init__(self) -> None:
        self._vitals = Vitals(self.catalogue)

    async def read(self, request: Request, shape: type[AnyBody], query: Sequence[str] = ()) -> AnyBody:
        """The body of a request. query: names of query parameters that this route knows. Raises RequestError."""
        for name in request.query_params:
            if name not in query:
                raise RequestError(
                    f"Query parameter `{name}` is not supported by this route.", param=name, code="unsupported_field"
                )
        return read_body(shape, request.headers.get("content-type", ""), await request.body())

    def deadline_s(self, request: Request) -> float:
        """When a request fails, in `time.monotonic()`. Raises RequestError for a header that is no number."""
        given = request.headers.get(TIMEOUT_HEADER)
        if given is None:
            return time.monotonic() + self.limits.request_timeout_s
        try:
            timeout_s = float(given)
        except ValueError:
            timeout_s = math.nan
        if not timeout_s >= MIN_TIMEOUT_S:
            raise invalid_value(TIMEOUT_HEADER, f"must be a number of seconds, at least {MIN_TIMEOUT_S:g}")
        return time.monotonic() + min(timeout_s, self.limits.request_timeout_s)

    async def submit(self, request: Request, name: str, plan: Callable[[ServedModel], Planned]) -> tuple[Planned, Feed]:
        """Look a model up, plan in a worker thread, and hand the plan to its engine. Raises RequestError."""
        while True:
            served = self.catalogue.find(name)
            request.state.model = served.name
            served.check_room()
            planned = await asyncio.to_thread(plan, served)
            try:
                feed = Feed(
                    served.engine, _owned(planned.requests, request), partial(self._first_token, request, served.name)
                )
            except RequestError as error:
                if error.code in _LEAVING and self.catalogue.find(name) is not served:
                    continue  # swapped since it was looked up
                raise
            return planned, feed

    def _first_token(self, request: Request, model: str) -> None:
        self.metrics.first_token(model, time.perf_counter() - request.state.began_s)

    async def unhealthy(self) -> str | None:
        """What is wrong with this replica, None when all is well."""
        return await self._vitals.check()


def _owned(requests: Sequence[EngineRequest], request: Request) -> list[EngineRequest]:
    """The requests as those of the client's key, if there are keys."""
    key = getattr(request.state, "key", b"")
    return [replace(one, owner=key) if isinstance(one, GenerationRequest) else one for one in requests]


class Vitals:
    """The last check of the engines, made anew when it is old; who asks meanwhile waits for the same one."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._checking = asyncio.Lock()
        self._checked_s = -math.inf
        self._reason: str | None = None

    async def check(self) -> str | None:
        """What is wrong, None when all is well."""
        async with self._checking:
            if time.monotonic() - self._checked_s > VITALS_S:
                self._reason = await self._ask()
                self._checked_s = time.monotonic()
            return self._reason

    async def _ask(self) -> str | None:
        models = list(self._catalogue)
        if not models:
            return "no model is loaded"
        reasons = await asyncio.gather(*(asyncio.to_thread(served.engine.unhealthy) for served in models))
        found = [
            f"{served.name}: {reason}"
            for served, reason in zip(models, reasons, strict=True)
            # one that was swapped while it was asked is stopped, and that is no fault
            if reason and self._catalogue.find(served.name) is served
        ]
        return "; ".join(found) or None
