"""The HTTP application: OpenAI's routes over an engine. Plain FastAPI; launch.py puts it into Ray Serve.

Invariant: an answer is complete or says that it is not. A stream ends with `data: [DONE]` after its last chunk, or with
an error event and no [DONE]; every refusal is OpenAI's error envelope. Prompts are never logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tc_ray.serving.auth import BearerAuth
from tc_ray.serving.body_limit import BodyLimit
from tc_ray.serving.engine import Engine, Event, Failed, Finished, Generation, GenerationRequest, Piece
from tc_ray.serving.errors import RequestError, from_validation
from tc_ray.serving.prompt import PromptEncoder
from tc_ray.serving.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Health,
    ModelCard,
    ModelList,
    Usage,
)


@dataclass(frozen=True)
class ServedModel:
    """What the routes stand on. `name` is the model's name in the API; `max_tokens` caps the new tokens a request."""

    name: str
    engine: Engine
    encoder: PromptEncoder
    default_lam: float
    max_tokens: int = 512
    max_body_bytes: int = 2**20
    created: int = field(default_factory=lambda: int(time.time()))

    def card(self) -> ModelCard:
        """Entry of GET /v1/models."""
        return ModelCard(id=self.name, created=self.created, copilot={"lambda": self.default_lam})

    def check_name(self, name: str) -> None:
        """Raise RequestError 404 for any other model."""
        if name != self.name:
            raise RequestError(
                f"Field `model`: no such model here; this server has `{self.name}`.",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def request(self, body: CompletionRequest | ChatRequest) -> GenerationRequest:
        """The engine's request for a body. Raises RequestError naming the field."""
        self.check_name(body.model)
        temperature, lam = body.sampling_temperature(), body.requested_lam()
        limit_field, asked = body.token_limit()
        if asked is not None and asked > self.max_tokens:
            raise RequestError(
                f"Field `{limit_field}`: this server generates at most {self.max_tokens} tokens a request.",
                param=limit_field,
                code="invalid_value",
            )
        ids = await asyncio.to_thread(self.encoder.encode, body)
        prompt_field = "prompt" if isinstance(body, CompletionRequest) else "messages"
        room = self.engine.context_tokens - len(ids)
        if room < (asked or 1):
            raise RequestError(
                f"Field `{prompt_field}`: {len(ids)} prompt tokens and {asked or 1} new ones do not fit into the "
                f"model's {self.engine.context_tokens} positions.",
                param=prompt_field,
                code="context_length_exceeded",
            )
        default = DEFAULT_COMPLETION_TOKENS if isinstance(body, CompletionRequest) else self.max_tokens
        return GenerationRequest(
            prompt_ids=ids,
            max_new_tokens=asked or min(default, self.max_tokens, room),
            temperature=temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k,
            seed=body.seed,
            stops=body.stops(),
            lam=lam,
        )


class Listener:
    """Receives a generation's events in the event loop that made it."""

    def __init__(self, engine: Engine, request: GenerationRequest) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.generation: Generation = engine.submit(request, self._deliver)

    def _deliver(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """Events up to and with the last one."""
        while True:
            event = await self._events.get()
            yield event
            if not isinstance(event, Piece):
                return

    async def result(self) -> tuple[str, Finished]:
        """The whole text and its end; cancels the generation when the waiting task is cancelled.

        Raises RequestError 500 when the generation failed.
        """
        pieces: list[str] = []
        try:
            async for event in self.events():
                if isinstance(event, Piece):
                    pieces.append(event.text)
                elif isinstance(event, Failed):
                    raise RequestError(event.message, status=500, code="generation_failed")
                else:
                    return "".join(pieces), event
            raise AssertionError("events end with Finished or Failed")
        finally:
            self.generation.cancel()


class EventStream(StreamingResponse):
    """Server-sent events of one generation, which is cancelled however the response ends, begun or not."""

    def __init__(self, chunks: AsyncIterator[str], listener: Listener) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._listener = listener

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._listener.generation.cancel()


class CompletionShape:
    """Answers of /v1/completions."""

    def __init__(self, model: str) -> None:
        self._head: dict[str, Any] = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, end: Finished) -> BaseModel:
        """The one answer of a request without stream."""
        choice = CompletionChoice(text=text, finish_reason=end.finish_reason)
        return Completion(**self._head, choices=[choice], usage=_usage(end))

    def opening(self) -> BaseModel | None:
        """Chunk before the first text, if the shape has one."""
        return None

    def piece(self, text: str) -> BaseModel:
        """Chunk with more text."""
        return Completion(**self._head, choices=[CompletionChoice(text=text)])

    def closing(self, end: Finished) -> BaseModel:
        """Chunk with the finish reason."""
        return Completion(**self._head, choices=[CompletionChoice(text="", finish_reason=end.finish_reason)])

    def usage(self, end: Finished) -> BaseModel:
        """Chunk with the token counts."""
        return Completion(**self._head, choices=[], usage=_usage(end))


class ChatShape(CompletionShape):
    """Answers of /v1/chat/completions."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._head["id"] = f"chatcmpl-{uuid.uuid4().hex}"

    def whole(self, text: str, end: Finished) -> BaseModel:
        """As the base."""
        choice = ChatChoice(message=ChatAnswer(content=text), finish_reason=end.finish_reason)
        return ChatCompletion(**self._head, choices=[choice], usage=_usage(end))

    def opening(self) -> BaseModel | None:
        """The chunk that names the role."""
        return self._chunk(ChatChunkChoice(delta=ChatDelta(role="assistant", content="")))

    def piece(self, text: str) -> BaseModel:
        """As the base."""
        return self._chunk(ChatChunkChoice(delta=ChatDelta(content=text)))

    def closing(self, end: Finished) -> BaseModel:
        """As the base."""
        return self._chunk(ChatChunkChoice(delta=ChatDelta(), finish_reason=end.finish_reason))

    def usage(self, end: Finished) -> BaseModel:
        """As the base."""
        return ChatChunk(**self._head, choices=[], usage=_usage(end))

    def _chunk(self, choice: ChatChunkChoice) -> BaseModel:
        return ChatChunk(**self._head, choices=[choice])


def _usage(end: Finished) -> Usage:
    return Usage(
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.completion_tokens,
        total_tokens=end.prompt_tokens + end.completion_tokens,
    )


async def _server_sent(listener: Listener, shape: CompletionShape, with_usage: bool) -> AsyncIterator[str]:
    """The lines of a stream."""
    if opening := shape.opening():
        yield _data(opening)
    async for event in listener.events():
        if isinstance(event, Piece):
            yield _data(shape.piece(event.text))
        elif isinstance(event, Failed):
            error = RequestError(event.message, status=500, code="generation_failed")
            yield f"data: {json.dumps(error.envelope())}\n\n"
            return
        else:
            yield _data(shape.closing(event))
            if with_usage:
                yield _data(shape.usage(event))
    yield "data: [DONE]\n\n"


def _data(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json()}\n\n"


def create_app(served: ServedModel, key_digest: bytes | None = None) -> FastAPI:
    """The application over one served model; with `key_digest` all but /health needs the bearer key."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.engine.close)

    # No documentation pages: they load scripts from elsewhere. /openapi.json stays.
    app = FastAPI(title="tc-ray", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.served = served
    app.add_middleware(BodyLimit, limit_bytes=served.max_body_bytes)
    if key_digest is not None:
        # Added last, so outermost: without the key no body is read.
        app.add_middleware(BearerAuth, key_digest=key_digest)
    _add_error_handlers(app)

    async def answer(body: CompletionRequest | ChatRequest, shape: CompletionShape) -> Any:
        with_usage = body.wants_usage()
        listener = Listener(served.engine, await served.request(body))
        if body.stream:
            return EventStream(_server_sent(listener, shape, with_usage), listener)
        return shape.whole(*await listener.result())

    @app.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest) -> Any:
        return await answer(body, CompletionShape(served.name))

    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest) -> Any:
        return await answer(body, ChatShape(served.name))

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        return ModelList(data=[served.card()])

    @app.get("/v1/models/{name:path}", response_model=ModelCard)
    async def model(name: str) -> ModelCard:
        served.check_name(name)
        return served.card()

    @app.get("/health", response_model=Health)
    async def health() -> Response:
        reason = served.engine.unhealthy()
        state = Health(status="unhealthy" if reason else "ok", reason=reason)
        return JSONResponse(state.model_dump(), 503 if reason else 200)

    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Every error of the framework in OpenAI's envelope, a malformed body as 400."""

    def answer(error: RequestError) -> Response:
        return JSONResponse(error.envelope(), error.status, error.headers)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return answer(from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        response = answer(RequestError(f"{error.detail}.", status=error.status_code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return answer(RequestError("The server failed.", status=500, code="internal_error"))
