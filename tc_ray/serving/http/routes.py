"""The routes of the HTTP API, and what FastAPI documents of them.

Invariants: bodies, query parameters and headers are declared in the signatures, so the OpenAPI document describes what is
checked. A request is checked from the cheap to the costly: fields, limits, model, places in the engine, then prompts. Prompts are never logged. Included by app.py.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import Json, WithJsonSchema
from starlette.responses import Response

from tc_ray.config.section import MAX_LAM
from tc_ray.config.serving import ServingSection
from tc_ray.serving.errors import RequestError
from tc_ray.serving.headers import COPILOT_HEADER, RESUME_HEADER, SEED_HEADER
from tc_ray.serving.http.answers import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CopilotCard,
    ModelCard,
    ModelList,
    ScoreAnswer,
    State,
)
from tc_ray.serving.http.feed import EventStream, Feed, json_response, whole
from tc_ray.serving.http.generate import Body, Work, make_generation, make_scoring, places_of
from tc_ray.serving.http.json_route import JsonRoute
from tc_ray.serving.http.metrics import Metrics
from tc_ray.serving.http.openapi import errors, generated
from tc_ray.serving.http.requests import (
    MAX_STOP_CHARACTERS,
    ChatRequest,
    CompletionRequest,
    QueryLam,
    Resume,
    ScoreBody,
    StopText,
)
from tc_ray.serving.http.responses import ChatBuilder, CompletionBuilder, ResponseBuilder, score_response
from tc_ray.serving.models.registry import ModelRegistry, ServedModel

HEALTH_S = 1.0
"""A health check holds for this long: /health needs no key and must not be a way to keep the engines busy."""
_STOPPED = frozenset({"worker_stopped", "shutting_down"})
SomeWork = TypeVar("SomeWork", bound=Work)
TIMEOUT_HEADER = "X-Request-Timeout-S"
MIN_TIMEOUT_S = 1.0
_SEED_BITS = 53
"""Of a drawn seed, so that JSON in any language can hold it."""

Timeout = Annotated[
    float,
    Header(
        alias=TIMEOUT_HEADER,
        ge=MIN_TIMEOUT_S,
        allow_inf_nan=False,
        description="seconds until the request fails with 504; the default is also the most",
    ),
]
Seed = Annotated[int | None, Header(alias=SEED_HEADER, ge=-(2**63), lt=2**63, include_in_schema=False)]
Resumed = Annotated[Json[Resume] | None, Header(alias=RESUME_HEADER, include_in_schema=False)]
ScoreAfter = Annotated[
    StopText | None,
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}),
    Query(description="`copilot.score_after` for clients that can only set an address; used where a prompt is scored"),
]
Lambda = Annotated[
    QueryLam | None,
    WithJsonSchema({"type": "number", "minimum": 0, "maximum": MAX_LAM}),
    Query(
        alias="lambda", description="`copilot.lambda` for clients that can only set an address; the body's comes first"
    ),
]


@dataclass
class _Service:
    """One replica's models and metrics."""

    registry: ModelRegistry
    limits: ServingSection
    metrics: Metrics
    _checking: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _checked_s: float = field(default=-math.inf, init=False)
    _unhealthy: str | None = field(default=None, init=False)

    async def submit(
        self, request: Request, body: Body, timeout_s: float, make: Callable[[ServedModel, float], SomeWork]
    ) -> tuple[SomeWork, Feed]:
        """Hold places in a model's engine, encode in a worker thread, and submit. Raises RequestError.

        timeout_s: what the client asks for. make: the work from a model and the deadline, in `time.monotonic()`.
        """
        deadline_s = time.monotonic() + min(timeout_s, self.limits.request_timeout_s)
        places = places_of(body, self.limits)
        while True:
            served = self.registry.find(body.model)
            request.state.model = served.name
            try:
                with served.engine.reserve(places) as submit:
                    work = await asyncio.to_thread(make, served, deadline_s)
                    first_token = partial(self._first_token, request, served.name)
                    return work, Feed(submit, work.requests, first_token)
            except RequestError as error:
                if error.code not in _STOPPED or self.registry.find(body.model) is served:
                    raise
                # swapped since it was looked up

    def _first_token(self, request: Request, model: str) -> None:
        self.metrics.first_token(model, time.perf_counter() - request.state.began_s)

    async def unhealthy(self) -> str | None:
        """What is wrong with this replica, None when all is well. Simultaneous callers share one check."""
        async with self._checking:
            if time.monotonic() - self._checked_s > HEALTH_S:
                self._unhealthy = await self.registry.unhealthy()
                self._checked_s = time.monotonic()
            return self._unhealthy


def make_router(registry: ModelRegistry, limits: ServingSection, metrics: Metrics) -> APIRouter:
    """All routes of the API over one replica's models."""
    service = _Service(registry, limits, metrics)
    router = APIRouter(generate_unique_id_function=lambda route: route.name)
    router.include_router(_work_routes(service))
    _add_state_routes(router, service)
    return router


def _work_routes(service: _Service) -> APIRouter:
    """The routes that make a model work."""
    router = APIRouter(route_class=JsonRoute, responses=errors(400, 404, 408, 413, 429, 503, 504))
    default_timeout_s = service.limits.request_timeout_s

    async def generate(
        request: Request,
        body: CompletionRequest | ChatRequest,
        builder_class: type[ResponseBuilder],
        seed: int | None,
        timeout_s: float,
        resume: Resume | None,
    ) -> Response:
        first_seed = next((one for one in (body.seed, seed) if one is not None), secrets.randbits(_SEED_BITS))
        key = getattr(request.state, "key", b"")
        make = partial(make_generation, body=body, limits=service.limits, seed=first_seed, owner=key)
        generation, feed = await service.submit(request, body, timeout_s, make)
        headers = {SEED_HEADER: str(first_seed), **_copilot_header(generation.served)}
        builder = builder_class(generation, resume)
        if body.stream:
            return EventStream(feed, builder.chunks(feed, body.wants_usage), headers)
        return await whole(request, feed, builder.response(feed), headers)

    @router.post("/v1/completions", response_model=Completion, responses=generated(Completion))
    async def completions(
        request: Request,
        body: CompletionRequest,
        score_after: ScoreAfter = None,
        lam: Lambda = None,
        timeout_s: Timeout = default_timeout_s,
        seed: Seed = None,
        resume: Resumed = None,
    ) -> Response:
        """Complete texts."""
        body = body.with_query(lam, score_after)
        return await generate(request, body, CompletionBuilder, seed, timeout_s, resume)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=generated(ChatChunk))
    async def chat_completions(
        request: Request,
        body: ChatRequest,
        timeout_s: Timeout = default_timeout_s,
        seed: Seed = None,
        resume: Resumed = None,
    ) -> Response:
        """Answer a conversation."""
        return await generate(request, body, ChatBuilder, seed, timeout_s, resume)

    @router.post("/v1/score", response_model=ScoreAnswer)
    async def score(request: Request, body: ScoreBody, timeout_s: Timeout = default_timeout_s) -> Response:
        """Log-probabilities under Pilot and fused model."""
        make = partial(make_scoring, body=body, limits=service.limits)
        scoring, feed = await service.submit(request, body, timeout_s, make)
        return await whole(request, feed, score_response(scoring, feed), _copilot_header(scoring.served))

    return router


def _add_state_routes(router: APIRouter, service: _Service) -> None:
    """The routes that show models and health."""
    registry = service.registry
    unavailable: dict[int | str, dict[str, Any]] = {
        503: {"model": State, "description": "Not fit to work; `reason` states why."}
    }

    @router.get("/v1/models", response_model=ModelList, responses=errors())
    async def models() -> Response:
        """Served models."""
        return json_response(ModelList(data=[_card(served) for served in registry]))

    @router.get("/v1/models/{name:path}", response_model=ModelCard, responses=errors(404))
    async def model(name: Annotated[str, Path(min_length=1)]) -> Response:
        """One served model."""
        return json_response(_card(registry.find(name)))

    @router.get("/health", response_model=State, responses={**errors(), **unavailable})
    async def health() -> Response:
        """Whether the engines generate."""
        return _state(await service.unhealthy())

    @router.get("/ready", response_model=State, responses={**errors(), **unavailable})
    async def ready() -> Response:
        """Whether new requests are accepted."""
        full = "every place in the batch and in the queue is taken" if registry.full else None
        return _state(await service.unhealthy() or full)


def _state(reason: str | None) -> Response:
    state = State(status="unavailable" if reason else "ok", reason=reason)
    return json_response(state, status=503 if reason else 200)


def _card(served: ServedModel) -> ModelCard:
    return ModelCard(
        id=served.name,
        created=served.created,
        context_tokens=served.engine.context_tokens,
        copilot=CopilotCard(lam=served.default_lam, version=served.copilot_version),
    )


def _copilot_header(served: ServedModel) -> dict[str, str]:
    """Shows the failover proxy that a repeated generation is by the same Copilot."""
    return {} if served.copilot_version is None else {COPILOT_HEADER: served.copilot_version}
