"""The routes of the HTTP API.

Invariant: handlers read bodies and make answers by the modules of this package only, so that the OpenAPI document, which is
written from the same shapes, is true. Prompts are never logged. Included by app.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from tc_ray.serving.http.answers import CopilotCard, ModelCard, ModelList, State, as_json
from tc_ray.serving.http.assembly import Assembly, collected
from tc_ray.serving.http.feed import ClientGone, unless_gone
from tc_ray.serving.http.generate import (
    Terms,
    check_generation,
    lam_from_query,
    make_plan,
    score_after_from_query,
    seed_from_header,
)
from tc_ray.serving.http.metrics import GONE
from tc_ray.serving.http.requests import ChatRequest, CompletionRequest, ScoreBody
from tc_ray.serving.http.score import make_score_plan, score_answer
from tc_ray.serving.http.service import Service
from tc_ray.serving.http.shapes import ChatShape, CompletionShape, Shape
from tc_ray.serving.http.stream import COPILOT_HEADER, RESUME_HEADER, SEED_HEADER, EventStream, Resume
from tc_ray.serving.models.registry import ServedModel

SCORE_AFTER, LAM = "score_after", "lambda"
"""Names in the query of /v1/completions."""


def make_router(service: Service) -> APIRouter:
    """All routes of the API over one replica's models."""
    router = APIRouter()
    catalogue = service.catalogue

    async def generate(
        request: Request, shape: type[CompletionRequest | ChatRequest], answers: type[Shape], query: Sequence[str]
    ) -> Response:
        body = await service.read(request, shape, query)
        check_generation(body)
        resume = Resume.from_header(request.headers.get(RESUME_HEADER))
        terms = Terms(
            deadline_s=service.deadline_s(request),
            seed=seed_from_header(request.headers.get(SEED_HEADER)),
            score_after=score_after_from_query(request.query_params.get(SCORE_AFTER)),
            lam=lam_from_query(request.query_params.get(LAM)),
        )
        plan, feed = await service.submit(
            request,
            body.model,
            lambda served: make_plan(served, body, service.limits, terms),
        )
        headers = {SEED_HEADER: str(plan.seed), **_copilot_header(plan.served)}
        assembly, answer = Assembly(plan), answers(plan, resume.id, resume.created)
        if body.stream:
            return EventStream(assembly, feed, answer, with_usage=body.wants_usage(), headers=headers)
        try:
            parts = await unless_gone(request.receive, collected(assembly, feed))
        except ClientGone:
            return _nobody(request)
        finally:
            feed.cancel()
        return _json(answer.whole(parts, assembly.ends), headers)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await generate(request, CompletionRequest, CompletionShape, [SCORE_AFTER, LAM])

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await generate(request, ChatRequest, ChatShape, [])

    @router.post("/v1/score")
    async def score(request: Request) -> Response:
        body = await service.read(request, ScoreBody)
        body.requested_lam()
        deadline_s = service.deadline_s(request)
        plan, feed = await service.submit(
            request,
            body.model,
            lambda served: make_score_plan(served, body, service.limits, deadline_s),
        )
        try:
            answer = await unless_gone(request.receive, score_answer(plan, body, feed))
        except ClientGone:
            return _nobody(request)
        finally:
            feed.cancel()
        return _json(answer, _copilot_header(plan.served))

    @router.get("/v1/models")
    async def models() -> Response:
        return _json(ModelList(data=[_card(served) for served in catalogue]))

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return _json(_card(catalogue.find(name)))

    @router.get("/health")
    async def health() -> Response:
        return _state(await service.unhealthy())

    @router.get("/ready")
    async def ready() -> Response:
        full = None if catalogue.has_room() else "as many requests run and wait as may"
        return _state(await service.unhealthy() or full)

    return router


def _json(answer: BaseModel, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(answer), media_type="application/json", headers=headers)


def _nobody(request: Request) -> Response:
    """What is returned when the client has gone."""
    request.state.gone = True
    return Response(status_code=GONE)


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
    """Lets the stream guard see that a repeated generation is by the same Copilot."""
    return {} if served.copilot_version is None else {COPILOT_HEADER: served.copilot_version}
