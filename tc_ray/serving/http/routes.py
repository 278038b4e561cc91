"""The routes of the HTTP API, and what FastAPI documents of them.

Invariants: bodies, query parameters and headers are declared in the signatures, so the OpenAPI document describes what is
checked. A request is checked from the cheap to the costly: fields, limits, model, prompts. Prompts are never logged.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import Json
from starlette.responses import Response

from tc_ray.config.section import MAX_LAM
from tc_ray.config.serving import ServingSection
from tc_ray.serving.errors import RequestError
from tc_ray.serving.http.answers import (
    ChatCompletion,
    Completion,
    CopilotCard,
    ModelCard,
    ModelList,
    ScoreAnswer,
    State,
)
from tc_ray.serving.http.feed import EventStream, Feed, json_response, whole
from tc_ray.serving.http.generate import Body, Work, check_limits, make_generation, make_scoring
from tc_ray.serving.http.metrics import Metrics
from tc_ray.serving.http.requests import MAX_STOP_CHARACTERS, ChatRequest, CompletionRequest, Resume, ScoreBody
from tc_ray.serving.http.responses import ChatBuilder, CompletionBuilder, ResponseBuilder, score_response
from tc_ray.serving.models.registry import ModelRegistry, ServedModel
from tc_ray.serving.wire import ALIVE_HEADER, ALIVE_S, COPILOT_HEADER, RESUME_HEADER, SEED_HEADER

_STOPPED = frozenset({"worker_stopped", "shutting_down"})
SomeWork = TypeVar("SomeWork", bound=Work)
_SEED_BITS = 53
"""Of a drawn seed, so that JSON in any language can hold it."""

Seed = Annotated[int | None, Header(alias=SEED_HEADER, ge=-(2**63), lt=2**63, include_in_schema=False)]
Resumed = Annotated[Json[Resume] | None, Header(alias=RESUME_HEADER, include_in_schema=False)]
ScoreAfter = Annotated[
    str | None,
    Query(
        min_length=1,
        max_length=MAX_STOP_CHARACTERS,
        description="`copilot.score_after` for clients that can only set an address; used where a prompt is scored",
    ),
]
Lambda = Annotated[
    float | None,
    Query(
        alias="lambda",
        ge=0,
        le=MAX_LAM,
        allow_inf_nan=False,
        description="`copilot.lambda` for clients that can only set an address; the body's comes first",
    ),
]
_EVENTS = """Server-sent events where `stream` is true: one chunk of one choice per event; then, if asked for, one chunk with
`usage`; then `[DONE]`. A stream that breaks off ends with an error instead."""
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "object", "description": _EVENTS}}}}
}


def make_router(registry: ModelRegistry, limits: ServingSection, metrics: Metrics) -> APIRouter:
    """All routes of the API over one replica's models."""
    router = APIRouter(generate_unique_id_function=lambda route: route.name)
    _add_work_routes(router, registry, limits, metrics)
    _add_state_routes(router, registry)
    return router


def _add_work_routes(router: APIRouter, registry: ModelRegistry, limits: ServingSection, metrics: Metrics) -> None:
    async def submit(
        request: Request, body: Body, make: Callable[[ServedModel, float], SomeWork]
    ) -> tuple[SomeWork, Feed]:
        """Encode in a worker thread, and submit. make: the work from a model and the deadline, in `time.monotonic()`."""
        deadline_s = time.monotonic() + limits.request_timeout_s
        check_limits(body, limits)
        while True:
            served = registry.find(body.model)
            request.state.model = served.name

            def first_token(model: str = served.name) -> None:
                metrics.first_token(model, time.perf_counter() - request.state.began_s)

            try:
                work = await asyncio.to_thread(make, served, deadline_s)
                return work, Feed(served.engine.submit, work.requests, first_token)
            except RequestError as error:
                if error.code not in _STOPPED or registry.find(body.model) is served:
                    raise
                # swapped since it was looked up

    async def generate(
        request: Request,
        body: CompletionRequest | ChatRequest,
        builder_class: type[ResponseBuilder],
        seed: int | None,
        resume: Resume | None,
    ) -> Response:
        first_seed = next((one for one in (body.seed, seed) if one is not None), secrets.randbits(_SEED_BITS))
        make = partial(make_generation, body=body, limits=limits, seed=first_seed, owner=request.state.key)
        generation, feed = await submit(request, body, make)
        headers = {SEED_HEADER: str(first_seed), **_copilot_header(generation.served)}
        builder = builder_class(generation, resume)
        if body.stream:
            return EventStream(feed, builder.chunks(feed), headers, _alive_s(request))
        return await whole(request, feed, builder.response(feed), headers, _alive_s(request))

    @router.post("/v1/completions", response_model=Completion, responses=_STREAMED)
    async def completions(
        request: Request,
        body: CompletionRequest,
        score_after: ScoreAfter = None,
        lam: Lambda = None,
        seed: Seed = None,
        resume: Resumed = None,
    ) -> Response:
        """Complete texts."""
        body = body.with_query(lam, score_after)
        return await generate(request, body, CompletionBuilder, seed, resume)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAMED)
    async def chat_completions(
        request: Request, body: ChatRequest, seed: Seed = None, resume: Resumed = None
    ) -> Response:
        """Answer a conversation."""
        return await generate(request, body, ChatBuilder, seed, resume)

    @router.post("/v1/score", response_model=ScoreAnswer)
    async def score(request: Request, body: ScoreBody) -> Response:
        """Log-probabilities under Pilot and fused model."""
        make = partial(make_scoring, body=body, limits=limits, owner=request.state.key)
        scoring, feed = await submit(request, body, make)
        headers = _copilot_header(scoring.served)
        return await whole(request, feed, score_response(scoring, feed), headers, _alive_s(request))


def _add_state_routes(router: APIRouter, registry: ModelRegistry) -> None:

    @router.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """Served models."""
        return json_response(ModelList(data=[_card(served) for served in registry]))

    @router.get("/v1/models/{name:path}", response_model=ModelCard)
    async def model(name: Annotated[str, Path(min_length=1)]) -> Response:
        """One served model."""
        return json_response(_card(registry.find(name)))

    open_to_all: dict[str, Any] = {"security": [{}]}  # in OpenAPI: no key is an alternative to the key

    @router.get("/health", response_model=State, responses={503: {"model": State}}, openapi_extra=open_to_all)
    async def health() -> Response:
        """Whether the engines generate."""
        reason = await registry.unhealthy()
        state = State(status="unavailable" if reason else "ok", reason=reason)
        return json_response(state, status=503 if reason else 200)


def _card(served: ServedModel) -> ModelCard:
    return ModelCard(
        id=served.name,
        created=served.created,
        context_tokens=served.engine.context_tokens,
        copilot=CopilotCard(lam=served.default_lam, version=served.copilot_version),
    )


def _alive_s(request: Request) -> float | None:
    """Seconds between signs of life, where the failover proxy wants them."""
    return ALIVE_S if ALIVE_HEADER in request.headers else None


def _copilot_header(served: ServedModel) -> dict[str, str]:
    """Shows the failover proxy that a repeated generation is by the same Copilot."""
    return {} if served.copilot_version is None else {COPILOT_HEADER: served.copilot_version}
