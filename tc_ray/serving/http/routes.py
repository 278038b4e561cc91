"""The routes of the HTTP API, and what FastAPI documents of them.

Invariant: bodies, query parameters and headers are declared in the signatures, so the OpenAPI document describes what is
checked. Prompts are never logged. Included by app.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import BaseModel, Json, WithJsonSchema
from starlette.responses import JSONResponse, Response

from tc_ray.config.section import MAX_LAM
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
    as_json,
)
from tc_ray.serving.http.feed import ClientGone, Feed, unless_gone
from tc_ray.serving.http.generate import make_generation, make_scoring, places_of
from tc_ray.serving.http.json_route import JsonRoute
from tc_ray.serving.http.metrics import GONE
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
from tc_ray.serving.http.service import Service
from tc_ray.serving.http.stream import EventStream
from tc_ray.serving.models.registry import ServedModel

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


def make_router(service: Service) -> APIRouter:
    """All routes of the API over one replica's models."""
    router = APIRouter(generate_unique_id_function=lambda route: route.name)
    router.include_router(_work_routes(service))
    _add_state_routes(router, service)
    return router


def _work_routes(service: Service) -> APIRouter:
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
        limits, deadline_s = service.limits, service.deadline_s(timeout_s)
        first_seed = next((one for one in (body.seed, seed) if one is not None), secrets.randbits(_SEED_BITS))
        key = getattr(request.state, "key", b"")
        generation, feed = await service.submit(
            request,
            body.model,
            places_of(body, limits),
            lambda served: make_generation(served, body, limits, seed=first_seed, owner=key, deadline_s=deadline_s),
        )
        headers = {SEED_HEADER: str(first_seed), **_copilot_header(generation.served)}
        builder = builder_class(generation, resume)
        if body.stream:
            return EventStream(builder, feed, with_usage=body.wants_usage, headers=headers)
        return await _answer(request, feed, builder.response(feed), headers)

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
        limits, deadline_s = service.limits, service.deadline_s(timeout_s)
        scoring, feed = await service.submit(
            request,
            body.model,
            places_of(body, limits),
            lambda served: make_scoring(served, body, limits, deadline_s=deadline_s),
        )
        return await _answer(request, feed, score_response(scoring, feed), _copilot_header(scoring.served))

    return router


def _add_state_routes(router: APIRouter, service: Service) -> None:
    """The routes that show models and health."""
    registry = service.registry
    unavailable: dict[int | str, dict[str, Any]] = {
        503: {"model": State, "description": "Not fit to work; `reason` states why."}
    }

    @router.get("/v1/models", response_model=ModelList, responses=errors())
    async def models() -> Response:
        """Served models."""
        return _json(ModelList(data=[_card(served) for served in registry]))

    @router.get("/v1/models/{name:path}", response_model=ModelCard, responses=errors(404))
    async def model(name: Annotated[str, Path(min_length=1)]) -> Response:
        """One served model."""
        return _json(_card(registry.find(name)))

    @router.get("/health", response_model=State, responses={**errors(), **unavailable})
    async def health() -> Response:
        """Whether the engines generate."""
        return _state(await service.unhealthy())

    @router.get("/ready", response_model=State, responses={**errors(), **unavailable})
    async def ready() -> Response:
        """Whether new requests are accepted."""
        full = "every place in the batch and in the queue is taken" if registry.full else None
        return _state(await service.unhealthy() or full)


async def _answer(
    request: Request, feed: Feed, response: Coroutine[Any, Any, BaseModel], headers: dict[str, str]
) -> Response:
    """Wait for a whole response; cancel its generations when the client leaves."""
    try:
        return _json(await unless_gone(request.receive, response), headers)
    except ClientGone:
        request.state.gone = True
        return Response(status_code=GONE)
    finally:
        feed.cancel()


def _json(answer: BaseModel, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(answer), media_type="application/json", headers=headers)


def _state(reason: str | None) -> Response:
    state = State(status="unavailable" if reason else "ok", reason=reason)
    return JSONResponse(state.model_dump(), 503 if reason else 200)


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
